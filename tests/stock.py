"""Greedy tokens of stock vLLM: prompts as JSON on standard input, tokens as JSON on the last line of the output.

Run with ``VLLM_PLUGINS=""``, so that vLLM loads no plugin.
"""

import json
import sys


def main() -> None:
    model, runner = sys.argv[1:]
    if runner == "v2":
        from conftest import _interpret_triton

        _interpret_triton()
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES

    llm = LLM(
        model,
        dtype="float32",
        block_size=32,
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=16,
        kv_cache_memory_bytes=2**30,
    )
    assert not _ATTN_OVERRIDES, "the plugin was loaded"
    prompts = [{"prompt_token_ids": prompt} for prompt in json.load(sys.stdin)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
