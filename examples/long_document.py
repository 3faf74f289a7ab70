"""Two questions about one long document, as two turns of a conversation.

After the first answer the document's blocks are back in the pool, but the prefix cache still knows them: the second
turn reads them from there, as long as nobody needed the memory. The server tells how many if it was started with
``--enable-prompt-tokens-details``.

    python examples/long_document.py
"""

import argparse
from pathlib import Path

from openai import OpenAI

DOCUMENT = Path(__file__).parent.parent / "LICENSE"
QUESTIONS = ("What is the name of the license above?", "Who may grant it, and what does it call them?")


def main() -> None:
    """Asks both questions, and prints what of each prompt was in the prefix cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": DOCUMENT.read_text()}]
    for turn, question in enumerate(QUESTIONS, start=1):
        # The question goes with the document, so that the window sees it.
        messages += [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=32)
        text, usage = answer.choices[0].message.content, answer.usage
        messages += [{"role": "assistant", "content": text}]
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        print(f"Turn {turn}: {question}\n  {text}")
        print(f"  Prompt tokens: {usage.prompt_tokens}, from the prefix cache: {cached}")


if __name__ == "__main__":
    main()
