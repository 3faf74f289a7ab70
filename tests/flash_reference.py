"""FlashAttention's and Triton's paged kernels in plain torch: what ``FLASH_ATTN`` and ``TRITON_ATTN`` call, no more.

They ask of their arguments what the kernels ask (shapes, types, strides), so that they would accept what passes here.
Formula: Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), section 3; the mask is aligned at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch


def flash_attn_varlen_func(*, scheduler_metadata: torch.Tensor | None, **arguments: Any) -> None:
    """What ``FLASH_ATTN`` calls: :func:`attend`, with queries of the keys' type and a schedule left to the kernel."""
    assert scheduler_metadata is None
    for name in ("alibi_slopes", "dynamic_causal", "mask_mod", "aux_tensors"):
        assert arguments.get(name) is None, name
    assert arguments["q"].dtype == arguments["k"].dtype
    for name in ("q_descale", "k_descale", "v_descale"):
        assert arguments["k"].element_size() == 1 or (arguments[name] == 1).all()
    attend(**arguments)


def unified_attention(*, q_descale: torch.Tensor | None, sinks: torch.Tensor | None, **arguments: Any) -> None:
    """What ``TRITON_ATTN`` calls: :func:`attend`, with queries of 8 bits and one scale, or the model's own and none."""
    for name in ("alibi_slopes", "output_scale", "mm_prefix_range", "rswa_prefix_lens", "k_scale_cache"):
        assert arguments.get(name) is None, name
    assert (q_descale is not None) == (arguments["q"].element_size() == 1)
    assert q_descale is None or arguments["q"].dtype == arguments["k"].dtype
    q_descale = torch.ones(1) if q_descale is None else q_descale
    assert q_descale.numel() == 1
    attend(q_descale=q_descale.expand(arguments["k_descale"].shape), s_aux=sinks, **arguments)


def attend(
    *,
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
    q_descale: torch.Tensor,
    k_descale: torch.Tensor,
    v_descale: torch.Tensor,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Attention of ``q`` ``[T, Hq, D]`` over pages ``k`` ``[num_blocks, B, Hkv, D]`` and ``v`` ``[..., Dv]``.

    Args:
        q: all sequences' queries, one after the other.
        k: keys; ``block_table`` ``[R, C]`` int32 names each sequence's pages.
        v: values.
        out: ``[T, Hq, Dv]``, written to.
        cu_seqlens_q: ``[R + 1]`` int32, where each sequence's queries begin.
        max_seqlen_q: at least as many as any sequence has.
        seqused_k: ``[R]`` int32, keys of each sequence.
        max_seqlen_k: at least as many as any sequence has.
        softmax_scale: of the logits.
        causal: must be true.
        window_size: keys to the left and right that a query sees; -1: all.
        block_table: see ``k``.
        softcap: bound of the logits, 0: none.
        q_descale: ``[R, Hkv]`` float32, what queries are times, as ``k_descale`` and ``v_descale``.
        k_descale: of keys.
        v_descale: of values.
        s_aux: ``[Hq]``, a logit of nothing beside each head's, or none.
        _: what changes rounding only, or was seen to be empty.
    """
    num_sequences, descales = len(cu_seqlens_q) - 1, (q_descale, k_descale, v_descale)
    assert causal
    assert {cu_seqlens_q.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert len(seqused_k) == len(block_table) == num_sequences
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == block_table.stride(-1) == 1
    assert k.dtype == v.dtype
    assert k.shape[:-1] == v.shape[:-1]
    assert out.shape[1:] == (q.shape[1], v.shape[-1])
    # Of a dimension of one vLLM makes what the kernels' alignment asks for.
    assert all(of_k == of_v or size == 1 for size, of_k, of_v in zip(k.shape, k.stride(), v.stride(), strict=True))
    assert k.shape[1] % 16 == 0
    assert q.shape[1] % k.shape[2] == 0
    for descale in descales:
        assert descale.shape == (num_sequences, k.shape[2])
        assert descale.dtype == torch.float32
    if s_aux is not None:
        assert s_aux.shape == (q.shape[1],)
        assert s_aux.is_contiguous()
    starts, per_head = cu_seqlens_q.tolist(), q.shape[1] // k.shape[2]
    assert starts[-1] <= len(q)
    for index, length in enumerate(seqused_k.tolist()):
        rows = slice(starts[index], starts[index + 1])
        num_queries = rows.stop - rows.start
        if not num_queries:
            continue
        assert num_queries <= max_seqlen_q
        assert num_queries <= length <= max_seqlen_k
        pages = block_table[index, : -(-length // k.shape[1])].long()
        # [Hq, 1, 1] and, of keys and values, [Hq, N, D]
        scales = [descale[index].repeat_interleave(per_head).view(-1, 1, 1) for descale in descales]
        keys, values = (
            cache[pages].flatten(0, 1)[:length].float().repeat_interleave(per_head, dim=1).transpose(0, 1) * descale
            for cache, descale in zip((k, v), scales[1:], strict=True)
        )
        logits = (q[rows].float().transpose(0, 1) * scales[0]) @ keys.mT * softmax_scale
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        distance = torch.arange(length - num_queries, length).unsqueeze(1) - torch.arange(length)
        hidden = distance < 0
        if window_size[0] >= 0:
            hidden |= distance > window_size[0]
        logits = logits.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.float().view(-1, 1, 1).expand(-1, num_queries, 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :length]
        out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)


def flash_attn_unequal(**arguments: Any) -> None:
    """What ``FLASH_ATTN_DIFFKV`` calls."""
    assert arguments.pop("fa_version") == 3
    flash_attn_varlen_func(**arguments)


def reshape_and_cache_unequal(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, *rest: Any
) -> None:
    """Writes ``[T, Hkv, D]`` keys and ``[T, Hkv, Dv]`` values side by side into ``[num_blocks, B, Hkv, D + Dv]``."""
    key_cache, value_cache = cache.split([key.shape[-1], value.shape[-1]], dim=-1)
    reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, *rest)


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
