"""An engine whose tensor-parallel ranks are processes of their own, with the scheduler in this one."""

from typing import Any

import torch
from engine import Engine
from ties import Served


class Recorder:
    """What a worker is asked for; vLLM makes it a base of the worker's class."""

    def record_choices(self) -> None:
        """From now on, what every eviction keeps of this rank's heads."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.recorded: list[tuple[str, list[list[torch.Tensor]]]] = []
        get_kv_transfer_group().worker.on_evicted = self._record

    def _record(self, what: Any, choice: Any, eviction: Any) -> None:
        if choice.chosen is not None:
            self.recorded.append((what.req_id, choice.chosen))

    def take_choices(self) -> list[tuple[str, list[list[torch.Tensor]]]]:
        """Since the last call: the request, and by layer what each head keeps."""
        recorded, self.recorded = self.recorded, []
        return recorded


class RankedEngine(Engine):
    """Its workers are not at hand; what they choose is asked of them afterwards."""

    def __init__(self, model: str, **kwargs: Any):
        super().__init__(model, worker_extension_cls=f"{__name__}.Recorder", **kwargs)

    def _follow_worker(self) -> None:
        self.llm.collective_rpc("record_choices")

    def _check_halves(self) -> None:
        """The worker half is elsewhere."""

    def served_as(self, name: str, tokens: list[int]) -> Served:
        """The only request since the last call, with the heads of all ranks."""
        ranks = self.llm.collective_rpc("take_choices")
        choices = []
        for of_ranks in zip(*ranks, strict=True):
            assert {req_id.rsplit("-", 1)[0] for req_id, _ in of_ranks} == {name}
            layers = zip(*(chosen for _, chosen in of_ranks), strict=True)
            choices.append([[head for heads in of_layer for head in heads] for of_layer in layers])
        return Served(tokens, choices)
