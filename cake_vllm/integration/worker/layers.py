"""An attention layer as the worker half reads it: keys, values and queries as numbers, and the projection behind it."""

from functools import cached_property
from typing import Any

import torch

from cake_vllm.integration.worker.attention import EvictingImpl
from cake_vllm.integration.worker.projections import output_projection, rotary_embedding
from cake_vllm.kernels import BlockLayout
from cake_vllm.policies.entries import Rotary


class EvictableLayer:
    """One attention layer: its module and its backend."""

    def __init__(self, name: str, module: Any, group: int, block_size: int):
        self.name = name
        self.module = module
        self.group = group
        self.block_size = block_size
        self.impl: EvictingImpl = module.impl
        self.soft_cap = float(getattr(self.impl, "logits_soft_cap", 0) or 0)
        self._output_weight: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def layout(self) -> BlockLayout:
        """Order of the elements in a head page."""
        return self.impl.block_layout(self.module, self.block_size)

    def read_keys(self, cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
        """``[Hkv, length, D]`` keys in the model's dtype; see :meth:`BlockLayout.read_keys`."""
        return self._restore(self.layout.read_keys(cache, table, length), self.module._k_scale_float)

    def read_values(self, cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
        """Values of the same positions."""
        return self._restore(self.layout.read_values(cache, table, length), self.module._v_scale_float)

    def restore_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries in the model's dtype; some backends are given quantized ones beside a quantized cache."""
        if queries.dtype != self.impl.quantized_dtype:
            return queries
        return queries.to(self.module.dtype).mul_(self.module._q_scale_float)

    def _restore(self, stored: torch.Tensor, scale: float) -> torch.Tensor:
        dtype = self.impl.quantized_dtype
        return stored if dtype is None else stored.view(dtype).to(self.module.dtype).mul_(scale)

    @cached_property
    def rotary(self) -> Rotary:
        """Which channels of its keys are turned by their positions; see :func:`rotary_embedding`."""
        return rotary_embedding(self.module)

    @property
    def output_weight(self) -> torch.Tensor:
        """``[hidden, Hq * D]``, the weight of the projection behind the layer.

        Read off the projection's answer to the unit vectors, because kernels may have repacked or quantized the
        weight itself, and kept until its answer to one mixed vector changes: vLLM reloads weights in place and tells
        nobody.
        """
        projection = output_projection(self.module)
        size, device = projection.input_size_per_partition, self.module.kv_cache.device

        def apply(inputs: torch.Tensor) -> torch.Tensor:
            # Its method and not itself: this rank's part alone, without bias.
            return projection.quant_method.apply(projection, inputs, None)

        answer = apply(torch.arange(1, size + 1, device=device).cos()[None].to(self.module.dtype))
        if self._output_weight is None or not torch.equal(answer, self._output_weight[0]):
            self._output_weight = answer, apply(torch.eye(size, dtype=self.module.dtype, device=device)).T.contiguous()
        return self._output_weight[1]
