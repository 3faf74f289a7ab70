"""What several policies look at: the window's attention over the prompt, and the size of projected values."""

from collections.abc import Iterator

import torch

from cake_vllm.policies.base import LayerInputs


def prefix_attention(inputs: LayerInputs) -> Iterator[torch.Tensor]:
    """Attention weights of the last ``w`` queries on the positions before them, some KV heads at a time.

    The softmax runs in float32 over all ``S`` keys, causal among the last ``w``; the columns of these are cut off
    afterwards and the rest is *not* renormalised (antgroup/cakekv, scoring block of the attention forward; SnapKV
    and kvpress do the same). What is not there (:attr:`LayerInputs.valid`) gets none. The peak does not grow with the
    model's width; see :func:`heads_at_once`.

    Yields:
        ``[n, G, w, S - w]`` float32 for the next ``n`` KV heads, the caller's to overwrite.

    Raises:
        ValueError: if the prompt is not longer than the window or the heads do not divide.
    """
    num_heads, window, _ = inputs.queries.shape
    num_kv_heads, prompt_len, _ = inputs.keys.shape
    if prompt_len <= window:
        raise ValueError(f"a prompt of {prompt_len} tokens has no prefix before a window of {window}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    future = torch.ones(window, window, dtype=torch.bool, device=inputs.queries.device).triu(1)
    at_once = heads_at_once(inputs.queries.device, num_heads // num_kv_heads * window * prompt_len)
    heads = inputs.queries.unflatten(0, (num_kv_heads, -1)).split(at_once), inputs.keys.split(at_once)
    missing = [None] * len(heads[1]) if inputs.valid is None else (~inputs.valid).split(at_once)
    for queries, keys, absent in zip(*heads, missing, strict=True):
        logits = attention_logits(queries, keys, inputs.scale, inputs.logits_soft_cap)
        if absent is not None:
            logits.masked_fill_(absent[:, None, None], float("-inf"))
        logits[..., prompt_len - window :].masked_fill_(future, float("-inf"))
        yield logits.softmax(dim=-1)[..., : prompt_len - window]


def heads_at_once(device: torch.device, weights_per_head: int) -> int:
    """How many KV heads to look at together: one on CPUs, whose caches hold it; elsewhere 64 MiB of attention weights.

    There an operation costs a launch however little it does.
    """
    return 1 if device.type == "cpu" else max(1, 2**24 // weights_per_head)


def attention_logits(queries: torch.Tensor, keys: torch.Tensor, scale: float, soft_cap: float) -> torch.Tensor:
    """``[n, G, q, S]`` float32 logits of ``[n, G, q, D]`` queries on ``[n, S, D]`` keys; see :class:`LayerInputs`."""
    logits = (queries.float() * scale).flatten(1, 2) @ keys.float().transpose(1, 2)
    logits = logits.unflatten(1, queries.shape[1:3])
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap > 0 else logits


def average_pool(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Smooths ``[..., N]`` along the last axis: stride 1, zeros beyond the ends, always divided by ``kernel``."""
    # Shifted sums: torch's own pooling takes five times as long on CPUs.
    total = scores.clone()
    for shift in range(1, min(kernel // 2 + 1, scores.shape[-1])):
        total[..., shift:] += scores[..., :-shift]
        total[..., :-shift] += scores[..., shift:]
    return total.div_(kernel)


def projected_value_norms(inputs: LayerInputs, chunk: int = 512) -> torch.Tensor:
    """L1 norm of what each value becomes behind the output projection, mean over the query heads that read it.

    Args:
        inputs: with ``values`` and ``output_weight``.
        chunk: positions projected at once; the peak is ``Hkv * G * chunk * hidden`` floats.

    Returns:
        ``[Hkv, S]`` float32.
    """
    assert inputs.values is not None, "the policy says that it needs values"
    assert inputs.output_weight is not None, "the policy says that it needs the output projection"
    num_kv_heads, prompt_len, head_size = inputs.values.shape
    # [Hkv, G, hidden, D]
    weight = inputs.output_weight.float().unflatten(1, (num_kv_heads, -1, head_size)).permute(1, 2, 0, 3)
    norms = torch.empty(num_kv_heads, prompt_len, device=inputs.values.device)
    for start in range(0, prompt_len, chunk):
        values = inputs.values[:, None, start : start + chunk].float()
        norms[:, start : start + chunk] = (values @ weight.transpose(-1, -2)).abs_().sum(dim=-1).mean(dim=1)
    return norms


def finite(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` with NaN as the lowest and infinities as the largest finite numbers of float32."""
    return torch.nan_to_num(scores.float(), nan=torch.finfo(torch.float32).min)


def require_window(window: int, at_least: int = 1) -> None:
    """Raises ``ValueError`` for a window that is too small."""
    if window < at_least:
        raise ValueError(f"window must be at least {at_least}, not {window}")


def require_odd(name: str, kernel: int) -> None:
    """Raises ``ValueError`` unless ``kernel`` is a positive odd number."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{name} must be a positive odd number, not {kernel}")


def require_fraction(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")
