"""The gates of the layers and heads that a worker has."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import GroupCoordinator
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from cake_vllm.integration.gates import GateFile, find_gates, remedy
from cake_vllm.integration.worker.layers import EvictableLayer
from cake_vllm.policies import Policy
from cake_vllm.policies.entries import LinearGate


class WorkerGates:
    """Reads a file when a policy first asks for it; that of the engine's own policy when it starts.

    Args:
        policy: the engine's.
        model: vLLM's ``ModelConfig``.
        layers: of this pipeline stage.
        group: tensor-parallel ranks, each with some of the KV heads, or several with the same.
    """

    def __init__(self, policy: Policy, model: Any, layers: Sequence[EvictableLayer], group: GroupCoordinator):
        self._model, self._layers, self._group = model, layers, group
        self._read: dict[str, list[LinearGate]] = {}
        if layers:
            self.of(policy, 0)

    def of(self, policy: Policy, layer_index: int) -> LinearGate | None:
        """The gate of a layer, by its rank in the stage; ``None`` for policies that need none.

        Raises:
            ValueError: if there are no gates, or they are not the model's.
        """
        if not policy.needs_gate:
            return None
        path: str = getattr(policy, "gates", "")
        if path not in self._read:
            file = GateFile.read(find_gates(self._model, path))
            self._read[path] = [self._gate(file, layer) for layer in self._layers]
        return self._read[path][layer_index]

    def _gate(self, file: GateFile, layer: EvictableLayer) -> LinearGate:
        total, own = self._model.get_total_num_kv_heads(), layer.impl.num_kv_heads
        first = self._group.rank_in_group * total // self._group.world_size
        device = torch.device(current_platform.device_type)
        gate = file.gate(extract_layer_index(layer.name), slice(first, first + own), device)
        if gate.rotary != layer.rotary:
            raise ValueError(
                f"the gates were made for {gate.rotary}, and {layer.name} has {layer.rotary}: "
                f"{remedy(self._model.model)}"
            )
        return gate
