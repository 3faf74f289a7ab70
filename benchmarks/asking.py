"""Makes prompts of samples, runs a server for the rows of a table, and asks it."""

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))

from cells import MIN_TOKENS, Answers, Question, Row, key_of, num_cuts
from demo import server
from neighbours import FILLER, SPARE_BLOCKS, Neighbours
from openai import OpenAI
from tables import ENDED, LENGTH
from tasks import Sample, Texts
from tqdm import tqdm

#: Where a request names the tokens that it is to go on with, see ``forcing.py``.
KEY = "forced_tokens"


class Prompts:
    """Makes prompts of samples.

    Args:
        texts: for the tokenizer, and for what fills chunks up.
        chat: whether to use the chat's template.
        chunk: tokens; contexts end where a chunk does. 0 for anywhere.
    """

    def __init__(self, texts: Texts, chat: bool, chunk: int = 0):
        self.texts, self.chunk = texts, chunk
        self._plain = texts.tokenizer("")["input_ids"], []
        self._chat = self._template("") if chat else self._plain

    def up_to_question(self, sample: Sample) -> int:
        """Tokens of a prompt before its question."""
        return len(self._around(sample)[0]) + len(sample.context)

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of the prompt."""
        before, behind = self._around(sample)
        missing = -self.up_to_question(sample) % self.chunk if self.chunk else 0
        padding = self.texts.prose(missing, random.Random(missing)) if missing else []
        return [*before, *padding, *sample.context, *sample.question, *behind, *sample.prefix]

    def parts(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt up to the question, and what a request that is cut is made to go on with: prose, the question."""
        before, behind = self._around(sample)
        prose = self.texts.prose(FILLER, random.Random(len(sample.context)))
        return [*before, *sample.context], [*prose, *sample.question, *behind, *sample.prefix]

    def _around(self, sample: Sample) -> tuple[list[int], list[int]]:
        if sample.system:
            return self._template(sample.system)
        return self._chat if sample.in_chat else self._plain

    def _template(self, system: str) -> tuple[list[int], list[int]]:
        mark = "CONTEXT-AND-QUESTION"
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": mark}]
        template = self.texts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, behind = template.partition(mark)
        return self.texts.encode(before), self.texts.encode(behind)


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        client: of it.
        model: its name there.
        mode: of prefill.
        prompts: makes them.
        limit: tokens of an answer.
        neighbours: of the requests that are to be cut.
    """

    client: OpenAI
    model: str
    mode: str
    prompts: Prompts
    limit: int
    neighbours: Neighbours | None = None

    def ask(self, row: Row, question: Question) -> dict[str, Any]:
        """One answer: its figures, the tokens of the prompt that were kept, and the beginning of its text."""
        sample = question.sample
        prompt, told = self.prompts.parts(sample) if self.neighbours else (self.prompts.ids(sample), [])
        forced = [*told, *sample.forced]
        extra: dict[str, Any] = {"vllm_xargs": row.xargs(self.mode), "return_token_ids": True}
        if row.observe:
            # What the prefix cache has is not looked at.
            extra["cache_salt"] = f"{row} {question.task} {question.length} {question.index} {question.part}"
        if forced:
            extra |= {
                "vllm_xargs": extra["vllm_xargs"] | {KEY: forced},
                "ignore_eos": bool(sample.forced),
                "logprobs": 1,
            }
        max_tokens = len(forced) + (0 if sample.forced else min(sample.max_tokens, self.limit))
        given: dict[str, Any] = {"model": self.model, "temperature": 0, "prompt": prompt, "max_tokens": max_tokens}
        answer = self._answer(row, len(prompt), {**given, "extra_body": extra})
        choice = answer.choices[0]
        if choice.token_ids[: len(forced)] != forced:
            raise RuntimeError("the server forces no tokens: start it with --logits-processors forcing:Forced")
        text = self.prompts.texts.tokenizer.decode(choice.token_ids[len(told) :]) if told else choice.text
        if sample.forced:
            best = [max(of_step.values()) for of_step in choice.logprobs.top_logprobs[len(told) :]]
            scores = sample.forced_scores(choice.logprobs.token_logprobs[len(told) :], best)
        else:
            length = len(choice.token_ids) - len(told)
            scores = {**sample.scores(text), LENGTH: length, ENDED: float(choice.finish_reason == "stop")}
        report = (getattr(answer, "kv_transfer_params", None) or {}).get("kv_eviction", {})
        kept = report.get("kept_tokens")
        record = {
            "scores": {name: round(value, 4) for name, value in scores.items()},
            "prompt": len(prompt),
            "kept": round(float(np.concatenate([np.ravel(layer) for layer in kept]).mean()), 1)
            if kept
            else len(prompt),
            "text": text[:200],
        }
        if self.neighbours and row.budget:
            record["cut_to"] = report["cut_to"]
        return record if sample.depth is None else record | {"depth": sample.depth}

    def _answer(self, row: Row, length: int, request: dict[str, Any]) -> Any:
        if not (self.neighbours and row.budget):
            return self.client.completions.create(**request)
        before = self.neighbours.generated()
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(self.client.completions.create, **request)
            self.neighbours.cut(length, float(row.budget), num_cuts(self.mode), before)
            return answer.result()


def flags(mode: str, rows: Sequence[Row], chunk: int, longest: int, args: argparse.Namespace) -> list[str]:
    """Of a server for all rows."""
    found = ["--max-model-len", str(args.max_model_len or longest + 16)]
    for name in ("dtype", "block_size", "gpu_memory_utilization"):
        if (value := getattr(args, name)) is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    if num_cuts(mode):
        # The pool holds one request in full, and a neighbour's prompt is one chunk.
        num_blocks = pool_blocks(longest, args.block_size)
        found[1] = str((num_blocks - 1) * args.block_size)
        found += ["--num-gpu-blocks-override", str(num_blocks), "--max-num-batched-tokens", found[1]]
    if chunk:
        # One request at a time takes whole chunks; --long-prefill-token-threshold would not bind one that is alone.
        found += ["--max-num-seqs", "1", "--max-num-batched-tokens", str(chunk), "--no-enable-prefix-caching"]
    evicting = [row for row in rows if row.policy != "full"]
    if evicting:
        densest = min((row for row in evicting if row.observe), key=lambda row: row.observe, default=None)
        config: dict[str, Any] = {"observe": densest.observe} if densest else {}
        first = densest or evicting[0]
        config |= {"min_tokens": MIN_TOKENS} if num_cuts(mode) else {"prefill": mode, "decode": args.decode}
        found += ["--kv-eviction", first.name, "--kv-eviction-budget", "auto" if num_cuts(mode) else first.budget]
        found += ["--kv-eviction-config", json.dumps(config)]
    return [*found, *shlex.split(args.server_args)]


def pool_blocks(longest: int, block_size: int) -> int:
    """Blocks of a pool in which no second prompt fits beside the longest request."""
    return -(-longest // block_size) + 2 * SPARE_BLOCKS


@contextmanager
def served(url: str | None, model: str, flags: list[str]) -> Iterator[str]:
    """The address of a server: the one that runs, or one of our own until the block ends."""
    if url:
        yield url
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")))
        )
        with server(model, *flags, "--logits-processors", "forcing:Forced") as address:
            yield address


def run(
    mode: str,
    rows: Sequence[Row],
    questions: Sequence[Question],
    prompts: Prompts,
    answers: Answers,
    args: argparse.Namespace,
) -> None:
    """Asks what is not answered yet, until all is or the time is up."""
    done = {key_of(record) for record in answers.records}
    work = [(question, row) for question in questions for row in rows if question.key(mode, row) not in done]
    if not work or time.monotonic() > args.deadline:
        return
    if prompts.chunk == 0 and mode == "progressive":
        prompts.chunk = args.chunk or max(prompts.up_to_question(question.sample) for question in questions)
    samples = [question.sample for question in questions]
    longest = max(len(prompts.ids(of)) + (len(of.forced) or min(of.max_tokens, args.max_tokens)) for of in samples)
    longest += FILLER if num_cuts(mode) else 0
    of_server = flags(mode, rows, prompts.chunk, longest, args)
    with (
        served(args.url, args.model, of_server) as url,
        ThreadPoolExecutor(concurrency := 1 if num_cuts(mode) else args.concurrency) as pool,
        tqdm(desc=mode, total=len(work)) as bar,
    ):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
        name = client.models.list().data[0].id
        neighbours = None
        if num_cuts(mode):
            num_blocks = pool_blocks(longest, args.block_size)
            neighbours = Neighbours(url, client, name, prompts.texts, num_blocks, args.block_size)
        answering = Server(client, name, mode, prompts, args.max_tokens, neighbours)
        running: dict[Future, tuple] = {}
        todo = iter(work)
        while True:
            while len(running) < concurrency and time.monotonic() < args.deadline:
                question, row = next(todo, (None, None))
                if question is None:
                    break
                asked = pool.submit(answering.ask, row, question)
                running[asked] = question.key(mode, row)
            if not running:
                break
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                key = dict(zip(("mode", "row", "task", "length", "index", "part"), running.pop(finished), strict=True))
                answers.add(key | finished.result())
                bar.update()
