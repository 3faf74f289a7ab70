"""FlashInfer's paged attention in plain torch, where there is no GPU: what ``FLASHINFER`` calls, and nothing else.

It asks of its arguments what FlashInfer 0.7 asks (its docstrings and checks in ``prefill.py`` and ``decode.py``), so
that the kernels would accept what passes here; the attention is :mod:`flash_reference`'s. vLLM's backend is imported
with this module under FlashInfer's names.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flash_reference
import torch

#: How often each kernel ran, by name, and the keys that it read.
calls: dict[str, list[list[int]]] = {}


@contextmanager
def in_place_of_flashinfer() -> Iterator[None]:
    """``import flashinfer`` finds this module meanwhile."""
    names = ["flashinfer", *(f"flashinfer.{name}" for name in ("decode", "prefill", "utils"))]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, sys.modules[__name__]))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def attend(
    kernel: str,
    q: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    pages: list[torch.Tensor],
    lengths: list[int],
    starts: list[int],
    scale: float,
    v_scale: float,
    out: torch.Tensor,
    window_left: int = -1,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of ``q`` ``[T, Hq, D]`` over pages of keys and values, ``HND``: ``[num_pages, Hkv, B, D]``.

    Args:
        kernel: name under which the call is remembered.
        q: all sequences' queries, one after the other.
        kv_cache: keys and values.
        pages: of each sequence.
        lengths: keys of each sequence.
        starts: where each sequence's queries begin, and where the last one's end.
        scale: of the logits, those of queries and keys included.
        v_scale: of the values.
        out: as ``q``.
        window_left: keys to the left that a query sees; -1: all.
        soft_cap: bound of the logits, 0: none.
        sinks: ``[Hq]`` float32, a logit of nothing beside each head's, or none.
    """
    calls.setdefault(kernel, []).append(lengths)
    num_pages, num_kv_heads, page_size, head_size = kv_cache[0].shape
    assert q.shape[1:] == out.shape[1:] == (q.shape[1], head_size)
    assert q.shape[0] == out.shape[0] == starts[-1]
    for table, length in zip(pages, lengths, strict=True):
        assert table.dtype == torch.int32
        assert len(table) >= -(-length // page_size)
        assert ((table >= 0) & (table < num_pages)).all()
    # [num_pages, B, Hkv, D]
    keys, values = (cache.transpose(1, 2) for cache in kv_cache)
    ones = torch.ones(len(lengths), num_kv_heads)
    flash_reference.attend(
        q=q,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        max_seqlen_q=max(b - a for a, b in itertools.pairwise(starts)),
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_k=max(lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(window_left, 0),
        block_table=torch.nn.utils.rnn.pad_sequence(pages, batch_first=True),
        softcap=soft_cap,
        q_descale=ones,
        k_descale=ones,
        v_descale=ones * v_scale,
        s_aux=sinks,
    )


class BatchPrefillWithPagedKVCacheWrapper:
    """``plan`` is given a step's rows on the host, ``run`` a layer's queries and cache."""

    kernel = "prefill"

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, backend: str = "auto"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"
        assert backend in ("auto", "fa2")
        self.is_cuda_graph_enabled = False

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        seq_lens: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        o_data_type: torch.dtype,
        fixed_split_size: int,
        disable_split_kv: bool,
    ) -> None:
        batch_size = len(qo_indptr) - 1
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32
        assert len(paged_kv_indptr) == batch_size + 1
        assert len(paged_kv_last_page_len) == len(seq_lens) == batch_size
        assert qo_indptr[0] == 0
        assert causal
        ends = paged_kv_indptr.tolist()
        assert ends == sorted(ends)
        assert ends[-1] <= len(paged_kv_indices)
        assert torch.equal(seq_lens, get_seq_lens(paged_kv_indptr, paged_kv_last_page_len, page_size))
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        # Copies, as it makes them: the caller's buffers are for the next step.
        self._starts, self._lengths = qo_indptr.tolist(), seq_lens.tolist()
        self._pages = [paged_kv_indices[start:end].clone() for start, end in itertools.pairwise(ends)]
        self._heads, self._page = (num_qo_heads, num_kv_heads, head_dim_qk), page_size
        self._dtypes = q_data_type, kv_data_type, o_data_type
        self._causal, self._sm_scale, self._window_left = causal, sm_scale, window_left
        self._logits_soft_cap = logits_soft_cap or 0.0

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        q_scale: float,
        k_scale: float,
        v_scale: float,
        out: torch.Tensor,
        kv_cache_sf: None = None,
        sinks: None = None,
    ) -> None:
        keys, _ = paged_kv_cache
        assert kv_cache_sf is sinks is None
        assert (q.dtype, keys.dtype, out.dtype) == self._dtypes
        assert (q.shape[1], keys.shape[1], q.shape[2]) == self._heads
        assert keys.shape[2] == self._page
        scale = self._sm_scale * q_scale * k_scale
        rows = self._pages, self._lengths, self._starts
        attend(self.kernel, q, paged_kv_cache, *rows, scale, v_scale, out, self._window_left, self._logits_soft_cap)


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """As many queries for each row, one unless vLLM 0.33 says otherwise."""

    kernel = "decode"

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, use_cuda_graph: bool, **rest: Any):
        super().__init__(float_workspace_buffer, kv_layout, rest["backend"])
        assert not use_cuda_graph
        assert rest["use_tensor_cores"]

    def plan(  # type: ignore[override]
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, head_dim: int, **rest: Any
    ) -> None:
        assert rest.pop("pos_encoding_mode") == "NONE"
        assert rest.pop("non_blocking")
        for name in ("data_type", "rope_scale", "rope_theta", "block_tables"):
            assert rest.pop(name) is None, name
        qo_indptr = torch.arange(len(indptr), dtype=torch.int32) * rest.pop("q_len_per_req", 1)
        super().plan(qo_indptr, indptr, indices, last_page_len, head_dim_qk=head_dim, causal=True, **rest)


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Keys of each row."""
    return (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp(min=0) * page_size + kv_last_page_len


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    window_left: int,
    out: torch.Tensor,
    kv_layout: str,
    q_len_per_req: int | None,
    sinks: torch.Tensor | None = None,
    **rest: Any,
) -> None:
    """Rows are read on the device; TensorRT-LLM's kernels, and with ``backend="xqa"`` those of :func:`xqa`."""
    is_xqa = rest.pop("backend", "xqa") == "xqa"
    starts, mask = rest.pop("q_cu_seq_lens" if is_xqa else "cum_seq_lens_q", None), rest.pop("mask", None)
    # Rows of different lengths say so once.
    longest = rest.pop("max_q_len", None)
    assert (q_len_per_req is None) == (longest is not None) == (starts is not None and not is_xqa)
    q_len_per_req = q_len_per_req or longest
    # Of the drafts of each row among themselves; they are causal here, and to TensorRT-LLM's kernels always.
    assert (mask is not None) == (is_xqa and q_len_per_req > 1)
    assert not any(rest.values()), rest
    name = "decode by lengths on the device"
    starts = torch.arange(len(seq_lens) + 1) * q_len_per_req if starts is None else starts
    assert (starts.diff() <= q_len_per_req).all()
    _by_tables(
        name,
        query,
        kv_cache,
        block_tables,
        seq_lens,
        starts,
        max_seq_len,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        kv_layout,
        sinks,
    )


xqa_batch_decode_with_kv_cache = trtllm_batch_decode_with_kv_cache


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    **rest: Any,
) -> None:
    """Rows of a prefill, read on the device."""
    assert not any(rest.values()), rest
    assert len(seq_lens) == batch_size
    assert cum_seq_lens_q.dtype == cum_seq_lens_kv.dtype == torch.int32
    num_pages = -(-seq_lens // kv_cache[0].shape[2])
    assert torch.equal(cum_seq_lens_kv, torch.nn.functional.pad(num_pages.cumsum(0), (1, 0)).int())
    assert (cum_seq_lens_q.diff() <= max_q_len).all()
    _by_tables(
        "prefill by lengths on the device",
        query,
        kv_cache,
        block_tables,
        seq_lens,
        cum_seq_lens_q,
        max_kv_len,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        "HND",
        sinks,
    )


def _by_tables(
    name: str,
    query: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    bmm1_scale: float,
    bmm2_scale: float,
    window_left: int,
    out: torch.Tensor,
    kv_layout: str,
    sinks: torch.Tensor | None,
) -> None:
    assert kv_layout == "HND"
    assert block_tables.dtype == seq_lens.dtype == torch.int32
    assert len(block_tables) == len(seq_lens) == len(starts) - 1
    assert (seq_lens <= longest).all()
    for tensor in (query, block_tables, seq_lens):
        assert tensor.is_contiguous()
    used = [table[: -(-length // kv_cache[0].shape[2])] for table, length in zip(block_tables, seq_lens, strict=True)]
    assert sinks is None or sinks.dtype == torch.float32
    rows = used, seq_lens.tolist(), starts.tolist()
    attend(name, query, kv_cache, *rows, bmm1_scale, bmm2_scale, out, window_left, sinks=sinks)


def unused(*args: Any, **kwargs: Any) -> Any:
    """What no test gets to."""
    raise NotImplementedError


class Unused:
    """The same."""


BatchAttentionWithAttentionSinkWrapper = BatchPrefillWithRaggedKVCacheWrapper = FP4Tensor = Unused
nvfp4_quantize_append_paged_kv_cache_with_slot_mapping = fast_decode_plan = unused


def get_device_sm_count(device: torch.device) -> int:
    """Of an H100."""
    return 132


def get_trtllm_gen_multi_ctas_kv_counter_bytes(max_tokens: int, num_heads: int, num_sms: int) -> int:
    """As much as nobody uses."""
    return 16
