"""Runs a job on an engine in processes of its own: ``python parallel.py``, JSON in, a line of JSON out.

The job is ``{"model", "requests": [{"prompt", "max_tokens", "wishes"}], "settings"}``, the answer
``[{"tokens", "gaps", "cached", "kept"}]``.
"""

import json
import os
import sys

from conftest import _interpret_triton
from stock import DEFAULTS, gaps

# Here, because workers import this module before anything else.
if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    _interpret_triton()


def main() -> None:
    from vllm import SamplingParams

    from cake_vllm import LLM

    job = json.load(sys.stdin)
    small = {
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 2**28,
    }
    llm = LLM(job["model"], **(DEFAULTS | small | job["settings"]))
    answers = []
    for request in job["requests"]:
        params = SamplingParams(
            temperature=0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            extra_args={"kv_eviction_report": 1, **request["wishes"]},
        )
        (output,) = llm.generate({"prompt_token_ids": request["prompt"]}, params, use_tqdm=False)
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "gaps": gaps(output.outputs[0].logprobs),
                "cached": output.num_cached_tokens,
                "kept": (output.kv_transfer_params or {}).get("kv_eviction", {}).get("kept_tokens"),
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
