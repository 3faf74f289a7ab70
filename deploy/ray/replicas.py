"""A Ray Serve application: replicas of vLLM's own OpenAI-compatible server, with eviction, behind one endpoint.

`ray.serve.llm` would be the shorter way; it is made for the vLLM that `ray[llm]` pins, which is not the one that the
plugin fits. How many replicas there are, what each gets, and which flags it serves with is in `serve.yaml`.
"""

import math
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingContext


class LoadPolicy:
    """As many replicas as bring the mean of each signal down to its target, as Kubernetes' autoscaler counts.

    Args:
        waiting: requests that wait for a replica, in its queue or in front of it.
        kv_usage: the share of its KV cache that is in use. Elastic budgets cut when it is full.
    """

    def __init__(self, waiting: float = 4, kv_usage: float = 0.8):
        self._targets = {"waiting": waiting, "kv_usage": kv_usage}

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number wanted; Serve applies bounds and delays."""
        seen = ctx.aggregated_metrics or {}
        total = {name: sum(seen.get(name, {}).values()) for name in self._targets}
        total["waiting"] += ctx.total_queued_requests or 0
        wanted = [total[name] / target for name, target in self._targets.items()]
        return max(1, *map(math.ceil, wanted)), {}


@serve.ingress()
class Replica:
    """One engine and vLLM's app in front of it."""

    async def __init__(self, model: str, flags: list[str]):
        # Here, for Serve's controller reads this file as well, and has no use for vLLM.
        from engine import start

        self._engine, self._load, self._app = await start(model, flags)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What LoadPolicy looks at."""
        return self._load.read()

    async def check_health(self) -> None:
        """Lets Serve replace a replica whose engine is dead."""
        await self._engine.check_health()

    def __del__(self):
        if hasattr(self, "_engine"):
            self._engine.shutdown()


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application, as `serve.yaml` describes it.

    Args:
        arguments: `model`, a folder or a name, and `flags`, those of `vllm serve`.
    """
    return serve.deployment(Replica).bind(arguments["model"], arguments.get("flags", []))
