"""Small random models of other architectures."""

import pytest
from engine import Engine, same_positions
from random_models import numbers, save_random_model
from ties import assert_same

from cake_vllm.policies.entries import Rotary

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("policy", "layer_types", "specs"),
    [
        ("cake", ["sliding_attention", "sliding_attention", "full_attention"] * 2, {"EvictableSpec": 1, "Exact": 2}),
        # vLLM's groups are as large as the smaller kind: the layers that attend to everything are in two of them.
        (
            "layer-defensivekv",
            ["sliding_attention", "full_attention", "full_attention"] * 2,
            {"EvictableSpec": 2, "Exact": 1},
        ),
    ],
    ids=["one-group", "two-groups"],
)
def test_sliding_layers_stay_as_they_are(start_engine, tmp_path, policy, layer_types, specs):
    """Only layers that attend to everything are evicted from."""
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
        model, kv_eviction=policy, kv_eviction_budget=100, skip_tokenizer_init=True, max_model_len=2048
    )
    found = [type(group.kv_cache_spec).__name__ for group in engine.scheduler.kv_cache_config.kv_cache_groups]
    assert found.count("EvictableSpec") == specs["EvictableSpec"]
    assert found.count("ExactSlidingWindowSpec") == specs["Exact"]
    prompts = [[(7 * i + j) % 250 for i in range(600 + 100 * j)] for j in range(4)]
    together = engine.runs(prompts, 24)
    stats = engine.stats()
    assert stats["requests"] == 4
    assert len(stats["kept_tokens"]) == layer_types.count("full_attention")
    assert engine.is_idle()
    for prompt, run in zip(prompts, together, strict=True):
        assert_same(run, *engine.runs([prompt], 24))
    roomy: Engine = start_engine(
        model, kv_eviction=policy, kv_eviction_budget=2000, skip_tokenizer_init=True, max_model_len=2048
    )
    everything_kept = roomy.generate(prompts, 24)
    stock: Engine = start_engine(model, skip_tokenizer_init=True, max_model_len=2048)
    assert stock.generate(prompts, 24) == everything_kept
    assert everything_kept != [run.tokens for run in together]


MODELS = {
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {"hidden_size": 128}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {}),
    "mistral": ("mistral", "MistralForCausalLM", {"sliding_window": None}),
    "phi": ("phi", "PhiForCausalLM", {"hidden_size": 128, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", "Phi3ForCausalLM", {"hidden_size": 128, "pad_token_id": 0}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "query_pre_attn_scalar": 32},
    ),
    "glm": ("glm", "GlmForCausalLM", {"hidden_size": 128, "partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "opt": ("opt", "OPTForCausalLM", {"hidden_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 128}),
    "qwen3-moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
#: How their rotary embeddings turn keys of 32 channels, if not all of them, half by half.
ROTARIES = {"phi": Rotary(16), "glm": Rotary(16, neighbours=True), "opt": Rotary()}


@pytest.mark.parametrize("name", MODELS)
def test_model(start_engine, tmp_path, name, same_on_both):
    """Served in full it is stock vLLM; evicted, every layer of full attention gives memory back."""
    model_type, architecture, fields = MODELS[name]
    model = save_random_model(tmp_path, model_type, architecture, num_hidden_layers=4, **fields)
    settings = {"skip_tokenizer_init": True, "max_model_len": 2048, "num_gpu_blocks_override": 2000}
    prompts = [[(7 * i * i + j) % 250 for i in range(400 + 100 * j)] for j in range(3)]
    expected = start_engine(model, **settings).generate(prompts, 16)
    # This policy asks for everything: queries, keys, values and the output projection.
    engine: Engine = start_engine(model, kv_eviction="criticalkv", kv_eviction_budget=100, **settings)
    assert {layer.rotary for layer in engine.connector.worker.layers.target} == {ROTARIES.get(name, Rotary(32))}
    for layer in engine.connector.worker.layers.target if name != "opt" else ():
        # The first pair by a radian, whatever its channels are.
        assert layer.rotation.speeds[0] == pytest.approx(1, abs=1e-3)
        assert len(layer.rotation.speeds) == layer.rotary.size // 2
    engine.stats()
    assert engine.generate(prompts, 16, extra_args={"kv_eviction": "none"}) == expected
    assert not engine.stats()
    tokens = engine.generate(prompts, 16)
    # Gemma 2's tied and scaled embeddings make a random model repeat itself, whatever it attends to.
    assert tokens != expected or name == "gemma2"
    stats = engine.stats()
    full = sum(kind == "full_attention" for kind in fields.get("layer_types", ["full_attention"] * 4))
    assert stats["requests"] == 3
    assert stats["failures"] == 0
    assert len(stats["kept_tokens"]) == full
    assert all(3 * 100 <= kept < 3 * 160 for kept in stats["kept_tokens"])
    assert engine.is_idle()


LONGEST = 608

#: Models whose windows are as long as the longest request, or longer: in every layer, or in some.
WIDE_WINDOWS = {
    "override": (("llama", "LlamaForCausalLM", {}), {"hf_overrides": {"sliding_window": 262144}}),
    "phi3": (("phi3", "Phi3ForCausalLM", {"hidden_size": 128, "pad_token_id": 0, "sliding_window": LONGEST}), {}),
    "in-two-layers": (
        ("llama", "LlamaForCausalLM", {}),
        {"hf_overrides": {"sliding_window": LONGEST, "layer_types": ["sliding_attention", "full_attention"] * 2}},
    ),
}


@pytest.mark.parametrize("name", WIDE_WINDOWS)
def test_a_window_that_never_cuts_is_full_attention(start_engine, tmp_path, name):
    """Every layer is evicted from, and a request of the longest length gets the tokens that it gets without windows."""
    (model_type, architecture, fields), wide = WIDE_WINDOWS[name]
    model = save_random_model(tmp_path, model_type, architecture, num_hidden_layers=4, **fields)
    settings = {"skip_tokenizer_init": True, "max_model_len": LONGEST, "num_gpu_blocks_override": 1000}
    evicting = {"kv_eviction": "cake", "kv_eviction_budget": 100}
    prompts = [numbers(0, LONGEST - 24), numbers(1, 300)]
    stock_tokens = start_engine(model, **settings, **wide).generate(prompts, 24)
    # vLLM's own way to do without windows.
    plain: Engine = start_engine(model, **settings, **evicting, disable_sliding_window=True)
    expected = plain.trace(prompts, 24)
    engine: Engine = start_engine(model, **settings, **evicting, **wide)
    engine.stats()
    served = engine.trace(prompts, 24)
    stats = engine.stats()
    assert stats["requests"] == 2
    assert len(stats["kept_tokens"]) == 4
    assert all(kept < 2 * 200 for kept in stats["kept_tokens"])
    for (tokens, kept), (expected_tokens, expected_kept) in zip(served, expected, strict=True):
        assert tokens == expected_tokens
        assert same_positions(kept, expected_kept)
    assert engine.generate(prompts, 24, extra_args={"kv_eviction": "none"}) == stock_tokens
    assert stock_tokens != [tokens for tokens, _ in served]


def test_a_window_that_cuts_can_be_switched_off(start_engine, tmp_path):
    """What the refusal advises: up to the window's length it is full attention."""
    model = save_random_model(
        tmp_path, "mistral", "MistralForCausalLM", num_hidden_layers=4, sliding_window=LONGEST - 1
    )
    settings = {"skip_tokenizer_init": True, "kv_eviction": "cake", "kv_eviction_budget": 100}
    with pytest.raises(ValueError, match=rf"up to {LONGEST - 1} tokens, .* --disable-sliding-window"):
        start_engine(model, **settings, max_model_len=LONGEST)
    engine: Engine = start_engine(model, **settings, max_model_len=None, disable_sliding_window=True)
    assert engine.vllm_config.model_config.max_model_len == LONGEST - 1
    engine.stats()
    engine.generate([numbers(0, LONGEST - 17)], 16)
    assert len(engine.stats()["kept_tokens"]) == 4
