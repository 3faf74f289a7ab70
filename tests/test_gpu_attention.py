"""The GPU backends on the CPU, with Triton interpreted and FlashAttention's kernel in torch; on a GPU: see ``gpu/``."""

from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import elsewhere
import pytest
import torch
from elsewhere import (
    InterpretedTritonBackend,
    InterpretedTritonImpl,
    ReferenceFlashBackend,
    flash_in_torch,
)
from random_models import numbers, save_random_kind, save_random_model
from replay import Replay
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

from cake_vllm.integration.worker.attention import Rows
from cake_vllm.integration.worker.gpu_attention import (
    EvictingFlashImpl,
    EvictingFlashUnequalImpl,
    EvictingTritonImpl,
    side_by_side,
)
from cake_vllm.policies import create_policy


@pytest.mark.parametrize("value_size", [8, 6])
def test_side_by_side(value_size):
    layout = side_by_side(16, 8, value_size, torch.device("cpu"))
    cache = torch.arange(2 * 3 * 16 * (8.0 + value_size)).view(2, 3, 16, -1)
    flat = cache.view(2, 3, -1)
    assert torch.equal(flat[:, :, layout.key_index], cache[..., :8])
    assert torch.equal(flat[:, :, layout.value_index], cache[..., 8:])


@pytest.mark.parametrize(
    ("impl", "metadata", "ranges"),
    [
        (EvictingTritonImpl, TritonAttentionMetadata, "mm_prefix_range_tensor"),
        (EvictingFlashImpl, FlashAttentionMetadata, "mm_prefix_query_range_tensor"),
    ],
)
def test_evicted_rows_know_nothing_of_where_pictures_were(impl, metadata, ranges):
    """What says so counts rows, or queries, of the batch, and positions that moved."""
    of_batch = metadata(**{field.name: None for field in fields(metadata)} | {ranges: torch.tensor([[[3, 9]]])})
    rows = Rows(True, torch.zeros(1, 2, 4), torch.ones(1, 2), torch.arange(3), 2, 1)
    layer = SimpleNamespace(kv_cache=torch.zeros(1, 1, 16, 64))
    own = object.__new__(impl).with_rows(layer, of_batch, rows, rows.tables[0], rows.lengths[0])
    assert getattr(own, ranges) is None
    assert getattr(of_batch, ranges) is not None


@pytest.fixture
def same_elsewhere(start_engine):
    """See :func:`elsewhere.same_elsewhere`."""
    return partial(elsewhere.same_elsewhere, start_engine)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "has_sinks"),
    [
        pytest.param("cake", False, marks=pytest.mark.full),
        ("layer-defensivekv", False),
        pytest.param("layer-defensivekv", True, marks=pytest.mark.full),
    ],
)
@pytest.mark.interpreted
def test_triton_attention_interpreted(same_elsewhere, tmp_path, is_v2, name, has_sinks):
    """The same tokens and positions as the CPU backend, on a model small enough for an interpreter."""
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    model = (
        save_random_kind(tmp_path, "sinks")
        if has_sinks
        else save_random_model(tmp_path, "llama", "LlamaForCausalLM", num_hidden_layers=3)
    )
    prompts = [[(7 * i + j) % 250 for i in range(150 + 40 * j)] for j in range(2)]
    settings = {"kv_eviction": name, "kv_eviction_budget": 40, "kv_eviction_config": {"window": 8}}
    found = same_elsewhere(InterpretedTritonBackend, model, prompts, 8, max_model_len=256, **settings)
    assert set(found) == {InterpretedTritonImpl}


@pytest.fixture
def flash():
    with flash_in_torch():
        yield


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize("prefill", [pytest.param("exact", marks=pytest.mark.full), "progressive"])
@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_flash_attention_by_reference(same_elsewhere, tiny_model, flash, is_v2, name, prefill):
    """FLASH_ATTN's own code over a kernel in torch; prompts of all kinds, in batches that mix them."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100}
    settings["kv_eviction_config"] = {"window": 8, "prefill": prefill, "decode": "window"}
    lengths = (40, 150, 260) if is_v2 else (40, 400, 150, 600)
    prompts = [numbers(140 + length, length) for length in lengths]
    num_tokens = 6 if is_v2 else 70
    found = same_elsewhere(ReferenceFlashBackend, tiny_model, prompts, num_tokens, max_model_len=1024, **settings)
    assert found == [EvictingFlashImpl] * 4


@pytest.mark.engine
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "defensivekv"])
def test_flash_attention_beside_sliding_windows(same_elsewhere, tmp_path, flash, same_on_both, name):
    """With a soft cap on the logits, as Gemma 2 has both."""
    model = save_random_model(
        tmp_path, "gemma2", "Gemma2ForCausalLM", num_hidden_layers=4, sliding_window=64, attn_logit_softcapping=2.0
    )
    settings = {"kv_eviction": name, "kv_eviction_budget": 100}
    prompts = [numbers(150, 300), numbers(151, 40), numbers(152, 500)]
    impls = same_elsewhere(ReferenceFlashBackend, model, prompts, 40, max_model_len=1024, **settings)
    assert impls == [EvictingFlashImpl] * 4


@pytest.mark.engine
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "layer-defensivekv"])
def test_flash_attention_with_sinks(same_elsewhere, tmp_path, flash, same_on_both, name):
    """A call for each KV head where heads are owners: its kernel has one sink for each head of a sequence."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100, "kv_eviction_config": {"prefill": "progressive"}}
    prompts = [numbers(150, 300), numbers(151, 40), numbers(152, 500)]
    model = save_random_kind(tmp_path, "sinks")
    impls = same_elsewhere(ReferenceFlashBackend, model, prompts, 24, max_model_len=1024, **settings)
    assert impls == [EvictingFlashImpl] * 4


def save_unequal(path) -> str:
    """MiMo-V2 without experts: values half as long as keys, and windows with twice the KV heads, and sinks."""
    kinds, rope = ["full_attention", "sliding_attention"] * 2, {"rope_type": "default", "partial_rotary_factor": 0.5}
    fields = {
        "v_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": kinds,
        "mlp_layer_types": ["dense"] * 4,
        "sliding_window": 64,
        "rope_parameters": {kind: {**rope, "rope_theta": 1e4} for kind in kinds},
    }
    # The same, as the published configuration calls it.
    fields |= {
        "hybrid_layer_pattern": [int("sliding" in kind) for kind in kinds],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "sliding_window_size": 64,
        "add_swa_attention_sink_bias": True,
        "moe_layer_freq": [0] * 4,
        "layernorm_epsilon": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
        "swa_rope_theta": 1e4,
    }
    return save_random_model(path, "mimo_v2_flash", "MiMoV2FlashForCausalLM", **fields)


@pytest.mark.engine
@pytest.mark.parametrize("prefill", ["exact", pytest.param("progressive", marks=pytest.mark.full)])
def test_values_that_are_not_as_long_as_keys(start_engine, tmp_path, flash, same_on_both, prefill):
    """``FLASH_ATTN_DIFFKV``'s own code, as replayed: by layer, by head, and in full, in one batch."""
    model, budget = save_unequal(tmp_path), 100
    chunk = None if prefill == "exact" else 128
    engine = start_engine(
        model,
        kv_eviction="cake",
        kv_eviction_budget=budget,
        kv_eviction_config={"prefill": prefill, "decode": "window"},
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=chunk or 512,
    )
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl) for layer in layers} == {EvictingFlashUnequalImpl}
    # Of full attention: windows have twice the KV heads, and half the tokens in a block.
    size = engine.connector.worker.layers.grid.page_size * engine.connector.worker.layers.grid.per_block
    assert size == 32
    replay = Replay(model)
    requests = [(numbers(190, 420), "cake"), (numbers(191, 333), "layer-defensivekv"), (numbers(192, 60), "cake")]
    for batch in [requests] if chunk is None else [[request] for request in requests]:
        names = [engine.add(prompt, 40, extra_args={"kv_eviction": name}) for prompt, name in batch]
        done = engine.run()
        for (prompt, policy), name in zip(batch, names, strict=True):
            served = engine.served_as(name, done[name])
            assert bool(served.choices) == (len(prompt) > budget)
            ways = {"page_size": 16, "decode": "window", "chunk": chunk}
            replay.verify(prompt, served, create_policy(policy, {}), budget, size, **ways)
    engine.shutdown()


@pytest.fixture
def replayed_elsewhere(start_engine, tmp_path):
    """See :func:`elsewhere.replayed_elsewhere`."""
    return partial(elsewhere.replayed_elsewhere, start_engine, tmp_path / "scaled")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "layer-defensivekv"])
@pytest.mark.interpreted
def test_triton_attention_over_eight_bits(replayed_elsewhere, tmp_path, is_v2, name):
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    model = save_random_model(tmp_path / "plain", "llama", "LlamaForCausalLM", num_hidden_layers=3)
    replayed_elsewhere(InterpretedTritonBackend, model, 190, 8, name, 40, window=8, decode="off")


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("cake", "exact", "cake"),
        ("layer-defensivekv", "progressive", "window"),
        pytest.param("layer-defensivekv", "exact", "off", marks=pytest.mark.full),
    ],
)
def test_flash_attention_over_eight_bits(replayed_elsewhere, tiny_model, flash, is_v2, name, prefill, decode):
    """Of keys, values and queries."""
    options = {"window": 8, "prefill": prefill, "decode": decode}
    stored = replayed_elsewhere(
        ReferenceFlashBackend, tiny_model, 260 if is_v2 else 600, 10 if is_v2 else 70, name, 100, **options
    )
    assert stored.queries
