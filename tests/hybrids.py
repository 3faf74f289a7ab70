"""Small models that mix attention with linear attention, state-space layers or short convolutions."""

from pathlib import Path
from typing import NamedTuple

from random_models import save_random_model


class Hybrid(NamedTuple):
    """A small one.

    Attributes:
        layers: of full attention.
        settings: of the engine.
        is_replayed: whether a Hugging Face model computes in float32 what stock vLLM does.
    """

    model_type: str
    architecture: str
    fields: dict
    layers: int
    settings: dict
    is_replayed: bool = True


MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32, "hidden_size": 128}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
UNCACHED = {"enable_prefix_caching": False}
HYBRIDS = {
    # Of one head: of more, vLLM's kernel for positions takes a head for a token on CPUs.
    "lfm2": Hybrid(
        "lfm2",
        "Lfm2ForCausalLM",
        {
            "layer_types": ["conv", "full_attention"] * 3,
            "num_hidden_layers": 6,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "conv_dim": 64,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_auto_adjust_ff_dim": False,
        },
        3,
        {"block_size": 64},
    ),
    "granite": Hybrid(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **MAMBA2,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope",
            "attention_multiplier": 0.17,
        },
        2,
        UNCACHED,
    ),
    # Attention and a state in each layer.
    "falcon-h1": Hybrid(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {**MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 256, "mamba_n_groups": 1},
        2,
        UNCACHED,
    ),
    **{
        # In blocks of hundreds of tokens.
        name: Hybrid(
            model_type,
            architecture,
            {
                "layer_types": ["linear_attention", "full_attention"] * 2,
                "num_hidden_layers": 4,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                **experts,
            },
            2,
            # Chunks that end with a block, in a batch as well.
            {"dtype": "bfloat16", "max_num_batched_tokens": 4096},
            is_replayed=False,
        )
        for name, model_type, architecture, experts in (
            ("qwen3-next", "qwen3_next", "Qwen3NextForCausalLM", EXPERTS),
            ("qwen3.5", "qwen3_5_text", "Qwen3_5ForCausalLM", {}),
        )
    },
}


def save_hybrid(name: str, path: Path) -> tuple[str, Hybrid]:
    """Its folder, and what it is."""
    of = HYBRIDS[name]
    return save_random_model(path, of.model_type, of.architecture, **of.fields), of
