"""Columns: where the pages of all layers lie in one buffer, and how private ones are dealt out.

vLLM allocates the KV caches of all layers in one buffer, and a block id stands for a *column*: one page in each layer,
each of ``Hkv`` head pages.

    buffer      layer 0 [ block 0 | block 1 | ... ]  layer 1 [ block 0 | ... ]  ...
    page        base[l] + b * step                   of layer l in block b
    head page   (base[l] + b * step) * Hkv + h       of its KV head h

An *owner* is what keeps a number of tokens of its own: a layer, or one KV head of a layer. A request that was evicted
holds ``P`` private columns, and any owner may use any page of them. Among these, pages have *local* ids: with ``n``
owners ``j * n + o`` is the page of owner ``o`` in the ``j``-th column, its *home* page. Dealing is arithmetic on the
host, hence in NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Grid:
    """The global view of the buffer.

    Attributes:
        pages: ``[N, Hkv, ...]``, every page of every layer, as an attention backend wants its cache.
        base: for each of the ``L`` layers, its page in block 0.
        step: pages from one block to the next.
        num_blocks: block ids.
        group_of: for each layer, which of the groups of layers it belongs to; each has a block table of its own.
    """

    pages: torch.Tensor
    base: tuple[int, ...]
    step: int
    num_blocks: int
    group_of: tuple[int, ...]

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], group_of: Sequence[int]) -> "Grid":
        """From the layers' own caches ``[num_blocks, Hkv, ...]``.

        Raises:
            RuntimeError: if they do not lie on one grid of pages; no layer could use another's.
        """
        first = min(caches, key=lambda cache: cache.storage_offset())
        num_blocks, size, stride = len(first), first[0].numel(), first.stride(0)
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
        shape = (max(base) + (num_blocks - 1) * step + 1, *first.shape[1:])
        pages = first.as_strided(shape, (size, *first.stride()[1:]))
        return cls(pages, base, step, num_blocks, tuple(group_of))

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
    def head_pages(self) -> torch.Tensor:
        """``[N * Hkv, 1, ...]``, a view for sequences of one KV head."""
        return self.pages.view(-1, 1, *self.pages.shape[2:])

    @property
    def cache(self) -> torch.Tensor:
        """``[N * Hkv, E]``, the view of :mod:`cake_vllm.kernels.pages`."""
        return self.pages.view(len(self.pages) * self.num_heads, -1)

    def layer_pages(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """A layer's pages in blocks; any shape, int64."""
        return self.base[layer] + blocks.long() * self.step

    def heads_of(self, pages: torch.Tensor) -> torch.Tensor:
        """``[Hkv, n]`` head pages of ``[n]`` pages."""
        return pages * self.num_heads + torch.arange(self.num_heads, device=pages.device).unsqueeze(1)

    def homes(self, columns: Sequence[Sequence[int]], by_head: bool) -> np.ndarray:
        """``[P, n]`` int64: the home page of each owner in each private column, by local id.

        Args:
            columns: ``[groups][P]`` block ids.
            by_head: whether the owners are KV heads, whose pages are head pages.
        """
        blocks = np.array(columns, dtype=np.int64).reshape(len(columns), -1)
        pages = np.array(self.base) + blocks[list(self.group_of)].T * self.step
        if by_head:
            pages = (pages[..., None] * self.num_heads + np.arange(self.num_heads)).reshape(len(pages), -1)
        return pages


def columns_for(budget: int, block_size: int) -> int:
    """Private columns that suffice however a budget is divided among the owners.

    Owners round up to whole pages: ``n`` of them, with ``n * budget`` tokens in sum, need at most
    ``n * (budget + B - 1) / B`` pages, and a policy may round a count up by one.

    Args:
        budget: mean tokens that an owner keeps.
        block_size: ``B``, tokens in a page.
    """
    return -(-(budget + block_size) // block_size)


def deal(held: np.ndarray, needs: np.ndarray, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals the pages of private columns out, such that tokens can be moved there without a staging buffer.

    An owner keeps the pages that it holds inside the columns, as far as it needs them; who needs more gets pages that
    nobody holds or that others leave over. If owners who need no more than they hold are moved first, every page is
    written to after its last reader is done with it: an owner reads all its tokens before it writes, and writes only
    to pages of its own, to pages nobody holds, and to those that an owner before it left.

    Args:
        held: ``[n, W]`` int64 local ids of pages that each owner may overwrite, -1 where there is none. No page twice.
        needs: ``[n]`` int64, pages that each owner shall have.
        num_columns: pages beyond those of the first so many columns are not dealt, whoever holds them.

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
