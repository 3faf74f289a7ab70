"""Small models with random weights that take pictures, their processors, and pictures."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

#: Ids of tokens that stand for no text: behind the letters, as in the configs below.
MARKS = ("<pad>", "<bos>", "<eos>", "<begin>", "<image>", "<end>", "<video>", "<audio>")
PAD, BOS, EOS, BEGIN, IMAGE, END, VIDEO, AUDIO = range(256, 256 + len(MARKS))
#: What Gemma's processor takes line breaks for.
BREAKS = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")

TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.3,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
EYES = {"patch_size": 16, "spatial_merge_size": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
GEMMA = {"boi_token_index": BEGIN, "eoi_token_index": END, "image_token_index": IMAGE}


class Kind(NamedTuple):
    """A model that takes pictures.

    Attributes:
        text: of its decoder, beside or instead of :data:`TEXT`.
        vision: of what reads pictures.
        fields: of the model.
        marks: names that its processor knows special tokens by.
    """

    model_type: str
    architecture: str
    text: dict[str, Any]
    vision: dict[str, Any]
    fields: dict[str, Any]
    marks: dict[str, int]


KINDS = {
    "qwen2.5-vl": Kind(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "hidden_size": 128,
        },
        {**EYES, "depth": 2, "out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 64},
        QWEN,
        {"image_token": IMAGE, "video_token": VIDEO},
    ),
    "qwen3-vl": Kind(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
            }
        },
        {**EYES, "depth": 3, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        QWEN,
        {"image_token": IMAGE, "video_token": VIDEO, "vision_start_token": BEGIN, "vision_end_token": END},
    ),
    "gemma3": Kind(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "query_pre_attn_scalar": 32},
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 128,
        },
        {**GEMMA, "mm_tokens_per_image": 64},
        {"boi_token": BEGIN, "image_token": IMAGE, "eoi_token": END},
    ),
}


def save_random_pictured(path: Path, name: str, seed: int = 0) -> str:
    """One of :data:`KINDS`, with its tokenizer and processor; any text is letters, one token for a byte."""
    kind = KINDS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind.model_type,
        architectures=[kind.architecture],
        text_config={**TEXT, **kind.text},
        vision_config={"initializer_range": 0.3, **kind.vision},
        tie_word_embeddings=False,
        **kind.fields,
    )
    model = AutoModelForImageTextToText.from_config(config)
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("mm_input_projection_weight"):
            # Which are no pictures as it comes.
            weight.data.normal_(std=0.3)
    model.save_pretrained(path)
    if name == "gemma3":
        _as_published(path)
    _save_processor(path, name)
    return str(path)


def _tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.add_tokens(list(BREAKS))
    marks = {name: MARKS[place - PAD] for name, place in kind.marks.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=marks,
    )


def _save_processor(path: Path, name: str) -> None:
    import transformers

    tokenizer = _tokenizer(KINDS[name])
    if name == "gemma3":
        size = {"height": 128, "width": 128}
        images = transformers.Gemma3ImageProcessor(size=size)
        processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=64)
    else:
        of_images = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}}
        images = transformers.Qwen2VLImageProcessor(**of_images)
        if name == "qwen3-vl":
            videos = transformers.Qwen3VLVideoProcessor(**of_images)
            processor = transformers.Qwen3VLProcessor(images, tokenizer, videos)
        else:
            videos = transformers.Qwen2VLVideoProcessor(**of_images)
            processor = transformers.Qwen2_5_VLProcessor(images, tokenizer, videos)
    processor.save_pretrained(path)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """One with something in each corner."""
    dice = np.random.default_rng(seed)
    small = dice.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def _as_published(path: Path) -> None:
    """The names of weights that checkpoints have and vLLM knows."""
    weights = load_file(path / "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({name.replace(old, new): weight for name, weight in weights.items()}, path / "model.safetensors")
