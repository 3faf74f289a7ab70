"""Small random models of other architectures."""

import pytest
import torch
from engine import Engine
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.engine


def save_random_model(path, model_type: str, architecture: str, **fields) -> str:
    """A model with random weights that decodes something, and no tokenizer."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(model_type, architectures=[architecture], **{**common, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def test_sliding_layers_stay_as_they_are(start_engine, tmp_path):
    """Of six layers, two attend to everything; only these are evicted from."""
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = save_random_model(
        tmp_path,
        "gemma3_text",
        "Gemma3ForCausalLM",
        num_hidden_layers=6,
        layer_types=layer_types,
        sliding_window=64,
        query_pre_attn_scalar=32,
    )
    engine: Engine = start_engine(
        model, kv_eviction="cake", kv_eviction_budget=100, skip_tokenizer_init=True, max_model_len=2048
    )
    specs = [type(group.kv_cache_spec).__name__ for group in engine.scheduler.kv_cache_config.kv_cache_groups]
    assert sorted(specs) == ["EvictableSpec"] * 2 + ["SlidingWindowSpec"] * 4
    prompts = [[(7 * i + j) % 250 for i in range(600 + 100 * j)] for j in range(4)]
    tokens = engine.generate(prompts, 24)
    stats = engine.stats()
    assert stats["requests"] == 4
    assert len(stats["kept_tokens"]) == 2
    assert engine.is_idle()
    assert [engine.generate([prompt], 24)[0] for prompt in prompts] == tokens
    roomy: Engine = start_engine(
        model, kv_eviction="cake", kv_eviction_budget=2000, skip_tokenizer_init=True, max_model_len=2048
    )
    everything_kept = roomy.generate(prompts, 24)
    stock: Engine = start_engine(model, skip_tokenizer_init=True, max_model_len=2048)
    assert stock.generate(prompts, 24) == everything_kept
    assert everything_kept != tokens
