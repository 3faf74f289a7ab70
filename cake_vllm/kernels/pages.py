"""Reading and moving tokens in paged KV caches: the torch reference.

A cache is addressed as ``[N, E]`` *head pages*: all ``E = 2 * B * D`` elements that one KV head owns in one page of
``B`` positions. Backends store them in different orders (a CPU kernel may keep keys transposed, or packed in pairs
for matrix units), so the order is a value here, not an assumption: :class:`BlockLayout` maps (slot, channel) to the
element's place in a head page.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
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

    def view(self, pages: torch.Tensor) -> torch.Tensor:
        """``[n, *slot digits, *channel digits]`` integers, each a unit, of ``[n, E]`` elements."""
        units = pages.view(INTEGERS[self.unit * pages.element_size()])
        sizes, steps = zip(*self.slots, *self.channels, strict=True)
        offset = units.storage_offset() + self.offset
        return units.as_strided((len(units), *sizes), (units.stride(0), *steps), offset)

    def digits(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Slot numbers as indices of the slot digits."""
        digits: list[torch.Tensor] = []
        for size, _ in reversed(self.slots):
            digits.insert(0, slots % size)
            slots = slots // size
        return digits


@lru_cache
def find_span(index: torch.Tensor) -> tuple[slice, torch.Tensor]:
    """The elements that ``[B, D]`` places lie among, and the places counted from there: one kind's half of a page."""
    first = int(index.min())
    return slice(first, int(index.max()) + 1), index - first


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
    """Where keys and values lie among the elements of a head page.

    Attributes:
        key_index: ``[B, D]`` int64, place of each channel of each slot's key in ``[0, E)``.
        value_index: the same for values; disjoint from ``key_index``, or part of it where values are part of keys.
    """

    key_index: torch.Tensor
    value_index: torch.Tensor

    @property
    def block_size(self) -> int:
        """``B``, positions in a page."""
        return self.key_index.shape[0]

    @cached_property
    def _moved(self) -> tuple[torch.Tensor, ...]:
        """Whatever a token has in its page, once."""
        is_part = torch.isin(self.value_index.cpu(), self.key_index.cpu()).all()
        return (self.key_index,) if is_part else (self.key_index, self.value_index)

    def read_keys(self, cache: torch.Tensor, table: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Keys of the first ``num_tokens`` positions of each KV head.

        Args:
            cache: ``[N, E]`` head pages.
            table: ``[Hkv, >= ceil(num_tokens / B)]`` int64 head page ids in position order.
            num_tokens: positions to read.

        Returns:
            ``[Hkv, num_tokens, D]``, a copy in the cache's dtype.
        """
        return self._read(self.key_index, cache, table, num_tokens)

    def read_values(self, cache: torch.Tensor, table: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values of the same positions; see :meth:`read_keys`."""
        return self._read(self.value_index, cache, table, num_tokens)

    def _read(self, index: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, num_tokens: int) -> torch.Tensor:
        used = -(-num_tokens // self.block_size)
        among, index = find_span(index)
        pages = cache[:, among].index_select(0, table[:, :used].flatten())
        strides = find_strides(index, 8 // cache.element_size())
        if strides is None:
            found = pages[:, index]
        else:
            found = strides.view(pages).reshape(len(pages), self.block_size, -1).view(cache.dtype)
        return found.reshape(len(table), used * self.block_size, -1)[:, :num_tokens]

    def move(self, cache: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, target: torch.Tensor) -> None:
        """Copies tokens into whole pages, **in place** in ``cache``.

        Everything is read before anything is written, so ``target`` may be among ``pages``.

        Args:
            cache: ``[N, E]`` head pages, modified.
            pages: ``[P * B]`` int64, the head page that each token lies in.
            slots: ``[P * B]`` int64, its place there, in ``[0, B)``.
            target: ``[P]`` int64 head pages that receive the tokens in order, without repetition.

        Raises:
            ValueError: if the tokens do not fill the pages.
        """
        if len(pages) != len(target) * self.block_size:
            raise ValueError(f"{len(pages)} tokens do not fill {len(target)} pages of {self.block_size}")
        if not len(target):
            return
        filled = torch.empty(len(target), cache.shape[-1], dtype=cache.dtype, device=cache.device)
        for index in self._moved:
            strides = find_strides(index, 8 // cache.element_size())
            if strides is None:
                kept = cache[pages.unsqueeze(-1), index[slots]]
                filled[:, index] = kept.unflatten(0, (len(target), self.block_size))
            else:
                goal = strides.view(filled)
                goal.copy_(strides.view(cache)[(pages, *strides.digits(slots))].view(goal.shape))
        cache.index_copy_(0, target, filled)
