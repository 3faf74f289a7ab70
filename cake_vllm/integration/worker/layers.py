"""What a layer is to the worker half: owners, queries, keys, values and the projection as numbers, and how its rows are
redirected. Another kind of attention is another kind of :class:`EvictableLayer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from cake_vllm.integration.scheduler.spec import EvictableLatentSpec, evictable_groups
from cake_vllm.integration.worker.attention import RedirectedImpl
from cake_vllm.integration.worker.dealing import Reads
from cake_vllm.integration.worker.projections import output_projection, rotary_embedding, rotation
from cake_vllm.kernels import BlockLayout, Grid, to_device
from cake_vllm.policies import LayerInputs, Policy
from cake_vllm.policies.entries import LinearGate, Rotary, Rotation


class EvictableLayer:
    """One attention layer: its module and its backend.

    Attributes:
        group: which group of evictable layers it belongs to.
        layout: order of the elements in a head page.
    """

    def __init__(self, name: str, module: Any, group: int, page_size: int):
        self.name = name
        self.module = module
        self.group = group
        self.impl: RedirectedImpl = module.impl
        self.soft_cap = float(getattr(self.impl, "logits_soft_cap", 0) or 0)
        self.layout: BlockLayout = self.impl.block_layout(module, page_size)
        self._output_weight: tuple[torch.Tensor, torch.Tensor] | None = None

    def inputs(
        self,
        cache: torch.Tensor,
        reads: Reads,
        queries: torch.Tensor,
        policy: Policy | None,
        gate: LinearGate | None = None,
    ) -> LayerInputs:
        """What a policy may look at; without one, queries and keys.

        Args:
            cache: ``[N, E]`` head pages.
            reads: what the layer reads of the request.
            queries: ``[q, Hq, D]``, see :meth:`restore_queries`.
            policy: says what else it needs.
            gate: of the layer, if the policy needs one.
        """
        valid, (key_scale, value_scale) = reads.valid, self.scales

        def there(layout_read: Any, scale: float) -> torch.Tensor:
            found = self._restore(layout_read(cache, reads.table, reads.length), scale)
            return found if valid is None else found.masked_fill_(~valid.unsqueeze(-1), 0)

        return LayerInputs(
            queries.transpose(0, 1),
            there(self.layout.read_keys, key_scale),
            self.impl.scale,
            self.soft_cap,
            there(self.layout.read_values, value_scale) if policy and policy.needs_values else None,
            self.output_weight if policy and policy.needs_output_weight else None,
            self.impl.layer_index,
            valid=valid,
            gate=gate,
            rotation=self.rotation if policy and policy.needs_rotation else None,
            sinks=None if self.impl.sinks is None else self.impl.sinks.detach(),
        )

    @property
    def cache(self) -> torch.Tensor:
        """``[blocks * r, Hkv, p, ...]``, its pages."""
        return self.module.kv_cache

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.module.dtype

    @property
    def scales(self) -> tuple[float, float]:
        """What quantized keys and values are multiplied by."""
        return self.module._k_scale_float, self.module._v_scale_float

    def no_queries(self) -> torch.Tensor:
        """``[0, Hq, D]``."""
        return torch.empty(0, self.impl.num_heads, self.impl.head_size, device=self.module.kv_cache.device)

    def restore_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries in the model's dtype; some backends are given quantized ones beside a quantized cache."""
        if queries.dtype != self.impl.quantized_dtype:
            return queries
        return queries.to(self.dtype).mul_(self.module._q_scale_float)

    def with_lengths(self, metadata: Any, seq_lens: torch.Tensor) -> Any:
        """A copy of ``metadata`` for the stock call, with other lengths (``[R]``)."""
        return self.impl.with_lengths(self.module, metadata, seq_lens)

    def _restore(self, stored: torch.Tensor, scale: float) -> torch.Tensor:
        dtype = self.impl.quantized_dtype
        return stored if dtype is None else stored.view(dtype).to(self.dtype).mul_(scale)

    @cached_property
    def rotary(self) -> Rotary:
        """Which channels of its keys are turned by their positions; see :func:`rotary_embedding`."""
        return rotary_embedding(self.module, self.embedded_size, self.dtype)

    @cached_property
    def rotation(self) -> Rotation:
        """By how much; see :func:`rotation`.

        Raises:
            ValueError: if it has no rotary embedding, or one that does something else.
        """
        found = rotation(self.module, self.rotary, self.embedded_size, self.dtype)
        return replace(found, speeds=found.speeds.to(self.module.kv_cache.device))

    @property
    def embedded_size(self) -> int:
        """How many channels its rotary embedding is given."""
        return self.impl.head_size

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

        answer = apply(torch.arange(1, size + 1, device=device).cos()[None].to(self.dtype))
        if self._output_weight is None or not torch.equal(answer, self._output_weight[0]):
            self._output_weight = answer, apply(torch.eye(size, dtype=self.dtype, device=device)).T.contiguous()
        return self._output_weight[1]


class LatentLayer(EvictableLayer):
    """A layer of latent attention: one KV head, of which each query head sees the latent through a map of its own."""

    @property
    def cache(self) -> torch.Tensor:
        """See the base class."""
        return self.module.kv_cache.unsqueeze(1)

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self.module._vllm_config.model_config.dtype

    @property
    def scales(self) -> tuple[float, float]:
        """See the base class; values are part of keys."""
        return self.module._k_scale_float, self.module._k_scale_float

    def restore_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """``[q, Hq, rank + R]`` of ``[q, Hq, D]``: taken to the space of the latents, as decoding takes them there."""
        own, turned = queries.split([self.module.qk_nope_head_dim, self.module.qk_rope_head_dim], dim=-1)
        taken = torch.bmm(own.transpose(0, 1), self.module.W_UK_T).transpose(0, 1)
        return torch.cat([taken, turned], dim=-1)

    @cached_property
    def rotary(self) -> Rotary:
        """See the base class."""
        found = rotary_embedding(self.module, self.embedded_size, self.dtype)
        return replace(found, behind=self.module.kv_lora_rank)

    @property
    def embedded_size(self) -> int:
        """See the base class."""
        return self.module.qk_rope_head_dim

    @property
    def output_weight(self) -> torch.Tensor:
        """``[hidden, Hq * rank]``: what each head makes of a latent, and the projection behind the layer makes of that.

        Not kept: it is ``rank / V`` times as large as that projection.
        """
        values = self.module.W_UV
        projection = super().output_weight.unflatten(1, (len(values), -1))
        return torch.einsum("ohv,hrv->ohr", projection, values).flatten(1)


@dataclass(frozen=True)
class Layers:
    """The evictable layers of a worker, in model order.

    Attributes:
        target: those of the model that is served.
        drafts: those of a model that drafts. They lie in the same blocks, and run after the target's.
        readers: layers without a cache of their own, which read one of the target's.
        whole: the global view of both.
    """

    target: list[EvictableLayer]
    drafts: list[EvictableLayer]
    readers: list[EvictableLayer]
    whole: Grid

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> "Layers":
        """Finds them, once their caches are allocated.

        Raises:
            RuntimeError: if there are none, or if no layer could use another's pages.
        """
        modules = vllm_config.compilation_config.static_forward_context
        groups = [kv_cache_config.kv_cache_groups[group_id] for group_id in evictable_groups(kv_cache_config)]
        named = [
            (name, index)
            for index, group in enumerate(groups)
            for name in group.layer_names
            if not modules[name].impl.is_reader
        ]
        named.sort(key=lambda found: extract_layer_index(found[0]))
        spec: Any = groups[0].kv_cache_spec
        kind = LatentLayer if isinstance(spec, EvictableLatentSpec) else EvictableLayer
        found = [kind(name, modules[name], group, spec.page_size) for name, group in named]
        target, drafts = ([layer for layer in found if layer.impl.is_draft == of] for of in (False, True))
        if drafts and len(kv_cache_config.kv_cache_groups) > 1:
            raise RuntimeError("--kv-eviction needs a draft model whose layers are in the target's only KV cache group")
        every = [*target, *drafts]
        for index, layer in enumerate(every):
            layer.impl.layer_index = index
        owners = {layer.name: layer for layer in target}
        readers = []
        for name, module in modules.items():
            owner = owners.get(getattr(module, "kv_sharing_target_layer_name", None) or "")
            if owner is not None:
                readers.append(EvictableLayer(name, module, owner.group, spec.page_size))
                module.impl.layer_index = owner.impl.layer_index
        caches, per_block = [layer.cache for layer in every], spec.block_size // spec.page_size
        grid = Grid.of(caches, [layer.group for layer in every], per_block)
        assert grid.page_size == spec.page_size, "vLLM cuts blocks as the backend of the layers says"
        return cls(target, drafts, readers, grid)

    @property
    def every(self) -> list[EvictableLayer]:
        """The target's, and behind them those that draft."""
        return [*self.target, *self.drafts]

    @property
    def redirected(self) -> list[EvictableLayer]:
        """Whatever reads pages of evicted rows."""
        return [*self.every, *self.readers]

    @cached_property
    def grid(self) -> Grid:
        """The target's part of the global view."""
        return self.whole.part(slice(len(self.target)))

    @cached_property
    def draft_grid(self) -> Grid:
        """The part of the layers that draft."""
        return self.whole.part(slice(len(self.target), None))


class Batch:
    """A step's attention metadata.

    Attributes:
        metadata: of every layer; layers of a group share one.
        first: that of the first group, whose blocks tell requests apart.
        tails: ``[R]``, the blocks that rows end in.
    """

    def __init__(self, layers: Layers, attn_metadata: dict[str, Any]):
        self.metadata = [attn_metadata[layer.name] for layer in layers.redirected]
        of_groups = {layer.group: found for layer, found in zip(layers.redirected, self.metadata, strict=True)}
        self.first = of_groups[0]
        self.tails = tails(self.first, layers.grid)
        self._tables = [of_groups[group].block_table for group in sorted(of_groups)]

    def places(self, asked: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """``[n, 1]`` rows that end in one of the blocks that are asked for, for each of ``n`` requests.

        Raises:
            RuntimeError: (from the device) if one is not where the scheduler put it.
        """
        most = max(map(len, asked))
        blocks = [of_request + of_request[-1:] * (most - len(of_request)) for of_request in asked]
        # [n, R]
        matches = (self.tails == to_device(blocks, self.tails.dtype, self.tails.device).unsqueeze(2)).any(dim=1)
        torch._assert_async((matches.sum(dim=1) == 1).all(), "requests are not where the scheduler put them")
        return matches.int().argmax(dim=1, keepdim=True)

    def rows(self, places: torch.Tensor) -> list[torch.Tensor]:
        """``[groups][n, C]`` slices of the rows at ``[n]`` places."""
        return [table.index_select(0, places) for table in self._tables]


def tails(metadata: Any, grid: Grid) -> torch.Tensor:
    """``[R]``, the blocks that rows end in."""
    last = ((metadata.seq_lens - 1).clamp(min=0) // grid.page_size).long()
    found = metadata.block_table.gather(1, last.unsqueeze(1)).squeeze(1)
    if grid.per_block > 1:
        found = found // grid.per_block
    # Rows that only pad the batch have no length; nobody's row ends in block 0.
    return found.masked_fill(metadata.seq_lens == 0, 0)
