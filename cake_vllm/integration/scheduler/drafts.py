"""Drafts beside the eviction of generated tokens.

Drafts are verified in the step that computes them. A block is given back when its last token has been computed, and
what is kept is judged by that token; so it must not share its step with drafts.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from cake_vllm.integration.patching import wrap


def num_drafts(request: Request, output: SchedulerOutput) -> int:
    """How many of the tokens that a request computes in a step may be rejected."""
    return len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))


def end_of(request: Request, output: SchedulerOutput) -> int:
    """Logical length of a request after a step, drafts aside; in tokens."""
    num_tokens = output.num_scheduled_tokens.get(request.request_id, 0)
    return request.num_computed_tokens + num_tokens - num_drafts(request, output)


def install_drafts() -> None:
    """Lets the scheduler half see drafts before they are scheduled (ledger: ``patches/README.md``)."""
    wrap(Scheduler, "update_draft_token_ids", _update_draft_token_ids)


def _update_draft_token_ids(original: Callable[..., None], self: Any, draft_token_ids: Any) -> None:
    original(self, draft_token_ids)
    # Other engines of this process may have other connectors.
    if not hasattr(self.connector, "is_alone"):
        return
    for request_id in draft_token_ids.req_ids:
        request = self.requests.get(request_id)
        if request is not None and request.spec_token_ids:
            self.connector.scheduler.cut_drafts(request)
