"""Model directories with a known model's shape and no weights: speed and memory do not depend on what the weights are.

vLLM makes random weights of its own for them (``--load-format dummy``).
"""

import json
from pathlib import Path

#: From the published ``config.json`` of the models.
SHAPES = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
}


def save(name: str, folder: Path) -> str:
    """Writes the shape ``name`` without a tokenizer to ``folder``; its path."""
    target = folder / name
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(SHAPES[name]))
    return str(target)
