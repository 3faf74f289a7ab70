"""Block tables of requests whose prompt has been evicted, for all layers and rows at once.

vLLM goes on describing an evicted request by its logical row: one entry per ``B`` positions, as if nothing had
happened. What a layer really reads is

    [ private pages 0 .. k ) [ entries of the logical row from `start` on )
    length = logical length - (start - k) * B

where ``k`` pages hold what the layer kept of the first ``start`` blocks. A layer that kept everything, and every
request that was not evicted, has ``k = start = 0``: its row is the logical row.
"""

from typing import Any

import torch


def to_device(numbers: Any, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of (lists of) numbers, without waiting for the device."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    return on_host.to(device, non_blocking=True)


class EvictedRows:
    """What each evicted request keeps in each layer, by slot. Slot 0 stands for "not evicted".

    The tables grow by doubling. Not thread-safe; owned by one worker.
    """

    def __init__(self, num_layers: int, block_size: int, device: torch.device | str):
        self.block_size = block_size
        #: Whether numbers can be looked at without waiting for a device.
        self.is_on_host = torch.device(device).type == "cpu"
        self._pages = torch.zeros(2, num_layers, 1, dtype=torch.int32, device=device)
        self._num_pages = torch.zeros(2, num_layers, dtype=torch.int32, device=device)
        self._start = torch.zeros(2, num_layers, dtype=torch.int32, device=device)
        self._slots: dict[str, int] = {}
        self._free = [1]

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, req_id: str) -> int:
        """Slot of a request; 0 if it was not evicted."""
        return self._slots.get(req_id, 0)

    def store(self, req_id: str, pages: list[list[int]], start: list[int]) -> None:
        """Records what an evicted request reads.

        Args:
            req_id: must not be stored already.
            pages: private page ids of each layer, empty where the layer kept everything.
            start: first entry of the logical row that each layer still reads.
        """
        if req_id in self._slots:
            raise ValueError(f"request {req_id} is already evicted")
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        longest = max(len(layer) for layer in pages)
        while self._pages.shape[2] < longest:
            self._pages = torch.cat([self._pages, torch.zeros_like(self._pages)], dim=2)
        width = self._pages.shape[2]
        padded = [layer + [0] * (width - len(layer)) for layer in pages]
        for table, numbers in (
            (self._pages, padded),
            (self._num_pages, [len(layer) for layer in pages]),
            (self._start, start),
        ):
            table[slot] = to_device(numbers, torch.int32, table.device)
        self._slots[req_id] = slot

    def discard(self, req_id: str) -> None:
        """Forgets a request, if it is known."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)

    def compose(
        self, tables: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention kernel reads.

        Args:
            tables: ``[L, R, C]`` int32, the logical rows of all layers.
            seq_lens: ``[R]`` int32, the logical lengths.
            slots: ``[R]`` int64, from :meth:`slot`.

        Returns:
            ``[L, R, C']`` int32 tables and ``[L, R]`` int32 lengths, contiguous. ``C'`` is ``C``, or on CPUs, where it
            can be seen without waiting, what the longest row needs. Entries beyond a row's length are arbitrary but
            valid block ids.
        """
        num_pages = self._num_pages[slots].T.unsqueeze(-1)
        start = self._start[slots].T.unsqueeze(-1)
        lengths = seq_lens - (start - num_pages).squeeze(-1) * self.block_size
        num_columns = last = tables.shape[-1]
        if self.is_on_host:
            num_columns = -(-int(lengths.max()) // self.block_size)
        column = torch.arange(num_columns, dtype=torch.int32, device=tables.device)
        source = (column - num_pages + start).clamp_(0, last - 1)
        composed = tables.gather(2, source.long())
        width = min(self._pages.shape[2], num_columns)
        private = self._pages[slots, :, :width].transpose(0, 1)
        composed[..., :width] = torch.where(column[:width] < num_pages, private, composed[..., :width])
        # Kernels read rows of both by pointer.
        return composed.contiguous(), lengths.to(seq_lens.dtype).contiguous()

    def _grow_slots(self) -> None:
        count = len(self._num_pages)
        self._pages = torch.cat([self._pages, torch.zeros_like(self._pages)])
        self._num_pages = torch.cat([self._num_pages, torch.zeros_like(self._num_pages)])
        self._start = torch.cat([self._start, torch.zeros_like(self._start)])
        self._free.extend(range(count, 2 * count))
