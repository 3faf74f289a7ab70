"""Random load on the real engine: no page is lost, and nobody's result depends on who else is served.

The seed of a case is in its name; ``pytest tests/test_fuzz.py --seed N`` runs it again.
"""

import random
from typing import Any

import pytest
from engine import Engine
from hybrids import HYBRIDS
from random_models import save_random_model
from stock import same_tokens, stock
from ties import assert_same

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POLICIES = ("cake", "cake", "snapkv", "layer-defensivekv", "criticaladakv", "knorm", "streamingllm", "tova")


def draw_settings(dice: random.Random, groups: int = 1, states: int = 0) -> dict[str, Any]:
    """An engine: method, budget, way of prefill and decoding, chunk, pool and scheduling.

    A request has a row of blocks in each group of layers with full attention, and so many blocks for states.
    """
    policy = dice.choice(POLICIES)
    options: dict[str, Any] = {
        "decode": dice.choice(("off", "window", "cake") if policy == "cake" else ("off", "window"))
    }
    if dice.random() < 0.4:
        options["prefill"] = "progressive"
    max_model_len = dice.choice((1500, 6200))
    # From one request of the longest kind to a dozen.
    blocks = (-(-max_model_len // 32) * groups + states) * dice.choice((1, 1.3, 3, 12))
    settings = {
        "kv_eviction": policy,
        "kv_eviction_budget": dice.choice((100, 200, 400, 0.2, 0.5, "auto")),
        "kv_eviction_config": options,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": dice.choice((256, 512, 2048)),
        "num_gpu_blocks_override": int(blocks) + 1,
        "scheduling_policy": dice.choice(("fcfs", "priority")),
    }
    if settings["kv_eviction_budget"] == "auto":
        settings["kv_eviction_config"] = {"min_tokens": dice.choice((64, 0.1))}
    return settings


class Load:
    """Random requests on one engine."""

    def __init__(self, engine: Engine, dice: random.Random, longest: int):
        self.engine, self.dice, self.longest = engine, dice, longest
        self.shared = [self._numbers(longest) for _ in range(4)]
        self.prompts: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.preempted: set[str] = set()
        self.steps = 0

    def _numbers(self, length: int) -> list[int]:
        return [self.dice.randrange(250) for _ in range(length)]

    def add(self) -> None:
        length = (
            round(self.longest ** self.dice.random())
            if self.dice.random() < 0.5
            else self.dice.randint(1, self.longest)
        )
        prompt = self._numbers(length)
        if self.dice.random() < 0.5:
            cut = self.dice.randrange(length)
            prompt = self.dice.choice(self.shared)[:cut] + prompt[cut:]
        sampling: dict[str, Any] = {"max_tokens": self.dice.randint(1, 60)}
        if self.dice.random() < 0.1:
            sampling |= {"n": 2, "temperature": 1.0}
        priority = self.dice.randrange(3) if self.engine.vllm_config.scheduler_config.policy == "priority" else 0
        name = self.engine.add(prompt, priority=priority, **sampling)
        if "n" not in sampling:
            self.prompts[name] = prompt

    def step(self) -> None:
        self.engine.step()
        self.steps += 1
        for request in self.engine.scheduler.requests.values():
            if request.num_preemptions:
                self.preempted.add(request.request_id.rsplit("-", 1)[0])

    def wave(self, count: int) -> None:
        """Adds requests while others run, aborts some, and runs until nothing is left."""
        for _ in range(count):
            self.add()
            for _ in range(self.dice.randrange(4)):
                self.step()
            alive = [name for name in self.prompts if name not in self.engine.outputs and name not in self.aborted]
            if alive and self.dice.random() < 0.1:
                victim = self.dice.choice(alive)
                self.engine.abort(victim)
                self.aborted.add(victim)
        while self.engine.llm.llm_engine.has_unfinished_requests():
            self.step()
        assert self.engine.is_idle()


def test_random_load(tiny, seed, is_v2):
    dice = random.Random(seed)
    settings = draw_settings(dice)
    print(f"seed {seed}: {settings}")
    engine: Engine = tiny(**settings)
    longest = settings["max_model_len"] - 100
    serve(engine, settings, dice, min(longest, 800) if is_v2 else longest, *((1, 15, 4) if is_v2 else (5, 40, 12)))


@pytest.mark.parametrize("number", [20, pytest.param(6, marks=pytest.mark.full)])
def test_random_load_beside_states(start_engine, tmp_path, number, same_on_both):
    """Two groups of attention layers, and one of short convolutions, whose states are in the prefix cache."""
    layers = {"layer_types": ["conv", "full_attention", "full_attention"] * 2}
    of = HYBRIDS["lfm2"]
    model = save_random_model(tmp_path, of.model_type, of.architecture, **of.fields | layers)
    dice = random.Random(number)
    settings = draw_settings(dice, groups=2, states=2)
    print(f"seed {number}: {settings}")
    engine: Engine = start_engine(model, skip_tokenizer_init=True, **settings)
    assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == 3
    serve(engine, settings, dice, settings["max_model_len"] - 100, 3, 30, 8)


def serve(
    engine: Engine,
    settings: dict[str, Any],
    dice: random.Random,
    longest: int,
    num_waves: int,
    size: int,
    num_solo: int,
) -> None:
    """Waves of so many requests of up to so many tokens, some of which are run again alone."""
    engine.stats()
    load = Load(engine, dice, longest)
    for _ in range(num_waves):
        load.wave(size)
    stats = engine.stats()
    assert stats["requests"] + stats["cuts"] > 0
    print(f"{load.steps} steps, {len(load.preempted)} preempted, {len(load.aborted)} aborted, {stats}")
    assert stats["failures"] == 0
    done = {name: prompt for name, prompt in load.prompts.items() if name not in load.aborted}
    for name in done:
        output = engine.outputs[name].outputs[0]
        assert output.finish_reason == "length"

    # A short request brings the last releases to the worker.
    short = engine.add([1, 2, 3], 3)
    engine.run()
    worker = engine.connector.worker
    assert all(name.startswith(short) for name in [*worker.moving.held, *worker.judging.watched])

    # Alone again. What progressive prefill or an elastic budget give depends on the load.
    if worker.judging.config.is_progressive or settings["kv_eviction_budget"] == "auto":
        return
    together = {name: engine.run_of(name) for name in done}
    # Those that were preempted, too.
    names = {*dice.sample(sorted(done), num_solo), *sorted(load.preempted & done.keys())[:num_solo]}
    for name in sorted(names):
        engine.forget_prefixes()
        (alone,) = engine.runs([done[name]], len(together[name].tokens))
        assert_same(together[name], alone)


@pytest.mark.full
def test_eviction_that_never_binds_is_stock(tiny, tiny_model, is_v2):
    """200 random requests with shared prefixes: with eviction off, and with a budget nobody reaches."""
    dice = random.Random(11)
    shared = [[dice.randrange(250) for _ in range(600)] for _ in range(5)]
    prompts = []
    for _ in range(60 if is_v2 else 200):
        length = dice.randint(1, 300 if is_v2 else 700)
        prompt = [dice.randrange(250) for _ in range(length)]
        cut = dice.randrange(length)
        prompts.append(dice.choice(shared)[:cut] + prompt[cut:])
    chunk = {"max_num_batched_tokens": 512}
    reference = stock(is_v2, tiny_model, prompts, 6, skip_tokenizer_init=True, num_gpu_blocks_override=400, **chunk)
    for eviction in ({}, {"kv_eviction": "cake", "kv_eviction_budget": 1000}):
        engine: Engine = tiny(**chunk, **eviction, num_gpu_blocks_override=400)
        names = [engine.add(prompt, 6, detokenize=False) for prompt in prompts]
        done = engine.run()
        assert all(same_tokens(done[name], run) for name, run in zip(names, reference, strict=True))
        assert sum(engine.num_cached(name) for name in names) > 0.2 * sum(map(len, prompts))
        assert not engine.stats()
