"""Greedy tokens of stock vLLM, from a process that never heard of the plugin.

``python stock.py RUNNER`` reads ``{"model": ..., "prompts": ..., "max_tokens": ..., "settings": {...}}`` from standard
input and prints ``[tokens, gaps]`` of each prompt on its last line; a gap is the distance of the two best log
probabilities. Run with ``VLLM_PLUGINS=""``, so that vLLM loads no plugin.
"""

import json
import os
import subprocess
import sys
from typing import Any

Run = tuple[list[int], list[float]]

#: What the engines of all tests are started with, if a test does not say otherwise.
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "enforce_eager": True,
    "max_model_len": 8192,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 2**30,
}


def stock(is_v2: bool, model: str, prompts: list[list[int]], max_tokens: int, **settings: Any) -> list[Run]:
    """Runs this file as a program."""
    job = {"model": model, "prompts": prompts, "max_tokens": max_tokens, "settings": settings}
    run = subprocess.run(
        [sys.executable, __file__, "v2" if is_v2 else "v1"],
        input=json.dumps(job),
        env={**os.environ, "VLLM_PLUGINS": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def same_tokens(tokens: list[int], reference: Run, bound: float = 1e-3) -> bool:
    """Whether two runs gave the same tokens up to a tie: at the first difference the gap is below ``bound``."""
    expected, gaps = reference
    first = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
    return first is None or gaps[first] < bound


def gaps(logprobs: Any) -> list[float]:
    """Distance of the two best log probabilities at each step."""
    best = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in logprobs]
    return [first - second for first, second, *_ in best]


def main() -> None:
    if sys.argv[1] == "v2":
        from conftest import _interpret_triton

        _interpret_triton()
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES

    job = json.load(sys.stdin)
    llm = LLM(job["model"], **(DEFAULTS | job["settings"]))
    assert not _ATTN_OVERRIDES, "the plugin was loaded"
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=2, detokenize=False)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    print(json.dumps([[list(output.token_ids), gaps(output.logprobs)] for output in outputs]))


if __name__ == "__main__":
    main()
