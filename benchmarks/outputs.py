"""What eviction of generated tokens costs in what comes after them: a model is made to go on with given tokens.

One engine serves all rows: each request asks for its method, and for whether its prompt stays. The budget is for what
is generated; where the prompt does not stay it is in the budget, which is larger by its length. What is too much goes
every ``--every`` tokens. Columns:

    kept    tokens of a layer behind the last eviction, in the mean of all outputs

    fact    four numbers, each stated once in the output, asked for ``gap`` tokens later: share of them of which all
            digits are the likeliest, and the mean probability of their tokens
    prose   real text as the output: share of its tokens that are the likeliest, and mean loss, behind the first
            ``--budget`` of them
    copy    40 tokens of the prompt behind 12 of them, asked for at the end of that text
    own     what the full cache itself answers to problems of mathematics (MATH-500, AIME): share of tokens that are
            still the likeliest, and mean loss, over those that do not repeat: the last eight were not said before

    python benchmarks/outputs.py MODEL --out benchmarks/results/outputs_MODEL.json
"""

import argparse
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from asking import Prompts
from cells import Row
from common import write
from exams import EXAMS
from forcing import KEY
from tasks import COPY_ASKED, COPY_GIVEN, Texts
from tqdm import tqdm

ROWS = (
    "full",
    "rkv",
    "triattention",
    "random+recent=32",
    "streamingllm",
    "snapkv",
    "cake",
    "layer-defensivekv",
    "echo",
    "lagkv",
    "keydiff",
)
FACTS = ("\nThe secret number is {}.", "\nThe password is {}.", "\nThe zip code is {}.", "\nThe flight number is {}.")


@dataclass(frozen=True)
class Output:
    """A prompt, what is generated behind it, and which of that is looked at.

    Attributes:
        prompt: token ids.
        forced: token ids.
        asked: by column, questions: places among these.
    """

    prompt: list[int]
    forced: list[int]
    asked: Mapping[str, Sequence[Sequence[int]]]


def facts(texts: Texts, args: argparse.Namespace) -> Iterator[Output]:
    """Facts in the output, and the same asked for later, in their order."""
    for gap in args.gaps:
        for index in range(args.samples):
            dice = random.Random(f"{args.seed} fact {gap} {index}")
            told, asked, places = texts.prose(100, dice), [], []
            for fact in FACTS:
                said = texts.encode(fact.format(dice.randrange(10_000, 100_000)))
                told += [*said, *texts.prose(25, dice)]
                # Without the full stop.
                asked.append((said[:-1], len(said) - 1 - len(texts.encode(fact.partition("{}")[0].rstrip()))))
            forced = told + texts.prose(max(gap - len(told) + 100, 0), dice)
            for said, count in asked:
                forced += said
                places.append(range(len(forced) - count, len(forced)))
            yield Output(texts.prose(args.prompt, dice), forced, {f"fact {gap}": places})


def copies(texts: Texts, args: argparse.Namespace) -> Iterator[Output]:
    """A piece of the prompt, repeated behind a long text; and that text."""
    for index in range(args.samples):
        dice = random.Random(f"{args.seed} copy {index}")
        prompt = texts.prose(args.prompt, dice)
        start = dice.randrange(len(prompt) - COPY_GIVEN - COPY_ASKED)
        piece = prompt[start : start + COPY_GIVEN + COPY_ASKED]
        text = texts.prose(max(args.gaps), dice)
        forced = [*text, *piece]
        last = range(len(forced) - COPY_ASKED, len(forced))
        prose = range(args.budget, len(text))
        yield Output(prompt, forced, {"copy": [last], "prose": [prose] if prose else []})


def problems(texts: Texts, args: argparse.Namespace) -> list[list[int]]:
    """Prompts of ``--samples`` problems, in the chat's template where the model has one."""
    prompts = Prompts(texts, chat=bool(texts.tokenizer.chat_template))
    asked = ((("math500", "aime")[index % 2], index // 2) for index in range(args.samples))
    return [prompts.ids(EXAMS[name](texts, 0, random.Random(), index)[0]) for name, index in asked]


def unsaid(tokens: Sequence[int], words: int = 8) -> list[int]:
    """Places of tokens that end a run of ``words`` which has not been there before."""
    seen: set[tuple[int, ...]] = set()
    places = []
    for place in range(len(tokens)):
        run = tuple(tokens[max(place - words + 1, 0) : place + 1])
        if run not in seen:
            places.append(place)
        seen.add(run)
    return places


class Engine:
    """vLLM in this process.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        from cake_vllm import LLM

        longest = max(args.problem + args.length, args.prompt + max(args.gaps) + 250)
        self.llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=args.concurrency,
            enforce_eager=True,
            block_size=args.block_size,
            kv_cache_memory_bytes=args.kv_cache_gib * 2**30,
            logits_processors=["forcing:Forced"],
            kv_eviction="snapkv",
            kv_eviction_budget=args.budget,
            kv_eviction_config={"decode": "window", "every": args.every},
        )
        self.args = args

    def go_on(self, row: Row, stays: bool, output: Output) -> tuple[list[int], Any, dict[str, Any]]:
        """A request as vLLM takes it: prompt and parameters; the latter name what it asks for."""
        from vllm import SamplingParams

        own: dict[str, Any] = {"kv_eviction": "none", "kv_eviction_report": True}
        if row.policy != "full":
            budget = self.args.budget + (0 if stays else len(output.prompt))
            config = {**row.knobs, "protect": {"prompt": stays}}
            own |= {"kv_eviction": row.name, "kv_eviction_budget": budget, "kv_eviction_config": config}
        forced = {KEY: output.forced} if output.forced else {}
        params = SamplingParams(
            temperature=0,
            # The last token is never evicted for: one more.
            max_tokens=(len(output.forced) or self.args.length) + 1,
            ignore_eos=True,
            logprobs=1,
            detokenize=False,
            extra_args={**own, **forced},
        )
        return output.prompt, params, own

    def answers(self, requests: list[tuple[Row, bool, Output]]) -> list[Any]:
        """What vLLM returns for requests, which run as far as there is room."""
        given = [self.go_on(*request) for request in requests]
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in given]
        found = self.llm.generate(prompts, [params for _, params, _ in given], use_tqdm=tqdm)
        return list(found)


def scores(output: Output, request: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of each question with its column, and how many tokens a layer keeps."""
    answer = request.outputs[0]
    kept = (request.kv_transfer_params or {}).get("kv_eviction", {}).get("kept_tokens")
    held = np.concatenate([np.ravel(layer) for layer in kept]).mean() if kept else len(output.prompt + output.forced)
    if list(answer.token_ids[: len(output.forced)]) != output.forced:
        raise RuntimeError("the engine forced no tokens")
    for task, questions in output.asked.items():
        for places in questions:
            steps = [(answer.logprobs[place], output.forced[place]) for place in places]
            chosen = [(step[token].logprob, max(found.logprob for found in step.values())) for step, token in steps]
            likeliest = [own >= best for own, best in chosen]
            loss = -statistics.mean(own for own, _ in chosen)
            main = float(all(likeliest)) if task.startswith("fact") else statistics.mean(likeliest)
            yield task, {"likeliest": main, "loss": loss, "probability": math.exp(-loss), "kept": float(held)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policies", nargs="+", default=list(ROWS))
    parser.add_argument("--budget", type=int, default=256, help="for what is generated, tokens (default: %(default)s)")
    parser.add_argument("--every", type=int, default=64, help="tokens between evictions (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=200, help="tokens (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1000, help="of the model's own outputs (default: %(default)s)")
    parser.add_argument("--problem", type=int, default=400, help="longest problem, tokens (default: %(default)s)")
    parser.add_argument("--gaps", type=int, nargs="+", default=[400, 1000], help="tokens (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    parser.add_argument("--data", type=Path, help="a folder of unpacked packages; default: the installed ones")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    engine = Engine(args)
    texts = Texts(engine.llm.get_tokenizer(), args.data)
    outputs = [*facts(texts, args), *copies(texts, args)]
    prompts = [prompt for prompt in problems(texts, args) if len(prompt) <= args.problem]
    own = engine.answers([(Row("full"), False, Output(prompt, [], {})) for prompt in prompts])
    num_unsaid = []
    for prompt, answer in zip(prompts, own, strict=True):
        forced = list(answer.outputs[0].token_ids[: args.length])
        new = unsaid(forced)
        num_unsaid.append(len(new))
        places = [place for place in new if place >= args.budget]
        outputs += [Output(prompt, forced, {"own": [places]})] if places else []

    rows = [(Row(policy, str(args.budget)), stays) for policy in args.policies for stays in (True, False)]
    rows = [(row, stays) for row, stays in rows if row.policy != "full" or not stays]
    requests = [(row, stays, output) for output in outputs for row, stays in rows]
    found: dict[tuple[str, bool, str], list[dict[str, float]]] = defaultdict(list)
    for (row, stays, output), answer in zip(requests, engine.answers(requests), strict=True):
        for task, figures in scores(output, answer):
            found[row.policy, stays, task].append(figures)
    tasks = list(dict.fromkeys(task for output in outputs for task, questions in output.asked.items() if questions))
    print("\n| method | prompt | kept | " + " | ".join(tasks) + " |")
    print("|---|---|---|" + "---|" * len(tasks))
    table = []
    for row, stays in rows:
        cells, kept = [], []
        for task in tasks:
            of_task = found[row.policy, stays, task]
            means = {name: round(statistics.mean(each[name] for each in of_task), 3) for name in of_task[0]}
            beside = "loss" if task in ("prose", "own") else "probability"
            cells.append(f"{means['likeliest']:.2f} ({means[beside]:.2f})")
            kept.append(means["kept"])
            table.append({"policy": row.policy, "prompt stays": stays, "task": task, **means, "n": len(of_task)})
        where = "" if row.policy == "full" else "stays" if stays else "in the budget"
        print(f"| `{row.policy}` | {where} | {statistics.mean(kept):.0f} | " + " | ".join(cells) + " |")
    names = ("block_size", "budget", "every", "prompt", "problem", "length", "gaps", "samples", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    write(args.out, {"settings": settings, "tokens of own outputs that repeat nothing": num_unsaid, "figures": table})


if __name__ == "__main__":
    main()
