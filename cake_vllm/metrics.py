"""What eviction did, for vLLM's periodic statistics and for ``/metrics``."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cake_vllm.integration.messages import Eviction
from cake_vllm.policies import PagedPrompt

_COUNTERS = {
    "requests": "Requests whose prompt was evicted.",
    "evicted_tokens": "Tokens evicted, summed over layers (counted once for all KV heads of a layer).",
    "freed_blocks": "Blocks of evicted prompts that went back to the pool, summed over layers.",
    "rounding_tokens": "Tokens kept beyond the policy's choice because memory is freed in whole blocks, over layers.",
    "in_place": "Evictions that reused the prompt's own blocks because the pool had none to spare.",
}


class EvictionStats(KVConnectorStats):
    """Sums over the evictions of an interval.

    ``data`` holds the counters by name and ``kept_tokens``, the tokens kept per layer summed over the requests.
    """

    @classmethod
    def empty(cls) -> "EvictionStats":
        """Statistics of nothing."""
        return cls({**dict.fromkeys(_COUNTERS, 0), "kept_tokens": []})

    def record(self, prompt: PagedPrompt, eviction: Eviction, in_place: bool) -> None:
        """Adds one eviction."""
        kept = eviction.kept
        shrunk = [pages for pages in eviction.pages if pages]
        self._add(
            {
                "requests": 1,
                "evicted_tokens": len(kept) * prompt.prompt_len - sum(kept),
                "freed_blocks": len(shrunk) * prompt.full_blocks - sum(shrunk),
                "rounding_tokens": sum(kept) - sum(eviction.wanted),
                "in_place": int(in_place),
                "kept_tokens": list(kept),
            }
        )

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval to this one."""
        self._add(other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs."""
        requests = self.data["requests"]
        kept = [tokens / requests for tokens in self.data["kept_tokens"]]
        return {f"KV eviction {name}": self.data[name] for name in _COUNTERS} | {
            "mean tokens kept per layer": round(sum(kept) / len(kept), 1),
            "least": round(min(kept), 1),
            "most": round(max(kept), 1),
        }

    def reset(self) -> None:
        """Back to nothing."""
        self.data = self.empty().data

    def is_empty(self) -> bool:
        """Whether nothing was evicted."""
        return self.data["requests"] == 0

    def _add(self, data: dict[str, Any]) -> None:
        for name in _COUNTERS:
            self.data[name] += data[name]
        ours, theirs = self.data["kept_tokens"], data["kept_tokens"]
        self.data["kept_tokens"] = [a + b for a, b in zip(ours, theirs, strict=True)] if ours else list(theirs)


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
        self._counters: dict[str, Any] = {
            name: self._counter_cls(f"vllm:kv_eviction_{name}", text, labelnames=labelnames)
            for name, text in _COUNTERS.items()
        }
        self._kept: Any = self._gauge_cls(
            "vllm:kv_eviction_kept_tokens",
            "Tokens a layer keeps per KV head: mean over the requests evicted in the last interval that had any.",
            labelnames=[*labelnames, "layer"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(transfer_stats_data[name])
        requests = transfer_stats_data["requests"]
        for layer, tokens in enumerate(transfer_stats_data["kept_tokens"]):
            self._kept.labels(*labels, str(layer)).set(tokens / requests)
