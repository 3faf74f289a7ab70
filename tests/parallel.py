"""Runs a job on an engine with several workers: ``python parallel.py``, JSON in, a line of JSON out.

The job is ``{"model", "prompts", "max_tokens", "settings"}``, the answer ``[{"tokens", "gaps", "kept"}, …]``.
"""

import json
import sys


def main() -> None:
    from vllm import SamplingParams

    from cake_vllm import LLM

    job = json.load(sys.stdin)
    defaults = {"dtype": "float32", "block_size": 32, "enforce_eager": True, "max_model_len": 2048}
    llm = LLM(job["model"], skip_tokenizer_init=True, kv_cache_memory_bytes=2**27, **defaults, **job["settings"])
    answers = []
    for prompt in job["prompts"]:
        params = SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            extra_args={"kv_eviction_report": 1},
        )
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        steps = [
            sorted((entry.logprob for entry in step.values()), reverse=True) for step in output.outputs[0].logprobs
        ]
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "gaps": [best - second for best, second, *_ in steps],
                "kept": (output.kv_transfer_params or {}).get("kv_eviction", {}).get("kept_tokens"),
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
