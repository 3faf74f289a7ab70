"""Requests that start again: a preempted one is evicted as it was, where it was, and by the same queries.

vLLM computes the prompt of a preempted request and what it has generated as if all of it were a prompt. Here these
tokens are computed in chunks that end where the request was evicted, so that what follows reads what it read before:

    before      prompt                  | 1 | 1 | 1 | … | 1 | 1 | …        | an eviction
    again       hits | chunk | chunk    | chunk         | chunk            decode "off": one chunk after the prompt

and what the prefix cache has, or a cache outside, ends before the queries by which it is evicted for the first time.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from cake_vllm.integration.patching import wrap

#: Attribute of a request: how many of its tokens may come from the prefix cache.
_MOST_HITS = "kv_eviction_most_hits"


def hit_at_most(request: Request, num_tokens: int) -> None:
    """Lets the prefix cache leave what lies behind so many tokens to be computed, whatever it has."""
    setattr(request, _MOST_HITS, num_tokens)


def install_stops() -> None:
    """Lets chunks end where a request is to be evicted, and hits before its queries (ledger: ``patches/README.md``)."""
    wrap(KVCacheManager, "get_computed_blocks", _get_computed_blocks)
    wrap(Scheduler, "_reserve_prefill_lookahead", _reserve_prefill_lookahead)


def _get_computed_blocks(
    original: Callable[..., Any], self: KVCacheManager, request: Request, *args: Any, **kwargs: Any
) -> Any:
    most = getattr(request, _MOST_HITS, request.num_tokens)
    if most >= request.num_tokens:
        return original(self, request, *args, **kwargs)
    # Lookup ends where there are no more hashes.
    hashes = request.block_hashes
    request.block_hashes = hashes[: most // self.block_pool.hash_block_size]
    try:
        blocks, num_hits, junction = original(self, request, *args, **kwargs)
    finally:
        request.block_hashes = hashes
    if not self.kv_cache_config.has_mamba_layers:
        # Layers with a window keep what lies before the places where a request may go on with its prefix. If it is
        # evicted, that is here. States are kept where chunks end, and no chunk ends for this.
        junction = junction or most
    return blocks, num_hits, junction


def _reserve_prefill_lookahead(
    original: Callable[..., int], self: Any, request: Request, num_computed_tokens: int, num_new_tokens: int
) -> int:
    num_new_tokens = original(self, request, num_computed_tokens, num_new_tokens)
    # Other engines of this process may have other connectors.
    if num_computed_tokens + 1 >= request.num_tokens or not hasattr(self.connector, "is_alone"):
        return num_new_tokens
    return self.connector.scheduler.chunk(request, num_computed_tokens, num_new_tokens)
