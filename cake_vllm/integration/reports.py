"""What was kept of a request, on its way from the scheduler's process to the answer.

A request can end in the front end alone: by a stop string, or because somebody aborts it. So each report travels with
the output of the step in which it was made, and the front end keeps the last one for the end, whatever that is:

    scheduler  EvictionScheduler.news ─► EngineCoreOutput.kv_transfer_params
    front end  ReportingState.report  ─► RequestOutput.kv_transfer_params, where ``finished``

Requests that ask for no report are not looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine.output_processor import RequestState

from cake_vllm.config import OFF, REPORT_KEY, KVEvictionConfig
from cake_vllm.integration.patching import wrap


def report(
    config: KVEvictionConfig | None, kept: list[int | list[int]] | None, cut_to: Sequence[int] = ()
) -> dict[str, Any]:
    """The entry of ``kv_transfer_params`` for a request.

    Args:
        config: its settings; ``None`` if it is not to be evicted.
        kept: tokens that each layer held after the last eviction, or each KV head of it where heads compete; ``None``
            before the first.
        cut_to: where budgets are elastic, tokens per layer that it was cut to when memory was short, each time.
    """
    settings: dict[str, Any] = {
        "policy": config.policy_name if config else OFF,
        "budget": config.budget if config else None,
    }
    if config is not None and config.is_elastic:
        settings["cut_to"] = list(cut_to)
    return {"kv_eviction": {**settings, "kept_tokens": kept}}


class ReportingState(RequestState):
    """The front end's state of a request that wants a report: the last one, for the last output."""

    report: dict[str, Any]

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the parent's, with the last report if the request ends."""
        self.report = kv_transfer_params or self.report
        last = self.report if finish_reason is not None else None
        return super().make_request_output(
            new_token_ids, pooling_output, finish_reason, stop_reason, last, *args, **kwargs
        )


def install_states() -> None:
    """Lets the front end keep reports (ledger: ``patches/README.md``)."""
    wrap(RequestState, "from_new_request", _from_new_request)


def install_news() -> None:
    """Lets the steps' outputs carry reports; called where the scheduler lives."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "update_from_output", _update_from_output)


def _from_new_request(
    original: Callable[..., Any], cls: type, tokenizer: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    params = request.sampling_params
    first = params.extra_args.get(REPORT_KEY) if params is not None and params.extra_args else None
    if not first:
        return original(cls, tokenizer, request, *args, **kwargs)
    state = original(ReportingState, tokenizer, request, *args, **kwargs)
    state.report = first
    return state


def _update_from_output(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    outputs = original(self, *args, **kwargs)
    # Other engines of this process may have other connectors.
    is_alone = getattr(self.connector, "is_alone", None)
    if is_alone is None:
        return outputs
    half = self.connector.scheduler
    for batch in outputs.values():
        if is_alone and batch.scheduler_stats is not None:
            # There is no cache outside that could have been asked.
            batch.scheduler_stats.connector_prefix_cache_stats = None
        if half.news:
            for output in batch.outputs:
                if output.request_id in half.news:
                    output.kv_transfer_params = half.news.pop(output.request_id)
    half.forget_news()
    return outputs
