"""A batch file with one request for each of several methods, answered by ``vllm run-batch`` without a server.

python examples/batch.py MODEL
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean as mean

DOCUMENT = Path(__file__).parent.parent / "LICENSE"
QUESTION = "What is the name of the license above?"
METHODS = ("none", "cake", "layer-defensivekv")


def request(method: str) -> dict:
    """A line of the batch file."""
    body = {
        "model": "batch",
        "messages": [{"role": "user", "content": f"{DOCUMENT.read_text()}\n\n{QUESTION}"}],
        "max_tokens": 32,
        "temperature": 0,
        "vllm_xargs": {"kv_eviction": method, "kv_eviction_report": True},
    }
    return {"custom_id": method, "method": "POST", "url": "/v1/chat/completions", "body": body}


def main() -> None:
    """Writes the file, runs it, and prints what was kept and answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory or name")
    parser.add_argument("--budget", default="512")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "requests.jsonl"), Path(folder, "answers.jsonl")
        asked.write_text("".join(json.dumps(request(method)) + "\n" for method in METHODS))
        command = [str(Path(sys.executable).parent / "vllm"), "run-batch", "-i", str(asked), "-o", str(answered)]
        command += ["--model", args.model, "--served-model-name", "batch", *flags]
        command += ["--kv-eviction", "cake", "--kv-eviction-budget", args.budget]
        subprocess.run(command, check=True)
        answers = [json.loads(line) for line in answered.read_text().splitlines()]
    for answer in answers:
        body = answer["response"]["body"]
        kept = body["kv_transfer_params"]["kv_eviction"]["kept_tokens"] or [body["usage"]["prompt_tokens"]]
        tokens = mean(mean(layer) if isinstance(layer, list) else layer for layer in kept)
        text = body["choices"][0]["message"]["content"]
        print(f"{answer['custom_id']}: kept {tokens:.0f} of {body['usage']['prompt_tokens']}: {text!r}")


if __name__ == "__main__":
    main()
