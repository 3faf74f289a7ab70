"""FlashAttention's and Triton's paged kernels in plain torch: what ``FLASH_ATTN`` and ``TRITON_ATTN`` call, no more.

They ask of their arguments what the kernels ask (shapes, types, strides), so that they would accept what passes here.
Formula: Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), section 3; the mask is aligned at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Sequence[int],
    block_table: torch.Tensor,
    softcap: float,
    scheduler_metadata: torch.Tensor | None,
    num_splits: int,
    **rest: Any,
) -> None:
    """Attention of ``q`` ``[T, Hq, D]`` over pages ``k``, ``v`` ``[num_blocks, B, Hkv, D]``, written to ``out``.

    Args:
        q: all sequences' queries, one after the other.
        k: keys; ``block_table`` ``[R, C]`` int32 names each sequence's pages. 8-bit floats only if ``q`` is, too.
        v: values.
        out: as ``q``.
        cu_seqlens_q: ``[R + 1]`` int32, where each sequence's queries begin.
        max_seqlen_q: at least as many as any sequence has.
        seqused_k: ``[R]`` int32, keys of each sequence.
        max_seqlen_k: at least as many as any sequence has.
        softmax_scale: of the logits.
        causal: must be true.
        window_size: keys to the left and right that a query sees; -1: all.
        block_table: see ``k``.
        softcap: bound of the logits, 0: none.
        scheduler_metadata: must be left to the kernel.
        num_splits: ignored, it changes rounding only.
        rest: ``q_descale``, ``k_descale``, ``v_descale`` ``[R, Hkv]`` float32, ones unless ``k`` is of 8 bits; what
            none of these tests uses must be empty.
    """
    assert causal
    assert scheduler_metadata is None
    for name in ("alibi_slopes", "dynamic_causal", "s_aux", "mask_mod", "aux_tensors"):
        assert rest.get(name) is None, name
    assert q.dtype == k.dtype == v.dtype
    descales = [rest[name] for name in ("q_descale", "k_descale", "v_descale")]
    for descale in descales:
        assert k.element_size() == 1 or (descale == 1).all()
    lengths = seqused_k, max_seqlen_k, block_table
    attend(q, k, v, out, cu_seqlens_q, max_seqlen_q, *lengths, softmax_scale, window_size[0], softcap, *descales)


def unified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Sequence[int],
    block_table: torch.Tensor,
    softcap: float,
    q_descale: torch.Tensor | None,
    k_descale: torch.Tensor,
    v_descale: torch.Tensor,
    **rest: Any,
) -> None:
    """What ``TRITON_ATTN`` calls, the same, but that queries beside 8-bit keys may be the model's own.

    Args as above, but for ``q_descale``: one number, only if ``q`` is of 8 bits.
    """
    for name in ("alibi_slopes", "sinks", "output_scale", "mm_prefix_range", "rswa_prefix_lens", "k_scale_cache"):
        assert rest.get(name) is None, name
    assert causal
    assert (q_descale is not None) == (q.element_size() == 1)
    assert k.dtype == v.dtype
    assert q.element_size() > 1 or q.dtype == k.dtype
    q_descale = torch.ones(1) if q_descale is None else q_descale
    assert q_descale.numel() == 1
    descales = q_descale.expand(k_descale.shape), k_descale, v_descale
    lengths = seqused_k, max_seqlen_k, block_table
    attend(q, k, v, out, cu_seqlens_q, max_seqlen_q, *lengths, softmax_scale, window_size[0], softcap, *descales)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    max_queries: int,
    lengths: torch.Tensor,
    max_keys: int,
    block_table: torch.Tensor,
    scale: float,
    window_left: int,
    soft_cap: float,
    *descales: torch.Tensor,
) -> None:
    """The attention of both, in float32; arguments as of :func:`flash_attn_varlen_func`, ``descales`` ``[R, Hkv]``."""
    num_sequences = len(starts) - 1
    assert {starts.dtype, lengths.dtype, block_table.dtype} == {torch.int32}
    assert len(lengths) == len(block_table) == num_sequences
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == block_table.stride(-1) == 1
    assert k.shape == v.shape
    assert k.stride() == v.stride()
    assert k.shape[1] % 16 == 0
    assert q.shape[1] % k.shape[2] == 0
    for descale in descales:
        assert descale.shape == (num_sequences, k.shape[2])
        assert descale.dtype == torch.float32
    assert starts[-1] <= len(q)
    per_head = q.shape[1] // k.shape[2]
    for index, length in enumerate(lengths.tolist()):
        rows = slice(starts[index], starts[index + 1])
        num_queries = int(rows.stop - rows.start)
        if not num_queries:
            continue
        assert num_queries <= max_queries
        assert num_queries <= length <= max_keys
        pages = block_table[index, : -(-length // k.shape[1])].long()
        # [Hq, 1, 1] and, of keys and values, [Hq, N, D]
        scales = [descale[index].repeat_interleave(per_head).view(-1, 1, 1) for descale in descales]
        keys, values = (
            cache[pages].flatten(0, 1)[:length].float().repeat_interleave(per_head, dim=1).transpose(0, 1) * of_cache
            for cache, of_cache in zip((k, v), scales[1:], strict=True)
        )
        logits = (q[rows].float().transpose(0, 1) * scales[0]) @ keys.mT * scale
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        distance = torch.arange(length - num_queries, length).unsqueeze(1) - torch.arange(length)
        hidden = distance < 0
        if window_left >= 0:
            hidden |= distance > window_left
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)


def scaled_fp8_quant(tensor: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers over one scale, as 8-bit floats of four exponent bits."""
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Writes ``[T, Hkv, D]`` keys and values into caches ``[num_blocks, B, Hkv, D]``; slots below 0 are padding.

    If ``kv_cache_dtype`` says so, these are bytes: numbers over their scale, as 8-bit floats of four exponent bits.
    """
    used = slot_mapping >= 0
    slots, size = slot_mapping[used], key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        new = new[: len(slot_mapping)][used]
        if kv_cache_dtype.startswith("fp8"):
            new = scaled_fp8_quant(new, scale)[0].view(cache.dtype)
        cache[slots // size, slots % size] = new
