"""Requests come, are chunked, preempted, paused, resumed and aborted in any order: nobody notices anybody else.

The machine draws a history; what it has done so far is printed, shortened, when it fails. After every step each page
is free or owned as often as it is referenced (``Engine.step``), and in the end everything is back.
"""

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from counting import living
from engine import Engine, Late, same_positions
from hybrids import save_hybrid
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from random_models import numbers, save_random_model
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm.v1.core.sched.interface import PauseState

pytestmark = pytest.mark.engine

SHARED = numbers(70, 640)
#: What a request may ask for, as far as every engine here grants it.
WISHES: list[dict[str, Any]] = [
    {},
    {"kv_eviction_budget": 60},
    {"kv_eviction": "snapkv", "kv_eviction_budget": 70},
    {"kv_eviction": "layer-defensivekv", "kv_eviction_budget": 80},
]
#: The same where budgets are elastic.
ELASTIC_WISHES: list[dict[str, Any]] = [
    {},
    {"kv_eviction": "layer-defensivekv"},
    {"kv_eviction_config": {"min_tokens": 0.2}},
    {"kv_eviction": "snapkv", "kv_eviction_budget": 70},
]
#: Prompts that are evicted as they come, and tokens as they are generated.
PROGRESSIVE = {"prefill": "progressive", "decode": "window"}
#: So that outputs of some dozen tokens give, too.
ELASTIC = {"min_tokens": 64, "window": 8, "recent_tokens": 16}


class Lifecycle(RuleBasedStateMachine):
    """Everything that can happen to requests between two steps of one engine."""

    def __init__(self, engine: Engine, late: Late | None):
        super().__init__()
        self.engine, self.late = engine, late
        self.alive: list[str] = []

    @property
    def core(self):
        return self.engine.core

    @property
    def is_elastic(self) -> bool:
        return self.core.scheduler.connector.scheduler.config.is_elastic

    @rule(
        length=st.integers(1, 640),
        shared=st.booleans(),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 50),
        wish=st.integers(0, len(WISHES) - 1),
        extra=st.sampled_from(
            ({}, {}, {"ignore_eos": False, "stop_token_ids": list(range(128))}, {"prompt_logprobs": 0})
        ),
    )
    def add(self, length, shared, seed, max_tokens, wish, extra):
        prompt = SHARED[:length] if shared else numbers(71 + seed, length)
        wishes = ELASTIC_WISHES if self.is_elastic else WISHES
        wish = {**wishes[wish], "kv_eviction_report": 1}
        self.alive.append(self.engine.add(prompt, max_tokens, extra_args=wish, **extra))

    @precondition(lambda self: self.is_elastic)
    @rule(length=st.integers(250, 600), seed=st.integers(0, 3), count=st.integers(4, 16))
    def crowd(self, length, seed, count):
        """More than the pool holds, and time to be cut."""
        for index in range(3):
            self.alive.append(self.engine.add(numbers(171 + seed + index, length), 50))
        self.step(count)

    @precondition(lambda self: self.is_elastic)
    @rule(length=st.integers(1, 100), count=st.integers(10, 40))
    def think(self, length, count):
        """Short prompts, and outputs that fill the pool."""
        for index in range(3):
            wish = {"kv_eviction": "layer-defensivekv"} if index == 1 else {}
            self.alive.append(self.engine.add(numbers(181 + index, length), 90, extra_args=wish))
        self.step(count)

    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            for name in self.engine.step():
                self.alive.remove(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self._abort(data.draw(st.sampled_from(self.alive)))

    @property
    def may_clear(self) -> bool:
        """Whether vLLM could forget everything now."""
        return True

    def reset(self, running: bool, external: bool) -> None:
        """Forgets prefixes; those that run start again."""
        self.core.reset_prefix_cache(reset_running_requests=running, reset_connector=external)

    @rule(running=st.booleans(), external=st.booleans())
    def reset_prefix_cache(self, running, external):
        self.reset(running, external)
        self.engine.check_integrity()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), count=st.integers(0, 2))
    def leave_after_a_reset(self, data, count):
        """What was preempted outside of a step is named in the next one, when it may be gone."""
        self.reset(True, False)
        for _ in range(min(count, len(self.alive))):
            self._abort(data.draw(st.sampled_from(self.alive)))
        self.core.resume_scheduler()
        self.step(1)

    @rule(mode=st.sampled_from(("abort", "keep", "wait")), clear_cache=st.booleans(), often=st.integers(0, 3))
    def pause(self, mode, clear_cache, often):
        if often:
            return
        if mode == "wait":
            # The core refuses it inside this process; it is this and then steps, until what runs has ended.
            self.core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            return
        self.core.pause_scheduler(mode, clear_cache and self.may_clear)
        if mode == "abort":
            # The core has forgotten them, the front end learns it here.
            self._abort(*self.alive)
        self.engine.check_integrity()

    @rule()
    def resume(self):
        self.core.resume_scheduler()

    def rehearse(self) -> None:
        """A history that evicts for sure: what is drawn depends on the names and numbers of all modules around."""
        if self.is_elastic:
            for seed in range(4):
                self.crowd(600, seed, 16)
            self.teardown()
            # Outputs alone are more than the pool holds.
            size = self.engine.vllm_config.cache_config.block_size
            for seed in range(len(self.engine.pool.blocks) * size // 300):
                self.engine.add(numbers(181 + seed, 60), 320)
        else:
            for seed, wish in itertools.product(range(4), range(len(WISHES))):
                self.add(640, False, seed, 20, wish, {})
                self.step(8)
        self.teardown()

    def _abort(self, *names: str) -> None:
        self.engine.abort(*names)
        self.alive = [name for name in self.alive if name not in names]
        self.engine.check_integrity()

    def teardown(self):
        self.core.resume_scheduler()
        self.engine.run()
        # The last releases and reports come with the steps of another request.
        name = self.engine.add([1, 2, 3], 4)
        assert len(self.engine.run()[name]) == 4
        if self.late:
            self.late.deliver()
        half, worker = self.engine.scheduler.connector.scheduler, self.engine.connector.worker
        assert not half._tracked
        assert not half._grants._pending
        assert not half._prefilling
        assert not half.news
        assert not any(half._grants._redirected.values())
        assert all(held.startswith(name) for held in [*worker.moving.held, *worker.judging.watched])
        self.engine.forget_prefixes()
        assert self.engine.is_idle()


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory) -> str:
    """Attention beside short convolutions, whose states lie in blocks of the same pool."""
    return save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))[0]


@pytest.mark.parametrize(
    ("options", "when", "kind"),
    [
        ({}, "at once", "llama"),
        pytest.param(PROGRESSIVE, "a step late", "llama", marks=pytest.mark.contract),
        (ELASTIC, "a step late", "llama"),
        (PROGRESSIVE, "at once", "hybrid"),
        pytest.param(ELASTIC, "drafts, too", "llama", marks=pytest.mark.full),
        pytest.param(PROGRESSIVE, "drafts, too", "llama", marks=pytest.mark.full),
        pytest.param({}, "a step late", "hybrid", marks=pytest.mark.full),
        pytest.param(ELASTIC, "at once", "hybrid", marks=pytest.mark.full),
    ],
)
def test_any_history(start_engine, tiny_model, hybrid_model, options, when, kind, monkeypatch, request, same_on_both):
    """In a pool that holds two and a half prompts of the longest kind, so that vLLM preempts, too.

    Where budgets are elastic, one and a half, so that many are cut. Reports come at once or a step late or, under
    asynchronous scheduling, drafts are verified then, too.
    """
    more = request.getfixturevalue("drafts_a_step_late") if when == "drafts, too" else {}
    blocks = (30 if options is ELASTIC else 56) if kind == "llama" else 34
    engine: Engine = start_engine(
        tiny_model if kind == "llama" else hybrid_model,
        skip_tokenizer_init=True,
        block_size=32 if kind == "llama" else 64,
        kv_eviction="cake",
        kv_eviction_budget="auto" if options is ELASTIC else 100,
        kv_eviction_config=options,
        max_model_len=700,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=blocks,
        **more,
    )
    late = None
    if when == "a step late":
        late = Late(engine.scheduler.connector.scheduler, monkeypatch)
        # The halves agree again when the report is there.
        monkeypatch.setattr(engine, "_check_halves", lambda: None)
    engine.stats()
    Lifecycle(engine, late).rehearse()
    stats = engine.stats()
    assert stats["cuts" if options is ELASTIC else "requests"] > 5
    assert options is not ELASTIC or stats["evicted_generated_tokens"] > 0
    run_state_machine_as_test(
        lambda: Lifecycle(engine, late),
        settings=settings(
            max_examples=4 if kind == "hybrid" or when == "drafts, too" else 6,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert stats["failures"] == engine.stats().get("failures", 0) == 0
    assert not living()


def test_nothing_is_put_down_for_requests_that_are_gone(tiny, same_on_both):
    """They would have been looked at again at the end of their budget, which none of them came near."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150)
    wishes = [{}, {"kv_eviction_budget": 131072}, {"kv_eviction_budget": 512, "kv_eviction_report": 1}]
    names = [engine.add(numbers(200 + i, 20), 4, extra_args=wishes[i % 3]) for i in range(60)]
    engine.step()
    engine.abort(*names[:5])
    engine.run()
    half = engine.scheduler.connector.scheduler
    assert not any(group.exact_len for group in half._grants._exact)
    assert not living()


def test_a_client_leaves_after_a_reset(tiny, same_on_both):
    """Preempted outside of a step, the request is named in the next one, when it is gone."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150)
    prompts = [numbers(100, 700), numbers(101, 500)]
    expected = engine.generate([prompts[1]], 30)
    leaving = engine.add(prompts[0], 60)
    for _ in range(4):
        engine.step()
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    engine.abort(leaving)
    staying = engine.add(prompts[1], 30)
    assert engine.run()[staying] == expected[0]
    assert engine.is_idle()


def test_an_eviction_in_the_last_step_of_a_request_is_counted_and_told(tiny, same_on_both):
    """Its first token ends it, which nobody knew."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150)
    prompt = numbers(122, 650)
    ((token, *_),) = engine.generate([prompt], 2)
    engine.forget_prefixes()
    engine.stats()
    name = engine.add(prompt, 50, stop_token_ids=[token], extra_args={"kv_eviction_report": 1})
    assert engine.run()[name] == [token]
    stats = engine.stats()
    assert stats["requests"] == 1
    assert stats["freed_blocks"] == 0
    report = engine.outputs[name].kv_transfer_params["kv_eviction"]
    assert 150 <= np.mean(report["kept_tokens"]) < 150 + 64
    assert engine.is_idle()


def test_a_request_that_ends_with_its_first_token_is_not_evicted(tiny, same_on_both):
    """It is known beforehand: nothing would read what is kept."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150, max_model_len=700)
    engine.forget_prefixes()
    engine.stats()
    engine.generate([numbers(120, 650)], 1)
    engine.generate([numbers(121, 699)], 5)
    assert not engine.stats()
    # With progressive prefill the prompt itself is bounded.
    name = engine.add(numbers(120, 650), 1)
    engine.run()
    assert engine.num_cached(name) == 640 - 32


@pytest.mark.contract
def test_wishes_keep_the_prefix_hits(tiny, same_on_both):
    """But for the last queries that a request's own settings ask for."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=300)
    prompt = numbers(123, 1500)
    engine.generate([prompt], 2)
    dice = random.Random(0)
    for wish, hit in (
        ({}, 1440),
        ({"kv_eviction_budget": 100}, 1440),
        ({"kv_eviction_budget": 0.1}, 1440),
        ({"kv_eviction": "snapkv"}, 1440),
        ({"kv_eviction": "layer-defensivekv", "kv_eviction_budget": 0.2}, 1440),
    ):
        name = engine.add(prompt[:1496] + [dice.randrange(250) for _ in range(4)], 2, extra_args=wish)
        engine.run()
        assert engine.num_cached(name) == hit, wish
    assert engine.is_idle()


@pytest.mark.parametrize("policy", ["knorm", "streamingllm", "random", "keydiff", "tova"])
def test_no_prompt_loses_everything(tiny, policy, same_on_both):
    """A hundredth of a short prompt is not nothing."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=300)
    wish = {"kv_eviction": policy, "kv_eviction_budget": 0.01, "kv_eviction_report": 1}
    for length in (64, 200, 500):
        name = engine.add(numbers(length, length), 4, extra_args=wish)
        engine.run()
        kept = engine.outputs[name].kv_transfer_params["kv_eviction"]["kept_tokens"]
        assert kept is None if length == 64 else min(kept) >= 32
    assert engine.is_idle()


def test_no_outer_cache_is_reported(tiny, same_on_both):
    """The plugin's connector transfers nothing, so nobody shall look for a tier that never hits."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=300)
    engine.generate([numbers(124, 500)], 3)
    series = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    assert series["vllm:prefix_cache_queries"] > 0
    assert series.get("vllm:external_prefix_cache_queries", 0) == 0


def test_a_prompt_that_is_cached_as_a_whole_computes_its_last_token(tiny, same_on_both):
    """Methods that look at no query need none of it computed, but the next token does."""
    engine: Engine = tiny(kv_eviction="knorm", kv_eviction_budget=300)
    prompt = numbers(125, 640)
    first = engine.generate([prompt], 5)
    name = engine.add(prompt, 5)
    assert engine.run()[name] == first[0]
    assert engine.num_cached(name) == 640 - 32


def test_a_preempted_request_keeps_its_own_settings(tiny, same_on_both):
    """It starts again, and is evicted again by the policy that it asked for."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=300)
    prompt = numbers(126, 700)
    wish = {"kv_eviction": "layer-defensivekv", "kv_eviction_budget": 100, "kv_eviction_report": 1}
    engine.stats()
    name = engine.add(prompt, 40, extra_args=wish)
    for _ in range(6):
        engine.step()
    engine.core.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    report = engine.outputs[name].kv_transfer_params["kv_eviction"]
    assert (report["policy"], report["budget"]) == ("layer-defensivekv", 100)
    assert np.shape(report["kept_tokens"]) == (4, 2)
    assert engine.stats()["requests"] == 2
    assert engine.is_idle()


@pytest.mark.parametrize("level", [0, 1])
def test_a_server_that_slept_goes_on(tiny, level, same_on_both):
    """Sleeping pauses what runs; deeper sleep forgets caches, so that it starts again."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150, kv_eviction_config={"decode": "off"})
    prompt = numbers(127, 700)
    expected = engine.generate([prompt], 30)
    engine.forget_prefixes()
    name = engine.add(prompt, 30)
    for _ in range(5):
        engine.step()
    engine.core.sleep(level, mode="keep")
    engine.step()
    engine.core.resume_scheduler()
    done = engine.run()
    assert len(done[name]) == 30
    if not level:
        assert done[name] == expected[0]
    assert engine.is_idle()


def test_embedded_prompts_are_evicted_alike(tiny, tiny_model, same_on_both):
    """A prompt given as embeddings is that of its tokens."""
    from transformers import AutoModelForCausalLM

    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150, enable_prompt_embeds=True)
    prompt = numbers(128, 700)
    expected = engine.generate([prompt], 20)
    embeds = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings()(torch.tensor(prompt)).detach()
    engine.stats()
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    (output,) = engine.llm.generate({"prompt_embeds": embeds}, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected[0]
    assert engine.stats()["requests"] == 1
    assert engine.is_idle()


@pytest.mark.parametrize("policy", ["criticalkv", "layer-defensivekv"])
def test_reloaded_weights_weigh_values(tiny, start_engine, tmp_path, policy, same_on_both):
    """Weights are reloaded in place, also those of the projections that these methods look through."""
    other = save_random_model(tmp_path, "llama", "LlamaForCausalLM", seed=1, num_hidden_layers=4)
    prompt = numbers(129, 700)
    options = {"kv_eviction": policy, "kv_eviction_budget": 150}
    engine: Engine = tiny(**options)
    ((before, _),) = engine.trace([prompt], 10)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    engine.forget_prefixes()
    ((tokens, kept),) = engine.trace([prompt], 10)
    engine.shutdown()
    fresh: Engine = start_engine(other, skip_tokenizer_init=True, num_gpu_blocks_override=1500, **options)
    ((expected, expected_kept),) = fresh.trace([prompt], 10)
    assert tokens == expected != before
    assert kept
    assert same_positions(kept, expected_kept)


def test_events_tell_what_the_prefix_cache_has(tiny, same_on_both):
    """Routers follow the KV cache events of a server; columns that a request gave back are told as removed or stay."""
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget=150,
        max_model_len=2048,
        num_gpu_blocks_override=80,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    told: list = []
    engine.scheduler.kv_event_publisher.publish = lambda batch: told.extend(batch.events)
    # vLLM tells of each block; those of equal requests that ran together have the same name.
    cached: Counter = Counter()
    removed = 0
    for seed in range(6):
        engine.generate([numbers(seed, 900), numbers(seed // 2, 700)], 40)
        for event in told:
            if isinstance(event, BlockStored):
                assert event.kv_cache_spec_kind == "full_attention"
                cached.update(event.block_hashes)
            else:
                assert isinstance(event, BlockRemoved)
                cached.subtract(event.block_hashes)
                removed += len(event.block_hashes)
        told.clear()
        blocks = [block.block_hash for block in engine.pool.blocks if block.block_hash is not None]
        assert +cached == Counter(maybe_convert_block_hash(get_block_hash(name)) for name in blocks)
        assert min(cached.values()) >= 0
    assert cached
    assert removed
    assert engine.stats()["requests"] == 12
