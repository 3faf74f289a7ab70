"""Carries out what was chosen: deals pages of the private columns, moves tokens there, and redirects what is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import Cut, Eviction, Grant, Observation
from cake_vllm.integration.worker.dealing import Held, copy_blocks, keep_recent, move, redeal
from cake_vllm.integration.worker.dividing import Choice
from cake_vllm.integration.worker.layers import Layers
from cake_vllm.kernels import EvictedRows, to_device


class Moving:
    """Moves what requests keep, and knows what they hold since.

    Args:
        config: the engine's.
        layers: of this worker.
        rows: by whether the owners are KV heads, what evicted rows read.

    Attributes:
        held: by request that was evicted.
    """

    def __init__(self, config: KVEvictionConfig, layers: Layers, rows: Mapping[bool, EvictedRows]):
        self.config, self.layers, self.rows = config, layers, rows
        self.held: dict[str, Held] = {}
        self._unsettled: list[Callable[[], None]] = []

    def settle(self) -> None:
        """The step is over: what was evicted is read from now on in its new place."""
        for take_effect in self._unsettled:
            take_effect()
        self._unsettled.clear()

    def forget(self, req_id: str) -> None:
        """A request that finished or was preempted."""
        self.held.pop(req_id, None)

    def evict(self, what: Observation | Cut, choice: Choice, rows: Sequence[torch.Tensor]) -> Eviction:
        """Moves what a request keeps, or leaves it with what it reads if nobody could choose.

        Args:
            what: the request.
            choice: what it keeps; its error is set if that cannot be had.
            rows: ``[groups][C]`` slices of its logical row.
        """
        config, grant, held = what.config or self.config, what.grant, self.held.get(what.req_id)
        assert grant is not None
        grid = self.layers.grid
        num_blocks = what.end // grid.block_size
        each = grid.num_heads if grant.by_head else 1
        counts = choice.counts
        if counts is None:
            candidates = grant.budget - choice.num_kept
            counts = held.counts if held else ((candidates,) * each,) * len(self.layers.target)
        new: Held | None = None
        moved: list[int] = []
        if choice.error is None and choice.chosen is not None:
            try:
                asked = replace(choice, counts=counts)
                new, last = self._deal(config, num_blocks, grant, held, asked)
                layout = self.layers.target[0].layout
                for owners in move(grid, layout, choice.reads, choice.chosen, new, last):
                    moved += owners
            except Exception as error:
                choice.error = error
        is_traded = new is not None and choice.error is None
        drafted, copy = self._draft(held, new if is_traded else None, grant, rows, num_blocks)
        if is_traded:
            assert new is not None
            self.held[what.req_id] = new = replace(new, drafted=drafted)
            pages, used = new.pages, new.used
        else:
            pages, used = self._as_it_is(grant, choice, new, moved)
        self._unsettled.append(partial(self._store, what.req_id, grant, pages, used, num_blocks, drafted, copy))
        kept = used * grid.page_size + what.end % grid.block_size
        return Eviction(
            grant.epoch,
            grant.by_head,
            new.num_columns if new else 0,
            is_traded,
            tuple(map(tuple, kept.reshape(-1, each).tolist())),
            tuple(tuple(count + choice.num_kept for count in layer) for layer in counts),
            failed=choice.error is not None,
        )

    def _deal(
        self, config: KVEvictionConfig, num_blocks: int, grant: Grant, held: Held | None, choice: Choice
    ) -> tuple[Held, np.ndarray]:
        """The pages that owners shall have, and those who have to be moved last."""
        assert choice.chosen is not None
        assert choice.counts is not None
        each, size = len(choice.counts[0]), self.layers.grid.page_size
        used = np.array([len(head) // size for layer in choice.chosen for head in layer[:each]])
        if held is not None and not grant.divides:
            return replace(held, used=used, start=num_blocks), np.zeros_like(used, dtype=bool)
        needs = used
        if config.decode != "off":
            # All that they will ever need: whenever a block has been filled, each takes it in or gives one up.
            needs = np.maximum(used, (np.ravel(choice.counts) + config.policy.protected + size - 1) // size)
        pages, last, num_columns = redeal(self.layers.grid, held, grant.columns, grant.by_head, needs)
        return Held(grant.by_head, num_blocks, pages, needs, used, num_columns, choice.counts), last

    def _as_it_is(
        self, grant: Grant, choice: Choice, new: Held | None, moved: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a request reads whose eviction did not come to its end: some owners may have moved, the others have not.

        Returns:
            ``[n, W]`` int64 pages in place of all full blocks, and ``[n]`` int64, how many of them each owner reads.
        """
        done = set(moved)
        rows: list[list[int]] = []
        for reads in choice.reads:
            full = reads.table[:, : reads.full_len // reads.page_size].tolist()
            heads = [pages[missing:] for pages, missing in zip(full, reads.missing, strict=True)]
            rows += heads if grant.by_head else [[page // self.layers.grid.num_heads for page in heads[0]]]
        if new is not None:
            rows = [
                new.pages[owner, : new.used[owner]].tolist() if owner in done else pages
                for owner, pages in enumerate(rows)
            ]
        used = np.array([len(pages) for pages in rows])
        return np.array([pages + [0] * (used.max() - len(pages)) for pages in rows]), used

    def _draft(
        self, held: Held | None, new: Held | None, grant: Grant, rows: Sequence[torch.Tensor], num_blocks: int
    ) -> tuple[tuple[int, ...], Callable[[], None] | None]:
        """Blocks whose pages draft layers shall read in place of all full ones, and what copies their pages there.

        Nothing that they read changes what is served, so no policy is asked. What they hold has no owner beside them:
        the pages in private columns are theirs.
        """
        if not self.layers.drafts:
            return (), None
        before, per_block = held.drafted if held else (), self.layers.grid.per_block
        row = rows[0][::per_block][held.start if held else 0 : num_blocks] // per_block
        if new is None:
            return (*before, *row.tolist()), None
        drafted, sources, targets = keep_recent(before, len(row), grant.columns[0][: new.num_columns])
        ids = partial(to_device, dtype=torch.int64, device=self.layers.grid.pages.device)
        blocks = torch.cat([ids(before), row.long()])[ids(sources)]
        return drafted, partial(copy_blocks, self.layers.draft_grid, blocks, ids(targets))

    def _store(
        self,
        req_id: str,
        grant: Grant,
        pages: np.ndarray,
        used: np.ndarray,
        start: int,
        drafted: Sequence[int],
        copy: Callable[[], None] | None,
    ) -> None:
        """From now on a request reads these pages, and its draft layers those of ``drafted``, which ``copy`` fills."""
        if copy is not None:
            copy()
        if self.layers.drafts:
            theirs = self.layers.draft_grid.homes([drafted], grant.by_head).T
            width = max(pages.shape[1], theirs.shape[1])
            pages = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (pages, theirs)])
            used = np.concatenate([used, np.full(len(theirs), theirs.shape[1])])
        self.rows[grant.by_head].store(req_id, pages, used, start, grant.tail)
