"""What eviction did, for vLLM's periodic statistics and for ``/metrics``."""

from collections.abc import Sequence
from statistics import fmean as mean
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cake_vllm.integration.messages import Eviction

_COUNTERS = {
    "requests": "Requests whose prompt was evicted; not those on which the policy failed.",
    "evicted_tokens": "Tokens evicted, mean over layers and KV heads.",
    "evicted_generated_tokens": "Generated tokens evicted, mean over layers and KV heads, as far as prompt and output "
    "have budgets of their own.",
    "kept_generated_tokens": "Generated tokens that requests which had lost some of them held when they ended; mean "
    "over layers and KV heads.",
    "freed_blocks": "Blocks by which evictions made requests smaller; they went back to the pool.",
    "rounding_tokens": "Tokens of memory held beyond the policy's choice, because it is dealt out in whole pages and "
    "blocks; mean over layers and KV heads.",
    "trims": "Times that a request gave blocks back before the end of its prompt or while decoding.",
    "cuts": "Times that a request was cut because memory was short.",
    "cut_blocks": "Blocks that cuts gave back.",
    "preemptions_avoided": "Steps for which the running requests would have found too few blocks without cuts.",
    "in_place": "Evictions that reused the prompt's own blocks because the pool had none to spare.",
    "failures": "Evictions given up, mostly because the policy raised; the request keeps what it holds.",
}
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class EvictionStats(KVConnectorStats):
    """Sums over the evictions of an interval.

    ``data`` holds the counters by name; ``kept_tokens``, the tokens kept by layer, mean over its heads, summed over the
    requests; and of the ``head_requests`` among them whose heads keep different numbers ``kept_by_head``, the tokens
    by layer and head. ``seconds`` has, for each step that evicted, how long that took there. ``in_force`` is how things
    stand at its end: the smallest budget to which a running request was cut (the longest possible request if none was),
    and how many are at their floors; empty while nobody asked.
    """

    @classmethod
    def empty(cls) -> "EvictionStats":
        """Statistics of nothing."""
        return cls(
            {
                **dict.fromkeys(_COUNTERS, 0),
                "kept_tokens": [],
                "head_requests": 0,
                "kept_by_head": [],
                "seconds": [],
                "in_force": [],
            }
        )

    def record(
        self,
        eviction: Eviction,
        num_blocks: int,
        block_size: int,
        in_place: bool,
        prompt_len: int | None,
        is_cut: bool = False,
        num_generated: int = 0,
    ) -> None:
        """Adds an eviction, by which a request came to hold ``num_blocks`` blocks fewer, or one that failed.

        ``prompt_len`` is the length at which its prompt ended, if it ended with this eviction; ``is_cut``, whether it
        was because memory was short; ``num_generated``, tokens that it took of what was generated, as far as is known.
        """
        self.data["freed_blocks"] += num_blocks
        self.data["evicted_tokens"] += num_blocks * block_size
        self.data["failures"] += eviction.failed
        if not eviction.is_traded:
            # The request holds what it held.
            return
        self.data["in_place"] += in_place
        self.data["evicted_generated_tokens"] += num_generated
        if prompt_len is not None:
            self.data["requests"] += 1
            held = eviction.columns * block_size + prompt_len % block_size
            self.data["rounding_tokens"] += held - round(mean(map(mean, eviction.wanted)))
            self._add_kept([mean(heads) for heads in eviction.kept])
            if eviction.by_head:
                self._add_heads(1, eviction.kept)
        elif is_cut:
            self.data["cuts"] += 1
            self.data["cut_blocks"] += num_blocks
        elif num_blocks:
            self.data["trims"] += 1

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval to this one."""
        for name in _COUNTERS:
            self.data[name] += other.data[name]
        self._add_kept(other.data["kept_tokens"])
        self._add_heads(other.data["head_requests"], other.data["kept_by_head"])
        self.data["seconds"] += other.data["seconds"]
        self.data["in_force"] = other.data["in_force"] or self.data["in_force"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs."""
        line: dict[str, int | float] = {f"KV eviction {name}": self.data[name] for name in _COUNTERS}
        kept = [tokens / self.data["requests"] for tokens in self.data["kept_tokens"]]
        if kept:
            line["mean tokens kept per layer"] = round(mean(kept), 1)
            line |= {"least": round(min(kept), 1), "most": round(max(kept), 1)}
        if self.data["head_requests"]:
            heads = [tokens / self.data["head_requests"] for layer in self.data["kept_by_head"] for tokens in layer]
            line |= {"least of a KV head": round(min(heads), 1), "most of a KV head": round(max(heads), 1)}
        if seconds := self.data["seconds"]:
            line |= {"mean seconds of a step's evictions": round(mean(seconds), 4), "longest": round(max(seconds), 4)}
        if self.data["in_force"]:
            line["budget in force"], line["requests at their floor"] = self.data["in_force"]
        return line

    def reset(self) -> None:
        """Back to nothing."""
        self.data = self.empty().data

    def is_empty(self) -> bool:
        """Whether nothing was evicted, and no step reported that had evicted something."""
        return not any(self.data[name] for name in (*_COUNTERS, "seconds"))

    def _add_kept(self, kept: Sequence[float]) -> None:
        ours = self.data["kept_tokens"] or [0] * len(kept)
        self.data["kept_tokens"] = [a + b for a, b in zip(ours, kept, strict=True)] if kept else ours

    def _add_heads(self, num_requests: int, kept: Sequence[Sequence[int]]) -> None:
        if num_requests:
            ours = self.data["kept_by_head"] or [[0] * len(heads) for heads in kept]
            layers = zip(ours, kept, strict=True)
            self.data["kept_by_head"] = [[a + b for a, b in zip(*heads, strict=True)] for heads in layers]
            self.data["head_requests"] += num_requests


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
        histogram_cls: Any = self._histogram_cls
        histogram = histogram_cls(
            "vllm:kv_eviction_step_seconds",
            "Seconds that a step with evictions took for them: scores, budgets, and moving what is kept.",
            labelnames=labelnames,
            buckets=_SECONDS,
        )
        self._seconds = {engine: histogram.labels(*values) for engine, values in per_engine_labelvalues.items()}
        of_interval = "mean over the requests evicted in the last interval that had any."
        gauge_cls: Any = self._gauge_cls
        # With several API servers: one series for all of them, as whichever counted last has it.
        self._kept = gauge_cls(
            "vllm:kv_eviction_kept_tokens",
            f"Tokens a layer keeps, mean over its KV heads, {of_interval}",
            labelnames=[*labelnames, "layer"],
            multiprocess_mode="mostrecent",
        )
        self._kept_by_head = gauge_cls(
            "vllm:kv_eviction_head_kept_tokens",
            f"Tokens a KV head keeps where heads compete, {of_interval}",
            labelnames=[*labelnames, "layer", "head"],
            multiprocess_mode="mostrecent",
        )

        self._in_force = [
            gauge_cls(f"vllm:kv_eviction_{name}", text, labelnames=labelnames, multiprocess_mode="mostrecent")
            for name, text in (
                (
                    "budget_in_force",
                    "Smallest budget to which a running request was cut, tokens per layer; if none "
                    "was, the longest possible request.",
                ),
                ("requests_at_floor", "Running requests that cannot be cut any further."),
            )
        ]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        for name, counter in self._counters.items():
            counter[engine_idx].inc(transfer_stats_data[name])
        for seconds in transfer_stats_data["seconds"]:
            self._seconds[engine_idx].observe(seconds)
        labels, requests = self.per_engine_labelvalues[engine_idx], transfer_stats_data["requests"]
        if requests:
            for layer, tokens in enumerate(transfer_stats_data["kept_tokens"]):
                self._kept.labels(*labels, str(layer)).set(tokens / requests)
        for gauge, value in zip(self._in_force, transfer_stats_data["in_force"], strict=False):
            gauge.labels(*labels).set(value)
        by_head = transfer_stats_data["head_requests"]
        for layer, heads in enumerate(transfer_stats_data["kept_by_head"] if by_head else ()):
            for head, tokens in enumerate(heads):
                self._kept_by_head.labels(*labels, str(layer), str(head)).set(tokens / by_head)
