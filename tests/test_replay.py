"""Served tokens against a plain Hugging Face model whose cache is pruned to what the policy chose."""

import pytest
import torch
from engine import Engine
from random_models import gates_of, numbers
from replay import Replay

from cake_vllm.policies import create_policy, policy_names
from cake_vllm.policies.cake import Cake

pytestmark = pytest.mark.engine

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def replay(model_dir: str) -> Replay:
    return Replay(model_dir, gates=gates_of(model_dir))


@pytest.fixture(scope="module")
def tiny_replay(tiny_model: str) -> Replay:
    return Replay(tiny_model, gates=gates_of(tiny_model))


@pytest.fixture
def evicting(start_engine) -> Engine:
    """One engine for all methods and budgets: requests ask for theirs."""
    return start_engine(kv_eviction="cake", kv_eviction_budget=128, max_num_batched_tokens=2048)


#: Policy, budget and lengths of the prompts, which are served together.
CASES = [
    ("cake", 256, (1000, 2049)),
    ("layer-defensivekv", 0.2, (1000, 2049)),
]


@pytest.mark.parametrize(("name", "budget", "lengths"), CASES)
def test_served_tokens_equal_replay(evicting: Engine, replay: Replay, prompts, name, budget, lengths, is_v2):
    """The interpreted runner is content with the shortest prompt."""
    chosen = [prompts[length] for length in (lengths[:1] if is_v2 else lengths)]
    wish = {"kv_eviction": name, "kv_eviction_budget": budget}
    for prompt, served in zip(chosen, evicting.served(chosen, NUM_TOKENS, extra_args=wish), strict=True):
        tokens = budget if isinstance(budget, int) else len(prompt) // 5
        replay.verify(prompt, served, create_policy(name, {}), tokens, block_size=32)


@pytest.mark.interpreted
def test_both_kinds_of_owners_share_a_batch(evicting: Engine, replay: Replay, text_ids):
    """One whose heads are alike and one whose heads compete, in one batch."""
    prompt, names = text_ids[3000:3300], ("cake", "layer-defensivekv")
    requests = [evicting.add(prompt, 6, extra_args={"kv_eviction": name}) for name in names]
    done = evicting.run()
    for request, name in zip(requests, names, strict=True):
        served = evicting.served_as(request, done[request])
        replay.verify(prompt, served, create_policy(name, {}), 128, block_size=32)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_served(tiny, tiny_replay: Replay, name: str):
    """Each method on the real engine: the tokens of its replay, and every page back."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=128, max_num_batched_tokens=2048)
    prompt = numbers(30, 500)
    engine.stats()
    (served,) = engine.served([prompt], 8, extra_args={"kv_eviction": name, "kv_eviction_budget": 150})
    tiny_replay.verify(prompt, served, create_policy(name, {}), 150, block_size=32)
    stats = engine.stats()
    assert stats["requests"] == 1
    # The last 20 tokens lie in a partial block and stay in any case.
    assert 4 * 150 - 4 <= sum(stats["kept_tokens"]) < 4 * (150 + 32 + 20)
    assert stats["head_requests"] == (create_policy(name, {}).selection != "layer")
    assert engine.is_idle()


def test_eviction_changes_the_output(evicting: Engine, prompts, same_on_both):
    """The comparisons above would be empty if eviction changed nothing."""
    tight = evicting.generate([prompts[1000]], NUM_TOKENS, extra_args={"kv_eviction_budget": 64})
    assert tight != evicting.generate([prompts[1000]], NUM_TOKENS, extra_args={"kv_eviction": "none"})


@pytest.mark.parametrize(
    ("name", "decode", "every", "prompt_len"),
    [
        ("cake", "cake", 1, 100),
        ("cake", "window", 1, 300),
        pytest.param("criticalkv", "window", 1, 100, marks=pytest.mark.full),
        ("rkv", "window", 64, 100),
        ("triattention", "window", 64, 300),
        pytest.param("cake", "cake", 70, 300, marks=pytest.mark.full),
        pytest.param("layer-defensivekv", "window", 64, 300, marks=pytest.mark.full),
    ],
)
def test_long_output_stays_in_its_budget(tiny, tiny_replay: Replay, name, decode, every, prompt_len, is_v2):
    """Generated tokens are evicted a period at a time; no layer holds more than budget, period and a block."""
    budget, num_tokens, period = 128, 100 if is_v2 else 200, -(-every // 32)
    options = {"decode": decode, "every": every}
    engine: Engine = tiny(
        kv_eviction=name, kv_eviction_budget=budget, kv_eviction_config=options, max_num_batched_tokens=256
    )
    prompt = numbers(50, prompt_len)
    engine.stats()
    request = engine.add(prompt, num_tokens)
    done, most = {}, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        done |= engine.step()
        most = max(most, engine.num_free - engine.pool.get_num_free_blocks() if engine.decoding else 0)
    served = engine.served_as(request, done[request])
    policy = create_policy(name, {})
    tiny_replay.verify(prompt, served, policy, budget, block_size=32, decode=decode, every=every)
    # For each that was filled, but for one that its prompt's own eviction may delay.
    num_filled = (prompt_len + num_tokens) // 32 - max(prompt_len, budget) // 32
    assert engine.stats()["trims"] in (num_filled // period, num_filled // period - 1)
    assert most <= budget // 32 + period + 1
    assert engine.is_idle()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rkv", {}),
        pytest.param("triattention", {}, marks=pytest.mark.full),
        pytest.param("random", {"decode": "window", "recent": 16}, marks=pytest.mark.full),
        pytest.param("cake", {}, marks=pytest.mark.full),
    ],
)
def test_a_prompt_that_stays(tiny, tiny_replay: Replay, name, options, is_v2):
    """The budget is for what is generated, over and over; what is generated short of it is left alone."""
    budget, every, prompt, is_left = 64, 64, numbers(51, 200), numbers(52, 330)
    engine: Engine = tiny(
        kv_eviction=name,
        kv_eviction_budget=budget,
        kv_eviction_config={**options, "every": every, "protect": {"prompt": True}},
        max_num_batched_tokens=256,
    )
    engine.stats()
    num_tokens = 170 if is_v2 else 300
    names = engine.add(prompt, num_tokens), engine.add(is_left, 60)
    done = engine.run()
    served, left = (engine.served_as(name, done[name]) for name in names)
    assert not left.choices
    assert engine.stats()["trims"] == len(served.choices) >= (1 if is_v2 else 3)
    for choice in served.choices:
        assert all(torch.equal(head[: len(prompt)], torch.arange(len(prompt))) for layer in choice for head in layer)
    own = {key: value for key, value in options.items() if key != "decode"}
    policy = create_policy(name, {**own, "protect": {"first": len(prompt)}})
    decode = options.get("decode", policy.decodes[0])
    tiny_replay.verify(prompt, served, policy, len(prompt) + budget, block_size=32, decode=decode, every=every)


@pytest.mark.slow
def test_steady_state(tiny, same_on_both):
    """1,500 generated tokens on a budget of 256: no layer ever holds more than it was given, and nothing grows."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=256, kv_eviction_config={"decode": "cake"})
    worker = engine.connector.worker
    request = engine.add([(7 * i) % 250 for i in range(600)], 1500)
    steps = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        for held in worker.moving.held.values():
            steps += 1
            given = [-(-(count + worker.judging.config.policy.protected) // 32) for (count,) in held.counts]
            assert held.used.tolist() <= held.dealt.tolist() == given
            # Beside these, the block that is being filled.
            if engine.scheduler.requests:
                total = engine.num_free - engine.pool.get_num_free_blocks()
                assert total <= held.num_columns + 1 <= 256 // 32 + 2
    assert steps > 1400, request
    assert engine.is_idle()


def test_layers_may_keep_their_last_block_only(start_engine, replay: Replay, text_ids, same_on_both):
    """A layer of budget 0 whose window lies in the partial block gives all its full blocks back."""
    options = {"window": 8, "tau1": 0.2, "tau2": 0.2}
    engine: Engine = start_engine(kv_eviction="cake", kv_eviction_budget=10, kv_eviction_config=options)
    prompt = text_ids[7000:7340]
    (served,) = engine.served([prompt], 30)
    replay.verify(prompt, served, Cake(**options), 10, block_size=32)
    assert any(len(heads[0]) == 0 for heads in served.choices[0])
    assert engine.is_idle()
