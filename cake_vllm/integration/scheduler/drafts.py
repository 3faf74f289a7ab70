"""Drafts beside eviction: how long a request is, and what of that is certain when a step is planned.

Under asynchronous scheduling a step is planned before the drafts of the one before are verified. Only what is certain
is cut; what lies behind stays in the row. After a step, ``d`` drafts aside:

    [ known tokens but the last | one of each step under way, and one of this step | accepted drafts, if any )
                                                                         verified ^                   end_of ^

Where drafts are verified in time, both are the same. There a block is given back when its last token has been computed,
and what is kept is judged by that token; so it must not share its step with drafts.
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
    """Logical length of a request after a step, drafts of the step aside; in tokens. If earlier drafts are not verified
    yet, they are taken for accepted.
    """
    num_tokens = output.num_scheduled_tokens.get(request.request_id, 0)
    return request.num_computed_tokens + num_tokens - num_drafts(request, output)


def verified(request: Request, output: SchedulerOutput, most_drafts: int) -> int:
    """Logical length that a request has at least after a step, whatever becomes of drafts; in tokens.

    Args:
        request: not finished.
        output: the step.
        most_drafts: of a request in one step.
    """
    return certain(request, end_of(request, output), request.request_id in output.num_scheduled_tokens, most_drafts)


def certain(request: Request, end: int, is_scheduled: bool, most_drafts: int) -> int:
    """The same, of a step of which is known whether it computes something of the request, and its length at most."""
    if not most_drafts:
        return end
    # Under asynchronous scheduling a step that samples puts down a placeholder for that token and one for each draft.
    under_way = -(-request.num_output_placeholders // (1 + most_drafts))
    return min(request.num_tokens - 1 + under_way + is_scheduled, end)


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
