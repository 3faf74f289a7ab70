"""The part of the attention backends that does not depend on the backend.

A backend that evicts is its stock backend with two differences: layers of full attention get a KV cache spec of
their own, and after its forward a layer shows the window's queries and its cache to the worker half. Both apply only
while eviction is on in the engine at hand; otherwise every class here hands out the stock one.
"""

import itertools
from abc import abstractmethod
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec, replace_as

from cake_vllm.integration.plugin import eviction_config, window_cuts
from cake_vllm.kernels import BlockLayout

#: Name under which a step's work hangs on a layer's attention metadata.
STEP = "kv_eviction_step"


class EvictingBackend:
    """Mixin for an ``AttentionBackend``; put it first among the bases."""

    stock_impl: ClassVar[type[AttentionImpl]]
    evicting_impl: ClassVar[type[AttentionImpl]]
    # Layers are built under the engine's config, specs are asked for later without one.
    _spec_fields: ClassVar[dict[str, Any] | None] = None
    _max_model_len: ClassVar[int]
    _layer_index: ClassVar[itertools.count]

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl]:
        """The evicting implementation if eviction is on in the current engine, else the stock one."""
        vllm_config = get_current_vllm_config_or_none()
        config = eviction_config(vllm_config)
        cls._layer_index = itertools.count()
        if config is None or vllm_config is None:
            cls._spec_fields = None
            return cls.stock_impl
        from cake_vllm.integration.projections import remember_projections

        remember_projections()
        max_model_len, in_flight = vllm_config.model_config.max_model_len, vllm_config.max_in_flight_tokens
        cls._max_model_len = max_model_len
        cls._spec_fields = {
            "num_queries": config.policy.num_queries,
            "never_evicted_len": config.never_evicted_len(),
            "max_request_tokens": config.max_request_tokens(max_model_len, in_flight),
        }
        return cls.evicting_impl

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder]:
        """The stock builder; while eviction is on, one that shares what it builds among the layers."""
        stock = super().get_builder_cls()  # type: ignore[misc]
        return stock if cls._spec_fields is None else _sharing(stock)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Gives each layer of full attention a spec that no other layer shares."""
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if cls._spec_fields is None:
            return spec
        from cake_vllm.integration.spec import EvictableSpec, ExactSlidingWindowSpec

        if type(spec) is SlidingWindowSpec and not window_cuts(spec.sliding_window, cls._max_model_len):
            spec = replace_as(spec, FullAttentionSpec, sliding_window=None, drop=("extra_retained_tokens",))
        if type(spec) is SlidingWindowSpec:
            return replace_as(spec, ExactSlidingWindowSpec)
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        return replace_as(spec, EvictableSpec, layer_index=next(cls._layer_index), **cls._spec_fields)


class SharingBuilder(AttentionMetadataBuilder):
    """Mixin for an ``AttentionMetadataBuilder``; put it first among the bases.

    Layers of one shape differ in their block tables only, but each is a KV cache group of its own and would have its
    metadata built anew. Here the first layer's is built and the others get copies with their own tables.
    """

    #: By shape of the layers, the last step's lengths and the metadata that was built for them.
    _built: ClassVar[dict[Any, tuple[torch.Tensor, Any]]]

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        spec = replace(kv_cache_spec, layer_index=0) if hasattr(kv_cache_spec, "layer_index") else kv_cache_spec
        self._shape = spec, getattr(self, "num_heads", None), getattr(self, "num_heads_q", None)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        # Of one step if they have the same lengths: the very same tensor, which vLLM makes once per step.
        lengths = common_attn_metadata.seq_lens
        shape = self._shape, common_prefix_len
        of_lengths, built = self._built.get(shape, (None, None))
        if of_lengths is not lengths:
            built = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)  # type: ignore[safe-super]
            self._built[shape] = lengths, built
            return built
        own: Any = copy(built)
        own.block_table = common_attn_metadata.block_table_tensor
        own.slot_mapping = common_attn_metadata.slot_mapping
        return own


@cache
def _sharing(stock: type[AttentionMetadataBuilder]) -> type[AttentionMetadataBuilder]:
    return type(f"Sharing{stock.__name__}", (SharingBuilder, stock), {"_built": {}})


class EvictingImpl(AttentionImpl):
    """Mixin for an ``AttentionImpl``; put it first among the bases."""

    def __init__(self, *args: Any, **kwargs: Any):
        given: dict[str, Any] = dict(zip(_IMPL_ARGUMENTS, args, strict=False)) | kwargs
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config and not window_cuts(given.get("sliding_window"), vllm_config.model_config.max_model_len):
            given["sliding_window"] = None
        super().__init__(**given)  # type: ignore[safe-super]
        checks = [
            (given.get("alibi_slopes") is not None, "ALiBi, whose bias depends on where a key lies"),
            (given.get("sinks") is not None, "attention sinks"),
            (given.get("kv_sharing_target_layer_name") is not None, "layers that share one KV cache"),
            (given.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER, "encoder attention"),
        ]
        for refused, what in checks:
            if refused:
                raise ValueError(f"--kv-eviction cannot evict from models with {what}: serve this one without the flag")

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
        """The stock forward; then, if this step needs it, the layer is shown to the worker half."""
        result = super().forward(  # type: ignore[safe-super]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        step = getattr(attn_metadata, STEP, None)
        if step is not None:
            step.observe(query)
        return result

    @abstractmethod
    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """Where this backend keeps keys and values inside a block."""

    @abstractmethod
    def flat_cache(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """A view of the layer's cache as :mod:`cake_vllm.kernels.pages` addresses it."""

    @abstractmethod
    def with_rows(self, layer: Any, metadata: Any, block_table: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        """A copy of ``metadata`` that reads ``block_table`` (``[R, C]`` int32) up to ``seq_lens`` (``[R]`` int32)."""


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
