"""Several workers: all of them free the same pages, whatever heads they hold."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Engine
from random_models import numbers
from stock import gaps, same_tokens
from tiers import transfer

from cake_vllm.policies import PagedPrompt, create_policy

pytestmark = pytest.mark.slow

PROMPTS = [numbers(30, 700), numbers(31, 60), numbers(32, 1100)]


def requests(prompts: list[list[int]] = PROMPTS, max_tokens: int = 100, **wishes: Any) -> list[dict]:
    """For :func:`run`."""
    return [{"prompt": prompt, "max_tokens": max_tokens, "wishes": wishes} for prompt in prompts]


def run(model: str, requests: list[dict], **settings: Any) -> list[dict]:
    """Every worker in a process of its own, with one thread if there are two; V2's find Triton's interpreter."""
    job = {"model": model, "requests": requests, "settings": settings}
    cores = sorted(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if {"tensor_parallel_size", "pipeline_parallel_size"} & set(settings):
        env |= threads
    if env["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    script = Path(__file__).parent / "parallel.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(job), env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    # Workers log on the same stream while they end.
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"tokens"')))


def compare(answers: list[dict], engine: Engine, prompts: list[list[int]], max_tokens: int = 100) -> None:
    """An engine in this process keeps as many tokens and says the same; the second prompt alone is not evicted."""
    for prompt, ours in zip(prompts, answers, strict=True):
        name = engine.add(prompt, max_tokens, extra_args={"kv_eviction_report": 1}, logprobs=2, detokenize=False)
        engine.run()
        output = engine.outputs[name]
        kept = output.kv_transfer_params["kv_eviction"]["kept_tokens"]
        assert ours["kept"] == (kept and list(kept))
        assert len(ours["tokens"]) == max_tokens
        assert same_tokens(ours["tokens"], (list(output.outputs[0].token_ids), gaps(output.outputs[0].logprobs)))
    assert [answer["kept"] is None for answer in answers] == [False, True, False]


EVICTION = {"kv_eviction": "cake", "kv_eviction_budget": 150, "kv_eviction_config": {"decode": "window"}}
#: By a name, what two ranks are asked for, once: each start of theirs takes as long as many tests.
ASKED = {
    "cake": requests(),
    "layer-defensivekv": requests(kv_eviction="layer-defensivekv"),
    "gate": requests(kv_eviction="gate"),
    "by gates alone": requests(PROMPTS[:1], 2, kv_eviction="gate", kv_eviction_config='{"evidence": 0.0}'),
}


#: Blocks that hold the longest prompt with its output, and 7 more.
NUM_BLOCKS = 45


@pytest.fixture(scope="module")
def answered(tiny_model) -> dict[str, list[dict]]:
    """What two tensor-parallel ranks answer over a lower tier, by the name of what is asked for."""
    workers = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.1, "kv_transfer_config": transfer()}
    pool = {"max_model_len": 1300, "num_gpu_blocks_override": NUM_BLOCKS}
    answers = iter(run(tiny_model, [each for of in ASKED.values() for each in of], **EVICTION, **workers, **pool))
    return {name: [next(answers) for _ in of] for name, of in ASKED.items()}


def test_two_ranks_keep_what_one_keeps(tiny, answered):
    """CAKE's preferences are sums over heads, and ranks add theirs."""
    compare(answered["cake"], tiny(max_model_len=2048, **EVICTION), PROMPTS)


def test_a_bare_process_keeps_what_this_one_keeps(tiny, tiny_model):
    """All that a worker needs reaches it in its config and in the steps' messages, whatever carries them."""
    answers = run(tiny_model, requests(), **EVICTION, distributed_executor_backend="bare_worker.BareExecutor")
    compare(answers, tiny(max_model_len=2048, **EVICTION), PROMPTS)


def test_each_rank_stores_and_loads_its_part(answered):
    """Of prompts that come again when the pool has few of their blocks left."""
    assert [answer["cached"] for answer in answered["cake"]] == [0] * len(PROMPTS)
    for name in ("layer-defensivekv", "gate"):
        first, _, last = (answer["cached"] for answer in answered[name])
        left = 32 * (NUM_BLOCKS - 1 - len(PROMPTS[2]) // 32)
        assert left < len(PROMPTS[0]) - 64 <= first
        assert left < len(PROMPTS[2]) - 64 <= last


@pytest.mark.parametrize("name", ["layer-defensivekv", "gate"])
def test_two_ranks_agree_where_heads_compete(answered, name):
    """Heads compete inside a rank, in columns that all ranks share."""
    answers = answered[name]
    assert [answer["kept"] is None for answer in answers] == [False, True, False]
    assert all(len(answer["tokens"]) == 100 for answer in answers)
    kept = [answer["kept"] for answer in answers if answer["kept"]]
    # Of each layer, the head of either rank.
    assert [np.shape(counts) for counts in kept] == [(4, 2)] * 2
    assert all(140 <= np.mean(counts) <= 150 + 32 for counts in kept)


def test_each_rank_judges_by_the_gates_of_its_head(tiny, answered):
    """And divides the budget among its head's layers: as the scores of one process say, head by head."""
    ((asked,), (answer,)) = ASKED["by gates alone"], answered["by gates alone"]
    prompt, wishes = asked["prompt"], asked["wishes"]
    engine: Engine = tiny(max_model_len=2048, **EVICTION)
    seen, policy = [], create_policy("gate", json.loads(wishes["kv_eviction_config"]))
    engine.connector.worker.judging.on_judged = lambda layer, inputs, score: seen.append(inputs)
    engine.generate([prompt], 2, extra_args=wishes)
    engine.connector.worker.judging.on_judged = None
    paged = PagedPrompt(len(prompt), policy.protected, 32, len(prompt) % 32)

    def expected(rank: int, gate: int) -> list[int]:
        scores = []
        for inputs in seen:
            of = slice(rank, rank + 1)
            mine = replace(inputs, keys=inputs.keys[of], values=inputs.values[of])
            scores.append(policy.judge(replace(mine, gate=inputs.gate.heads(slice(gate, gate + 1)))))
        return [paged.kept_len(paged.pages(*counts)) for counts in policy.head_budgets(scores, len(prompt), 150)]

    for rank, kept in enumerate(zip(*answer["kept"], strict=True)):
        assert list(kept) == expected(rank, rank)
        assert list(kept) != expected(rank, 1 - rank)


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["snapkv", pytest.param("layer-defensivekv", marks=pytest.mark.full)])
def test_stages_share_columns(tiny, tiny_model, is_v2, name):
    """Two pipeline stages: where layers do not compete, the same as in one; else each stage divides its own budget."""
    if not is_v2:
        pytest.skip("vLLM's first runner cannot run two stages on a CPU: --runner v2")
    prompts, num_tokens = [numbers(33, 300), numbers(34, 60), numbers(35, 250)], 8
    options = {"window": 8, "decode": "off"}
    eviction = {"kv_eviction": name, "kv_eviction_budget": 100, "kv_eviction_config": options}
    stages = {"pipeline_parallel_size": 2, "gpu_memory_utilization": 0.1}
    answers = run(tiny_model, requests(prompts, num_tokens), **eviction, **stages)
    if name == "snapkv":
        compare(answers, tiny(max_model_len=2048, **eviction), prompts, num_tokens)
        return
    kept = [answer["kept"] for answer in answers if answer["kept"]]
    assert [np.shape(counts) for counts in kept] == [(4, 2)] * 2
    for counts in kept:
        for stage in (counts[:2], counts[2:]):
            # Beside the budget, rounding to pages, and a partial block.
            assert 90 <= np.mean(stage) <= 100 + 2 * 32


@pytest.mark.engine
def test_each_stage_stores_and_loads_its_part(tiny, tiny_model, is_v2):
    """Of a prompt that is evicted in place, in a pool that holds one, while its blocks are stored; it comes again."""
    if not is_v2:
        pytest.skip("vLLM's first runner cannot run two stages on a CPU: --runner v2")
    first, second = numbers(36, 300), numbers(37, 310)
    prompts, num_tokens = [first, second, first], 8
    eviction = {"kv_eviction": "snapkv", "kv_eviction_budget": 100, "kv_eviction_config": {"window": 8}}
    pool = {"max_model_len": 340, "num_gpu_blocks_override": 13}
    workers = {"pipeline_parallel_size": 2, "gpu_memory_utilization": 0.1}
    asked = requests(prompts, num_tokens)
    answers = run(tiny_model, asked, **eviction, **pool, **workers, kv_transfer_config=transfer())
    assert [answer["cached"] for answer in answers] == [0, 0, 288]
    engine: Engine = tiny(**eviction, **pool)
    engine.stats()
    for prompt, ours in zip(prompts, answers, strict=True):
        engine.forget_prefixes()
        name = engine.add(prompt, num_tokens, extra_args={"kv_eviction_report": 1}, logprobs=2, detokenize=False)
        engine.run()
        output = engine.outputs[name]
        assert ours["kept"] == list(output.kv_transfer_params["kv_eviction"]["kept_tokens"])
        assert same_tokens(ours["tokens"], (list(output.outputs[0].token_ids), gaps(output.outputs[0].logprobs)))
    assert engine.stats()["in_place"] == len(prompts)
