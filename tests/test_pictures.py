"""Pictures in prompts: what stands for them is scored, evicted and cached like any other token, and can be kept whole.

What stock vLLM does with such models on CPUs is in docs/compatibility.md.
"""

from typing import Any

import pytest
import torch
from engine import Engine
from pictured_replay import PicturedReplay
from random_models import gates_of, numbers, save_random_gates
from random_pictures import BEGIN, END, IMAGE, picture, save_random_pictured
from ties import assert_same
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from cake_vllm.integration.worker.projections import _rotaries
from cake_vllm.policies import create_policy
from cake_vllm.policies.entries import Rotary

pytestmark = pytest.mark.engine

BUDGET, PAGE, BLOCK, CHUNK = 150, 32, 64, 256
COMMON = {
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 100,
    "block_size": BLOCK,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    "kv_eviction": "cake",
    "kv_eviction_budget": BUDGET,
}


@pytest.fixture(scope="module", params=[pytest.param("qwen2.5-vl", marks=pytest.mark.full), "qwen3-vl", "gemma3"])
def pictured(request, tmp_path_factory) -> tuple[str, str]:
    """A model's name, and its folder."""
    return request.param, save_random_pictured(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[str, str]:
    """One with M-RoPE."""
    return "qwen3-vl", save_random_pictured(tmp_path_factory.mktemp("qwen"), "qwen3-vl")


def prompt_of(name: str, seed: int, before: int, after: int, *pictures) -> dict[str, Any]:
    """Text, pictures, and text."""
    mark = [BEGIN] if name.startswith("gemma") else [BEGIN, IMAGE, END]
    tokens = [*numbers(seed, before), *mark * len(pictures), *numbers(seed + 1, after)]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": list(pictures)}}


def verify(engine: Engine, replay: PicturedReplay, prompts: list[dict], num_tokens: int, policy: str, **ways) -> None:
    """Serves prompts together, and shows that each is what the replay makes of it."""
    asked = ways.pop("extra_args", {"kv_eviction": policy})
    names = [engine.add(prompt, num_tokens, extra_args=asked) for prompt in prompts]
    done = engine.run()
    for name, prompt in zip(names, prompts, strict=True):
        seen = engine.outputs[name].prompt_token_ids
        assert seen.count(IMAGE) > len(prompt["multi_modal_data"]["image"])
        replay.see(seen, prompt["multi_modal_data"]["image"], IMAGE)
        served = engine.served_as(name, done[name])
        replay.verify(seen, served, create_policy(policy, {}), BUDGET, BLOCK, page_size=PAGE, decode="window", **ways)


def test_as_replayed(start_engine, pictured):
    """By layer and by head, prompts and what is generated, in a batch: pictures early, two in a row, and one in whose
    last rows the window begins, which ends in a few tokens of text.
    """
    name, model = pictured
    engine = start_engine(model, **COMMON, kv_eviction_config={"decode": "window"})
    replay = PicturedReplay(model)
    prompts = [
        prompt_of(name, 300, 120, 90, picture(1, 256, 192)),
        prompt_of(name, 302, 10, 200, picture(2, 192, 256), picture(3, 64, 64)),
        prompt_of(name, 304, 180, 12, picture(4, 256, 192)),
    ]
    for policy in ("cake", "layer-defensivekv"):
        engine.forget_prefixes()
        verify(engine, replay, prompts, 24, policy)


def test_progressive(start_engine, qwen, same_on_both):
    """A picture that begins in one chunk and ends in the next, by when the first has been evicted."""
    name, model = qwen
    settings = COMMON | {"max_num_batched_tokens": CHUNK}
    engine = start_engine(model, **settings, kv_eviction_config={"prefill": "progressive", "decode": "window"})
    prompt, replay = prompt_of(name, 310, 230, 330, picture(1, 320, 256)), PicturedReplay(model)
    for policy in ("cake", "layer-defensivekv"):
        engine.forget_prefixes()
        verify(engine, replay, [prompt], 24, policy, chunk=CHUNK)


def test_prefix_hits(start_engine, qwen, same_on_both):
    """With the same picture up to the window, also where it begins inside the picture; with another of the same size
    up to the picture.
    """
    name, model = qwen
    engine = start_engine(model, **COMMON, kv_eviction_config={"decode": "window"})
    for before, after, num_hits in ((130, 120, 256), (130, 12, 192)):
        prompts = [prompt_of(name, 320, before, after, picture(seed, 320, 256)) for seed in (1, 2)]
        cold = []
        for prompt in prompts:
            engine.forget_prefixes()
            cold += engine.runs([prompt], 12)
        assert cold[0].tokens != cold[1].tokens
        # The other picture's blocks are there.
        for prompt, run, hits in zip(
            reversed(prompts), reversed(cold), (num_hits, before // BLOCK * BLOCK), strict=True
        ):
            request = engine.add(prompt, 12, logprobs=2, detokenize=False)
            engine.run()
            assert engine.num_cached(request) == hits
            assert_same(engine.run_of(request), run)


@pytest.mark.parametrize("kind", [pytest.param("qwen2.5-vl", marks=pytest.mark.full), "qwen3-vl"])
def test_gates_read_keys_at_positions_in_three_dimensions(start_engine, tmp_path, kind, same_on_both):
    """M-RoPE turns the same pairs of channels as other rotary embeddings, each by one of the three positions."""
    model = save_random_pictured(tmp_path, kind)
    save_random_gates(model)
    engine = start_engine(model, **COMMON, kv_eviction_config={"decode": "window"})
    layer = engine.connector.worker.layers.target[0]
    module = _rotaries[layer.module]()
    key = torch.ones(200, 32)
    turned = module(torch.randint(4000, (3, 200)), key.clone(), key.clone())[1]
    assert layer.rotary == Rotary(32)
    (norms,), _ = layer.rotary.parts(turned)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    assert (turned - turned[:1]).abs().amax(dim=0).min() > 0.1
    replay = PicturedReplay(model, gates=gates_of(model))
    verify(engine, replay, [prompt_of(kind, 350, 100, 60, picture(1, 320, 256))], 24, "gate")


class Holdings:
    """Which positions each head of each layer holds of the evicted requests, by what they were told to keep."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch):
        self._positions: dict[str, dict[tuple[int, int], list[int]]] = {}
        self._ends: dict[str, int] = {}
        self._told = engine.connector.worker.on_evicted
        patch.setattr(engine.connector.worker, "on_evicted", self._follow)

    def _follow(self, what, choice, eviction) -> None:
        self._told(what, choice, eviction)
        assert eviction.is_traded
        of_request = self._positions.setdefault(what.req_id, {})
        for layer, (reads, chosen) in enumerate(zip(choice.reads, choice.chosen, strict=True)):
            for head, (kept, missing) in enumerate(zip(chosen, reads.missing_tokens, strict=True)):
                held = of_request.get((layer, head), [])
                held = [*held, *range(self._ends.get(what.req_id, 0), what.end)]
                assert len(held) == reads.length - missing
                left = [held[index - missing] for index in kept.tolist()]
                of_request[layer, head] = [*left, *held[reads.full_len - missing :]]
        self._ends[what.req_id] = what.end

    def of(self, name: str) -> list[list[int]]:
        """Of a request, all heads."""
        return next(list(held.values()) for key, held in self._positions.items() if key.rsplit("-", 1)[0] == name)


WAYS = {
    "exact": ({"decode": "window"}, {}),
    "by the current token": ({"decode": "cake"}, {}),
    "progressive": ({"prefill": "progressive", "decode": "window"}, {"max_num_batched_tokens": CHUNK}),
    "cut": (
        {"min_tokens": BUDGET},
        {"kv_eviction_budget": "auto", "num_gpu_blocks_override": 22, "max_model_len": 1024},
    ),
}


@pytest.mark.parametrize("way", [pytest.param("exact", marks=pytest.mark.full), *list(WAYS)[1:]])
def test_placeholders_stay(start_engine, qwen, way, monkeypatch, same_on_both):
    """In all heads and to the end, of requests that ask for it, and of no other."""
    name, model = qwen
    config, settings = WAYS[way]
    engine = start_engine(model, **(COMMON | settings), kv_eviction_config=config)
    held, prompt = Holdings(engine, monkeypatch), prompt_of(name, 330, 230, 200, picture(1, 320, 256))
    wishes: list[dict[str, Any]] = [{"kv_eviction_config": {"protect": {"media": of}}} for of in (True, False)]
    if way != "by the current token":
        wishes.append(wishes[0] | {"kv_eviction": "layer-defensivekv"})
    engine.stats()
    names = [engine.add(prompt | {"cache_salt": str(salt)}, 80, extra_args=wish) for salt, wish in enumerate(wishes)]
    engine.run()
    stats = engine.stats()
    assert stats["failures"] == 0
    assert stats.get("cuts", 0) >= (2 if way == "cut" else 0)
    tokens = engine.outputs[names[0]].prompt_token_ids
    placeholders = {place for place, token in enumerate(tokens) if token == IMAGE}
    assert len(placeholders) == 80
    for request, wish in zip(names, wishes, strict=True):
        is_whole = [placeholders <= set(positions) for positions in held.of(request)]
        assert all(is_whole) if wish["kv_eviction_config"]["protect"]["media"] else not any(is_whole)
        assert all(len(positions) < len(tokens) + 40 for positions in held.of(request))


def test_a_budget_that_cannot_hold_them_is_refused(start_engine, qwen, same_on_both):
    """By the sentence that HTTP's 400 has; a fraction grows to what they need."""
    name, model = qwen
    engine = start_engine(model, **COMMON, kv_eviction_config={"decode": "off"})
    prompt = prompt_of(name, 340, 100, 200, picture(1, 320, 256))
    kept: dict[str, Any] = {"kv_eviction_config": {"protect": {"media": True}}}
    message = "kv_eviction_budget 100 is too little for the 80 tokens of pictures .* it must be 113 tokens or more"
    with pytest.raises(VLLMValidationError, match=message):
        engine.add(prompt, 4, extra_args=kept | {"kv_eviction_budget": 100})
    assert not engine.scheduler.requests
    engine.stats()
    # Its picture was not sent, and is not taken for sent.
    engine.generate([prompt], 4, extra_args=kept | {"kv_eviction_budget": 0.1})
    # A page more than is asked for, and the partial block.
    assert all(113 <= tokens <= 113 + PAGE + 382 % BLOCK for tokens in engine.stats()["kept_tokens"])


def test_two_ways_and_chunks(tmp_path, no_engine):
    """Gemma 3's pictures, unless there are none, and prefill in chunks that are evicted."""
    model = save_random_pictured(tmp_path, "gemma3")
    settings = COMMON | {"kv_eviction_config": {"prefill": "progressive"}}
    with pytest.raises(ValueError, match="does not work together with prefill progressive for Gemma3ForConditional"):
        EngineArgs(model, **settings).create_engine_config()
    EngineArgs(model, **(settings | {"limit_mm_per_prompt": {"image": 0}})).create_engine_config()
