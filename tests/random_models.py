"""Small models with random weights, for what real weights would not show better."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cake_vllm.policies.entries import Rotary


def numbers(seed: int, length: int) -> list[int]:
    """A prompt for these models."""
    dice = random.Random(seed)
    return [dice.randrange(250) for _ in range(length)]


def save_random_model(path: Path, model_type: str, architecture: str, *, seed: int = 0, **fields) -> str:
    """A model that decodes something, and no tokenizer."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(model_type, architectures=[architecture], **{**common, **fields})
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(".sinks"):
            # As loud as these models are: of most queries about half, and no two alike.
            weight.data.copy_(torch.linspace(16, 28, len(weight)).roll(len(name)))
    model.save_pretrained(path)
    return str(path)


#: Models whose attention is not only that of a Llama.
KINDS: dict[str, tuple[str, str, dict]] = {
    # One learned logit of each query head beside those of its keys; every other layer has a window.
    "sinks": (
        "gpt_oss",
        "GptOssForCausalLM",
        {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    ),
    # The last three read the caches of those before them.
    "shared": (
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "sliding_window": 64,
            "intermediate_size": [128] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            # Whose embedding is nothing, which is no number behind the norms of these models.
            "pad_token_id": 255,
        },
    ),
    # Heads of full attention are twice as long as those of windows, and the last two layers read the caches of those
    # before them.
    "two sizes": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "sliding_window": 64,
            "global_head_dim": 64,
            "tie_word_embeddings": False,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "pad_token_id": 255,
        },
    ),
    # Every other layer attends within chunks.
    "chunks": (
        "llama4_text",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 128,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
        },
    ),
}


#: Latent attention, of the only size that vLLM's CPU kernel is compiled for. Head sizes are small.
LATENT = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def save_random_latent(path: Path, **fields) -> str:
    """A small DeepSeek V3 without experts."""
    return save_random_model(path, "deepseek_v3", "DeepseekV3ForCausalLM", **(LATENT | fields))


def save_random_kind(path: Path, name: str) -> str:
    """One of :data:`KINDS`."""
    model_type, architecture, fields = KINDS[name]
    return save_random_model(path, model_type, architecture, **fields)


def save_random_gates(model: str, path: Path | None = None, rotary: Rotary | None = None) -> Path:
    """Gates that judge anyhow, where the engine looks for them; of a Llama if nothing else is said."""
    from vllm.engine.arg_utils import EngineArgs

    from cake_vllm.integration.gates import GateFile, default_path, fingerprint
    from cake_vllm.policies.entries import LinearGate

    config = EngineArgs(model=model, skip_tokenizer_init=True).create_model_config()
    layers = range(config.hf_text_config.num_hidden_layers)
    size = config.get_head_size()
    rotary = rotary or Rotary(size)
    gates = [LinearGate.random(config.get_total_num_kv_heads(), size, rotary, seed) for seed in layers]
    weight, bias = (torch.stack([getattr(gate, name) for gate in gates]) for name in ("weight", "bias"))
    about = {"fingerprint": fingerprint(config), "model": model}
    path = path or default_path(about["fingerprint"])
    GateFile(weight, bias, tuple(layers), (rotary,) * len(layers), about).save(path)
    return path


def gates_of(model: str):
    """What the engine finds for it."""
    from vllm.engine.arg_utils import EngineArgs

    from cake_vllm.integration.gates import GateFile, find_gates

    return GateFile.read(find_gates(EngineArgs(model=model, skip_tokenizer_init=True).create_model_config()))


def save_random_adapter(path: Path, num_layers: int, hidden: int = 64, rank: int = 4) -> str:
    """A LoRA adapter for the query and output projections of the Llamas above, 128 wide, loud enough to be heard."""
    torch.manual_seed(1)
    weights = {}
    for layer in range(num_layers):
        for name, width_in, width_out in (("q_proj", hidden, 128), ("o_proj", 128, hidden)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, width_in)
            weights[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(width_out, rank)
    path.mkdir(exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


def save_random_eagle(path: Path, method: str) -> str:
    """A head that drafts for the Llamas above: one layer over the target's states, and what joins them to the tokens.

    Args:
        path: a folder.
        method: ``"eagle"``, or ``"eagle3"``, which takes the states behind three layers.
    """
    save_random_model(path, "llama", "LlamaForCausalLM", seed=3, num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text()) | {"draft_vocab_size": 256, "tie_word_embeddings": False}
    layer = {
        name.removeprefix("model.layers.0."): weight
        for name, weight in load_file(path / "model.safetensors").items()
        if name.startswith("model.layers.0.")
    }
    if method == "eagle":
        config["architectures"] = ["EagleLlamaForCausalLM"]
        del layer["input_layernorm.weight"]
        weights = {f"layers.0.{name}": weight for name, weight in layer.items()}
        weights["fc.weight"] = 0.1 * torch.randn(64, 2 * 64)
    else:
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = layer[f"self_attn.{name}.weight"]
            layer[f"self_attn.{name}.weight"] = torch.cat([weight, 0.3 * torch.randn_like(weight)], dim=1)
        weights = {f"midlayer.{name}": weight for name, weight in layer.items()}
        weights |= {"midlayer.hidden_norm.weight": torch.ones(64), "norm.weight": torch.ones(64)}
        weights |= {"fc.weight": 0.1 * torch.randn(64, 3 * 64), "lm_head.weight": 0.3 * torch.randn(256, 64)}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def save_random_mtp(path: Path) -> str:
    """A mixture of experts with two layers, and a third that drafts."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    save_random_model(path, "glm4_moe", "Glm4MoeForCausalLM", num_hidden_layers=3, **experts)
    return let_last_layer_draft(path)


def let_last_layer_draft(path: Path) -> str:
    """Makes a multi-token prediction module of the last of three layers, all full of noise."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    weights = load_file(path / "model.safetensors")
    names = ("enorm", "hnorm", "shared_head.norm")
    weights |= {f"model.layers.2.{name}.weight": torch.ones(64) for name in names}
    weights["model.layers.2.eh_proj.weight"] = 0.1 * torch.randn(64, 2 * 64)
    save_file(weights, path / "model.safetensors")
    return str(path)
