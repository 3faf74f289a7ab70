"""What a request asks for in its ``vllm_xargs``: checked and written out in the front end, before the engine sees it.

All ways into an engine meet in ``InputProcessor.process_inputs``. Over HTTP a request is checked before that as well:
a stream's status is sent before its generator runs, beam search leaves ``vllm_xargs`` behind, and how many choices an
answer has is known only there.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from cake_vllm.config import (
    KEYS,
    OFF,
    POLICY_KEY,
    REPORT_KEY,
    REQUEST_KEYS,
    as_json,
    check_keys,
    flag,
    for_request,
    parse_flag,
    wishes_of,
)
from cake_vllm.integration.engine import eviction_config, placeholders
from cake_vllm.integration.front.refusals import refuse_without_gates
from cake_vllm.integration.patching import wrap
from cake_vllm.integration.reports import report
from cake_vllm.policies.parsing import written


def install_requests() -> None:
    """Checks the requests of every engine in this process (ledger: ``patches/README.md``)."""
    wrap(InputProcessor, "process_inputs", _process_inputs)


def install_http() -> None:
    """Checks what comes over HTTP, on completions, chat, responses and all that is built on these."""
    from vllm.entrypoints.serve.engine.serving import BaseServing

    wrap(BaseServing, "_check_model", _check_model)


def _process_inputs(original: Callable[..., Any], self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    try:
        _check(request, self.vllm_config)
    except VLLMValidationError:
        # The next request with its pictures has to send them: what this one would have sent never arrives.
        known = self.renderer.mm_processor_cache
        if known is not None:
            for feature in request.mm_features or ():
                known.invalidate(feature.mm_hash or feature.identifier)
        raise
    return request


def _check(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    params = request.sampling_params
    if params is not None and (wishes := wishes_of(params.extra_args)):
        first_report = resolve(wishes, vllm_config)
        if first_report is not None and params.n > 1:
            raise VLLMValidationError(f"{REPORT_KEY} is about one choice: set n to 1", parameter="n")
        others = {key: value for key, value in (params.extra_args or {}).items() if key not in wishes}
        # A dict of its own: a caller may use the one it gave for several requests. In plain types: vLLM has checked
        # what can be sent, and what cannot would be found out once the request is registered.
        params.extra_args = {**others, **json.loads(as_json(wishes))}
        if first_report is not None:
            params.extra_args[REPORT_KEY] = first_report
    if params is not None and request.mm_features:
        check_media(request, vllm_config)


def check_media(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Refuses a request whose budget cannot hold what stands for its pictures, where these are protected.

    Raises:
        VLLMValidationError: one sentence that names the keys and the fix.
    """
    server, params = eviction_config(vllm_config), request.sampling_params
    longest = vllm_config.model_config.max_model_len
    config = for_request(server, params.extra_args, longest) if server and params else None
    if config is not None and config.policy.protect.media:
        assert params is not None
        num_media = sum(end - start for start, end in placeholders(request.mm_features or ()))
        length = len(request.prompt_token_ids or ()) + (params.max_tokens or longest)
        try:
            config.check_media(num_media, min(length, longest), longest)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


async def _check_model(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    refusal = await original(self, request, *args, **kwargs)
    engine = getattr(self, "engine_client", None)
    if refusal is None and engine is not None:
        try:
            check_http(request, engine.vllm_config)
        except VLLMValidationError as error:
            return self.create_error_response(error)
    return refusal


def check_http(request: Any, vllm_config: VllmConfig) -> None:
    """Refuses a request whose wishes cannot be granted, or would go unheard.

    Args:
        request: any that has ``vllm_xargs``, or ``sampling_params`` with extra arguments.
        vllm_config: the engine's.

    Raises:
        VLLMValidationError: one sentence that names the key and the fix.
    """
    for key in wishes_of(getattr(request, "model_extra", None)):
        raise VLLMValidationError(f"{written(key)} is a key of vllm_xargs: move it there", parameter=written(key))
    params = getattr(request, "sampling_params", None)
    wishes = wishes_of(getattr(request, "vllm_xargs", None) or getattr(params, "extra_args", None))
    if not wishes:
        return
    wants_report = resolve(wishes, vllm_config) is not None
    if getattr(request, "use_beam_search", False):
        for key in KEYS:
            if wishes.get(key) not in (None, OFF):
                raise VLLMValidationError(
                    f"{key} has no effect on beam search, which computes the prompt in every step: drop one of the two",
                    parameter="vllm_xargs",
                )
    num_choices = num_prompts(request) * (getattr(request, "n", None) or getattr(params, "n", None) or 1)
    if wants_report and (
        getattr(request, "stream", False) or num_choices > 1 or getattr(request, "use_beam_search", 0)
    ):
        raise VLLMValidationError(
            f"{REPORT_KEY} is about one choice, in an answer that is not streamed: "
            "set stream to false and n to 1, send one prompt, and use no beam search",
            parameter="vllm_xargs",
        )


def resolve(wishes: Mapping[str, Any], vllm_config: VllmConfig) -> dict[str, Any] | None:
    """Checks a request's wishes; the report of what is kept of it before anything is evicted, if it wants one.

    Raises:
        VLLMValidationError: one sentence that names the key and the fix.
    """
    try:
        check_keys(wishes, REQUEST_KEYS, "a request")
        wanted = wishes.get(REPORT_KEY, False)
        # A mapping is the report of an earlier request with the same parameters.
        wants_report = isinstance(wanted, Mapping) or parse_flag(REPORT_KEY, wanted)
        server = eviction_config(vllm_config)
        if server is None:
            for key, value in wishes.items():
                if wants_report if key == REPORT_KEY else value not in (None, OFF):
                    raise ValueError(f"{key} needs a server with eviction: start it with {flag(POLICY_KEY)}")
            return None
        config = for_request(server, wishes, vllm_config.model_config.max_model_len)
        if config is not None and config is not server:
            refuse_without_gates(config, vllm_config)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return report(config, None) if wants_report else None


def num_prompts(request: Any) -> int:
    """How many prompts an HTTP request has."""
    count = 0
    for field in ("prompt", "prompt_embeds"):
        value = getattr(request, field, None)
        if isinstance(value, list):
            # A list of numbers is one prompt.
            count += len(value) if value and not isinstance(value[0], int) else 1
        elif value is not None:
            count += 1
    messages = getattr(request, "messages", None)
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        count += len(messages)
    return max(count, 1)
