"""What was kept of a prompt, as a picture and a page."""

import base64
import dataclasses
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Columns of the map at most; longer prompts have several positions in one.
NUM_BINS = 800


@dataclass(frozen=True)
class Layer:
    """What was kept in a layer.

    Attributes:
        index: of the layer in the model.
        entropy: of the window's attention on the prefix, summed over query heads; ``None`` if there is no window.
        variance: of the same over the window's queries, summed likewise.
        preference: CAKE's, of both, as a share of all layers'.
        budget: tokens that the policy gave it, or each of its KV heads where heads compete, the window included.
        kept: the same after rounding up to pages.
        positions: for each KV head those that it kept, ascending.
    """

    index: int
    entropy: float | None
    variance: float | None
    preference: float | None
    budget: list[int]
    kept: list[int]
    positions: list[list[int]]


@dataclass(frozen=True)
class Inspection:
    """What was kept of a prompt.

    Attributes:
        policy: with its knobs.
        budget: in force, mean tokens per layer.
        blocks: that the prompt filled, and that are held in their place.
        report: as clients get it.
        pieces: the text of each token.
    """

    model: str
    policy: str
    budget: int
    block_size: int
    blocks: tuple[int, int]
    report: dict[str, Any]
    layers: list[Layer]
    pieces: list[str]

    @property
    def prompt_len(self) -> int:
        """Tokens."""
        return len(self.pieces)

    @property
    def is_kept(self) -> np.ndarray:
        """``[L, Hkv, S]`` bool."""
        mask = np.zeros((len(self.layers), len(self.layers[0].positions), self.prompt_len), dtype=bool)
        for rows, layer in zip(mask, self.layers, strict=True):
            for row, positions in zip(rows, layer.positions, strict=True):
                row[positions] = True
        return mask


def draw(found: Inspection) -> Any:
    """The picture: a panel for each statistic of the layers, their budgets, and a map of what stays."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    mask, layers = found.is_kept, found.layers
    num_layers, num_heads, prompt_len = mask.shape
    indices = [layer.index for layer in layers]
    has_terms = layers[0].entropy is not None
    figure = Figure(figsize=(11, 6.2 + 0.14 * num_layers + 2.0 * has_terms), layout="constrained")
    heights = [2.0] * has_terms + [2.4, 2.6 + 0.14 * num_layers]
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    figure.suptitle(
        f"{Path(found.model).name}: what {found.report['policy']} keeps of {prompt_len:,} tokens", fontweight="bold"
    )

    if has_terms:
        panels = [("entropy", "entropy H", BLUES[1]), ("variance", "variance V", ORANGE), ("preference", SHARE, GREEN)]
        for column, (name, title, color) in enumerate(panels):
            axes = figure.add_subplot(grid[0, column])
            axes.bar(indices, [getattr(layer, name) for layer in layers], color=color, width=0.8)
            _tidy(axes, title)
            axes.set_xlabel("layer", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    axes = figure.add_subplot(grid[-2, :])
    each = len(layers[0].budget)
    places = [index + 0.8 * ((head + 0.5) / each - 0.5) for index in indices for head in range(each)]
    kept, budgets = ([count for layer in layers for count in getattr(layer, name)] for name in ("kept", "budget"))
    axes.bar(places, kept, color=BLUES[0], width=0.8 / each, label="kept, in whole pages")
    axes.scatter(places, budgets, s=14 if each == 1 else 6, color=BLUES[2], zorder=3, label="budget")
    axes.axhline(found.budget, color="0.35", linestyle="--", linewidth=1, label=f"mean budget: {found.budget:,}")
    if max(kept) > prompt_len / 2:
        axes.axhline(prompt_len, color="0.6", linestyle=":", linewidth=1, label=f"whole prompt: {prompt_len:,}")
    axes.set_xlim(indices[0] - 0.7, indices[-1] + 0.7)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.set_xlabel("layer", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    _tidy(axes, "tokens of each layer" if each == 1 else "tokens of each KV head")

    axes = figure.add_subplot(grid[-1, :])
    rows, edges = _binned(mask)
    picture = axes.imshow(
        rows, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(0, prompt_len, len(rows), 0)
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_heads, color="0.85", linewidth=0.5)
    every = -(-num_layers // 32)
    ticks = range(0, num_layers, every)
    axes.set_yticks(
        [(layer + 0.5) * num_heads for layer in ticks], [str(indices[layer]) for layer in ticks], fontsize=7
    )
    axes.set_ylabel(f"layer, {num_heads} KV head{'s' if num_heads > 1 else ''} each", fontsize=9)
    axes.set_xlabel("position in the prompt", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    width = prompt_len / len(edges)
    bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.02, shrink=0.5)
    bar.set_label("stays" if width <= 1 else f"share that stays of {width:.1f} positions", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title("what stays in each KV head", fontsize=10, loc="left")
    return figure


BLUES = ("#9ecae1", "#4292c6", "#08306b")
ORANGE, GREEN = "#e6862f", "#4a9d5b"
SHARE = "preference, share of all layers'"


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _binned(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[L * Hkv, n]`` share of each bin's positions that stays, and the bins' first positions."""
    rows = mask.reshape(-1, mask.shape[-1]).astype(float)
    edges = np.linspace(0, rows.shape[1], min(NUM_BINS, rows.shape[1]) + 1).astype(int)
    return np.add.reduceat(rows, edges[:-1], axis=1) / np.diff(edges), edges[:-1]


def page(found: Inspection, figure: Any) -> str:
    """One HTML file with everything in it; the numbers are also there as JSON, in ``#numbers``."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    numbers = {**dataclasses.asdict(found), "prompt_len": found.prompt_len}
    del numbers["pieces"]
    share = found.is_kept.mean(axis=(0, 1))
    text = "".join(
        f'<span style="--k:{kept**0.5:.2f}" title="position {position}: {kept:.0%}">{html.escape(piece)}</span>'
        for position, (piece, kept) in enumerate(zip(found.pieces, share, strict=True))
    )
    mean = sum(sum(layer.kept) / len(layer.kept) for layer in found.layers) / len(found.layers)
    full, held = found.blocks
    facts = {
        "policy": found.policy,
        "prompt": f"{found.prompt_len:,} tokens",
        "budget": f"{found.budget:,} tokens per layer, in the mean",
        "kept": f"{mean:,.0f} tokens per layer ({mean / found.prompt_len:.0%} of the prompt), in pages of "
        f"{found.block_size} tokens",
        "blocks": f"{full} that the prompt fills, {held} in their place: {full - held} freed",
    }
    return PAGE.format(
        title=html.escape(Path(found.model).name),
        facts="".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        picture=base64.b64encode(drawn.getvalue()).decode(),
        rows="".join(map(_row, found.layers)),
        text=text,
        # No "</script>" in a string.
        numbers=json.dumps(numbers).replace("<", "\\u003c"),
    )


def _row(layer: Layer) -> str:
    cells = [str(layer.index)]
    cells += ["-" if value is None else f"{value:.4g}" for value in (layer.entropy, layer.variance, layer.preference)]
    cells += [" ".join(map(str, counts)) for counts in (layer.budget, layer.kept)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What stays: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }}
dt {{ color: #666; }} dd {{ margin: 0; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #e4e4e4; }}
#text {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; }}
#text span {{ background: rgb(66 146 198 / calc(var(--k) * .8)); }}
</style>
</head>
<body>
<h1>What stays: {title}</h1>
<dl>{facts}</dl>
<img alt="Entropy, variance, preference and budget of each layer, and the positions that stay in each KV head"
 src="data:image/png;base64,{picture}">
<h2>Layers</h2>
<p>Entropy and variance of the attention that the window pays to what is before it, summed over query heads; the
preference as a share of all layers'. Budget and kept in tokens, for each KV head where heads compete.</p>
<table>
<thead><tr><th>layer</th><th>entropy</th><th>variance</th><th>preference</th><th>budget</th><th>kept</th></tr></thead>
<tbody>{rows}</tbody>
</table>
<h2>Text</h2>
<p>The darker, the more of all KV heads keep the token.</p>
<div id="text">{text}</div>
<script type="application/json" id="numbers">{numbers}</script>
</body>
</html>
"""
