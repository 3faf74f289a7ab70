"""One manager answers for all layers, and the answers are those that vLLM's own coordinator gives."""

import itertools
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import vllm
from conftest import ROOT
from vllm import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from cake_vllm.integration.cache_manager import Cut, EvictingManager, ExactPrefixManager, check_integrity
from cake_vllm.integration.coordinator import LayerwiseCoordinator
from cake_vllm.integration.messages import Grant
from cake_vllm.integration.spec import EvictableSpec

LAYERS, BLOCK = 5, 16


class SeparateManager(EvictingManager):
    """A layer that enters its own blocks into the prefix cache."""

    def cache_blocks(self, *args, **kwargs) -> None:
        ExactPrefixManager.cache_blocks(self, *args, **kwargs)


@register_kv_cache_spec(manager_class=SeparateManager)
@dataclass(frozen=True, kw_only=True)
class SeparateSpec(EvictableSpec):
    """A layer for vLLM's own coordinator."""


def make_manager(caching: bool, spec: type[EvictableSpec] = EvictableSpec, num_blocks: int = 60) -> KVCacheManager:
    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    specs = [spec(**shape, layer_index=i, never_evicted_len=1000) for i in range(LAYERS)]
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    config = KVCacheConfig(LAYERS * num_blocks + 1, [], groups)
    return KVCacheManager(config, 1000, BLOCK, BLOCK, enable_caching=caching)


def make_request(name: str, prompt: list[int], caching: bool = True) -> Request:
    init_none_hash(sha256_cbor)
    hasher = get_request_block_hasher(BLOCK, sha256_cbor) if caching else None
    return Request(name, prompt, SamplingParams(max_tokens=50), None, block_hasher=hasher)


def history(manager: KVCacheManager, caching: bool) -> list:
    """What a manager answers to a random sequence of arrivals, steps and ends."""
    dice = random.Random(5)
    running: list[Request] = []
    seen: list = []
    for step in range(600):
        if dice.random() < 0.2:
            prompt = [1] * dice.randint(1, 200) + [step] * dice.randint(1, 100)
            request = make_request(str(step), prompt, caching)
            hits, num_hit, _ = manager.get_computed_blocks(request)
            new = manager.allocate_slots(
                request, request.num_tokens - num_hit, num_hit, hits, full_sequence_must_fit=True
            )
            seen.append((num_hit, new is None))
            if new is not None:
                request.num_computed_tokens = request.num_tokens
                running.append(request)
        for request in list(running):
            request.append_output_token_ids(step)
            new = manager.allocate_slots(request, 1)
            seen.append(new and [len(row) for row in new.blocks])
            if new is None or dice.random() < 0.05:
                manager.free(request)
                running.remove(request)
            else:
                request.num_computed_tokens += 1
        check_integrity(manager)
        seen.append(manager.block_pool.get_num_free_blocks())
    return seen


@pytest.mark.parametrize("caching", [False, True])
def test_answers_are_those_of_every_layer(caching, monkeypatch):
    ours = make_manager(caching)
    assert isinstance(ours.coordinator, LayerwiseCoordinator)
    with monkeypatch.context() as patch:
        patch.setattr(
            kv_cache_manager, "get_kv_cache_coordinator", kv_cache_manager.get_kv_cache_coordinator.__wrapped__
        )
        plain = make_manager(caching, SeparateSpec)
    assert not isinstance(plain.coordinator, LayerwiseCoordinator)
    # The order in which prefixes are forgotten is part of what the layers decide together.
    for layer in plain.coordinator.single_type_managers:
        layer.layers = plain.coordinator.single_type_managers
    answers = history(ours, caching)
    assert answers == history(plain, caching)
    arrivals = [answer for answer in answers if isinstance(answer, tuple)]
    assert any(refused for _, refused in arrivals), "the pool was never full"
    assert any(num_hit for num_hit, _ in arrivals) == caching


def test_a_prefix_is_hit_while_all_its_blocks_are_there():
    """A block of one layer is handed out again while the first layer's is not: forgotten, also for good."""
    manager = make_manager(caching=True, num_blocks=20)
    first, *_, last = manager.coordinator.single_type_managers
    prompt = list(range(6 * BLOCK))

    def arrive(name: str) -> tuple[Request, int]:
        request = make_request(name, prompt)
        hits, num_hit, _ = manager.get_computed_blocks(request)
        assert len({len(row) for row in hits.blocks}) == 1
        assert manager.allocate_slots(request, len(prompt) - num_hit, num_hit, hits) is not None
        request.num_computed_tokens = len(prompt)
        return request, num_hit

    owner, num_hit = arrive("owner")
    assert num_hit == 0
    reader, num_hit = arrive("reader")
    assert num_hit == 5 * BLOCK
    for layer in (first, last):
        assert layer.req_to_blocks["reader"][:5] == layer.req_to_blocks["owner"][:5]
    # An eviction gives up the last layer's row from its fourth block on, and the pool hands those blocks out again.
    manager.free(reader)
    row = last.req_to_blocks["owner"]
    given_up, row[3:] = row[3:], [manager.block_pool.null_block] * 3
    manager.block_pool.free_blocks(reversed(given_up))
    reader, num_hit = arrive("another reader")
    assert num_hit == 5 * BLOCK
    manager.free(reader)
    manager.block_pool.free_blocks(manager.block_pool.get_new_blocks(manager.block_pool.get_num_free_blocks()))
    second, num_hit = arrive("second")
    assert num_hit == 3 * BLOCK
    # Now its blocks stand for the prefix, and go on doing so without the first owner.
    manager.free(owner)
    third, num_hit = arrive("third")
    assert num_hit == 5 * BLOCK
    for layer in (first, last):
        assert layer.req_to_blocks["third"][:5] == layer.req_to_blocks["second"][:5]
    manager.free(second)
    manager.free(third)
    check_integrity(manager)


def test_turns_of_a_decoding_request_are_the_same_cuts():
    """Cuts that repeat take a short way, from which one of two runs is kept."""

    def states(remembers: bool) -> list:
        dice, null = random.Random(3), KVCacheBlock(0)
        null.is_null = True
        count = itertools.count(1)
        rows: list[list[KVCacheBlock]] = [[] for _ in range(LAYERS)]
        cut, seen, pages = Cut(rows), [], (4, None, 0, 2, 7)
        for end in range(8, 60):
            for row in rows:
                row += [KVCacheBlock(next(count)) for _ in range(end - len(row))]
            if dice.random() < 0.2:
                continue
            if dice.random() < 0.2:
                held = [len(own or []) + end - start for own, start in zip(cut.pages, cut.num_traded, strict=True)]
                pages = tuple(dice.choice([None, 0, min(3, most), most - 1]) for most in held)
            if not remembers:
                cut._last = (), 0
            lent = [KVCacheBlock(next(count)) for _ in range(LAYERS * 7)]
            cut.lent += lent
            grant = Grant(end, 64, False, tuple(block.block_id for block in lent), end)
            given_up, unused = cut.shrink(grant, pages, end, null)
            for blocks in ([given_up, unused], rows, [held or [] for held in cut.pages]):
                seen.append([[block.block_id for block in row] for row in blocks])
            seen.append(list(cut.num_traded))
        return seen

    assert states(remembers=True) == states(remembers=False)


def test_what_is_known_of_prefixes_does_not_grow():
    manager = make_manager(caching=True, num_blocks=20)
    (first, *_) = manager.coordinator.single_type_managers
    for turn in range(200):
        prompt = [turn] * 150
        request = make_request(str(turn), prompt)
        assert manager.allocate_slots(request, len(prompt)) is not None
        manager.free(request)
        assert len(first.columns) <= 2 * 20 + 1
        assert all(len(others) == LAYERS - 1 for others in first.columns.values())


SERVE = """
from cake_vllm import LLM
from vllm.v1.core import kv_cache_manager
import vllm
llm = LLM({model!r}, skip_tokenizer_init=True, dtype="float32", block_size=32, enforce_eager=True, max_model_len=2048,
          kv_cache_memory_bytes=2**26, kv_eviction="cake", kv_eviction_budget=100)
manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
print("RESULT", vllm.__file__, type(manager.coordinator).__name__,
      hasattr(kv_cache_manager.get_kv_cache_coordinator, "__wrapped__"),
      llm.generate({{"prompt_token_ids": list(range(1, 250)) * 3}}, use_tqdm=False)[0].outputs[0].token_ids[:4])
"""


@pytest.mark.slow
def test_the_patch_takes_the_wrappers_place(tiny_model, tmp_path):
    """It applies to the installed vLLM (to a copy of it), and a request is served without the wrapper."""
    installed = Path(vllm.__file__).parent
    copy = tmp_path / "vllm"
    for folder, _, files in os.walk(installed):
        here = copy / Path(folder).relative_to(installed)
        here.mkdir()
        for file in files:
            (here / file).symlink_to(Path(folder) / file)
    patch = ROOT / "patches" / "customize_coordinator.patch"
    names = [line.removeprefix("+++ b/") for line in patch.read_text().splitlines() if line.startswith("+++ b/")]
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)
    subprocess.run(["git", "apply", "-p1", patch], cwd=tmp_path, check=True)
    run = subprocess.run(
        [sys.executable, "-c", SERVE.format(model=tiny_model)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = next(line.split() for line in run.stdout.splitlines() if line.startswith("RESULT"))
    assert result[1:4] == [str(copy / "__init__.py"), "LayerwiseHybridKVCacheCoordinator", "False"]
