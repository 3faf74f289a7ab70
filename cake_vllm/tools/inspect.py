"""``cake-vllm inspect``: what eviction keeps of a prompt, by layer and KV head, as a page and a picture.

The prompt runs through vLLM's engine in this process, so what is shown is what is served: the worker's own traces and
the report that a client gets. Entropy, variance and preference of a layer are CAKE's, whatever the policy.
"""

import argparse
import os
from pathlib import Path
from typing import Any, cast

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
from cake_vllm.tools.options import add_eviction, add_memory, positive
from cake_vllm.tools.report import Inspection, Layer, draw, page


def add_command(commands: Any) -> None:
    """Adds the subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "inspect",
        allow_abbrev=False,
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
    add_memory(parser)
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
        {key: getattr(args, key) for key in (POLICY_KEY, BUDGET_KEY, CONFIG_KEY)},
        is_chat=args.chat,
        dtype=args.dtype,
        block_size=args.block_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
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
        prompt_len, size = len(token_ids), worker.layers.grid.block_size
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
