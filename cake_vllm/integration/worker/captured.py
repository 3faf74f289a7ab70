"""Decode steps of evicted rows as full CUDA graphs have them: what is read lies in buffers that stay where they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from cake_vllm.integration.messages import StepPlan
from cake_vllm.integration.worker.attention import RedirectedImpl, Rows, StepWork
from cake_vllm.integration.worker.layers import Batch, Layers
from cake_vllm.integration.worker.reading import find_slots
from cake_vllm.kernels import EvictedRows

#: Bytes that the tables of captured steps may take.
MOST_BYTES = 128 * 2**20


class ReplayedRows:
    """What the evicted rows of a captured decode step read: one query for each of ``R`` rows, evicted or not.

    Attributes:
        by_head: whether the owners are KV heads (``H`` of them) or layers (``H`` = 1).
        tables: ``[L, R * H, C]`` int32.
        lengths: ``[L, R * H]`` int32; 1 where nothing was evicted.
        is_here: ``[R]`` bool, which rows were evicted.
        stock_lens: ``[R]`` int32, lengths for the stock call; 1 where a row was evicted.
        starts: ``[R * H + 1]`` int32, ascending by one.
    """

    def __init__(self, by_head: bool, num_layers: int, num_rows: int, num_heads: int, width: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.by_head, self.num_heads = by_head, num_heads
        width = min(width, max(MOST_BYTES // (4 * num_layers * num_rows * num_heads), 1))
        self.tables = zeros(num_layers, num_rows * num_heads, width)
        self.lengths = zeros(num_layers, num_rows * num_heads)
        self.is_here, self.stock_lens = zeros(num_rows, dtype=torch.bool), zeros(num_rows)
        self.starts = torch.arange(num_rows * num_heads + 1, dtype=torch.int32, device=device)

    def fill(self, rows: EvictedRows, slots: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> None:
        """Writes a step's rows, ``[n]`` slots and logical lengths; what lies behind them is not read."""
        num_rows, num_owners = len(slots), len(slots) * self.num_heads
        is_here = slots > 0
        tables, num_dropped = rows.select(slots)
        lengths = torch.where(is_here.unsqueeze(1), seq_lens.view(1, -1, 1) - num_dropped * page_size, 1)
        self.tables[:, :num_owners, : tables.shape[2]] = tables
        self.lengths[:, :num_owners] = lengths.flatten(1)
        self.is_here[:num_rows] = is_here
        self.stock_lens[:num_rows] = torch.where(is_here, 1, seq_lens)


class CapturedSteps:
    """Captures decode steps over one set of buffers, and fills it before each is replayed.

    Args:
        layers: of this worker.
        rows: by whether the owners are KV heads.
        by_head: the kind of owners whose steps are captured.
        most_rows: rows of the largest captured step.
        most_pages: of the longest row.
    """

    def __init__(
        self, layers: Layers, rows: Mapping[bool, EvictedRows], by_head: bool, most_rows: int, most_pages: int
    ):
        self.layers, self._rows, self.by_head = layers, rows[by_head], by_head
        self._most_rows, self._most_pages = most_rows, most_pages

    def fits(self, plan: StepPlan) -> bool:
        """Whether a decode step with these rows can run as it was captured."""
        growth = max((len(of_groups[0]) for of_groups in plan.grown.values()), default=0)
        is_narrow = self._rows.width + growth * self.layers.grid.per_block <= self.buffers.tables.shape[2]
        return not plan.observations and set(plan.redirected) == {self.by_head} and is_narrow

    def fill(self, plan: StepPlan, batch: Batch) -> None:
        """Fills the buffers that a captured step reads; called before it runs."""
        slots = find_slots(self._rows, plan.redirected[self.by_head], batch.tails)
        self.buffers.fill(self._rows, slots, batch.first.seq_lens, self.layers.grid.page_size)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Every decode step that runs meanwhile reads the buffers that :meth:`fill` fills."""
        RedirectedImpl.captured_step = self.work
        try:
            yield
        finally:
            RedirectedImpl.captured_step = None

    @cached_property
    def buffers(self) -> ReplayedRows:
        """Made when the first step is captured."""
        grid, num_heads = self.layers.whole, self.layers.grid.num_heads if self.by_head else 1
        shape = grid.num_layers, self._most_rows, num_heads, self._most_pages
        return ReplayedRows(self.by_head, *shape, grid.pages.device)

    def work(self, metadata: Any) -> StepWork:
        """A captured step's work."""
        rows, num_rows = self.buffers, len(metadata.seq_lens)
        num_owners = num_rows * rows.num_heads
        stock = self.layers.target[0].with_lengths(metadata, rows.stock_lens[:num_rows])
        tables, lengths = rows.tables[:, :num_owners], rows.lengths[:, :num_owners]
        evicted = Rows(rows.by_head, tables, lengths, rows.starts[: num_owners + 1], num_owners, 1)
        return StepWork(self.layers.grid, stock, [evicted], None, None, rows.is_here[:num_rows])
