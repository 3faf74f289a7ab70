"""A real vLLM engine in this process, with its insides at hand."""

import atexit
import functools
import gc
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from stock import DEFAULTS, gaps
from ties import Run, Served
from vllm import RequestOutput, SamplingParams
from vllm.triton_utils import dispatcher

from cake_vllm import LLM
from cake_vllm.integration.metrics import EvictionStats
from cake_vllm.integration.patching import wrap
from cake_vllm.integration.scheduler.cache_manager import check_integrity

#: Kept positions of each layer by head; ``None`` for a layer that kept everything.
Kept = list[list[torch.Tensor] | None]


_is_searched = False


def _search_once(search: Callable[..., None], *args: Any) -> None:
    """vLLM looks for kernels in all modules whenever an engine starts, and trips over those that n-gram drafts brought.

    Modules that come later find what the first search left.
    """
    global _is_searched
    if _is_searched:
        return
    _is_searched = True
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "llvmlite"}
    with mock.patch.object(sys, "modules", others):
        search(*args)


wrap(dispatcher, "_rebind_kernels", _search_once)


@functools.cache
def _freeze_once() -> None:
    """Takes all that tests import out of the nine garbage collections of each engine, which take half of its time.

    Once, before there are engines: none may be frozen while it lives. vLLM would thaw and freeze everything itself.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.freeze = gc.unfreeze = lambda: None


class Engine:
    """vLLM's offline engine; every call checks that no page is lost."""

    def __init__(self, model: str, **kwargs: Any):
        _freeze_once()
        self.llm = LLM(model, **(DEFAULTS | {"disable_log_stats": False} | kwargs))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.num_free = self.pool.get_num_free_blocks()
        self._ids = itertools.count()
        #: What vLLM returned for finished requests.
        self.outputs: dict[str, RequestOutput] = {}
        self._stats = EvictionStats.empty()
        if self.evicts:
            self._choices: defaultdict[str, list[list[list[torch.Tensor]]]] = defaultdict(list)
            self._kept: dict[str, Kept] = {}
            self._ranks: dict[str, dict[int, torch.Tensor]] = {}
            self._follow_worker()
            ours = getattr(self.scheduler.connector, "_ours", self.scheduler.connector)
            self._take_stats = ours.get_kv_connector_stats
            ours.get_kv_connector_stats = self._pass_stats

    def _follow_worker(self) -> None:
        """Has the worker say what it chose."""
        self.connector.worker.judging.is_traced = True
        self.connector.worker.on_evicted = self._follow

    @property
    def evicts(self) -> bool:
        return hasattr(self.scheduler.connector, "is_alone")

    @property
    def connector(self):
        """The worker's end of the connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    @property
    def vllm_config(self):
        return self.llm.llm_engine.vllm_config

    def add(
        self,
        prompt: list[int] | dict[str, Any],
        max_tokens: int = 16,
        priority: int = 0,
        lora_request: Any = None,
        **params: Any,
    ) -> str:
        """Adds a greedy request and returns its id; a prompt may be whatever vLLM takes."""
        if self.evicts and not self.scheduler.requests:
            self._choices.clear()
        name = f"r{next(self._ids)}"
        sampling = SamplingParams(**({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | params))
        given = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        self.llm.llm_engine.add_request(name, given, sampling, lora_request=lora_request, priority=priority)
        return name

    def abort(self, *names: str) -> None:
        self.llm.llm_engine.abort_request(list(names))

    def step(self) -> dict[str, list[int]]:
        """One engine step; the finished requests' tokens by id."""
        outputs = self.llm.llm_engine.step()
        self.check_integrity()
        self._check_halves()
        finished = {output.request_id: output for output in outputs if output.finished}
        self.outputs |= finished
        return {name: list(output.outputs[0].token_ids) for name, output in finished.items()}

    def check_integrity(self) -> None:
        """No block is lost; those that vLLM frees when a step is over are on the way."""
        check_integrity(self.manager, (block for _, blocks in self.scheduler.deferred_frees for block in blocks))

    def _check_halves(self) -> None:
        """Of every evicted request scheduler and worker hold the same columns, and no page of them is dealt twice.

        Under asynchronous scheduling not of those whose eviction is still to be reported.
        """
        if not self.evicts:
            return
        is_late = self.vllm_config.scheduler_config.async_scheduling
        half, worker = self.scheduler.connector.scheduler, self.connector.worker
        for name, held in worker.moving.held.items():
            if name not in half._tracked or half._tracked[name].by_head is None:
                continue
            if is_late and half._tracked[name].num_pending:
                continue
            if name not in half._grants.managers[0].req_to_blocks:
                # Preempted by a reset: the worker hears of it with the next plan.
                continue
            cuts = [manager.cuts[name] for manager in half._grants.managers]
            columns = [[block.block_id for block in cut.columns] for cut in cuts]
            assert {len(of_group) for of_group in columns} == {held.num_columns}
            own = set(worker.layers.grid.homes(columns, held.by_head).ravel().tolist())
            dealt = [
                page for pages, count in zip(held.pages.tolist(), held.dealt, strict=True) for page in pages[:count]
            ]
            assert len(set(dealt)) == len(dealt), "a page is dealt twice"
            assert set(dealt) <= own, "a page is dealt that is not the request's"
            assert (held.used <= held.dealt).all()
            if worker.layers.drafts:
                assert len(set(held.drafted)) == len(held.drafted)
                assert set(held.drafted) <= set(columns[worker.layers.drafts[0].group])
            for manager, cut in zip(half._grants.managers, cuts, strict=True):
                assert cut.num_traded == held.start
                row = manager.req_to_blocks[name]
                assert [block.is_null for block in row] == [index < held.start for index in range(len(row))]

    def run(self) -> dict[str, list[int]]:
        """Steps until idle; the tokens of all requests that finished."""
        done: dict[str, list[int]] = {}
        while self.llm.llm_engine.has_unfinished_requests() or self.scheduler.deferred_frees:
            done |= self.step()
        # A request's end reaches the worker with the next step.
        assert self.is_idle()
        return done

    def generate(self, prompts: list[list[int]], max_tokens: int = 16, **params: Any) -> list[list[int]]:
        """Greedy tokens of prompts that run together."""
        names = [self.add(prompt, max_tokens, **params) for prompt in prompts]
        done = self.run()
        return [done[name] for name in names]

    def trace(self, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[tuple[list[int], Kept]]:
        """Greedy tokens and kept positions of prompts that run together; positions are empty if nothing left."""
        self._kept.clear()
        self._ranks.clear()
        names = [self.add(prompt, max_tokens, **params) for prompt in prompts]
        done = self.run()
        return [(done[name], self.positions(name)) for name in names]

    def positions(self, name: str) -> Kept:
        """Kept positions of a request by layer; empty if nothing left."""
        return self._of_request(self._kept, name, [])

    def runs(self, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[Run]:
        """Prompts that run together, with all that a comparison up to ties needs."""
        names = [self.add(prompt, max_tokens, logprobs=2, detokenize=False, **params) for prompt in prompts]
        self.run()
        return [self.run_of(name) for name in names]

    def run_of(self, name: str) -> Run:
        """A finished request; a reference has to be added with ``logprobs=2``."""
        output = self.outputs[name].outputs[0]
        tokens, distances = list(output.token_ids), gaps(output.logprobs or [])
        if not self.evicts:
            return Run(tokens, distances, [], {})
        return Run(tokens, distances, self.positions(name), self._of_request(self._ranks, name, {}))

    def served(self, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[Served]:
        """Prompts that run together, with all that a replay follows."""
        names = [self.add(prompt, max_tokens, **params) for prompt in prompts]
        done = self.run()
        return [self.served_as(name, done[name]) for name in names]

    def served_as(self, name: str, tokens: list[int]) -> Served:
        """A request of the last batch."""
        choices = self._of_request(self._choices, name, [])
        return Served(tokens, [[[head.cpu() for head in layer] for layer in eviction] for eviction in choices])

    def _follow(self, what, choice, eviction) -> None:
        """Remembers what every eviction keeps, and of those that divide a budget what they chose by."""
        if choice.chosen is None:
            return
        self._choices[what.req_id].append(choice.chosen)
        if eviction.is_traded and what.grant.divides:
            self._kept[what.req_id] = [
                None if all(len(head) == reads.full_len for head in chosen) else chosen
                for chosen, reads in zip(choice.chosen, choice.reads, strict=True)
            ]
            self._ranks[what.req_id] = choice.ranks

    @staticmethod
    def _of_request(found: Mapping[str, Any], name: str, default: Any) -> Any:
        return next((what for key, what in found.items() if key.rsplit("-", 1)[0] == name), default)

    def num_cached(self, name: str) -> int:
        """Prompt tokens of a finished request that came from the prefix cache, as vLLM reports them."""
        return self.outputs[name].num_cached_tokens

    def forget_prefixes(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def is_idle(self) -> bool:
        """No request left, every page back."""
        self.check_integrity()
        return not self.scheduler.requests and self.pool.get_num_free_blocks() == self.num_free

    @property
    def num_running(self) -> int:
        """vLLM's own count."""
        return self.scheduler.get_request_counts()[0]

    @property
    def decoding(self) -> bool:
        """Whether a request is past its prompt."""
        return any(request.num_output_tokens > 1 for request in self.scheduler.requests.values())

    def stats(self) -> dict[str, Any]:
        """What was evicted since the last call, as vLLM's metrics see it; empty if nothing was."""
        stats, self._stats = self._stats, EvictionStats.empty()
        return {} if stats.is_empty() else stats.data

    def _pass_stats(self):
        """Keeps a copy of what vLLM takes after every step."""
        stats = self._take_stats()
        if stats is not None:
            self._stats.aggregate(stats)
        return stats

    def shutdown(self) -> None:
        """Ends the engine; harmless if it has ended."""
        if not hasattr(self, "core"):
            return
        self.core.shutdown()
        del self.llm, self.core, self.scheduler, self.manager, self.pool


def same_positions(a: Kept, b: Kept) -> bool:
    """Whether two requests kept the same positions in all heads; ``None`` is a layer that kept everything."""
    layers = zip(a, b, strict=True)
    return all(
        ours is theirs if ours is None or theirs is None else all(map(torch.equal, ours, theirs))
        for ours, theirs in layers
    )


class Late:
    """Has the scheduler half hear of a step only when the next one is planned, as under asynchronous scheduling."""

    def __init__(self, half: Any, patch: pytest.MonkeyPatch):
        self.reports: list[list] = []
        plan, self._finish = half.plan, half.finish

        def plan_first(output):
            planned = plan(output)
            self.deliver()
            return planned

        patch.setattr(half, "plan", plan_first)
        patch.setattr(half, "finish", lambda evictions: self.reports.append(evictions))

    def deliver(self) -> None:
        due, self.reports = self.reports, []
        for evictions in due:
            self._finish(evictions)
