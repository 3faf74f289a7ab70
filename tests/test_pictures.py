"""Pictures in prompts: what stands for them is scored, evicted and cached like any other token, and can be kept whole.

What stock vLLM does with such models on CPUs is in docs/compatibility.md.
"""

from typing import Any

import pytest
from engine import Engine
from pictured_replay import PicturedReplay
from random_models import numbers
from random_pictures import BEGIN, END, IMAGE, KINDS, picture, save_random_pictured

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine

BUDGET, PAGE, BLOCK = 150, 32, 64
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


@pytest.fixture(scope="module", params=KINDS)
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
    """By layer and by head, prompts and what is generated, in a batch: pictures early and late, one and two."""
    name, model = pictured
    engine = start_engine(model, **COMMON, kv_eviction_config={"decode": "window"})
    replay = PicturedReplay(model)
    prompts = [
        prompt_of(name, 300, 120, 200, picture(1, 256, 192)),
        prompt_of(name, 302, 10, 260, picture(2, 192, 256), picture(3, 64, 64)),
    ]
    for policy in ("cake", "layer-defensivekv"):
        engine.forget_prefixes()
        verify(engine, replay, prompts, 40, policy)
