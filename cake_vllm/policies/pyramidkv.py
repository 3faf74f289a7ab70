"""PyramidKV."""

from collections.abc import Sequence
from dataclasses import dataclass

from cake_vllm.policies.base import LayerScore
from cake_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores; budgets that fall linearly from the first layer to the last.

    Paper: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arXiv 2406.02069. Budgets as in kvpress: they include the window, and where the pyramid does not fit between the
    window and the prompt, every layer gets the mean.

    Attributes:
        beta: the mean divided by the last layer's budget.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, not {self.beta}")

    def budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[int]:
        """See :meth:`Policy.budgets`."""
        num_layers = len(scores)
        least = budget / self.beta
        most = 2 * budget - least
        if most >= prompt_len - self.window:
            most = prompt_len - self.window
            least = 2 * budget - most
        if num_layers == 1 or not prompt_len >= most >= least >= self.window:
            sizes = [round(budget)] * num_layers
        else:
            step = (most - least) / (num_layers - 1)
            sizes = [round(most - layer * step) for layer in range(num_layers)]
        return [min(size, prompt_len) - self.window for size in sizes]
