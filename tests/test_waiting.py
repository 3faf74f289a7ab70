"""How often the worker waits for the device: counted where a tensor's numbers are asked for on the host."""

import pytest
from counting import Waits
from engine import Engine
from random_models import numbers

from cake_vllm.integration.worker.judging import Judging
from cake_vllm.integration.worker.reading import Reading
from cake_vllm.integration.worker.worker import EvictionWorker

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("decode", "num_drafts"), [("off", 0), ("cake", 0), ("window", 0), ("cake", 2)])
def test_the_worker_waits_once_for_each_prompt(tiny, tiny_model, monkeypatch, same_on_both, decode, num_drafts):
    """For the preferences, by which the budget is divided; never while it decodes, but for giving a block back."""
    counted = []
    step = [(EvictionWorker, name) for name in ("begin", "finish", "end")]
    for room, name in (*step, (Judging, "_observe"), (Reading, "_work_of_pass")):
        method = getattr(room, name)

        def counting(*args, method=method):
            with Waits() as waits:
                result = method(*args)
            counted.append(sum(waits.seen.values()))
            return result

        monkeypatch.setattr(room, name, counting)
    options = {"kv_eviction_config": {"decode": decode}, "kv_eviction_budget": 100}
    if num_drafts:
        speculation = {"method": "draft_model", "model": tiny_model, "num_speculative_tokens": num_drafts}
        options["speculative_config"] = speculation
    engine: Engine = tiny(kv_eviction="cake", max_num_batched_tokens=256, **options)
    # What is made once for a model is made.
    engine.generate([numbers(49, 600)], 2)
    engine.stats()
    engine.forget_prefixes()
    for seed in range(3):
        engine.add(numbers(50 + seed, 600), 80)
    steps = []
    while engine.llm.llm_engine.has_unfinished_requests():
        counted.clear()
        engine.step()
        steps.append((engine.stats(), sum(counted)))
    prompts = [(stats["requests"], waits) for stats, waits in steps if stats and stats["requests"]]
    assert sum(requests for requests, _ in prompts) == 3
    assert all(waits == requests for requests, waits in prompts)
    quiet = [waits for stats, waits in steps if not stats]
    assert len(quiet) > 60 // (1 + num_drafts)
    assert not any(quiet)
