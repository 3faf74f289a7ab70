"""Lets a request go on with given tokens, whatever the model would say: teacher forcing behind an evicted prompt.

    vllm serve MODEL --logits-processors forcing:Forced        # with this folder in PYTHONPATH

A request gives the tokens as ``forced_tokens`` in ``vllm_xargs``; log probabilities are the model's own, as vLLM takes
them before any processor.
"""

from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor, LogitsProcRequestState

KEY = "forced_tokens"


class Forced(AdapterLogitsProcessor, LogitsProcessor):
    """vLLM's hook, in the form of both model runners: a server takes one class by name, whichever it has.

    V1 asks for a function for each request; V2 says for each row whose it is and where it stands.
    """

    def __init__(self, vllm_config: Any, *given: Any):
        if isinstance(given[0], LogitsProcRequestState):
            self.states: LogitsProcRequestState = given[0]
            self.counts = np.zeros(self.states.max_num_reqs, dtype=np.int64)
            self.tokens = torch.zeros(self.states.max_num_reqs, 0, dtype=torch.int64, device=self.states.device)
        else:
            super().__init__(vllm_config, *given)

    def is_argmax_invariant(self) -> bool:
        """V1: it is not, greedy sampling follows it."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """V1: takes a request's output so far and the next token's logits to the logits to sample from."""
        tokens = _forced(params)

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) >= len(tokens):
                return logits
            forced = torch.full_like(logits, -torch.inf)
            forced[tokens[len(output)]] = 0
            return forced

        return force if tokens else None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a row of the table."""
        tokens = torch.tensor(_forced(sampling_params), dtype=torch.int64)
        self.counts[req_idx] = len(tokens)
        missing = len(tokens) - self.tokens.shape[1]
        if missing > 0:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, missing))
        self.tokens[req_idx, : len(tokens)] = tokens.to(self.tokens.device)
        return len(tokens) > 0

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Both: the logits of a batch; ``ctx`` is V2's."""
        if ctx is None:
            return super().apply(logits)
        if not self.counts[ctx.idx_mapping_np].any():
            return logits
        rows = ctx.expanded_idx_mapping.long()
        counts = torch.from_numpy(self.counts).to(logits.device)[rows]
        step = ctx.pos + 1 - self.states.prompt_len.gpu[rows]
        is_forced = (step >= 0) & (step < counts)
        tokens = self.tokens[rows, step.clamp(0, self.tokens.shape[1] - 1)]
        forced = torch.full_like(logits, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0)
        return torch.where(is_forced.unsqueeze(1), forced, logits)


def _forced(params: SamplingParams) -> list[int]:
    return [int(token) for token in (params.extra_args or {}).get(KEY) or ()]
