"""Small models with random weights, for what real weights would not show better."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def save_random_model(path: Path, model_type: str, architecture: str, **fields) -> str:
    """A model that decodes something, and no tokenizer."""
    torch.manual_seed(0)
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
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)
