"""Columns: where the pages of all layers lie in one buffer, and how private ones are dealt out.

vLLM allocates the KV caches of all layers in one buffer, and a block id of ``B`` tokens stands for a *column*: one
block in each layer. The kernels read blocks in ``r`` *slices* of ``p = B / r`` tokens, so that a layer has a page in
each slice, of ``Hkv`` head pages:

    buffer      layer 0 [ block 0             | block 1             | ... ]  layer 1 [ block 0 | ... ]  ...
    slice s     b * r + j    of block b       [ b * r | ... | b * r + r - 1 ]
    page        base[l] + s * step            of layer l in slice s: [ head page | ... | head page ]
    head page   (base[l] + s * step) * Hkv + h     of its KV head h, p tokens

Blocks are what the pool lends, pages what is dealt out. Where blocks are small both are the same (``r`` = 1).

An *owner* is what keeps a number of tokens of its own: a layer, or one KV head of a layer. A request that was evicted
holds ``P`` private columns, and any owner may use any page of them. Among these, pages have *local* ids: with ``n``
owners ``j * n + o`` is the page of owner ``o`` in the ``j``-th slice of the columns, its *home* page:

    columns       7               |  3               |       r = 2, n = 3 owners
    slices        14     |  15    |  6      |  7     |
    local ids     0 1 2  |  3 4 5 |  6 7 8  |  9 ..  |       owner 1 is at home in 1, 4, 7, 10

Dealing is arithmetic on the host, hence in NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Grid:
    """The global view of the buffer.

    Attributes:
        pages: ``[N, Hkv, p, ...]``, every page of every layer, as an attention backend wants its cache.
        base: for each of the ``L`` layers, its page in slice 0.
        step: pages from one slice to the next.
        num_blocks: block ids.
        group_of: for each layer, which of the groups of layers it belongs to; each has a block table of its own.
        per_block: ``r``, slices of a block.
    """

    pages: torch.Tensor
    base: tuple[int, ...]
    step: int
    num_blocks: int
    group_of: tuple[int, ...]
    per_block: int = 1

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], group_of: Sequence[int], per_block: int = 1) -> "Grid":
        """From the layers' own caches ``[num_blocks * r, Hkv, p, ...]``.

        Raises:
            RuntimeError: if they do not lie on one grid of pages; no layer could use another's.
        """
        first = min(caches, key=lambda cache: cache.storage_offset())
        num_slices, size, stride = len(first), first[0].numel(), first.stride(0)
        offsets = [cache.storage_offset() - first.storage_offset() for cache in caches]
        buffer = first.untyped_storage().data_ptr()
        fits = (
            first[0].is_contiguous()
            and all(cache.untyped_storage().data_ptr() == buffer for cache in caches)
            and all((cache.shape, cache.stride()) == (first.shape, first.stride()) for cache in caches)
            and not any(distance % size for distance in (stride, *offsets))
        )
        if not fits:
            raise RuntimeError("--kv-eviction needs the KV caches of all layers in one buffer of equal pages")
        base, step = tuple(offset // size for offset in offsets), stride // size
        shape = (max(base) + (num_slices - 1) * step + 1, *first.shape[1:])
        pages = first.as_strided(shape, (size, *first.stride()[1:]))
        return cls(pages, base, step, num_slices // per_block, tuple(group_of), per_block)

    def part(self, layers: slice) -> "Grid":
        """Some of the layers, over the same buffer."""
        return replace(self, base=self.base[layers], group_of=self.group_of[layers])

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.base)

    @property
    def num_heads(self) -> int:
        """``Hkv``."""
        return self.pages.shape[1]

    @property
    def page_size(self) -> int:
        """``p``, tokens in a page."""
        return self.pages.shape[2]

    @property
    def block_size(self) -> int:
        """``B``, tokens in a block."""
        return self.page_size * self.per_block

    @property
    def head_pages(self) -> torch.Tensor:
        """``[N * Hkv, 1, ...]``, a view for sequences of one KV head."""
        return self.pages.view(-1, 1, *self.pages.shape[2:])

    @property
    def cache(self) -> torch.Tensor:
        """``[N * Hkv, E]``, the view of :mod:`cake_vllm.kernels.pages`."""
        return self.pages.view(len(self.pages) * self.num_heads, -1)

    def slices(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[..., n * r]`` slices of ``[..., n]`` blocks, in order."""
        return (blocks.unsqueeze(-1) * self.per_block + torch.arange(self.per_block, device=blocks.device)).flatten(-2)

    def layer_pages(self, layer: int, slices: torch.Tensor) -> torch.Tensor:
        """A layer's pages in slices; any shape, int64."""
        return self.base[layer] + slices.long() * self.step

    def heads_of(self, pages: torch.Tensor) -> torch.Tensor:
        """``[Hkv, n]`` head pages of ``[n]`` pages."""
        return pages * self.num_heads + torch.arange(self.num_heads, device=pages.device).unsqueeze(1)

    def homes(self, columns: Sequence[Sequence[int]], by_head: bool) -> np.ndarray:
        """``[P * r, n]`` int64: the home page of each owner in each slice of private columns, by local id.

        Args:
            columns: ``[groups][P]`` block ids.
            by_head: whether the owners are KV heads, whose pages are head pages.
        """
        blocks = np.array(columns, dtype=np.int64).reshape(len(columns), -1, 1)
        slices = (blocks * self.per_block + np.arange(self.per_block)).reshape(len(columns), -1)
        pages = np.array(self.base) + slices[list(self.group_of)].T * self.step
        if by_head:
            pages = (pages[..., None] * self.num_heads + np.arange(self.num_heads)).reshape(len(pages), -1)
        return pages


def page_of(block_size: int, kernel_block_size: int) -> int:
    """Tokens of a page: of the smallest block that kernels take, where that divides a block, else of the block."""
    return block_size if block_size % kernel_block_size else kernel_block_size


def columns_for(budget: int, block_size: int, page_size: int) -> int:
    """Private columns that suffice however a budget is divided among the owners.

    Owners round up to whole pages: ``n`` of them, with ``n * budget`` tokens in sum, need at most
    ``n * (budget + p - 1) / p`` pages, and a policy may round a count up by one. The request rounds up to whole
    columns, of ``n * B / p`` pages.

    Args:
        budget: mean tokens that an owner keeps.
        block_size: ``B``, tokens in a column.
        page_size: ``p``, tokens in a page.
    """
    return -(-(budget + page_size) // block_size)


def budget_for(num_columns: int, block_size: int, page_size: int) -> int:
    """The largest budget for which so many columns suffice; see :func:`columns_for`."""
    return num_columns * block_size - page_size


def deal(held: np.ndarray, needs: np.ndarray, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals the pages of private columns out, such that tokens can be moved there without a staging buffer.

    An owner keeps the pages that it holds inside the columns, as far as it needs them; who needs more gets pages that
    nobody holds or that others leave over. If owners who need no more than they hold are moved first, every page is
    written to after its last reader is done with it: an owner reads all its tokens before it writes, and writes only
    to pages of its own, to pages nobody holds, and to those that an owner before it left.

    Args:
        held: ``[n, W]`` int64 local ids of pages that each owner may overwrite, -1 where there is none. No page twice.
        needs: ``[n]`` int64, pages that each owner shall have.
        num_columns: pages beyond those of the first so many are not dealt, whoever holds them; columns of one page for
            each owner, so that a slice is one.

    Returns:
        ``[n, max(needs)]`` int64 local ids, -1 beyond an owner's, and ``[n]`` bool, the owners to be moved last.

    Raises:
        ValueError: if there are not enough pages.
    """
    num_owners, width = len(needs), int(needs.max())
    inside = (held >= 0) & (held < num_columns * num_owners)
    held, num_held = np.take_along_axis(held, np.argsort(~inside, axis=1, kind="stable"), axis=1), inside.sum(axis=1)
    place = np.arange(max(width, held.shape[1]))
    dealt = np.full((num_owners, len(place)), -1)
    dealt[:, : held.shape[1]] = held
    kept = place < np.minimum(num_held, needs)[:, None]
    dealt[~kept] = -1
    is_free = np.ones(num_columns * num_owners, dtype=bool)
    is_free[dealt[kept]] = False
    free = is_free.nonzero()[0]
    missing = (place >= num_held[:, None]) & (place < needs[:, None])
    num_missing = int(missing.sum())
    if num_missing > len(free):
        raise ValueError(f"{num_columns} columns of {num_owners} pages are too few: {num_missing - len(free)} missing")
    dealt[missing] = free[:num_missing]
    return dealt[:, :width], needs > num_held
