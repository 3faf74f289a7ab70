"""Which rows of a step were evicted in an earlier one, and what they read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from cake_vllm.integration.messages import Redirected, StepPlan
from cake_vllm.integration.worker.attention import STEP, Rows, StepWork
from cake_vllm.integration.worker.graphs import MISPLACED
from cake_vllm.integration.worker.layers import Batch, Layers, tails
from cake_vllm.kernels import EvictedRows


@dataclass(frozen=True)
class _Found:
    """The evicted rows of a batch.

    Attributes:
        redirected: by kind of owner.
        index: where their queries are, see :class:`StepWork`.
        stock_lens: ``[R]``, lengths for the stock call; ``None``: nothing is left for it.
    """

    redirected: list[Rows]
    index: tuple[torch.Tensor, torch.Tensor] | None
    stock_lens: torch.Tensor | None


class Reading:
    """Redirects evicted rows to the pages that ``rows`` lists.

    Args:
        layers: of this worker.
        rows: by whether the owners are KV heads.
        more_drafted: tokens that a row's first pass through the model that drafts has beside the step's.
    """

    def __init__(self, layers: Layers, rows: Mapping[bool, EvictedRows], more_drafted: int):
        self.layers, self.rows = layers, rows
        self._more_drafted = more_drafted
        #: What the scheduler says is in the batch.
        self.expected: Mapping[bool, Redirected] = {}
        for layer in layers.drafts:
            layer.impl.work_of_pass = self._work_of_pass

    def begin(self, plan: StepPlan) -> None:
        """Takes over what changed since the last step."""
        self.expected = plan.redirected
        for rows in self.rows.values():
            for req_id in plan.released:
                rows.discard(req_id)
            if plan.grown:
                rows.append(plan.grown)

    def evicted(self, plan: StepPlan, known: Iterable[str]) -> set[str]:
        """Those of the ``known`` requests whose rows are redirected in a step that is being set up."""
        return {name for name in known for rows in self.rows.values() if name in rows}.difference(plan.released)

    def redirect(self, batch: Batch, observe: Callable[[int, torch.Tensor], None] | None) -> None:
        """Hangs a step's work on the metadata of the layers.

        Args:
            batch: of the step.
            observe: see :class:`StepWork`.

        Raises:
            RuntimeError: (from the device) if an evicted row is not found; it would read blocks that are not its own.
        """
        found = self._find(self.expected, batch.first, batch.tails)
        done = set()
        for layer, metadata in zip(self.layers.redirected, batch.metadata, strict=True):
            if id(metadata) in done:
                continue
            done.add(id(metadata))
            stock = None if found.redirected else metadata
            if found.stock_lens is not None:
                stock = layer.with_lengths(metadata, found.stock_lens)
            setattr(metadata, STEP, StepWork(self.layers.grid, stock, found.redirected, found.index, observe))

    def _work_of_pass(self, metadata: Any) -> StepWork | None:
        """A pass of the model that drafts: rows that were evicted before this step read pages of their own.

        Its first pass has the step's tokens, each later one a token for each row; their metadata is not shown to a
        connector, and may be one object for all of them. A pass's forward context is its own.
        """
        if not self.expected:
            return None
        known = get_forward_context().additional_kwargs
        if STEP not in known:
            more = self._more_drafted if metadata.max_query_len > 1 else 0
            expected = {
                by_head: Redirected(count.num_rows, count.num_tokens + more * count.num_rows, count.longest + more)
                if metadata.max_query_len > 1
                else Redirected(count.num_rows, count.num_rows, 1)
                for by_head, count in self.expected.items()
            }
            found = self._find(expected, metadata, tails(metadata, self.layers.grid))
            lengths, layer = found.stock_lens, self.layers.drafts[0]
            stock = None if lengths is None else layer.with_lengths(metadata, lengths)
            known[STEP] = StepWork(self.layers.whole, stock, found.redirected, found.index, None)
        return known[STEP]

    def _find(self, expected: Mapping[bool, Redirected], metadata: Any, row_tails: torch.Tensor) -> _Found:
        seq_lens, starts = metadata.seq_lens, metadata.query_start_loc
        found, places, elsewhere = [], [], torch.zeros_like(seq_lens, dtype=torch.bool)
        for by_head, count in expected.items():
            slots = find_slots(self.rows[by_head], count, row_tails)
            is_here = slots > 0
            elsewhere |= is_here
            rows, place = self._sequences(by_head, count, slots, is_here, seq_lens, starts)
            found.append(rows)
            places += [place] if place is not None else []
        index = None
        if places:
            token, head = torch.cat(places, dim=1)
            index = token, head
        if not found or sum(count.num_rows for count in expected.values()) == len(seq_lens):
            return _Found(found, index, None)
        num_new = (starts[1:] - starts[:-1])[: len(seq_lens)]
        return _Found(found, index, torch.where(elsewhere, num_new, seq_lens).to(seq_lens.dtype))

    def _sequences(
        self,
        by_head: bool,
        count: Redirected,
        slots: torch.Tensor,
        is_here: torch.Tensor,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
    ) -> tuple[Rows, torch.Tensor | None]:
        """Rows of one kind, and ``[2, N]`` tokens and heads of their queries, ``None`` if they are all, in order."""
        device, num_heads = slots.device, self.layers.grid.num_heads
        split = num_heads if by_head else 1
        is_all = count.num_rows == len(seq_lens)
        row = (~is_here).int().argsort(stable=True)[: count.num_rows]
        tables, num_dropped = self.rows[by_head].select(slots[row])
        lengths = (seq_lens[row].view(1, -1, 1) - num_dropped * self.layers.grid.page_size).flatten(1)
        first, num_queries = starts[row], count.num_tokens * split
        token, head = first.unsqueeze(1), torch.arange(num_heads, device=device)
        if count.longest == 1:
            query_start_loc = torch.arange(num_queries + 1, dtype=starts.dtype, device=device)
        else:
            num_new = (starts[row + 1] - first).repeat_interleave(split)
            ends = num_new.cumsum(0)
            query_start_loc = torch.nn.functional.pad(ends, (1, 0)).to(starts.dtype)
            if by_head or not is_all:
                sequence = torch.arange(len(num_new), device=device).repeat_interleave(num_new, output_size=num_queries)
                before = (ends - num_new - first.repeat_interleave(split))[sequence]
                token = (torch.arange(num_queries, device=device) - before).unsqueeze(1)
                if by_head:
                    head = (sequence % split).unsqueeze(1)
        rows = Rows(by_head, tables, lengths.to(seq_lens.dtype), query_start_loc, num_queries, count.longest)
        if is_all and (count.longest == 1 or not by_head):
            return rows, None
        return rows, torch.stack(torch.broadcast_tensors(token.long(), head)).flatten(1)


def find_slots(rows: EvictedRows, count: Redirected, row_tails: torch.Tensor) -> torch.Tensor:
    """``[R]`` slots of the batch's rows of one kind, 0 for the others; there are as many as the scheduler says."""
    slots = rows.find(row_tails)
    torch._assert_async((slots > 0).sum() == count.num_rows, MISPLACED)
    return slots
