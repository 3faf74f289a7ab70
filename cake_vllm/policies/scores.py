"""What several policies look at: the window's attention over the prompt, and the size of projected values."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from cake_vllm.policies.base import LayerInputs, leading

#: How far a position's attention is passed on, positions.
ECHO_REACH = 63
#: First positions that pass nothing on unless a policy says otherwise: what they draw belongs to nobody behind them.
SINKS = 4
#: Widest pooling, positions; it takes time and, in some policies, memory in proportion.
MAX_KERNEL = 2**15
#: Queries of a chunk that are looked at together.
AT_ONCE = 32


def prefix_attention(inputs: LayerInputs) -> Iterator[torch.Tensor]:
    """:func:`window_attention` on the positions before the window.

    The columns of the window are cut off after the softmax and the rest is *not* renormalised (antgroup/cakekv,
    scoring block of the attention forward; SnapKV and kvpress do the same).

    Yields:
        ``[n, G, w, S - w]`` float32 for the next ``n`` KV heads, the caller's to overwrite.
    """
    prefix_len = inputs.keys.shape[1] - inputs.queries.shape[1]
    return (weights[..., :prefix_len] for weights in window_attention(inputs))


def window_attention(inputs: LayerInputs) -> Iterator[torch.Tensor]:
    """:func:`attention` of the last ``w`` queries.

    Yields:
        ``[n, G, w, S]`` float32 for the next ``n`` KV heads, the caller's to overwrite.

    Raises:
        ValueError: if the prompt is not longer than the window.
    """
    window, prompt_len = inputs.queries.shape[1], inputs.keys.shape[1]
    if prompt_len <= window:
        raise ValueError(f"a prompt of {prompt_len} tokens has no prefix before a window of {window}")
    return attention(inputs, range(prompt_len - window, prompt_len))


def attention(inputs: LayerInputs, places: range) -> Iterator[torch.Tensor]:
    """Attention weights of some queries on all positions, some KV heads at a time.

    The softmax runs in float32 over all ``S`` keys up to each query's own, and the head's sink if it has one. What is
    not there (:attr:`LayerInputs.valid`) gets none. The peak does not grow with the model's width; see
    :func:`heads_at_once`.

    Args:
        inputs: with ``q`` queries.
        places: of their own keys.

    Yields:
        ``[n, G, q, S]`` float32 for the next ``n`` KV heads, the caller's to overwrite.

    Raises:
        ValueError: if the heads do not divide.
    """
    num_heads, num_queries, _ = inputs.queries.shape
    num_kv_heads, prompt_len, _ = inputs.keys.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    device = inputs.queries.device
    own = places.start + places.step * torch.arange(len(places), device=device).unsqueeze(1)
    future = torch.arange(places.start, prompt_len, device=device) > own
    at_once = heads_at_once(device, num_heads // num_kv_heads * num_queries * prompt_len)
    heads = inputs.queries.unflatten(0, (num_kv_heads, -1)).split(at_once), inputs.keys.split(at_once)
    missing = [None] * len(heads[1]) if inputs.valid is None else (~inputs.valid).split(at_once)
    sinks: Iterable[torch.Tensor | None] = [None] * len(missing)
    if inputs.sinks is not None:
        sinks = inputs.sinks.unflatten(0, (num_kv_heads, -1)).split(at_once)
    for queries, keys, absent, sink in zip(*heads, missing, sinks, strict=True):
        logits = attention_logits(queries, keys, inputs.scale, inputs.logits_soft_cap)
        if absent is not None:
            logits.masked_fill_(absent[:, None, None], float("-inf"))
        logits[..., places.start :].masked_fill_(future, float("-inf"))
        yield _softmax(logits, sink)


def largest_attention(inputs: LayerInputs, places: range, notes: torch.Tensor | None, near: int = 0) -> torch.Tensor:
    """The largest attention that any query so far, in any head of the group, pays each position.

    Args:
        inputs: with the queries of a chunk; see :meth:`Policy.note`.
        places: of their own keys.
        notes: what this returned for the chunks before, of those positions that are left.
        near: positions before a query that it says nothing of; its own is not among them and says nothing either.

    Returns:
        ``[Hkv, S]`` float32.
    """
    num_kv_heads, length, _ = inputs.keys.shape
    peak = torch.zeros(num_kv_heads, length, device=inputs.keys.device)
    if notes is not None:
        peak[:, : notes.shape[1]] = notes
    # A few at a time, with what they can see: half of it in the mean.
    for first in range(0, len(places), AT_ONCE):
        part = places[first : first + AT_ONCE]
        end = part[-1] + 1
        seen = replace(
            inputs,
            queries=inputs.queries[:, first : first + AT_ONCE],
            keys=inputs.keys[:, :end],
            valid=None if inputs.valid is None else inputs.valid[:, :end],
        )
        own = part.start + part.step * torch.arange(len(part), device=peak.device).unsqueeze(1)
        is_near = torch.arange(end, device=peak.device) >= own - near
        new = [weights.masked_fill_(is_near, 0).amax(dim=(1, 2)) for weights in attention(seen, part)]
        peak[:, :end] = peak[:, :end].maximum(torch.cat(new))
    return peak


def inherited(
    peak: torch.Tensor, pool_kernel: int, half_life: float, first: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """The largest attention to each position, smoothed, passed on to successors, and at least its head's mean.

    Args:
        peak: ``[Hkv, N]``.
        pool_kernel: width of the smoothing, odd.
        half_life: see :func:`echoed`.
        first: positions of each head that pass nothing on and get nothing of their own.
        valid: see :class:`LayerInputs`.
    """
    worth = echoed(average_pool(peak.masked_fill(leading(first, peak, valid), 0), pool_kernel), half_life)
    mean = worth.mean(dim=-1, keepdim=True)
    if valid is not None:
        there = valid[:, : worth.shape[1]]
        mean = (worth * there).sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True)
    return worth.maximum(mean)


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


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of ``[n, G, q, S]`` float32 logits, which may be overwritten, beside ``[n, G]`` sinks if there are."""
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks.float()[..., None, None]
    most = logits.amax(dim=-1, keepdim=True).maximum(sink)
    weights = logits.sub_(most).exp_()
    return weights.div_(weights.sum(dim=-1, keepdim=True).add_((sink - most).exp_()))


def average_pool(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Smooths ``[..., N]`` along the last axis: stride 1, zeros beyond the ends, always divided by ``kernel``."""
    # Shifted sums: torch's own pooling takes five times as long on CPUs.
    total = scores.clone()
    for shift in range(1, min(kernel // 2 + 1, scores.shape[-1])):
        total[..., shift:] += scores[..., :-shift]
        total[..., :-shift] += scores[..., shift:]
    return total.div_(kernel)


def echoed(scores: torch.Tensor, half_life: float, valid: torch.Tensor | None = None, silent: int = 0) -> torch.Tensor:
    """Lets each position inherit the scores of those before it, halved with every ``half_life`` positions.

    What attends to a position attends to its successors in the next steps, when it goes on copying or reading from
    there: ``max over 0 <= j <= 63 of 2 ** (-j / half_life) * scores[i - j]``.

    Args:
        scores: ``[Hkv, N]``, not negative.
        half_life: positions; 0 leaves the scores as they are.
        valid: see :class:`LayerInputs`.
        silent: first positions of each head that pass nothing on.

    Returns:
        ``[Hkv, N]``, at least ``scores``.
    """
    if not half_life:
        return scores
    passed = scores.masked_fill(leading(silent, scores, valid), 0)
    # By doubling: a maximum over the last n is one over two maxima over the last n / 2.
    reach = 0
    while reach < ECHO_REACH:
        step = min(reach + 1, ECHO_REACH - reach)
        passed[:, step:] = passed[:, step:].maximum(passed[:, :-step] * 2 ** (-step / half_life))
        reach += step
    return passed.maximum(scores)


def better_ranks(*rankings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Joins rankings of the same entries: each counts by the best of its ranks among all entries of all layers.

    Args:
        rankings: each the scores of all layers, ``[Hkv, N]``; ``N`` may differ between layers. Entries that tie in
            one are ranked by the next.

    Returns:
        For each layer ``[Hkv, N]`` float32, the share of all entries that do not rank before, in (0, 1].
    """
    best = order = None
    for ranking in reversed(rankings):
        scores = torch.cat([layer.flatten() for layer in ranking])
        if best is None or order is None:
            order = scores.argsort(descending=True, stable=True)
            best = torch.full_like(order, len(scores))
        else:
            order = order[scores[order].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        best = best.minimum(rank)
    assert best is not None, "there is at least one ranking"
    share = (1 - best.double() / len(best)).float()
    layers = share.split([layer.numel() for layer in rankings[0]])
    return [ranks.view_as(layer) for ranks, layer in zip(layers, rankings[0], strict=True)]


def projected_value_norms(inputs: LayerInputs) -> torch.Tensor:
    """L1 norm of what each value becomes behind the output projection, mean over the query heads that read it.

    Returns:
        ``[Hkv, S]`` float32.
    """
    return torch.cat([values.abs_().sum(dim=-1).mean(dim=1) for values in projected_values(inputs)], dim=-1)


def projected_values(inputs: LayerInputs, chunk: int = 512) -> Iterator[torch.Tensor]:
    """What each value becomes behind the output projection, for the query heads that read it.

    Args:
        inputs: with ``values`` and ``output_weight``.
        chunk: positions projected at once; the peak is ``Hkv * G * chunk * hidden`` floats.

    Yields:
        ``[Hkv, G, n, hidden]`` float32 for the next ``n`` positions, the caller's to overwrite.
    """
    assert inputs.values is not None, "the policy says that it needs values"
    weight = projections(inputs)
    for start in range(0, inputs.values.shape[1], chunk):
        yield inputs.values[:, None, start : start + chunk].float() @ weight.transpose(-1, -2)


def projections(inputs: LayerInputs) -> torch.Tensor:
    """``[Hkv, G, hidden, D]`` float32, the part of the output projection that belongs to each query head's values."""
    assert inputs.output_weight is not None, "the policy says that it needs the output projection"
    assert inputs.values is not None, "the policy says that it needs values"
    num_kv_heads, _, head_size = inputs.values.shape
    return inputs.output_weight.float().unflatten(1, (num_kv_heads, -1, head_size)).permute(1, 2, 0, 3)


def finite(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` with NaN as the lowest and infinities as the largest finite numbers of float32."""
    return torch.nan_to_num(scores.float(), nan=torch.finfo(torch.float32).min)


def require_window(window: int, at_least: int = 1) -> None:
    """Raises ``ValueError`` for a window that is too small."""
    if window < at_least:
        raise ValueError(f"window must be at least {at_least}, not {window}")


def require_odd(name: str, kernel: int) -> None:
    """Raises ``ValueError`` unless ``kernel`` is a positive odd number, and one that may be allocated."""
    if not 1 <= kernel < MAX_KERNEL or kernel % 2 == 0:
        raise ValueError(f"{name} must be a positive odd number below {MAX_KERNEL}, not {kernel}")


def require_echo(half_life: float) -> None:
    """Raises ``ValueError`` for a half-life that is not a finite number of positions."""
    if not 0 <= half_life < float("inf"):
        raise ValueError(f"echo must be a number of positions of at least 0, not {half_life}")


def require_fraction(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")
