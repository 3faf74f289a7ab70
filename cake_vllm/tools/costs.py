"""What memory is taken beside the KV pool: weights, and what eviction needs."""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cake_vllm.config import KVEvictionConfig
from cake_vllm.kernels import EvictedRows, Grid
from cake_vllm.policies import LayerInputs, LayerScore, Policy
from cake_vllm.policies.entries import LinearGate, Rotary, Rotation
from cake_vllm.tools.capacity import Model, Pool, Requests, page_size
from cake_vllm.tools.options import readable

#: Prompts that policies are tried on, tokens behind the window: what they keep grows in proportion.
TRIALS = (1024, 2048)


@dataclass(frozen=True)
class Cost:
    """Memory beside the pool, on each GPU.

    Attributes:
        what: takes it.
        memory: bytes.
        when: it is there.
    """

    what: str
    memory: int
    when: str


def weight_bytes(model: str, model_config: Any) -> int:
    """Size of a model's weights as vLLM will hold them, bytes, of all GPUs together.

    Read off the headers of local files in the format safetensors, else counted in the model that the config describes.

    Raises:
        ValueError: if there are no such files and the config says that weights are quantized.
    """
    folder, item = Path(model), model_config.dtype.itemsize
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text())
            files, total = {folder / name for name in listed["weight_map"].values()}, listed["metadata"]["total_size"]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{index} is no index of weights: give --weights") from None
        if not all(file.is_file() for file in files):
            return int(total)
    else:
        files = set(folder.glob("*.safetensors"))
    if files:
        return sum(_file_bytes(file, item) for file in files)
    if getattr(model_config.hf_config, "quantization_config", None):
        raise ValueError(f"the config of {model} says that its weights are quantized, not how large: give --weights")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_config.hf_config)
    return item * sum(parameter.numel() for parameter in empty.parameters())


def _file_bytes(file: Path, item: int) -> int:
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                kind = tensor.get_dtype()
                # Floating-point weights are loaded in the model's dtype, quantized ones as they are.
                bits = 8 * item if kind in ("F64", "F32", "F16", "BF16") else int(re.findall(r"\d+", kind)[0])
                total += math.prod(tensor.get_shape()) * bits // 8
    except (SafetensorError, MemoryError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__} {error}): give --weights") from None
    return total


def beside(
    config: KVEvictionConfig,
    model: Model,
    pool: Pool,
    requests: Requests,
    args: argparse.Namespace,
    num_prompts: int,
) -> list[Cost]:
    """Memory that eviction takes beside the pool; vLLM's profile of the start does not see it.

    Args:
        config: the settings.
        model: what the KV cache is made of.
        pool: the KV pool.
        requests: those that are served with these settings.
        args: of the command.
        num_prompts: that may end in one step.
    """
    policy, item, prompt_len = config.policy, model.dtype.itemsize, args.context
    length = min(prompt_len, requests.entering * pool.block_size) if config.is_progressive else prompt_len
    queries = model.evictable * policy.num_queries * model.query_heads * model.head_size * item
    scores = model.evictable * score_bytes(policy, model.kv_heads, length)
    always = bool(config.num_rescoring)
    kept = requests.at_once if always else num_prompts
    found = [
        Cost("queries of the window", kept * queries, "of all requests" if always else f"of {num_prompts} that enter"),
        Cost("scores", num_prompts * scores, f"of {num_prompts} that enter"),
    ]
    if config.is_elastic:
        # A request that is cut keeps its scores, in half precision, in place of the queries.
        worth = requests.at_once * max(scores // 2, queries)
        found[0] = Cost("what prompts are worth", worth, "of all requests, once they are cut")
        if config.cuts_outputs and queries:
            # While memory is nearly short, of those who would give of it.
            recent = requests.at_once * queries
            found.append(Cost("queries of what is generated", recent, "of all requests, before they are cut"))
    if policy.takes_notes:
        notes = model.evictable * score_bytes(policy, model.kv_heads, length, notes=True)
        found.append(Cost("notes", num_prompts * notes, f"of {num_prompts} that enter"))
    copies = 2 if policy.needs_values else 1
    keys = copies * model.kv_heads * length * model.head_size * item
    found.append(Cost("values and keys" if copies == 2 else "keys", keys, "of the layer that is scored, a copy"))
    page, by_head = page_size(pool.block_size), policy.selection != "layer"
    per_block = pool.block_size // page
    even = -(-config.tokens(prompt_len) // page) if not config.is_elastic else requests.decoding * per_block
    tables, most = (
        table_bytes(model, pool, requests.at_once, num_pages, by_head, per_block)
        for num_pages in (even, prompt_len // pool.block_size * per_block)
    )
    found.append(
        Cost("tables of evicted requests", tables, f"if budgets are even; {readable(most)} if some owner keeps all")
    )
    return found


def score_bytes(policy: Policy, kv_heads: int, length: int, notes: bool = False) -> int:
    """What a policy's scores, or its notes, of one layer take for a prompt; it is tried on two short ones.

    Args:
        policy: any.
        kv_heads: of the layer.
        length: of the prompt, tokens.
        notes: whether it is about the notes.
    """
    start = policy.window_size + TRIALS[0]
    first, second = (_trial(policy, kv_heads, policy.window_size + trial, notes) for trial in TRIALS)
    return first + (second - first) * (length - start) // (TRIALS[1] - TRIALS[0])


def _trial(policy: Policy, kv_heads: int, length: int, notes: bool) -> int:
    width, places = 8, policy.noted(0, length) if notes else range(policy.num_queries)
    inputs = LayerInputs(
        torch.randn(kv_heads, len(places), width),
        torch.randn(kv_heads, length, width),
        width**-0.5,
        values=torch.randn(kv_heads, length, width) if policy.needs_values else None,
        output_weight=torch.randn(width, kv_heads * width) if policy.needs_output_weight else None,
        gate=LinearGate.random(kv_heads, width, Rotary()) if policy.needs_gate else None,
        rotation=Rotation.plain(width) if policy.needs_rotation else None,
        budget=length // 2,
    )
    if notes:
        return policy.note(inputs, places, None).nbytes
    score: LayerScore = policy.judge(inputs)
    return sum(tensor.nbytes for tensor in (score.indicator, score.terms, *score.extra))


def table_bytes(model: Model, pool: Pool, num_requests: int, num_pages: int, by_head: bool, per_block: int = 1) -> int:
    """Memory of the workers' tables when that many requests have been evicted.

    Args:
        model: what the KV cache is made of.
        pool: the KV pool.
        num_requests: that are evicted.
        num_pages: of the owner with the most.
        by_head: whether the owners are KV heads.
        per_block: pages that a layer has in a block.
    """
    num_slices, layers = pool.blocks * per_block, range(model.evictable)
    pages = torch.empty(model.evictable * num_slices, model.kv_heads, 1, device="meta")
    base = tuple(layer * num_slices for layer in layers)
    grid = Grid(pages, base, 1, pool.blocks, tuple(layer % pool.groups for layer in layers), per_block)
    rows = {of: EvictedRows(grid, of) for of in (False, True)}
    counts = np.full(model.evictable * (model.kv_heads if by_head else 1), num_pages)
    held = np.zeros((len(counts), num_pages), dtype=np.int64)
    for request in range(num_requests):
        rows[by_head].store(str(request), held, counts, num_pages, [[1]] * pool.groups)
    return sum(table.num_bytes for table in rows.values())
