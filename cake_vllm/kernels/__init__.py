"""Tensor operations on paged KV caches. Nothing here imports vLLM."""

from cake_vllm.kernels.columns import Grid, budget_for, columns_for, deal, page_of
from cake_vllm.kernels.pages import BlockLayout
from cake_vllm.kernels.rows import EvictedRows, to_device

__all__ = ["BlockLayout", "EvictedRows", "Grid", "budget_for", "columns_for", "deal", "page_of", "to_device"]
