"""Starts ``vllm serve MODEL --kv-eviction cake``, sends one long chat request, and prints what eviction did."""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

DOCUMENT = Path(__file__).parent.parent / "LICENSE"
QUESTION = "What is the name of the license above?"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(model: str, *flags: str, log_file: Path | None = None) -> Iterator[str]:
    """Runs the server until the block ends; yields its URL.

    Args:
        model: a model directory or name.
        flags: of ``vllm serve``.
        log_file: where to write the server's log, if it is to stay.

    Raises:
        RuntimeError: with the end of the server's log, if it stops or is not ready within ten minutes.
    """
    port = free_port()
    vllm = Path(sys.executable).parent / "vllm"
    command = [str(vllm), "serve", model, "--served-model-name", "demo", "--port", str(port), *flags]
    print("$", " ".join(["vllm", *command[1:]]), flush=True)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with open(log_file, "w+") if log_file else tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 600
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError("the server did not start:\n" + "".join(log.readlines()[-30:]))
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait()


def is_ready(url: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def samples(url: str, pattern: str) -> list[tuple[str, str, float]]:
    """Names, labels and values of the series on ``/metrics`` whose whole name matches ``pattern``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^({pattern})(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    return [(name, labels, float(value)) for name, labels, value in found]


def metrics(url: str) -> dict[str, float]:
    """The plugin's series on ``/metrics``; a layer's gauge under its layer number."""
    found = {}
    for name, labels, value in samples(url, r"vllm:kv_eviction_(?!head_)\w+"):
        layer = re.search(r'layer="(\d+)"', labels)
        found[layer.group(1) if layer else name.removeprefix("vllm:kv_eviction_").removesuffix("_total")] = value
    return found


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model directory or name")
    parser.add_argument("--budget", default="512", help="tokens per layer, or a fraction of the prompt (default: 512)")
    args = parser.parse_args()
    flags = ["--kv-eviction", "cake", "--kv-eviction-budget", args.budget]
    flags += ["--dtype", "float32", "--block-size", "32", "--max-model-len", "8192", "--enforce-eager"]
    with server(args.model, *flags) as url:
        message = f"{DOCUMENT.read_text()}\n\n{QUESTION}"
        print(f"\nPOST /v1/chat/completions: {DOCUMENT.name}, and then: {QUESTION}", flush=True)
        chat = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions
        answer = chat.create(
            model="demo", messages=[{"role": "user", "content": message}], temperature=0, max_tokens=48
        )
        print(f"\nAnswer: {answer.choices[0].message.content}\n")
        seen = metrics(url)
    prompt_len = answer.usage.prompt_tokens
    kept = [round(seen[key]) for key in sorted((key for key in seen if key.isdigit()), key=int)]
    print(f"Prompt tokens:         {prompt_len}")
    print(f"Kept in each layer:    {' '.join(map(str, kept))}")
    print(
        f"Mean kept:             {sum(kept) / len(kept):.0f} ({sum(kept) / len(kept) / prompt_len:.0%} of the prompt)"
    )
    print(f"Blocks freed:          {seen['freed_blocks']:.0f} (of {prompt_len // 32}, of 32 tokens each)")


if __name__ == "__main__":
    main()
