"""Requests that make memory short while another one decodes, so that an elastic budget is cut as often as wanted."""

import random
import time

from demo import samples
from openai import OpenAI
from tasks import Texts

#: Tokens that the request which is to be cut goes on with meanwhile, and blocks that are left in the pool besides.
FILLER, SPARE_BLOCKS = 96, 6
GENERATED = "vllm:generation_tokens_total"


class Neighbours:
    """Prompts that are not evicted, sent one after the other to a server whose pool is known.

    Args:
        url: of the server.
        client: of the same.
        model: its name there.
        texts: for prose.
        num_blocks: of the server's pool.
        block_size: tokens.
    """

    def __init__(self, url: str, client: OpenAI, model: str, texts: Texts, num_blocks: int, block_size: int):
        self.url, self.client, self.model, self.texts = url, client, model, texts
        self.num_blocks, self.block_size = num_blocks, block_size

    def generated(self) -> int:
        """Tokens that the server has generated so far."""
        return int(sum(value for _, _, value in samples(self.url, GENERATED)))

    def cut(self, length: int, share: float, times: int, before: int) -> None:
        """Lets the only request that decodes be cut.

        Args:
            length: of its prompt, tokens.
            share: of its prompt that the last cut leaves it, nearly.
            times: how many cuts, from its whole prompt down in equal steps.
            before: what :meth:`generated` was before the request.

        Raises:
            RuntimeError: if it has gone on for longer than :data:`FILLER` tokens meanwhile, or does not decode.
        """
        deadline = time.monotonic() + 600
        while self.generated() == before:
            if time.monotonic() > deadline:
                raise RuntimeError("the request that was to be cut does not decode")
            time.sleep(0.05)
        for turn in range(1, times + 1):
            left = length * (1 - (1 - share) * turn / times)
            num_tokens = (self.num_blocks - SPARE_BLOCKS) * self.block_size - int(left)
            self.client.completions.create(
                model=self.model,
                prompt=self.texts.prose(num_tokens, random.Random(turn)),
                max_tokens=1,
                extra_body={"ignore_eos": True, "vllm_xargs": {"kv_eviction": "none"}},
            )
        if self.generated() - before - times >= FILLER:
            raise RuntimeError("the question came before the last cut: the machine is too busy for this")
