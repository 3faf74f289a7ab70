"""Several workers: all of them free the same pages, whatever heads they hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stock import gaps, same_tokens
from test_memory import numbers

pytestmark = pytest.mark.slow

PROMPTS = [numbers(30, 700), numbers(31, 60), numbers(32, 1100)]


def run(model: str, **settings) -> list[dict]:
    """Every worker in a process of its own; tp ranks get one thread each."""
    job = {"model": model, "prompts": PROMPTS, "max_tokens": 100, "settings": settings}
    cores = sorted(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if "tensor_parallel_size" in settings:
        env |= threads
    script = Path(__file__).parent / "parallel.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(job), env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    # Workers log on the same stream while they end.
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"tokens"')))


def test_two_ranks_keep_what_one_keeps(start_engine, tiny_model):
    """CAKE's preferences are sums over heads, and ranks add theirs."""
    eviction = {"kv_eviction": "cake", "kv_eviction_budget": 150}
    two = run(tiny_model, **eviction, tensor_parallel_size=2)
    engine = start_engine(tiny_model, skip_tokenizer_init=True, max_model_len=2048, **eviction)
    for prompt, ours in zip(PROMPTS, two, strict=True):
        name = engine.add(prompt, 100, extra_args={"kv_eviction_report": 1}, logprobs=2, detokenize=False)
        engine.run()
        output = engine.outputs[name]
        kept = output.kv_transfer_params["kv_eviction"]["kept_tokens"]
        assert ours["kept"] == (kept and list(kept))
        assert len(ours["tokens"]) == 100
        assert same_tokens(ours["tokens"], (list(output.outputs[0].token_ids), gaps(output.outputs[0].logprobs)))
    assert [answer["kept"] is None for answer in two] == [False, True, False]


def test_two_ranks_agree_where_heads_compete(tiny_model):
    """Ranks see other heads and would free other pages; that they agree is checked by the engine at every step."""
    eviction = {
        "kv_eviction": "layer-defensivekv",
        "kv_eviction_budget": 150,
        "kv_eviction_config": {"decode": "window"},
    }
    answers = run(tiny_model, **eviction, tensor_parallel_size=2)
    assert [answer["kept"] is None for answer in answers] == [False, True, False]
    assert all(len(answer["tokens"]) == 100 for answer in answers)
    assert all(4 * 140 <= sum(answer["kept"]) <= 4 * (150 + 32) for answer in answers if answer["kept"])
