"""One long chat request with a method and a budget of its own, and the report of what was kept of it.

python examples/chat.py --method layer-defensivekv --budget 512
"""

import argparse
from pathlib import Path
from statistics import fmean as mean

from openai import OpenAI

DOCUMENT = Path(__file__).parent.parent / "LICENSE"


def main() -> None:
    """Asks, and prints the answer with its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--method", default="cake", help="any that --kv-eviction knows")
    parser.add_argument("--budget", default="256", help="tokens per layer, a fraction of the prompt, or auto")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{DOCUMENT.read_text()}\n\nWhat is the name of the license above?"}],
        temperature=0,
        max_tokens=32,
        extra_body={
            "vllm_xargs": {
                "kv_eviction": args.method,
                "kv_eviction_budget": args.budget,
                "kv_eviction_report": True,
            }
        },
    )
    print(f"Answer: {answer.choices[0].message.content}")
    report = answer.kv_transfer_params["kv_eviction"]
    print(f"Method and budget: {report['policy']}, {report['budget']}")
    # A number for each layer or, where heads compete, a list with one for each KV head of it.
    kept = report["kept_tokens"] or [answer.usage.prompt_tokens]
    layers = [mean(layer) if isinstance(layer, list) else layer for layer in kept]
    print(f"Kept in each layer: {' '.join(f'{tokens:.0f}' for tokens in layers)}")
    print(f"Mean kept: {mean(layers):.0f} of {answer.usage.prompt_tokens} prompt tokens")


if __name__ == "__main__":
    main()
