"""What a cached entry says of itself, wherever it lies: features of its key and value, and linear maps of these.

A rotary embedding turns pairs of a key's channels by an angle that depends on the position alone. The pairs' norms do
not change, so the features of an entry are the same at any position, after any move and in any later turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

#: The least that norms count for in the logarithm.
LEAST_NORM = 1e-4


@dataclass(frozen=True)
class Rotary:
    """Which channels of a key are turned together.

    Attributes:
        size: leading channels that are turned, an even number; 0 for none.
        neighbours: whether a pair are two that lie side by side (GPT-J), or the two halves' (NeoX).
        behind: channels before those that are turned which are the entry's value, and no features of its key: the
            latent of latent attention.
    """

    size: int = 0
    neighbours: bool = False
    behind: int = 0

    def num_features(self, head_size: int) -> int:
        """``F`` of entries whose keys have so many channels."""
        return head_size - self.behind - self.size // 2 + (self.behind or head_size) + 2

    def split(self, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second channels of all pairs, ``[..., size / 2]`` each, of the ``[..., size]`` that are
        turned: views.
        """
        if self.neighbours:
            return turned[..., ::2], turned[..., 1::2]
        return turned[..., : self.size // 2], turned[..., self.size // 2 :]

    def parts(self, keys: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of ``[..., D]`` keys of any float dtype the ``[..., size / 2]`` norms of pairs and the channels that are not
        turned, and of all these together the ``[...]`` norm; float32.
        """
        keys = keys[..., self.behind :]
        parts, square = [], keys.new_zeros((), dtype=torch.float32)
        if self.size:
            # In place, in a copy of its own: half of the time is memory.
            first, second = self.split(keys[..., : self.size].to(torch.float32, copy=True).square_())
            of_pairs = first + second
            square = of_pairs.sum(dim=-1)
            parts.append(of_pairs.sqrt_())
        if self.size < keys.shape[-1]:
            parts.append(keys[..., self.size :].float())
            square = square + parts[-1].square().sum(dim=-1)
        return parts, square.sqrt()


@dataclass(frozen=True)
class Rotation:
    """By how much a layer's rotary embedding turns pairs of channels from each position to the next.

    Attributes:
        rotary: which channels; some.
        speeds: ``[size / 2]`` float64, of each pair, radians from its first channel towards its second.
    """

    rotary: Rotary
    speeds: torch.Tensor

    def turned(self, vectors: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Queries or keys as they would be at other positions.

        Args:
            vectors: ``[..., n, D]``, any float dtype.
            steps: ``[n]`` integers, by how many positions each is moved.

        Returns:
            ``[..., n, D]`` float32.
        """
        moved = vectors.to(torch.float32, copy=True)
        first, second = self.rotary.split(self._turned_channels(moved))
        # Far away, float32 has whole turns but little behind the point.
        angles = steps.double().unsqueeze(1) * self.speeds
        cos, sin = angles.cos().float(), angles.sin().float()
        before = first.clone()
        first.mul_(cos).sub_(second * sin)
        second.mul_(cos).add_(before * sin)
        return moved

    def norms(self, vectors: torch.Tensor) -> torch.Tensor:
        """``[..., size / 2]`` float32, of the pairs of ``[..., D]`` vectors: the same at any position."""
        return torch.hypot(*self.rotary.split(self._turned_channels(vectors).float()))

    def _turned_channels(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors[..., self.rotary.behind : self.rotary.behind + self.rotary.size]

    @staticmethod
    def plain(size: int) -> "Rotation":
        """As most models have it for heads of so many channels, for what does not depend on how it is."""
        return Rotation(Rotary(size), 10_000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size))


def entry_parts(keys: torch.Tensor, values: torch.Tensor, rotary: Rotary) -> Iterator[torch.Tensor]:
    """The features of :func:`features` one after the other, so that each may be used while caches hold it: norms of
    pairs, other channels, values, and two logarithms.
    """
    of_keys, key_norm = rotary.parts(keys)
    yield from of_keys
    values = values.float()
    yield values
    norms = torch.stack([key_norm, torch.linalg.vector_norm(values, dim=-1)], dim=-2)
    yield norms.clamp_(min=LEAST_NORM).log_().transpose(-1, -2)


def features(keys: torch.Tensor, values: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """``[Hkv, S, F]`` float32 features of ``[Hkv, S, D]`` keys and ``[Hkv, S, Dv]`` values of any float dtype."""
    return torch.cat(list(entry_parts(keys, values, rotary)), dim=-1)


@dataclass(frozen=True)
class LinearGate:
    """One layer's linear map of an entry's features to the natural logarithm of what it is worth.

    Attributes:
        weight: ``[Hkv, F]`` float32.
        bias: ``[Hkv]`` float32.
        rotary: of the layer.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rotary: Rotary = Rotary()

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``[Hkv, S]`` float32 of ``[Hkv, S, D]`` keys and ``[Hkv, S, Dv]`` values."""
        total, first = self.bias.unsqueeze(1), 0
        for part in entry_parts(keys, values, self.rotary):
            weight = self.weight[:, first : (first := first + part.shape[-1])]
            total = total + _weighted(part, weight)
        return total

    def heads(self, chosen: slice) -> "LinearGate":
        """That of some of the KV heads."""
        return LinearGate(self.weight[chosen], self.bias[chosen], self.rotary)

    @staticmethod
    def random(num_kv_heads: int, head_size: int, rotary: Rotary, seed: int = 0) -> "LinearGate":
        """One that judges anyhow, for what does not depend on how."""
        dice = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_kv_heads, rotary.num_features(head_size), generator=dice) * head_size**-0.5
        return LinearGate(weight, torch.full((num_kv_heads,), -6.0), rotary)


def _weighted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[n, S]`` of ``[n, S, F]`` rows and ``[n, F]`` weights."""
    if len(rows) > 1:
        return (rows @ weight.unsqueeze(-1)).squeeze(-1)
    # The same for one head; a batch of one takes four times as long on CPUs.
    return rows[0].mv(weight[0]).unsqueeze(0)


class Ridge:
    """Ridge regression of each KV head of a layer, by sums alone: what is added may be forgotten.

    Args:
        num_heads: KV heads.
        num_features: ``F``.
        device: where the sums are kept, in float64.
    """

    def __init__(self, num_heads: int, num_features: int, device: torch.device):
        # Products of [features, 1, target] with themselves: all sums in one matrix.
        size = num_features + 2
        self._sums = torch.zeros(num_heads, size, size, dtype=torch.float64, device=device)

    def add(self, found: torch.Tensor, target: torch.Tensor) -> None:
        """Adds ``[Hkv, S, F]`` features and the ``[Hkv, S]`` targets that belong to them."""
        target = target.unsqueeze(-1)
        rows = torch.cat([found, torch.ones_like(target), target], dim=-1).double()
        self._sums += rows.transpose(1, 2) @ rows

    @property
    def level(self) -> torch.Tensor:
        """``[Hkv]`` float32, the mean of the targets."""
        return (self._sums[:, -1, -2] / self._sums[:, -2, -2]).float()

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[Hkv, F]`` and bias ``[Hkv]``, float32, for features as they are.

        Args:
            penalty: on the squared weights of standardised features, beside the sum of squared errors.
        """
        count, target = self._sums[:, -2, -2], self._sums[:, -1, -2]
        sums, products = self._sums[:, :-2, -2], self._sums[:, :-2, -1]
        mean, level = sums / count.unsqueeze(1), target / count
        spread = self._sums[:, :-2, :-2] - sums.unsqueeze(2) * mean.unsqueeze(1)
        size = (spread.diagonal(dim1=1, dim2=2) / count.unsqueeze(1)).clamp(min=0).sqrt()
        # A feature that never changes says nothing.
        size = torch.where(size > 1e-6 * (mean.abs() + 1e-6), size, float("inf"))
        scaled = spread / size.unsqueeze(1) / size.unsqueeze(2)
        scaled.diagonal(dim1=1, dim2=2).add_(penalty)
        weight = torch.linalg.solve(scaled, (products - sums * level.unsqueeze(1)) / size) / size
        return weight.float(), (level - (weight * mean).sum(dim=1)).float()


def overlap(scores: Sequence[torch.Tensor], others: Sequence[torch.Tensor], share: float) -> float:
    """How much of the best ``share`` of all entries of all layers two rankings have in common, from 0 to 1.

    Args:
        scores: ``[Hkv, S]`` for each layer.
        others: the same.
        share: of all entries, in (0, 1).
    """
    first, second = (torch.cat([layer.flatten() for layer in ranking]) for ranking in (scores, others))
    count = max(int(share * len(first)), 1)
    best = torch.zeros(2, len(first), dtype=torch.bool, device=first.device)
    for row, ranking in zip(best, (first, second), strict=True):
        row[ranking.topk(count).indices] = True
    return float(best.all(dim=0).sum()) / count
