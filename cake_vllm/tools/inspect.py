"""``cake-vllm inspect``: what eviction keeps of a prompt, by layer and KV head, as a page and a picture.

The prompt runs through vLLM's engine in this process, so what is shown is what is served: the worker's own traces and
the report that a client gets. Entropy, variance and preference of a layer are CAKE's, whatever the policy.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from cake_vllm.config import (
    BUDGET_KEY,
    CONFIG_KEY,
    POLICY_KEY,
    REPORT_KEY,
    KVEvictionConfig,
    flag,
)
from cake_vllm.policies import LayerInputs, LayerScore
from cake_vllm.policies.cake import Cake
from cake_vllm.tools.plan import add_eviction, positive, size

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


def add_command(commands: Any) -> None:
    """Adds the subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "inspect",
        help="what eviction keeps of a prompt, by layer and head, as a page and a picture",
        description="Runs a prompt through vLLM's engine and shows what eviction keeps of it: for each layer entropy, "
        "variance, preference and budget, and for each KV head the positions that stay. Needs matplotlib: "
        "pip install 'cake-vllm[inspect]'.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name that vLLM can look up")
    parser.add_argument("--prompt", required=True, metavar="FILE|TEXT", help="a file of text, or the text itself")
    parser.add_argument("--chat", action="store_true", help="put it into the model's chat template, as the user's turn")
    add_eviction(parser, "N|F", "tokens per layer, or a fraction of the prompt")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page, HTML without other files")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the picture alone")
    parser.add_argument(
        "--block-size", type=positive, metavar="N", help="as of vllm serve (default: 32 on a CPU, else vLLM's)"
    )
    parser.add_argument(
        "--kv-cache-memory", type=size, metavar="SIZE", help="of the KV pool, a number of GiB (default: vLLM's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the page, and the picture if it is wanted.

    Raises:
        ValueError: one sentence, if there is nothing to show.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("cake-vllm inspect draws with matplotlib: pip install 'cake-vllm[inspect]'") from None
    matplotlib.use("Agg")
    found = inspect(
        args.model,
        read_prompt(args.prompt),
        {POLICY_KEY: args.policy, BUDGET_KEY: args.budget, CONFIG_KEY: args.config},
        is_chat=args.chat,
        dtype=args.dtype,
        block_size=args.block_size,
        kv_cache_memory_bytes=args.kv_cache_memory,
    )
    figure = draw(found)
    args.out.write_text(page(found, figure))
    print(f"wrote {args.out}")
    if args.png:
        figure.savefig(args.png, dpi=150)
        print(f"wrote {args.png}")


def read_prompt(text: str) -> str:
    """The text of a file, or the argument itself if it names none."""
    return Path(text).read_text() if os.path.isfile(text) else text


def inspect(
    model: str, prompt: str, settings: dict[str, Any], *, is_chat: bool = False, block_size: int | None, **engine: Any
) -> Inspection:
    """Serves a prompt, and tells what was kept of it.

    Args:
        model: a directory or a name.
        prompt: its text.
        settings: as of ``LLM``.
        is_chat: whether it goes into the chat template.
        block_size: tokens; ``None``: 32 on a CPU, else vLLM's.
        engine: other keyword arguments of ``LLM``.

    Raises:
        ValueError: one sentence, if the settings are bad or nothing was evicted.
    """
    config = KVEvictionConfig.from_settings(settings)
    assert config is not None
    if config.is_elastic or config.is_progressive:
        raise ValueError(
            f"inspect shows what is kept of a whole prompt: give {flag(BUDGET_KEY)} a number, and prefill exact"
        )
    from transformers import AutoTokenizer

    from cake_vllm import LLM

    token_ids, pieces = tokenize(AutoTokenizer.from_pretrained(model), prompt, is_chat)

    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.platforms import current_platform

    from cake_vllm.integration.connector import KVEvictionConnector
    from cake_vllm.integration.messages import Eviction
    from cake_vllm.integration.worker.dividing import Choice

    llm = LLM(
        model,
        additional_config=config.settings(),
        block_size=block_size or (32 if current_platform.is_cpu() else None),
        max_model_len=len(token_ids) + 2,
        max_num_seqs=1,
        enforce_eager=True,
        **engine,
    )
    try:
        vllm_config = llm.llm_engine.vllm_config
        config = KVEvictionConfig.from_settings(vllm_config.additional_config)
        assert config is not None
        terms = Terms(config, vllm_config.model_config.hf_text_config)
        worker = cast(KVEvictionConnector, get_kv_transfer_group()).worker
        evictions: list[tuple[Choice, Eviction]] = []
        worker.judging.on_judged = terms.look
        worker.on_evicted = lambda _, choice, eviction: evictions.append((choice, eviction))
        # An eviction is for what follows: a request whose next token is its last is left alone.
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, extra_args={REPORT_KEY: True})
        (output,) = llm.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)
        prompt_len, size = len(token_ids), worker.layers.block_size
        choice, eviction = evictions[0] if evictions else (None, None)
        if choice is None or eviction is None or choice.chosen is None:
            raise ValueError(
                f"nothing was evicted of {prompt_len} tokens, in blocks of {size}, with "
                f"{flag(BUDGET_KEY)} {config.budget}: give a longer prompt or a smaller budget"
            )
        target, tail = worker.layers.target, list(range(prompt_len // size * size, prompt_len))
        layers = [
            Layer(
                extract_layer_index(layer.name),
                *of_layer,
                list(wanted),
                list(kept),
                [head.tolist() + tail for head in heads],
            )
            for layer, of_layer, wanted, kept, heads in zip(
                target, terms.of_layers(len(target)), eviction.wanted, eviction.kept, choice.chosen, strict=True
            )
        ]
        return Inspection(
            model,
            repr(config.policy),
            config.tokens(prompt_len),
            size,
            (prompt_len // size, eviction.columns),
            output.kv_transfer_params["kv_eviction"],
            layers,
            pieces,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()


def tokenize(tokenizer: Any, prompt: str, is_chat: bool) -> tuple[list[int], list[str]]:
    """Token ids of a prompt, and the text that each stands for."""
    if is_chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if not tokenizer.is_fast:
        token_ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
        return token_ids, [tokenizer.decode([token]) for token in token_ids]
    found = tokenizer(prompt, add_special_tokens=not is_chat, return_offsets_mapping=True)
    pieces, shown = [], 0
    for start, end in found["offset_mapping"]:
        # Several tokens may share a character; it is shown once.
        pieces.append(prompt[max(start, shown) : end])
        shown = max(shown, end)
    return found["input_ids"], pieces


class Terms:
    """Entropy, variance and preference of layers, as CAKE sees them, collected while a prompt is judged."""

    def __init__(self, config: KVEvictionConfig, model: Any):
        policy, self._is_served = config.policy, isinstance(config.policy, Cake)
        if not isinstance(policy, Cake):
            like = KVEvictionConfig("cake", config.budget, {"window": max(policy.num_queries, 2)})
            policy = like.resolve(model).policy
        assert isinstance(policy, Cake)
        self._policy = policy
        self._scores: dict[int, LayerScore] = {}

    def look(self, layer: int, inputs: LayerInputs, score: LayerScore) -> None:
        """Takes note of a layer; see :attr:`EvictionWorker.on_judged`."""
        if inputs.queries.shape[1] == self._policy.window:
            self._scores[layer] = score if self._is_served else self._policy.score(inputs)

    def of_layers(self, num_layers: int) -> list[tuple[float | None, float | None, float | None]]:
        """By layer, in model order; ``None`` for policies that look at one query at most."""
        scores = [score for _, score in sorted(self._scores.items())]
        if not scores:
            return [(None, None, None)] * num_layers
        preferences = self._policy.preferences(scores)
        whole = sum(preferences) or 1.0
        return [
            (*score.terms.tolist(), preference / whole) for score, preference in zip(scores, preferences, strict=True)
        ]


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
