"""What eviction did, for vLLM's periodic statistics and for ``/metrics``."""

from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cake_vllm.integration.messages import Eviction

_COUNTERS = {
    "requests": "Requests whose prompt was evicted.",
    "evicted_tokens": "Tokens evicted, summed over layers (counted once for all KV heads of a layer).",
    "freed_blocks": "Blocks of evicted prompts that went back to the pool, summed over layers.",
    "rounding_tokens": "Tokens kept beyond the policy's choice because memory is freed in whole blocks, over layers.",
    "trims": "Times that a request gave blocks back before the end of its prompt or while decoding.",
    "in_place": "Evictions that reused the prompt's own blocks because the pool had none to spare.",
    "postponed": "Layers whose eviction has to wait because neither the pool nor the request has pages to write to.",
    "failures": "Evictions given up because the policy raised; the request keeps what it holds.",
}


class EvictionStats(KVConnectorStats):
    """Sums over the evictions of an interval.

    ``data`` holds the counters by name and ``kept_tokens``, the tokens kept per layer summed over the requests.
    """

    @classmethod
    def empty(cls) -> "EvictionStats":
        """Statistics of nothing."""
        return cls({**dict.fromkeys(_COUNTERS, 0), "kept_tokens": []})

    def record(self, eviction: Eviction, num_blocks: int, block_size: int, is_prompt_end: bool, in_place: bool) -> None:
        """Adds an eviction, by which a request came to hold ``num_blocks`` blocks fewer."""
        self.data["freed_blocks"] += num_blocks
        self.data["evicted_tokens"] += num_blocks * block_size
        self.data["in_place"] += in_place
        self.data["postponed"] += eviction.postponed
        self.data["failures"] += eviction.failed
        if is_prompt_end:
            self.data["requests"] += 1
            self.data["rounding_tokens"] += sum(eviction.kept) - sum(eviction.wanted)
            self._add_kept(eviction.kept)
        elif num_blocks:
            self.data["trims"] += 1

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval to this one."""
        for name in _COUNTERS:
            self.data[name] += other.data[name]
        self._add_kept(other.data["kept_tokens"])
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs."""
        line: dict[str, int | float] = {f"KV eviction {name}": self.data[name] for name in _COUNTERS}
        kept = [tokens / self.data["requests"] for tokens in self.data["kept_tokens"]]
        if kept:
            line["mean tokens kept per layer"] = round(sum(kept) / len(kept), 1)
            line |= {"least": round(min(kept), 1), "most": round(max(kept), 1)}
        return line

    def reset(self) -> None:
        """Back to nothing."""
        self.data = self.empty().data

    def is_empty(self) -> bool:
        """Whether nothing was evicted."""
        return not any(self.data[name] for name in _COUNTERS)

    def _add_kept(self, kept: Sequence[int]) -> None:
        ours = self.data["kept_tokens"] or [0] * len(kept)
        self.data["kept_tokens"] = [a + b for a, b in zip(ours, kept, strict=True)] if kept else ours


class EvictionPromMetrics(KVConnectorPromMetrics):
    """``vllm:kv_eviction_*`` on ``/metrics``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # Made for every engine at once, so that they show 0 before the first eviction.
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in _COUNTERS.items():
            counter: Any = self._counter_cls(f"vllm:kv_eviction_{name}", text, labelnames=labelnames)
            engines = per_engine_labelvalues.items()
            self._counters[name] = {engine: counter.labels(*values) for engine, values in engines}
        gauge_cls: Any = self._gauge_cls
        self._kept = gauge_cls(
            "vllm:kv_eviction_kept_tokens",
            "Tokens a layer keeps per KV head: mean over the requests evicted in the last interval that had any.",
            labelnames=[*labelnames, "layer"],
            multiprocess_mode="mostrecent",
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        for name, counter in self._counters.items():
            counter[engine_idx].inc(transfer_stats_data[name])
        labels, requests = self.per_engine_labelvalues[engine_idx], transfer_stats_data["requests"]
        if requests:
            for layer, tokens in enumerate(transfer_stats_data["kept_tokens"]):
                self._kept.labels(*labels, str(layer)).set(tokens / requests)
