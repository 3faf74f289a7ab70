"""The part of the attention backends that does not depend on the backend.

A backend that evicts is its stock backend with two differences: layers of full attention get a KV cache spec of ours,
and a layer's forward may have a step's work beside it: rows that read private pages, and requests whose queries and
keys have to be looked at. Both apply only while eviction is on in the engine at hand; otherwise every class here hands
out the stock one, and in a step without such work the stock forward is all that runs.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.compilation import backends as compilation
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionImplBase, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)

from cake_vllm.integration.engine import eviction_config, window_cuts
from cake_vllm.kernels import BlockLayout, Grid

#: Name under which a step's work hangs on the attention metadata of evictable layers.
STEP = "kv_eviction_step"


class EvictingBackend:
    """Mixin for an ``AttentionBackend``; put it first among the bases."""

    stock_impl: ClassVar[type[AttentionImplBase]]
    evicting_impl: ClassVar[type[AttentionImplBase]]
    # Layers are built under the engine's config, specs are asked for later without one.
    _spec_fields: ClassVar[dict[str, Any] | None] = None
    _max_model_len: ClassVar[int]

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImplBase]:
        """The evicting implementation if eviction is on in the current engine, else the stock one."""
        vllm_config = get_current_vllm_config_or_none()
        config = eviction_config(vllm_config)
        if config is None or vllm_config is None:
            cls._spec_fields = None
            return cls.stock_impl
        from cake_vllm.integration.worker.projections import remember_projections

        remember_projections()
        if cls._spec_fields is not None and is_drafting():
            # Built under a configuration of its own, whose models may be shorter.
            return cls.evicting_impl
        max_model_len = vllm_config.model_config.max_model_len
        in_flight = vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens
        cls._max_model_len = max_model_len
        cls._spec_fields = {"max_request_tokens": config.max_request_tokens(max_model_len, in_flight)}
        return cls.evicting_impl

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """While eviction is on the smallest that the stock backend takes, which is how private pages are dealt out.

        vLLM cuts its blocks accordingly, and shows its kernels the parts: each is a page of its own in every layer,
        dense and in the order of elements that the kernels give a block of that size.
        """
        sizes = super().get_supported_kernel_block_sizes(kv_cache_spec)  # type: ignore[misc]
        return sizes if cls._spec_fields is None else [smallest(sizes)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Gives layers of full attention a spec of ours, whose manager lets them give blocks back."""
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if cls._spec_fields is None:
            return spec
        from cake_vllm.integration.scheduler.spec import (
            EvictableLatentSpec,
            EvictableSpec,
            ExactChunkedSpec,
            ExactSlidingWindowSpec,
        )

        if type(spec) is SlidingWindowSpec and not window_cuts(spec.sliding_window, cls._max_model_len):
            spec = replace_as(spec, FullAttentionSpec, sliding_window=None, drop=("extra_retained_tokens",))
        if type(spec) is SlidingWindowSpec:
            return replace_as(spec, ExactSlidingWindowSpec)
        if type(spec) is ChunkedLocalAttentionSpec:
            return replace_as(spec, ExactChunkedSpec)
        is_latent = type(spec) is MLAAttentionSpec
        if not is_latent and (type(spec) is not FullAttentionSpec or spec.sliding_window is not None):
            return spec
        (page,) = cls.get_supported_kernel_block_sizes(spec)
        evictable = EvictableLatentSpec if is_latent else EvictableSpec
        return replace_as(spec, evictable, kernel_block_size=page, **cls._spec_fields)


@dataclass(frozen=True)
class Rows:
    """Evicted rows of a step whose owners are of one kind, as sequences of their own.

    With layers as owners a row is a sequence. With KV heads as owners it is ``Hkv`` sequences of one KV head and ``G``
    query heads each: queries ``[T, Hq, D]`` are read as ``[T * Hkv, G, D]``.

    Attributes:
        by_head: whether the owners are KV heads.
        tables: ``[L, N, C]`` int32, pages of the global view (head pages by head).
        lengths: ``[L, N]`` int32.
        query_start_loc: ``[N + 1]`` int32.
        num_queries: of all sequences together.
        longest: queries of the sequence with the most.
    """

    by_head: bool
    tables: torch.Tensor
    lengths: torch.Tensor
    query_start_loc: torch.Tensor
    num_queries: int
    longest: int

    @cached_property
    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n]`` int64 each: the sequence of every query, and how many queries of it come behind; for all layers."""
        starts, device = self.query_start_loc, self.query_start_loc.device
        sequence = torch.arange(len(starts) - 1, device=device)
        sequence = sequence.repeat_interleave(starts[1:] - starts[:-1], output_size=self.num_queries)
        return sequence, starts[1:][sequence] - 1 - torch.arange(self.num_queries, device=device)

    def of_one_head(self, num_heads: int) -> "Rows":
        """The same for one of so many KV heads: what they have in common, which is all but tables and lengths."""
        starts = self.query_start_loc[::num_heads] // num_heads
        return replace(self, query_start_loc=starts, num_queries=self.num_queries // num_heads)

    def places_by_head(self, num_heads: int) -> torch.Tensor:
        """``[Hkv, n]`` int64, where the queries of each KV head are."""
        starts, device = self.query_start_loc.long(), self.query_start_loc.device
        num_queries, head = self.num_queries // num_heads, torch.arange(num_heads, device=device).unsqueeze(1)
        place = torch.arange(num_queries, device=device)
        if self.longest == 1:
            return place * num_heads + head
        num_new = (starts[1:] - starts[:-1])[::num_heads]
        row = torch.arange(len(num_new), device=device).repeat_interleave(num_new, output_size=num_queries)
        # Of the row, which begins with its first head's; of it the queries before are of this head alone.
        first = starts[:-1:num_heads][row]
        return first + head * num_new[row] + place - first // num_heads


@dataclass(frozen=True)
class StepWork:
    """Hung on the metadata of evictable layers for one step.

    Attributes:
        grid: the global view.
        stock: the metadata for rows that were not evicted; ``None`` if there are none.
        redirected: the others.
        index: of each KV head's group of their queries, one after the other: its token and its head, both int64;
            ``None``: they are all of the step's, in order.
        observe: shown each layer's index and queries ``[T, Hq, D]``, post-RoPE, after its forward; or ``None``.
        is_here: ``[T]`` bool, if the redirected rows are all of the step's, evicted or not: which results count.
    """

    grid: Grid
    stock: Any
    redirected: list[Rows]
    index: tuple[torch.Tensor, torch.Tensor] | None
    observe: Callable[[int, torch.Tensor], None] | None
    is_here: torch.Tensor | None = None


class RedirectedImpl(AttentionImplBase):
    """What an implementation of attention that evicts knows of its layer and of a step, however it is called.

    Attributes:
        layer_index: rank of the layer among the evictable ones of its worker, in model order, a draft's behind the
            target's; of a layer that reads the cache of one of these, that one's. -1: it is not evicted.
        is_reader: whether it reads another layer's cache: what was kept for that one's queries.
        is_draft: whether the layer belongs to a model that drafts.
        work_of_pass: of a draft layer, makes a pass's work of its metadata.
        captured_step: makes a step's work of its metadata, while graphs of steps with evicted rows are captured.
    """

    layer_index = -1
    work_of_pass: Callable[[Any], StepWork | None] | None
    captured_step: ClassVar[Callable[[Any], StepWork] | None] = None
    num_kv_heads: int
    kv_cache_dtype: str
    sinks: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any):
        asked: dict[str, Any] = dict(zip(_IMPL_ARGUMENTS, args, strict=False)) | kwargs
        given = dict(asked)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config and not window_cuts(given.get("sliding_window"), vllm_config.model_config.max_model_len):
            given["sliding_window"] = None
        super().__init__(**given)
        self.is_draft, self.work_of_pass = is_drafting(), None
        self.is_reader = given.get("kv_sharing_target_layer_name") is not None
        for is_so, what in self.refused(asked):
            if is_so:
                raise ValueError(f"--kv-eviction cannot evict from models with {what}: serve this one without the flag")

    @staticmethod
    def refused(given: dict[str, Any]) -> list[tuple[bool, str]]:
        """Whether a layer, by the arguments it was given, has what cannot be evicted from, and what that is."""
        return [
            (given.get("alibi_slopes") is not None, "ALiBi, whose bias depends on where a key lies"),
            (given.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER, "encoder attention"),
        ]

    def work_of(self, metadata: Any) -> StepWork | None:
        """A step's work in this layer, if there is any beside the stock call."""
        step: StepWork | None = getattr(metadata, STEP, None)
        if metadata is not None and self.work_of_pass is not None:
            # The metadata may be the target's, or that of an earlier pass with other lengths in it.
            return self.work_of_pass(metadata)
        if step is None and metadata is not None and RedirectedImpl.captured_step and self.layer_index >= 0:
            return RedirectedImpl.captured_step(metadata)
        return step

    @property
    def quantized_dtype(self) -> torch.dtype | None:
        """What the bytes of a quantized cache are; ``None``: it holds the model's own numbers."""
        return current_platform.fp8_dtype() if is_quantized(self.kv_cache_dtype) else None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not while rows are computed apart from each other."""
        return False

    @abstractmethod
    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """Where this backend keeps keys and values inside a head page."""

    @abstractmethod
    def with_lengths(self, layer: Any, metadata: Any, seq_lens: torch.Tensor) -> Any:
        """A copy of ``metadata`` with other lengths (``[R]``)."""


class EvictingImpl(RedirectedImpl, AttentionImpl):
    """Mixin for an ``AttentionImpl``; put it first among the bases."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The stock forward, with rows that were evicted reading their own pages.

        The stock call covers all rows, evicted ones with nothing but their new tokens; what it gives these is
        overwritten. If all rows were evicted it is left out. Keys and values have been written by then, by vLLM.
        """
        step = self.work_of(attn_metadata)
        stock = attn_metadata if step is None else step.stock
        if stock is not None:
            self._stock_forward(layer, query, key, value, kv_cache, stock, output, *args, **kwargs)
        if step is not None:
            if step.redirected:
                self._attend(step, layer, query, key, value, attn_metadata, output)
            if step.observe is not None and not self.is_reader:
                step.observe(self.layer_index, query)
        return output

    def _stock_forward(self, *args: Any, **kwargs: Any) -> None:
        super().forward(*args, **kwargs)  # type: ignore[safe-super]

    def _attend(
        self,
        step: StepWork,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        one, size = self._of_one_head, query.shape[-1]
        queries, chosen, end = query, output, 0
        if step.index is not None:
            # [N, G, D]: one gather and one scatter, whatever owners there are.
            queries = select_rows(query.unflatten(1, (-1, one.num_heads)), step.index)
        if step.index is not None or step.is_here is not None:
            # As wide as values, which may be of another size.
            chosen = output.new_empty(*queries.shape[:-1], output.shape[-1])
        for rows in step.redirected:
            impl, cache = (one, step.grid.head_pages) if rows.by_head else (self, step.grid.pages)
            start, end = end, end + rows.num_queries * impl.num_kv_heads
            # [tokens, heads, D], or [tokens * Hkv, G, D]
            asked = queries[start:end].reshape(-1, impl.num_heads, size)
            given = chosen[start:end].view(-1, impl.num_heads, output.shape[-1])
            if rows.by_head and self.sinks is not None:
                self._attend_by_head(rows, layer, asked, key, value, cache, metadata, given)
                continue
            own = impl.with_rows(layer, metadata, rows, rows.tables[self.layer_index], rows.lengths[self.layer_index])
            impl._stock_forward(layer, asked, key, value, cache, own, given)
        if step.index is not None:
            output.unflatten(1, (-1, one.num_heads))[step.index] = chosen
        elif step.is_here is not None:
            is_here = step.is_here.view(-1, *[1] * (output.ndim - 1))
            torch.where(is_here, chosen.view(output.shape), output, out=output)

    def _attend_by_head(
        self,
        rows: Rows,
        layer: Any,
        queries: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """A call for each KV head: kernels have a sink for each head of a sequence, the same in all sequences."""
        assert self.sinks is not None
        one, num_heads = self._of_one_head, self.num_kv_heads
        places, rows_of_one = rows.places_by_head(num_heads), rows.of_one_head(num_heads)
        # [Hkv, N, C], [Hkv, N], [Hkv, n, G, D], [Hkv, G]
        tables, lengths = (
            of[self.layer_index].unflatten(0, (-1, num_heads)).transpose(0, 1).contiguous()
            for of in (rows.tables, rows.lengths)
        )
        asked, sinks = queries[places], self.sinks.unflatten(0, (num_heads, -1))
        given = output.new_empty(*asked.shape[:-1], output.shape[-1])
        for head in range(num_heads):
            one.sinks = sinks[head]
            own = one.with_rows(layer, metadata, rows_of_one, tables[head], lengths[head])
            one._stock_forward(layer, asked[head], key, value, cache, own, given[head])
        output[places] = given

    @abstractmethod
    def with_rows(self, layer: Any, metadata: Any, rows: Rows, table: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        """A copy of ``metadata`` for sequences that read ``table`` (``[N, C]``) up to ``seq_lens`` (``[N]``)."""

    @cached_property
    def _of_one_head(self) -> "EvictingImpl":
        """The same for sequences of one KV head."""
        one = copy(self)
        one.num_heads, one.num_kv_heads = self.num_heads // self.num_kv_heads, 1
        return one


def smallest(sizes: Sequence[int | MultipleOf]) -> int:
    """The smallest block, in tokens, of those that vLLM says a kernel takes."""
    return min(size.base if isinstance(size, MultipleOf) else size for size in sizes)


def is_drafting() -> bool:
    """Whether the model that is being built is one that drafts."""
    return compilation.model_tag in ("eagle_head", "draft_model")


def is_quantized(kv_cache_dtype: str) -> bool:
    """Whether a cache holds 8-bit floats, of those that are not refused."""
    return kv_cache_dtype.startswith("fp8")


def select_rows(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]``, also where there is none for 8-bit floats."""
    if tensor.element_size() > 1:
        return tensor[index]
    return tensor.view(torch.uint8)[index].view(tensor.dtype)


_IMPL_ARGUMENTS = (
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
)
