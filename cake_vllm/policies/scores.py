"""Attention of the window over the prompt, the one thing that every window-based policy looks at."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def prefix_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, logits_soft_cap: float = 0.0
) -> Iterator[torch.Tensor]:
    """Attention weights of the last ``w`` queries on the prefix, one KV head at a time.

    The softmax runs in float32 over all ``S`` keys, causal inside the window; the window's own columns are cut off
    afterwards and the rest is *not* renormalised (antgroup/cakekv, scoring block of the attention forward; SnapKV
    and kvpress do the same). One head at a time keeps the peak at ``G * w * S`` floats, whatever the model's width.

    Args:
        queries: ``[Hq, w, D]``.
        keys: ``[Hkv, S, D]``.
        scale: factor on the logits.
        logits_soft_cap: see :meth:`Policy.score`.

    Yields:
        ``[G, w, S - w]`` float32 for each KV head, ``G = Hq // Hkv``.

    Raises:
        ValueError: if the prompt is not longer than the window or the heads do not divide.
    """
    num_heads, window, _ = queries.shape
    num_kv_heads, prompt_len, _ = keys.shape
    if prompt_len <= window:
        raise ValueError(f"a prompt of {prompt_len} tokens has no prefix before a window of {window}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    grouped = queries.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    future = torch.ones(window, window, dtype=torch.bool, device=queries.device).triu(1)
    for head_queries, head_keys in zip(grouped, keys, strict=True):
        logits = head_queries.float() @ head_keys.float().T * scale
        if logits_soft_cap > 0:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        logits[..., prompt_len - window :].masked_fill_(future, float("-inf"))
        yield logits.softmax(dim=-1)[..., : prompt_len - window]


def average_pool(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Smooths ``[..., N]`` along the last axis: stride 1, zeros beyond the ends, always divided by ``kernel``."""
    if kernel == 1:
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    return F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2).reshape(scores.shape)
