"""Gates: what an entry says of itself, what is learnt from a repetition, and how it is served."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine import Engine
from random_models import gates_of, numbers, save_random_gates, save_random_model
from replay import Replay
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope

from cake_vllm.__main__ import main
from cake_vllm.integration.gates import GateFile
from cake_vllm.integration.worker import projections
from cake_vllm.integration.worker.gates import WorkerGates
from cake_vllm.policies import LayerInputs, create_policy
from cake_vllm.policies.entries import LinearGate, Ridge, Rotary, features, overlap
from cake_vllm.tools import calibrate

WINDOW = 4


def turned(keys: torch.Tensor, rotary: Rotary, positions: range) -> torch.Tensor:
    """``[Hkv, S, D]`` keys turned by their positions, pair by pair; each pair has a speed of its own."""
    keys = keys.clone()
    half = rotary.size // 2
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if rotary.neighbours else (pair, pair + half)
        for place, position in enumerate(positions):
            angle = position * 1.3**-pair
            a, b = keys[:, place, first].clone(), keys[:, place, second].clone()
            keys[:, place, first] = a * math.cos(angle) - b * math.sin(angle)
            keys[:, place, second] = b * math.cos(angle) + a * math.sin(angle)
    return keys


@pytest.mark.parametrize("rotary", [Rotary(16), Rotary(16, True), Rotary(6), Rotary(6, True), Rotary()])
def test_features_do_not_depend_on_positions(rotary):
    keys, values = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    found = features(keys, values, rotary)
    assert found.shape == (2, 9, 2 * 16 + 2 - rotary.size // 2)
    for first in (0, 1000):
        moved = features(turned(keys, rotary, range(first, first + 9)), values, rotary)
        torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-5)
    if rotary.size:
        other = Rotary(rotary.size, not rotary.neighbours)
        moved = features(turned(keys, rotary, range(50, 59)), values, other)
        assert not torch.allclose(moved, features(keys, values, other), atol=0.1)


def log_worth(gate: LinearGate, head: int, key: list[float], value: list[float]) -> float:
    """What a gate says of an entry, number by number; pairs are the halves'."""
    half = gate.rotary.size // 2
    parts = [math.hypot(key[j], key[j + half]) for j in range(half)] + key[2 * half :] + value
    parts += [math.log(max(math.hypot(*vector), 1e-4)) for vector in (key, value)]
    weights = gate.weight[head].tolist()
    return sum(w * x for w, x in zip(weights, parts, strict=True)) + float(gate.bias[head])


def attention(inputs: LayerInputs, head: int, query: int) -> list[float]:
    """Of the ``query``-th of the last queries, over all keys up to its own."""
    keys = inputs.keys[head // 2].tolist()
    visible = len(keys) - inputs.queries.shape[1] + query + 1
    own = inputs.queries[head, query].tolist()
    weights = [math.exp(sum(a * b for a, b in zip(own, key, strict=True)) * inputs.scale) for key in keys[:visible]]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("evidence", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("size", [8, 4, 0])
def test_a_gates_score_is_its_formula(evidence, size):
    """``exp(min(gate, 0)) * (1 + evidence * e / mean(e))``."""
    torch.manual_seed(1)
    length = 100
    gate = LinearGate.random(2, 8, Rotary(size))
    # Some of the entries are worth more than the gates' most.
    gate = replace(gate, bias=torch.tensor([1.0, -3.0]))
    policy = create_policy("gate", {"window": WINDOW, "evidence": evidence})
    assert policy.num_queries == (WINDOW if evidence else 0)
    inputs = LayerInputs(
        2 * torch.randn(4, policy.num_queries, 8),
        2 * torch.randn(2, length, 8),
        8**-0.5,
        values=torch.randn(2, length, 8),
        gate=gate,
    )
    prefix, capped = length - WINDOW, 0
    expected = np.empty((2, prefix))
    for head in range(2):
        worth = [
            log_worth(gate, head, inputs.keys[head, i].tolist(), inputs.values[head, i].tolist()) for i in range(prefix)
        ]
        capped += sum(log > 0 for log in worth)
        worth = [math.exp(min(log, 0)) for log in worth]
        if evidence:
            peak = [0.0] * prefix
            for query_head, query in itertools.product((2 * head, 2 * head + 1), range(WINDOW)):
                row = attention(inputs, query_head, query)
                peak = [max(a, b) for a, b in zip(peak, row, strict=False)]
            peak = [0.0] * 4 + peak[4:]
            pooled = [sum(peak[max(i - 2, 0) : i + 3]) / 5 for i in range(prefix)]
            seen = [max(pooled[i - j] * 2 ** (-j / 12) for j in range(min(i, 63) + 1)) for i in range(prefix)]
            seen = [max(one, sum(seen) / prefix) for one in seen]
            worth = [one * (1 + evidence * e / (sum(seen) / prefix)) for one, e in zip(worth, seen, strict=True)]
        expected[head] = worth
    assert capped
    np.testing.assert_allclose(policy.score(inputs).indicator, expected, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 60, 100])
def test_kvzips_score_is_the_largest_attention_of_the_repetition(chunk):
    """Chunk by chunk, of all queries behind the context; the repetition itself goes first."""
    torch.manual_seed(2)
    length, context = 100, 40
    policy = create_policy("kvzip", {"window": WINDOW, "context": context})
    everything = LayerInputs(2 * torch.randn(4, length, 8), 2 * torch.randn(2, length, 8), 8**-0.5)
    notes = None
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        places = policy.noted(start, end)
        assert list(places) == [place for place in range(start, end) if place >= context]
        seen = replace(everything, queries=everything.queries[:, list(places)], keys=everything.keys[:, :end])
        notes = policy.note(seen, places, notes)
    inputs = replace(everything, queries=everything.queries[:, -WINDOW:], notes=notes)
    expected = np.zeros((2, context))
    for query_head, query in itertools.product(range(4), range(context, length)):
        row = attention(everything, query_head, query)[:context]
        expected[query_head // 2] = np.maximum(expected[query_head // 2], row)
    indicator = policy.score(inputs).indicator
    np.testing.assert_allclose(indicator[:, :context], expected, rtol=1e-4)
    assert indicator.shape == (2, length - WINDOW)
    assert (indicator[:, context:] < expected.min()).all()


def test_without_a_repetition_the_window_judges_as_kvzip():
    torch.manual_seed(3)
    policy = create_policy("kvzip", {"window": WINDOW})
    assert not policy.takes_notes
    inputs = LayerInputs(torch.randn(4, WINDOW, 8), torch.randn(2, 30, 8), 8**-0.5)
    rows = [[attention(inputs, head, query)[: 30 - WINDOW] for query in range(WINDOW)] for head in range(4)]
    expected = np.array(rows).reshape(2, 2 * WINDOW, -1).max(axis=1)
    np.testing.assert_allclose(policy.score(inputs).indicator, expected, rtol=1e-4)


def test_ridge_regression_by_sums_is_that_of_all_rows():
    """In two parts, with features of very different sizes and one that never changes."""
    torch.manual_seed(4)
    found = torch.randn(3, 500, 6, dtype=torch.float64) * torch.tensor([1, 100, 0.01, 1, 3, 0]) + 5
    target = (found @ torch.randn(3, 6, 1, dtype=torch.float64)).squeeze(-1) + torch.randn(3, 500)
    ridge = Ridge(3, 6, torch.device("cpu"))
    for part in (slice(200), slice(200, None)):
        ridge.add(found[:, part].float(), target[:, part].float())
    weight, bias = ridge.solve(30.0)
    for head in range(3):
        size = found[head].std(dim=0, unbiased=False)
        size[5] = 1
        scaled, level = (found[head] - found[head].mean(dim=0)) / size, target[head].mean()
        rows = torch.cat([scaled, 30.0**0.5 * torch.eye(6)])
        wanted = torch.linalg.lstsq(rows, torch.cat([target[head] - level, torch.zeros(6)])[:, None]).solution
        expected = (scaled @ wanted).squeeze(-1) + level
        ours = found[head] @ weight[head].double() + bias[head]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-2)
        assert weight[head, 5] == 0
    torch.testing.assert_close(ridge.level, target.mean(dim=1).float())


def test_overlap_is_of_all_layers_and_heads():
    scores = [torch.tensor([[9.0, 1.0, 8.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    others = [torch.tensor([[1.0, 9.0, 8.0, 2.0]]), torch.tensor([[7.0, 4.0]])]
    assert overlap(scores, scores, 0.5) == 1
    # Best three: 9, 8 and 4; and 9, 8 and 7.
    assert overlap(scores, others, 0.5) == pytest.approx(1 / 3)


def beside(*siblings: torch.nn.Module | None) -> torch.nn.Module:
    """A module in which an attention layer of 32 channels has these beside it; a model of one such layer."""
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.head_size, attention.dtype, attention.layer_name = 32, torch.float32, "attn"
    attention.num_heads = attention.head_size_v = 0
    parent = torch.nn.Module()
    parent.attn = attention
    for index, sibling in enumerate(siblings):
        setattr(parent, f"sibling{index}", sibling)
    return parent


@pytest.fixture
def rope():
    """vLLM's own rotary embeddings of 32 channels."""
    with set_current_vllm_config(VllmConfig()):
        yield lambda is_neox_style=True, **more: get_rope(32, 1024, is_neox_style, {"rope_theta": 10000.0, **more})


def rotary_of(layer):
    return projections.rotary_embedding(layer.attn, layer.attn.head_size, layer.attn.dtype)


def rotation_of(layer):
    return projections.rotation(layer.attn, rotary_of(layer), layer.attn.head_size, layer.attn.dtype)


KINDS = {
    "default": ({}, Rotary(32)),
    "neighbours": ({"is_neox_style": False}, Rotary(32, neighbours=True)),
    "part": ({"partial_rotary_factor": 0.25}, Rotary(8)),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, Rotary(32)),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, Rotary(32)),
    "sections": ({"rope_type": "default", "mrope_section": (4, 6, 6)}, Rotary(32)),
    "interleaved sections": ({"mrope_section": (4, 6, 6), "mrope_interleaved": True}, Rotary(32)),
}


@pytest.mark.parametrize(("options", "expected"), KINDS.values(), ids=KINDS)
def test_rotary_embeddings_are_tried(rope, options, expected):
    layer = beside(rope(**options))
    projections._remember_rotaries(layer)
    assert rotary_of(layer) == expected


SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [kind for kind, _ in KINDS.values()] + [*SCALED.values()], ids=[*KINDS, *SCALED])
def test_by_how_much_keys_are_turned(rope, options, dtype):
    """A key of one position, moved to others, is what the embedding itself makes of it there; far away, too."""
    layer = beside(module := rope(**options).to(dtype))
    layer.attn.dtype = dtype
    projections._remember_rotaries(layer)
    rotation = rotation_of(layer)
    # Of the cache that vLLM has made: cosines and sines of the angles at the first position.
    cos, sin = module.cos_sin_cache[1].double().chunk(2)
    torch.testing.assert_close(rotation.speeds, torch.atan2(sin, cos), rtol=0.01, atol=1e-4)
    key, positions = torch.randn(1, 32).repeat(4, 1).to(dtype), torch.tensor([100, 101, 350, 900])
    there = module(positions, key.clone(), key.clone())[1].view_as(key).float()
    moved = rotation.turned(there[:1].expand(4, -1), positions - 100)
    bound = 1e-3 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(moved, there, rtol=0, atol=bound)
    torch.testing.assert_close(rotation.norms(moved), rotation.norms(there), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_as_exact_as_they_are_looked_from_afar(dtype):
    """The farther a model's positions go, the better: a whole turn is never lost."""
    with set_current_vllm_config(VllmConfig()):
        module = get_rope(32, 2**17, True, {"rope_theta": 1e6}, dtype=dtype)
    layer = beside(module)
    layer.attn.dtype = dtype
    projections._remember_rotaries(layer)
    off = (rotation_of(layer).speeds - 1e6 ** -(torch.arange(0, 32, 2) / 32).double()).abs() * 2**16
    assert off.max() < 0.05


class SlowingRotaryEmbedding(torch.nn.Module):
    """Turns all pairs, from place to place by less."""

    rotary_dim = 32

    def forward(self, positions, query, key):
        angle = positions.float().sqrt().unsqueeze(-1)
        first, second = key.chunk(2, dim=-1)
        return query, torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )


class DoublingRotaryEmbedding(torch.nn.Module):
    """Turns nothing, and makes keys longer from place to place."""

    rotary_dim = 32

    def forward(self, positions, query, key):
        return query, key * (1 + positions.unsqueeze(-1))


def test_whose_rotary_embedding_it_is(rope):
    """Layers share one; some have none; one may lie further up; and where it is unknown, gates are refused."""
    shared = rope()
    model = torch.nn.ModuleList([beside(shared), beside(None), beside(shared)])
    projections._remember_rotaries(model)
    found = [rotary_of(layer) for layer in model]
    assert found == [Rotary(32), Rotary(), Rotary(32)]
    model = beside()
    model.rotary_emb, model.layers = rope(is_neox_style=False), torch.nn.ModuleList([beside()])
    projections._remember_rotaries(model)
    assert rotary_of(model.layers[0]) == Rotary(32, neighbours=True)
    alone = beside()
    projections._remember_rotaries(alone)
    assert rotary_of(alone) == Rotary()
    elsewhere = torch.nn.ModuleList([beside(), torch.nn.Sequential(rope())])
    projections._remember_rotaries(elsewhere)
    for layer in (elsewhere[0], beside()):
        with pytest.raises(ValueError, match="the rotary embedding of attn cannot be found"):
            rotary_of(layer)
    other = beside(DoublingRotaryEmbedding())
    projections._remember_rotaries(other)
    with pytest.raises(ValueError, match=r"of attn \(DoublingRotaryEmbedding\) does more than to turn pairs"):
        rotary_of(other)


def test_angles_that_are_no_angles(rope):
    """Layers without an embedding, and one whose angles do not grow alike."""
    none, slowing = beside(), beside(SlowingRotaryEmbedding())
    for layer in (none, slowing):
        projections._remember_rotaries(layer)
    with pytest.raises(ValueError, match="no rotary embedding turns those of attn: choose another policy"):
        rotation_of(none)
    assert rotary_of(slowing) == Rotary(32)
    with pytest.raises(ValueError, match=r"attn \(SlowingRotaryEmbedding\) turns them by other angles from place to"):
        rotation_of(slowing)


@pytest.mark.engine
def test_an_embedding_that_is_there_and_passed_by(start_engine, tmp_path, same_on_both):
    """Cohere 2 has one in every layer, and uses it in those with windows: refused at the start; a request that asks for
    it keeps everything.
    """
    kinds = ["sliding_attention", "full_attention"] * 2
    fields = {"layer_types": kinds, "sliding_window": 64, "hidden_size": 128, "num_key_value_heads": 4}
    model = save_random_model(tmp_path, "cohere2", "Cohere2ForCausalLM", num_hidden_layers=4, **fields)
    settings = {"skip_tokenizer_init": True, "max_model_len": 1024, "kv_eviction_budget": 100}
    with pytest.raises(ValueError, match=r"no rotary embedding turns those of model\.layers\.1\.self_attn"):
        start_engine(model, kv_eviction="triattention", **settings)
    # A process of its own would have ended.
    ensure_kv_transfer_shutdown()
    engine: Engine = start_engine(model, kv_eviction="cake", **settings)
    prompt = numbers(66, 300)
    expected = engine.generate([prompt], 8, extra_args={"kv_eviction": "none"})
    engine.stats()
    assert engine.generate([prompt], 8, extra_args={"kv_eviction": "triattention"}) == expected
    assert engine.stats()["failures"] == 1
    assert engine.generate([prompt], 8) != expected


class Words:
    """A tokenizer of one token for each character."""

    chat_template = "{{ messages }}"
    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<user>{messages[0]['content']}</user><answer>"


def test_long_prompts_are_repeated_in_pieces():
    prompt = numbers(3, 250)
    requests = list(calibrate.repetitions(Words(), [prompt, prompt[:90]], piece=100))
    assert [(request.context, request.is_last) for request in requests] == [
        (0, False),
        (0, False),
        (0, True),
        (1, True),
    ]
    for request, start in zip(requests, (0, 100, 200), strict=False):
        assert request.tokens[:250] == prompt
        piece = prompt[start : start + 100]
        assert request.tokens[-len(piece) :] == piece
        between = request.tokens[250 : -len(piece)]
        lead = prompt[start - 8 : start] if start else []
        text = calibrate.REPEAT_FROM if start else calibrate.REPEAT
        assert between == [*map(ord, text), *lead, *map(ord, "</user><answer>")]
    Words.chat_template, template = None, Words.chat_template
    assert calibrate.assistant_turn(Words()) == "\n\n"
    Words.chat_template = template


def test_prompts_come_from_all_over_the_text():
    text = "".join(map(chr, range(1000, 9000)))
    prompts = calibrate.cut(Words(), text, 4000, 500)
    assert [len(prompt) for prompt in prompts] == [500] * 8
    assert [prompt[0] - 1000 for prompt in prompts] == list(range(0, 8000, 1000))
    assert [len(prompt) for prompt in calibrate.cut(Words(), text[:700], 4000, 500)] == [350, 350]
    with pytest.raises(
        ValueError, match="the text has 200 tokens, too few to learn from: give a longer one with --text"
    ):
        calibrate.cut(Words(), text[:200], 4000, 500)


@pytest.fixture(scope="module")
def replay(tiny_model) -> Replay:
    return Replay(tiny_model, gates=gates_of(tiny_model))


@pytest.mark.engine
@pytest.mark.parametrize("evidence", [1.0, 0.0])
@pytest.mark.parametrize(
    ("prefill", "decode"), [("exact", "window"), ("progressive", "off"), ("progressive", "window")]
)
def test_served_tokens_equal_replay(tiny, replay, prefill, decode, evidence, is_v2):
    """Prompts, chunks and generated tokens are judged by the same gates."""
    options = {"prefill": prefill, "decode": decode}
    engine: Engine = tiny(
        kv_eviction="cake", kv_eviction_budget=150, kv_eviction_config=options, max_num_batched_tokens=256
    )
    engine.forget_prefixes()
    engine.stats()
    prompt, knobs = numbers(63, 900), {"evidence": evidence}
    wish = {"kv_eviction": "gate", "kv_eviction_config": json.dumps(knobs)}
    (served,) = engine.served([prompt], 40 if is_v2 else 110, extra_args=wish)
    chunk = 256 if prefill == "progressive" else None
    replay.verify(prompt, served, create_policy("gate", knobs), 150, block_size=32, decode=decode, chunk=chunk)
    stats = engine.stats()
    assert stats["failures"] == 0
    assert stats["trims"] > 0 or decode == "off"
    other = create_policy("gate", {"evidence": 5.0})
    with pytest.raises(AssertionError):
        replay.verify(prompt, served, other, 150, block_size=32, decode=decode, chunk=chunk)


@pytest.mark.engine
def test_a_repetition_is_served_as_replayed(tiny, replay, same_on_both):
    """The prompt carries it: what lies behind the context goes first."""
    engine: Engine = tiny(
        kv_eviction="cake", kv_eviction_budget=150, kv_eviction_config={"decode": "off"}, max_num_batched_tokens=256
    )
    engine.forget_prefixes()
    context = numbers(64, 400)
    prompt, knobs = [*context, *numbers(65, 9), *context], {"context": 400}
    wish = {"kv_eviction": "kvzip", "kv_eviction_config": json.dumps(knobs)}
    (served,) = engine.served([prompt], 12, extra_args=wish)
    replay.verify(prompt, served, create_policy("kvzip", knobs), 150, block_size=32)
    (chosen,) = served.choices
    behind = [position for layer in chosen for head in layer for position in head.tolist() if position >= 400]
    # Rounding to pages leaves room for some.
    assert len(behind) < 0.3 * sum(len(head) for layer in chosen for head in layer)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_stages_take_what_is_theirs(tiny_model, world_size):
    """Two KV heads: both, one of them, or one that two ranks share; layers by their place in the model."""
    file = gates_of(tiny_model)
    model = EngineArgs(model=tiny_model, skip_tokenizer_init=True).create_model_config()
    num_heads, policy = max(2 // world_size, 1), create_policy("gate", {})
    layers = [
        SimpleNamespace(
            name=f"model.layers.{index}.attn", impl=SimpleNamespace(num_kv_heads=num_heads), rotary=Rotary(32)
        )
        for index in (2, 3)
    ]
    for rank in range(world_size):
        gates = WorkerGates(policy, model, layers, SimpleNamespace(rank_in_group=rank, world_size=world_size))
        heads = {1: [0, 1], 2: [rank], 4: [rank // 2]}[world_size]
        for row, layer in enumerate((2, 3)):
            assert torch.equal(gates.of(policy, row).weight, file.weight[layer, heads])
            assert torch.equal(gates.of(policy, row).bias, file.bias[layer, heads])
    layers[0].rotary = Rotary(16)
    with pytest.raises(ValueError, match=r"made for Rotary\(size=32.*has Rotary\(size=16.*: make them with"):
        WorkerGates(policy, model, layers, SimpleNamespace(rank_in_group=0, world_size=1))


@pytest.mark.engine
def test_gates_of_another_model_are_refused(tiny_model, tmp_path, monkeypatch, same_on_both):
    """And missing ones, before any weight is loaded, with the command that makes them."""
    from cake_vllm import LLM

    def start(**config):
        settings = {"kv_eviction": "gate", "kv_eviction_budget": 100, "kv_eviction_config": config}
        LLM(tiny_model, skip_tokenizer_init=True, **settings)

    other = save_random_model(tmp_path / "other", "llama", "LlamaForCausalLM", num_hidden_layers=4, seed=1)
    theirs = save_random_gates(other, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=rf"gates of another model \({other}\): .*cake-vllm calibrate {tiny_model}"):
        start(gates=str(theirs))
    with pytest.raises(ValueError, match=rf"none at .*: make them with: cake-vllm calibrate {tiny_model} --out \S+no$"):
        start(gates=str(tmp_path / "no"))
    (tmp_path / "text").write_text("no gates")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        start(gates=str(tmp_path / "text"))
    with pytest.raises(ValueError, match="is no file of gates"):
        start(gates=f"{tiny_model}/model.safetensors")
    monkeypatch.setenv("CAKE_VLLM_GATES", str(tmp_path))
    with pytest.raises(ValueError, match=rf"there are none at {tmp_path}/\w+.safetensors: .*calibrate {tiny_model}$"):
        start()


@pytest.mark.engine
def test_a_request_names_no_files_and_needs_gates(tiny, tmp_path, monkeypatch, same_on_both):
    engine: Engine = tiny(
        kv_eviction="cake", kv_eviction_budget=150, kv_eviction_config={"decode": "off"}, max_num_batched_tokens=256
    )
    wish = {"kv_eviction": "gate", "kv_eviction_config": json.dumps({"gates": str(tmp_path / "g")})}
    with pytest.raises(VLLMValidationError, match="kv_eviction_config: gates is for the server to choose"):
        engine.add(numbers(1, 300), 4, extra_args=wish)
    monkeypatch.setenv("CAKE_VLLM_GATES", str(tmp_path))
    with pytest.raises(
        VLLMValidationError, match=r"the policy gate needs gates of .*: make them with: cake-vllm calibrate"
    ):
        engine.add(numbers(1, 300), 4, extra_args={"kv_eviction": "gate"})


@pytest.mark.engine
@pytest.mark.slow
def test_gates_of_a_real_model(model_dir, tmp_path, capsys, no_engine, same_on_both):
    """Three prompts, one of them held out: the gates name more of what the repetition needs than a constant does."""
    no_engine()
    out = tmp_path / "gates.safetensors"
    arguments = [
        "--tokens",
        "1500",
        "--length",
        "500",
        "--dtype",
        "float32",
        "--kv-cache-memory-bytes",
        "1G",
        "--out",
        str(out),
    ]
    assert main(["calibrate", model_dir, *arguments]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    gates = GateFile.read(out)
    quality = json.loads(gates.about["overlap"])
    for ours, constant in zip(quality["gates"], quality["a constant per head"], strict=True):
        assert ours > constant + 0.04
    assert gates.layers == tuple(range(30))
    assert set(gates.rotaries) == {Rotary(64)}
    assert gates.weight.shape == (30, 3, 98)
    assert out.stat().st_size < 100_000
