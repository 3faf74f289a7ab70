"""What evicted requests hold in private columns, and how tokens come there.

An eviction goes through three steps: what every owner *reads* now; how many pages it shall have, and which
(:func:`cake_vllm.kernels.deal`); and moving what it keeps there, in an order in which nobody writes to a page whose
owner still has to read it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cake_vllm.integration.messages import Blocks, Counts
from cake_vllm.kernels import BlockLayout, Grid, deal, to_device
from cake_vllm.policies import PagedPrompt


@dataclass(frozen=True)
class Held:
    """What an evicted request reads in place of the first blocks of its row.

    Owners are layers, or the KV heads of all layers, layer by layer; there are ``n``.

    Attributes:
        by_head: whether the owners are KV heads.
        start: full blocks of the row that the pages stand for.
        pages: ``[n, W]`` int64, the pages (head pages by head) dealt to each owner, those in use first.
        dealt: ``[n]`` int64, how many these are.
        used: ``[n]`` int64, how many of them hold tokens.
        num_columns: the private columns that they lie in.
        counts: ``[L][H]`` candidates that the policy gave each owner.
        drafted: block ids that draft layers read in place of the row's first ones, in position order.
    """

    by_head: bool
    start: int
    pages: np.ndarray
    dealt: np.ndarray
    used: np.ndarray
    num_columns: int
    counts: Counts
    drafted: tuple[int, ...] = ()

    def of_layer(self, layer: int, numbers: np.ndarray) -> np.ndarray:
        """The part of ``[n, ...]`` that belongs to a layer."""
        each = len(self.counts[0])
        return numbers[layer * each : (layer + 1) * each]


@dataclass(frozen=True)
class Reads:
    """What the KV heads of a layer read at some moment, in position order, aligned at the end.

    Attributes:
        table: ``[Hkv, C]`` int64 head pages; 0 before the beginning of a head that has fewer.
        length: tokens of the head with the most; the columns of :attr:`table`, of which the last may be partial.
        tail: how many of them are in the block that is not full yet.
        missing: for each head, pages by which it has fewer.
        page_size: ``p``, tokens in a page.
    """

    table: torch.Tensor
    length: int
    tail: int
    missing: list[int]
    page_size: int

    @property
    def missing_tokens(self) -> list[int]:
        """For each head, tokens by which it has fewer."""
        return [pages * self.page_size for pages in self.missing]

    @property
    def full_len(self) -> int:
        """Tokens of the head with the most that lie in full blocks or private pages; whole pages of them."""
        return self.length - self.tail

    def paged(self, num_kept: int) -> PagedPrompt:
        """The same as a prompt, the last ``num_kept`` positions of which always stay."""
        return PagedPrompt(self.length, num_kept, self.page_size, self.tail)

    @property
    def valid(self) -> torch.Tensor | None:
        """``[Hkv, length]`` bool, where there is something; ``None`` if it is everywhere."""
        if not any(self.missing):
            return None
        first = to_device(self.missing_tokens, torch.int64, self.table.device).unsqueeze(1)
        return torch.arange(self.length, device=self.table.device) >= first


def read(grid: Grid, layer: int, held: Held | None, rows: Sequence[torch.Tensor], end: int) -> Reads:
    """What a layer of a request reads at logical length ``end``, given the slices of its row, ``[groups][C]``."""
    start, size = (held.start if held else 0) * grid.per_block, grid.page_size
    row = rows[grid.group_of[layer]][start : -(-end // size)]
    table, most, missing = grid.heads_of(grid.layer_pages(layer, row)), 0, [0] * grid.num_heads
    if held is not None:
        used, pages = held.of_layer(layer, held.used).tolist(), held.of_layer(layer, held.pages).tolist()
        most = max(used)
        # [1 or Hkv, most]
        private = [[0] * (most - count) + mine[:count] for count, mine in zip(used, pages, strict=True)]
        ids = to_device(private, torch.int64, table.device).view(len(used), most)
        table = torch.cat([ids if held.by_head else grid.heads_of(ids[0]), table], dim=1)
        if held.by_head:
            missing = [most - count for count in used]
    return Reads(table, end - (start - most) * size, end % grid.block_size, missing, size)


def redeal(
    grid: Grid, held: Held | None, columns: Blocks, by_head: bool, needs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Deals pages of the granted columns to all owners.

    Args:
        grid: the global view.
        held: what they have now.
        columns: ``[groups][P]`` blocks of the grant; those that the request holds come first.
        by_head: whether the owners are KV heads.
        needs: ``[n]`` int64 pages for each.

    Returns:
        ``[n, W]`` int64 pages, the owners to be moved last (``[n]`` bool), and the columns in use, as few as possible.
    """
    homes = grid.homes(columns, by_head)
    num_owners = homes.shape[1]
    # Blocks of the row that are rewritten in place are read by the owners whose homes they are; the pages of blocks
    # from the pool are read by nobody, and may as well be theirs.
    known = held.num_columns * grid.per_block if held else 0
    local = np.arange(homes.size).reshape(homes.shape)[known:].T
    if held is not None:
        local = np.column_stack([_local(held, homes), local])
    num_columns = -(-int(needs.sum()) // (num_owners * grid.per_block))
    dealt, last = deal(local, needs, num_columns * grid.per_block)
    return homes.ravel()[dealt], last, num_columns


def _local(held: Held, homes: np.ndarray) -> np.ndarray:
    """``[n, W]`` local ids of the pages dealt to each owner, -1 where there is none among ``homes``."""
    order = homes.ravel().argsort()
    ids = homes.ravel()[order]
    place = np.searchsorted(ids, held.pages).clip(max=len(ids) - 1)
    known = (ids[place] == held.pages) & (np.arange(held.pages.shape[1]) < held.dealt[:, None])
    return np.where(known, order[place], -1)


def move(
    grid: Grid,
    layout: BlockLayout,
    reads: Sequence[Reads],
    chosen: Sequence[Sequence[torch.Tensor]],
    new: Held,
    last: np.ndarray,
) -> Iterator[list[int]]:
    """Moves what owners keep into their pages; yields the owners that have been moved, a few at a time.

    Args:
        grid: the global view; its buffer is modified.
        layout: order of the elements in a head page.
        reads: of all layers, before.
        chosen: ``[L][Hkv]`` positions that each head keeps, counted in what it reads; whole pages of them.
        new: the pages to move to.
        last: ``[n]`` bool, owners to be moved after the others.
    """
    each, page_size = len(new.counts[0]), grid.page_size
    for is_last in (False, True):
        for layer, (source, positions) in enumerate(zip(reads, chosen, strict=True)):
            owners = [owner for owner in range(layer * each, (layer + 1) * each) if last[owner] == is_last]
            if not owners:
                continue
            heads = [owner - layer * each for owner in owners] if new.by_head else range(grid.num_heads)
            pages = torch.cat([source.table[head][positions[head] // page_size] for head in heads])
            slots = torch.cat([positions[head] for head in heads]) % page_size
            ids = [new.pages[owner, : new.used[owner]] for owner in owners]
            target = to_device(np.concatenate(ids), torch.int64, pages.device)
            layout.move(grid.cache, pages, slots, target if new.by_head else grid.heads_of(target).flatten())
            yield owners


def keep_recent(
    held: Sequence[int], num_new: int, columns: Sequence[int]
) -> tuple[tuple[int, ...], list[int], list[int]]:
    """What draft layers go on reading: the first block, a sink for attention, and as many of the last as there is room.

    Args:
        held: block ids whose pages they read in place of the row's first blocks, in position order.
        num_new: full blocks of the row behind these.
        columns: private columns of the request; in each there is a block for every draft layer.

    Returns:
        Block ids to read from now on, in position order; which blocks have to be copied for that, as indices into
        ``held`` and the row behind it; and the block that each is copied to.
    """
    num_blocks = len(held) + num_new
    most = min(len(columns), num_blocks)
    kept = list(range(num_blocks - most, num_blocks))
    if most > 1:
        kept[0] = 0
    stays = {held[index] for index in kept if index < len(held)} & set(columns)
    free = iter([block for block in columns if block not in stays])
    read, sources, targets = [], [], []
    for index in kept:
        if index < len(held) and held[index] in stays:
            read.append(held[index])
            continue
        read.append(next(free))
        sources.append(index)
        targets.append(read[-1])
    return tuple(read), sources, targets


def copy_blocks(grid: Grid, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copies all layers' pages of blocks, **in place**; of each layer all is read before anything is written."""
    for layer in range(grid.num_layers):
        slices = map(grid.slices, (sources, targets))
        pages, goal = (grid.heads_of(grid.layer_pages(layer, of_blocks)).flatten() for of_blocks in slices)
        grid.cache.index_copy_(0, goal, grid.cache[pages])
