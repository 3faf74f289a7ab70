"""``cake-vllm calibrate``: makes the gates of a model, which ``--kv-eviction gate`` judges cache entries by.

The model repeats pieces of text that it was given; what the repetition attends to is what a cache has to keep (KVzip,
arXiv 2505.23416). A linear map of each entry's own key and value then learns the logarithm of that attention. All of it
runs in vLLM's engine, in this process: prompts are served, and the policy ``kvzip`` is the teacher.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from cake_vllm import __version__
from cake_vllm.config import BUDGET_KEY, CONFIG_KEY, POLICY_KEY
from cake_vllm.integration.gates import GateFile, default_path, fingerprint
from cake_vllm.policies import LayerInputs, LayerScore
from cake_vllm.policies.entries import LinearGate, Ridge, Rotary, features, overlap
from cake_vllm.tools.options import add_memory, positive

#: Of the regression, on standardised features.
PENALTY = 30.0
#: Attention counts as at least that in the logarithm.
LEAST_ATTENTION = 1e-9
#: A repetition is that long at most; longer prompts are repeated piece by piece, as in the paper.
PIECE = 2000
#: How a piece begins is said with so many tokens before it, as in the paper's code.
LEAD = 8
#: The shortest prompts that teach something, tokens.
SHORTEST = 128
#: Of every five prompts one is held out.
HELD_OUT = 5
SHARES = (0.1, 0.2, 0.4)
REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with"


@dataclass(frozen=True)
class Request:
    """A prompt with the repetition of a piece of it behind it.

    Attributes:
        context: which prompt it is.
        tokens: ids.
        is_last: whether all pieces of this prompt have been repeated then.
    """

    context: int
    tokens: list[int]
    is_last: bool


def add_command(commands: Any) -> None:
    """Adds the subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "calibrate",
        allow_abbrev=False,
        help="make the gates of a model, for --kv-eviction gate",
        description="Lets a model repeat some text, learns from that what a cached entry is worth by its own key and "
        "value, says how well on text that was held out, and writes a file with which vllm serve --kv-eviction gate "
        "finds its way. Once for a model; runs in vLLM's engine, on one device.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name that vLLM can look up")
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="text to learn from (default: Python's own documentation)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=20_000, metavar="N", help="of text, in all (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=positive, default=2000, metavar="N", help="of a prompt, tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the gates (default: where vllm serve looks for them)"
    )
    parser.add_argument("--dtype", default="auto", help="as of vllm serve (default: %(default)s)")
    add_memory(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the gates and writes them.

    Raises:
        ValueError: one sentence, if the text is too short or the model's attention cannot be read.
    """
    texts = [file.read_text() for file in args.text] if args.text else [python_documentation()]
    named = [file.name for file in args.text] if args.text else ["Python's documentation"]
    gates, quality = calibrate(
        args.model,
        "\n\n".join(texts),
        tokens=args.tokens,
        length=args.length,
        about={"text": json.dumps(named)},
        dtype=args.dtype,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    print(as_table(quality))
    out = args.out or default_path(gates.about["fingerprint"])
    gates.save(out)
    print(f"wrote {out}")


def as_table(quality: dict[str, list[float]]) -> str:
    """What :func:`calibrate` found on held-out text."""
    rows = ["of the entries that the repetition needs most, on held-out text:"]
    rows.append(f"{'':22}" + "".join(f"{f'best {share:.0%}':>10}" for share in SHARES))
    rows += [f"{name:22}" + "".join(f"{value:10.2f}" for value in values) for name, values in quality.items()]
    return "\n".join(rows)


def python_documentation() -> str:
    """About 100,000 tokens of English and some code, which lie beside every interpreter.

    Raises:
        ValueError: if they do not.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without its documentation: give text with --text FILE") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def calibrate(
    model: str, text: str, *, tokens: int, length: int, about: dict[str, str], **engine: Any
) -> tuple[GateFile, dict[str, list[float]]]:
    """Makes the gates of a model.

    Args:
        model: a directory or a name.
        text: to learn from.
        tokens: of it, in all.
        length: of a prompt, tokens.
        about: what is to be noted in the file.
        engine: keyword arguments of ``LLM``.

    Returns:
        The gates; and of all entries of held-out prompts, how much of the best 10, 20 and 40% by the repetition is
        among the best by the gates, and by a constant for each head.

    Raises:
        ValueError: one sentence, if that cannot be done.
    """
    from transformers import AutoTokenizer

    from cake_vllm import LLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = cut(tokenizer, text, tokens, length)
    requests = list(repetitions(tokenizer, prompts))

    from tqdm import tqdm
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.platforms import current_platform

    from cake_vllm.integration.connector import KVEvictionConnector

    window = 1
    llm = LLM(
        model,
        additional_config={POLICY_KEY: "kvzip", BUDGET_KEY: 64, CONFIG_KEY: {"window": window}},
        # The context is computed once for all of its pieces.
        enable_prefix_caching=True,
        block_size=32 if current_platform.is_cpu() else None,
        max_model_len=max(len(request.tokens) for request in requests) + 2,
        max_num_seqs=1,
        enforce_eager=True,
        **engine,
    )
    try:
        worker = cast(KVEvictionConnector, get_kv_transfer_group()).worker
        layers = worker.layers.target
        lesson = Lesson([layer.rotary for layer in layers], num_held_out(len(prompts)))
        worker.judging.on_judged = lesson.look
        for request in tqdm(requests, desc="repetitions"):
            lesson.length = len(prompts[request.context])
            wish = {CONFIG_KEY: json.dumps({"context": lesson.length})}
            # An eviction is for what follows: a request whose next token is its last is left alone.
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, extra_args=wish)
            llm.generate({"prompt_token_ids": request.tokens}, params, use_tqdm=False)
            if len(lesson.peaks) < len(layers):
                raise ValueError(
                    f"nothing was judged of a prompt of {len(request.tokens)} tokens: give a longer --length"
                )
            if request.is_last:
                lesson.learn()
        vllm_model = llm.llm_engine.vllm_config.model_config
        indices = tuple(extract_layer_index(layer.name) for layer in layers)
        quality = lesson.quality()
        print_ = fingerprint(vllm_model)
        notes = {
            **about,
            "fingerprint": print_,
            "model": model,
            "tokens": str(sum(map(len, prompts))),
            "overlap": json.dumps(quality),
            "versions": json.dumps({"cake-vllm": __version__, "vllm": importlib.metadata.version("vllm")}),
        }
        gates = lesson.gates
        weight, bias = (torch.stack([getattr(gate, name) for gate in gates]) for name in ("weight", "bias"))
        return GateFile(weight, bias, indices, tuple(lesson.rotaries), notes), quality
    finally:
        llm.llm_engine.engine_core.shutdown()


def cut(tokenizer: Any, text: str, tokens: int, length: int) -> list[list[int]]:
    """Prompts from all over a text, two at least; each begins as the tokenizer begins texts.

    Raises:
        ValueError: if the text is too short for that.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token_id
    begin = [first] if first is not None and tokenizer("a")["input_ids"][:1] == [first] else []
    count = max(min(tokens, len(ids)) // length, 2)
    each = min(length, len(ids) // count)
    if each < SHORTEST:
        raise ValueError(f"the text has {len(ids)} tokens, too few to learn from: give a longer one with --text")
    stride = len(ids) // count
    return [[*begin, *ids[start : start + each]] for start in range(0, count * stride, stride)]


def num_held_out(count: int) -> int:
    """How many of so many prompts nothing is learnt from; the last ones."""
    return max(count // HELD_OUT, 1)


def repetitions(tokenizer: Any, prompts: Sequence[list[int]], piece: int = PIECE) -> Iterator[Request]:
    """Prompts with what makes the model repeat them, piece by piece, and the piece."""
    turn = assistant_turn(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for index, prompt in enumerate(prompts):
        starts = range(0, len(prompt), piece)
        for start in starts:
            lead = [*encode(REPEAT_FROM), *prompt[max(start - LEAD, 0) : start]] if start else encode(REPEAT)
            tokens = [*prompt, *lead, *encode(turn), *prompt[start : start + piece]]
            yield Request(index, tokens, start == starts[-1])


def assistant_turn(tokenizer: Any) -> str:
    """What stands between a user's message and the answer in the model's chat template; a blank line if it has none."""
    mark = "CONTEXT"
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n"
    message = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text.partition(mark)[2]


class Lesson:
    """What the repetitions show, layer by layer, and what is learnt of it.

    Args:
        rotaries: of the layers.
        held_out: how many prompts, the last, are kept to see how good the gates are.
    """

    def __init__(self, rotaries: Sequence[Rotary], held_out: int):
        self.rotaries, self._held_out = list(rotaries), held_out
        #: Tokens of the prompt at hand.
        self.length = 0
        #: By layer, the largest attention that the repetition of the prompt at hand has paid so far: ``[Hkv, S]``.
        self.peaks: dict[int, torch.Tensor] = {}
        self._entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Prompts whose turn to be learnt from comes when another one behind them can be held out.
        self._waiting: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._ridges: list[Ridge] = []

    def look(self, layer: int, inputs: LayerInputs, score: LayerScore) -> None:
        """Takes note of a layer; see :attr:`EvictionWorker.on_judged`."""
        assert inputs.notes is not None
        assert inputs.values is not None
        peak = inputs.notes[:, : self.length]
        self.peaks[layer] = peak.maximum(self.peaks[layer]) if layer in self.peaks else peak.clone()
        self._entries[layer] = inputs.keys[:, : self.length], inputs.values[:, : self.length]

    def learn(self) -> None:
        """The prompt at hand has been repeated: it is learnt from, or waits to be held out."""
        found = []
        for layer, rotary in enumerate(self.rotaries):
            entry = features(*self._entries[layer], rotary)
            found.append((entry, self.peaks[layer].clamp(min=LEAST_ATTENTION).log()))
        self.peaks.clear()
        self._entries.clear()
        if not self._ridges:
            self._ridges = [Ridge(len(entry), entry.shape[-1], entry.device) for entry, _ in found]
        self._waiting.append(found)
        if len(self._waiting) > self._held_out:
            for ridge, (entry, target) in zip(self._ridges, self._waiting.pop(0), strict=True):
                ridge.add(entry, target)

    @property
    def gates(self) -> list[LinearGate]:
        """Of all layers."""
        solved = [ridge.solve(PENALTY) for ridge in self._ridges]
        return [LinearGate(*gate, rotary) for gate, rotary in zip(solved, self.rotaries, strict=True)]

    def quality(self) -> dict[str, list[float]]:
        """Of held-out prompts, how much of the best the gates name, and a constant for each head; by :data:`SHARES`."""
        gates, levels = self.gates, [ridge.level for ridge in self._ridges]
        rows: dict[str, list[float]] = {"gates": [], "a constant per head": []}
        for share in SHARES:
            sums = [0.0, 0.0]
            for prompt in self._waiting:
                teacher = [target for _, target in prompt]
                by_gate = [
                    (entry @ gate.weight.unsqueeze(-1)).squeeze(-1) + gate.bias.unsqueeze(1)
                    for gate, (entry, _) in zip(gates, prompt, strict=True)
                ]
                by_head = [level.unsqueeze(1).expand_as(target) for level, target in zip(levels, teacher, strict=True)]
                for i, ranking in enumerate((by_gate, by_head)):
                    sums[i] += overlap(teacher, ranking, share) / len(self._waiting)
            for values, mean in zip(rows.values(), sums, strict=True):
                values.append(round(mean, 3))
        return rows
