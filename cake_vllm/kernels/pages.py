"""Reading and compacting paged KV caches: the torch reference.

A cache is addressed as ``[num_blocks, Hkv, E]``: all ``E = 2 * B * D`` elements that one KV head owns in a block of
``B`` positions. Backends store them in different orders (a CPU kernel may keep keys transposed, or packed in pairs
for matrix units), so the order is a value here, not an assumption: :class:`BlockLayout` maps (slot, channel) to the
element's place in a block.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Strides(NamedTuple):
    """A regular order of ``[B, D]`` elements, in units of elements that lie side by side.

    Side by side, elements move as one number: an index per element takes five times as long on CPUs.

    Attributes:
        unit: elements in a unit.
        offset: place of the first unit.
        slots: ``(size, step)`` of what slots count in, most significant first: an order in tiles has several digits.
            The step is in units.
        channels: the same of channels.
    """

    unit: int
    offset: int
    slots: tuple[tuple[int, int], ...]
    channels: tuple[tuple[int, int], ...]

    def view(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[n, Hkv, *slot digits, *channel digits]`` integers, each a unit, of ``[n, Hkv, E]`` elements."""
        units = blocks.view(INTEGERS[self.unit * blocks.element_size()])
        sizes, steps = zip(*self.slots, *self.channels, strict=True)
        offset = units.storage_offset() + self.offset
        return units.as_strided((*units.shape[:2], *sizes), (*units.stride()[:2], *steps), offset)

    def digits(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Slot numbers as indices of the slot digits."""
        digits: list[torch.Tensor] = []
        for size, _ in reversed(self.slots):
            digits.insert(0, slots % size)
            slots = slots // size
        return digits


@lru_cache
def find_strides(index: torch.Tensor, largest: int) -> Strides | None:
    """The regular order that ``[B, D]`` places follow, in units of at most ``largest``; ``None``: they do not."""
    places = index.cpu()
    offset, unit = int(places[0, 0]), 1
    slots, channels = _digits((places[:, 0] - offset).tolist()), _digits((places[0] - offset).tolist())
    found = places[0, 0]
    for size, step in slots + channels:
        found = found.unsqueeze(-1) + torch.arange(size) * step
    if not torch.equal(found.flatten(), places.flatten()):
        return None
    if channels and channels[-1][1] == 1:
        run = channels.pop()[0]
        unit = math.gcd(largest, run, offset, *(step for _, step in slots + channels))
        channels.append((run // unit, unit))
    in_units = [tuple((size, step // unit) for size, step in digits) for digits in (slots, channels)]
    return Strides(unit, offset // unit, *in_units)


def _digits(numbers: list[int]) -> list[tuple[int, int]]:
    """Sizes and steps, most significant first, such that counting in them gives ``numbers``, if anything does."""
    digits: list[tuple[int, int]] = []
    count = 1
    while count < len(numbers):
        step = numbers[count]
        multiples = enumerate(numbers[::count])
        size = next((times for times, number in multiples if number != times * step), len(numbers) // count)
        digits.insert(0, (size, step))
        count *= size
    return digits


@dataclass(frozen=True)
class BlockLayout:
    """Where keys and values lie among the elements that a KV head owns in a block.

    Attributes:
        key_index: ``[B, D]`` int64, place of each channel of each slot's key in ``[0, E)``.
        value_index: the same for values; disjoint from ``key_index``.
    """

    key_index: torch.Tensor
    value_index: torch.Tensor

    @property
    def block_size(self) -> int:
        """``B``, positions in a block."""
        return self.key_index.shape[0]

    def read_keys(self, cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Keys of the first ``num_tokens`` positions of a block row.

        Args:
            cache: ``[num_blocks, Hkv, E]``.
            blocks: ``[>= ceil(num_tokens / B)]`` int64 block ids in position order.
            num_tokens: positions to read.

        Returns:
            ``[Hkv, num_tokens, D]``, a copy in the cache's dtype.
        """
        return self._read(self.key_index, cache, blocks, num_tokens)

    def read_values(self, cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values of the same positions; see :meth:`read_keys`."""
        return self._read(self.value_index, cache, blocks, num_tokens)

    def _read(self, index: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        used = -(-num_tokens // self.block_size)
        pages = cache.index_select(0, blocks[:used])
        strides = find_strides(index, 8 // cache.element_size())
        if strides is None:
            return pages[:, :, index].transpose(0, 1).flatten(1, 2)[:, :num_tokens]
        found = strides.view(pages).transpose(0, 1)
        found = found.reshape(len(found), used * self.block_size, -1).contiguous()
        return found.view(cache.dtype)[:, :num_tokens]

    def compact(self, cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor, pages: torch.Tensor) -> None:
        """Copies kept positions into whole pages, **in place** in ``cache``.

        Everything is read before anything is written, so ``pages`` may be among ``blocks``.

        Args:
            cache: ``[num_blocks, Hkv, E]``, modified.
            blocks: ``[n]`` int64 block ids of the request's row, in position order.
            positions: ``[Hkv, P * B]`` int64 positions to keep, each in ``[0, n * B)``.
            pages: ``[P]`` int64 ids of the blocks that receive them, without repetition.
        """
        num_kv_heads, num_kept = positions.shape
        if num_kept != len(pages) * self.block_size:
            raise ValueError(f"{num_kept} positions do not fill {len(pages)} pages of {self.block_size}")
        if not len(pages):
            return
        block_of, slot = blocks[positions // self.block_size], positions % self.block_size
        head = torch.arange(num_kv_heads, device=cache.device).unsqueeze(1)
        filled = torch.empty(len(pages), num_kv_heads, cache.shape[-1], dtype=cache.dtype, device=cache.device)
        for index in (self.key_index, self.value_index):
            strides = find_strides(index, 8 // cache.element_size())
            if strides is None:
                kept = cache[block_of.unsqueeze(-1), head.unsqueeze(-1), index[slot]]
                filled[:, :, index] = kept.unflatten(1, (len(pages), self.block_size)).transpose(0, 1)
            else:
                kept = strides.view(cache)[(block_of, head, *strides.digits(slot))]
                goal = strides.view(filled).transpose(0, 1)
                goal.copy_(kept.view(goal.shape))
        cache.index_copy_(0, pages, filled)
