"""Block tables of evicted requests.

vLLM goes on describing an evicted request by its logical row: one block per ``B`` positions, as if nothing had
happened. What an owner (a layer, or one KV head of a layer) really reads, in pages of ``p`` tokens, is

    [ private pages 0 .. k ) [ its pages in the blocks of the logical row from `start` on, r = B / p of each )
    length = logical length - (start * r - k) * p

where ``k`` pages hold what the owner kept of the first ``start`` blocks. These tables are kept ready, as wide as what
is kept, and written to only where something changes.

Which rows of a batch are evicted is seen from the rows themselves: a request's last position lies in a block that no
other request's last position lies in, and every block that an evicted request can end in is known here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cake_vllm.kernels.columns import Grid


def to_device(numbers: Any, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of numbers, in lists or an array, without waiting for the device."""
    on_host = torch.tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


class EvictedRows:
    """Tables by slot of requests whose owners are layers (``H`` = 1), or KV heads (``H`` = ``Hkv``).

    Slot 0 stands for "not here". The tables grow by doubling. Not thread-safe; owned by one worker.
    """

    def __init__(self, grid: Grid, by_head: bool):
        device = grid.pages.device
        self.grid = grid
        self.num_heads = grid.num_heads if by_head else 1
        self._group_of = torch.tensor(grid.group_of, device=device)
        self._base = torch.tensor(grid.base, device=device).view(-1, 1, 1)
        self._layer = torch.arange(grid.num_layers, device=device).view(-1, 1, 1)
        self._head = torch.arange(self.num_heads, device=device)
        # [L, slots, H, W], [L, slots, H] twice, [num_blocks]
        self._pages = torch.zeros(grid.num_layers, 2, self.num_heads, 1, dtype=torch.int32, device=device)
        self._num_pages = torch.zeros_like(self._pages[..., 0])
        self._num_dropped = torch.zeros_like(self._num_pages)
        self._slot_of_block = torch.zeros(grid.num_blocks, dtype=torch.int32, device=device)
        self._slots: dict[str, int] = {}
        self._free = [1]
        # By slot: private pages of the owner with the most, and slices of the row behind them.
        self._most: dict[int, int] = {}
        self._num_slices: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._slots

    @property
    def num_bytes(self) -> int:
        """Memory of the tables on the device."""
        return sum(table.nbytes for table in (self._pages, self._num_pages, self._num_dropped, self._slot_of_block))

    def store(
        self, req_id: str, pages: np.ndarray, counts: np.ndarray, start: int, tail: Sequence[Sequence[int]]
    ) -> None:
        """Records what a request reads, in place of what was recorded before.

        Args:
            req_id: the request.
            pages: ``[L * H, W]`` int64 private pages, arbitrary but valid beyond an owner's count.
            counts: ``[L * H]`` int64, private pages of each owner.
            start: blocks of the logical row that they stand for.
            tail: ``[groups][n]`` ids of the blocks from there on.
        """
        self.discard(req_id)
        if not self._free:
            self._grow(slots=True)
        slot = self._slots[req_id] = self._free.pop()
        most = self._most[slot] = int(counts.max())
        self._num_slices[slot] = 0
        while self._pages.shape[3] < most:
            self._grow(slots=False)
        shape = (self.grid.num_layers, self.num_heads)
        # One transfer for all three.
        packed = np.column_stack([counts, start * self.grid.per_block - counts, pages[:, :most]])
        found = to_device(packed, torch.int32, self._pages.device).view(*shape, -1)
        self._num_pages[:, slot], self._num_dropped[:, slot] = found[..., 0], found[..., 1]
        self._pages[:, slot, :, :most] = found[..., 2:]
        self.append({req_id: tail})

    def append(self, grown: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Adds blocks to the logical rows of requests; those that are not here are passed over.

        Args:
            grown: by request, ``[groups][n]`` block ids.
        """
        places, blocks, each = [], [], self.grid.per_block
        for req_id, tail in grown.items():
            slot = self._slots.get(req_id)
            if slot is None:
                continue
            for of_groups in zip(*tail, strict=True):
                places.append((slot, self._num_slices[slot]))
                blocks.append(of_groups)
                self._num_slices[slot] += each
            while self._pages.shape[3] < self._most[slot] + self._num_slices[slot]:
                self._grow(slots=False)
        if not places:
            return
        device = self._pages.device
        slots, place = to_device(places, torch.int64, device).T
        ids = to_device(blocks, torch.int64, device).T
        self._slot_of_block[ids[0]] = slots.int()
        if each > 1:
            ids, place = self.grid.slices(ids), (place.unsqueeze(1) + torch.arange(each, device=device)).flatten()
            slots = slots.repeat_interleave(each)
        # [L, n * r, H]
        pages = self._base + ids[self._group_of].unsqueeze(-1) * self.grid.step
        if self.num_heads > 1:
            pages = pages * self.num_heads + self._head
        column = self._num_pages[:, slots] + place.unsqueeze(-1)
        self._pages[self._layer, slots.unsqueeze(-1), self._head, column] = pages.int().expand(column.shape)

    def discard(self, req_id: str) -> None:
        """Forgets a request, if it is known."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self._slot_of_block.masked_fill_(self._slot_of_block == slot, 0)
            del self._most[slot], self._num_slices[slot]
            self._free.append(slot)

    def find(self, tails: torch.Tensor) -> torch.Tensor:
        """``[R]`` int32 slots of rows by the blocks that their last positions lie in; 0 if they are not here."""
        return self._slot_of_block[tails.long()]

    @property
    def width(self) -> int:
        """Pages that the owner with the most reads."""
        return max((self._most[slot] + self._num_slices[slot] for slot in self._slots.values()), default=0)

    def select(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of ``[R]`` slots.

        Returns:
            ``[L, R * H, C]`` int32 pages (head pages if ``H`` > 1), contiguous, ``C`` what the widest request needs;
            beyond what an owner reads they are arbitrary but valid. And ``[L, R, H]`` int32, pages by which an owner's
            length is shorter than the logical one.
        """
        tables = self._pages[..., : self.width].index_select(1, slots)
        return tables.flatten(1, 2), self._num_dropped.index_select(1, slots)

    def _grow(self, slots: bool) -> None:
        if slots:
            count = self._pages.shape[1]
            self._pages, self._num_pages, self._num_dropped = (
                torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
                for tensor in (self._pages, self._num_pages, self._num_dropped)
            )
            self._free.extend(range(count, 2 * count))
        else:
            self._pages = torch.cat([self._pages, torch.zeros_like(self._pages)], dim=3)
