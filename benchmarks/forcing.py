"""Lets a request go on with given tokens, whatever the model would say: teacher forcing behind an evicted prompt.

    vllm serve MODEL --logits-processors forcing:Forced        # with this folder in PYTHONPATH

A request gives the tokens as ``forced_tokens`` in ``vllm_xargs``; log probabilities are the model's own, as vLLM takes
them before any processor.
"""

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "forced_tokens"


class Forced(AdapterLogitsProcessor):
    """vLLM's hook."""

    def is_argmax_invariant(self) -> bool:
        """It is not: greedy sampling follows it."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """Of a request: its output so far and the next token's logits give the logits to sample from."""
        tokens = (params.extra_args or {}).get(KEY)
        if not tokens:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) >= len(tokens):
                return logits
            forced = torch.full_like(logits, -torch.inf)
            forced[int(tokens[len(output)])] = 0
            return forced

        return force
