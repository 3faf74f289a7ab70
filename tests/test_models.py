"""Small random models of other architectures."""

import pytest
from engine import Engine
from random_models import save_random_model

pytestmark = pytest.mark.engine


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
    assert sorted(specs) == ["EvictableSpec"] * 2 + ["ExactSlidingWindowSpec"] * 4
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
