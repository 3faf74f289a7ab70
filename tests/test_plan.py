"""``cake-vllm plan``: its numbers are vLLM's and those of the real engine."""

import argparse
import json

import pytest
import torch
from engine import Engine
from hybrids import save_hybrid
from random_models import KINDS as MODELS
from random_models import numbers, save_random_kind, save_random_latent, save_random_model
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from cake_vllm.__main__ import main
from cake_vllm.integration.worker import judging
from cake_vllm.policies import LayerInputs, create_policy, knobs, policy_names
from cake_vllm.policies.entries import LinearGate, Rotary, Rotation
from cake_vllm.tools import capacity, costs, plan

TINY = ["--dtype", "float32", "--block-size", "32", "--max-num-batched-tokens", "512"]
MEMORY = 2**27


def planned(model: str, *flags: str) -> tuple[plan.Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser()
    plan.add_command(parser.add_subparsers())
    args = parser.parse_args(["plan", model, *TINY, *flags])
    return plan.make(args), args


@pytest.fixture(scope="module")
def window_model(tmp_path_factory) -> str:
    """Every second layer has a sliding window."""
    kinds = ["sliding_attention", "full_attention"] * 3
    fields = {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 128}
    path = tmp_path_factory.mktemp("windows")
    return save_random_model(path, "gemma2", "Gemma2ForCausalLM", query_pre_attn_scalar=32, **fields)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory) -> str:
    return save_random_latent(tmp_path_factory.mktemp("latent"))


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize(
    ("layers", "policy", "dtype"),
    [
        ("full", "cake", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("windows", "cake", "float32"),
                ("windows", "none", "bfloat16"),
                ("latent", "cake", "float32"),
                *((kind, "cake", "float32") for kind in MODELS),
            )
        ),
    ],
)
def test_the_pool_is_what_vllm_reports(
    start_engine, tiny_model, window_model, latent_model, tmp_path, layers, policy, dtype, same_on_both
):
    models = {"full": tiny_model, "windows": window_model, "latent": latent_model}
    # Of two sizes: in layers with windows, and in others.
    model = models[layers] if layers in models else save_random_kind(tmp_path, layers)
    sizes = ["--kv-cache-memory-bytes", str(MEMORY), "--context", "1000", "--output-len", "24"]
    settings = {} if policy == "none" else {"kv_eviction": policy, "kv_eviction_budget": 200}
    if layers == "latent":
        sizes += ["--block-size", "16"]
        settings |= {"block_size": 16, "attention_config": {"backend": "CPU_MLA"}}
    found, _ = planned(model, *sizes, "--dtype", dtype, "--kv-eviction-budget", "200")
    engine: Engine = start_engine(
        model,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=MEMORY,
        dtype=dtype,
        max_model_len=1024,
        max_num_batched_tokens=512,
        **settings,
    )
    cache = engine.vllm_config.cache_config
    assert found.pool.blocks == cache.num_gpu_blocks == engine.num_free + 1
    assert (found.pool.tokens, found.pool.concurrency) == (
        cache.kv_cache_size_tokens,
        cache.kv_cache_max_concurrency,
    )
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    assert found.pool.groups == sum(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups)
    assert (found.pool.others > 0) == (len(groups) > found.pool.groups)


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("lfm2", True),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("lfm2", False), ("granite", False), ("falcon-h1", False), ("falcon-h1", True))
        ),
    ],
)
def test_states_are_as_vllm_sizes_them(start_engine, tmp_path, name, cached, same_on_both):
    """Blocks as large as a state, what a request holds of these, and the pool."""
    model, of = save_hybrid(name, tmp_path)
    caching = f"--{'' if cached else 'no-'}enable-prefix-caching"
    sizes = ["--kv-cache-memory-bytes", str(MEMORY), "--context", "1000", "--output-len", "24"]
    found, _ = planned(model, *sizes, "--kv-eviction-budget", "200", caching)
    engine: Engine = start_engine(
        model,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=MEMORY,
        max_model_len=1024,
        max_num_batched_tokens=512,
        enable_prefix_caching=cached,
        kv_eviction="cake",
        kv_eviction_budget=200,
    )
    cache = engine.vllm_config.cache_config
    pool, states = found.pool, found.states
    assert (pool.block_size, pool.blocks) == (cache.block_size, cache.num_gpu_blocks)
    assert (pool.tokens, pool.concurrency) == (cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency)
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    keeping = [group for group in groups if isinstance(group.kv_cache_spec, MambaSpec)]
    assert pool.groups == len(groups) - len(keeping)
    assert states.layers == sum(len(group.layer_names) for group in keeping)
    assert states.memory == sum(group.kv_cache_spec.real_page_size_bytes * len(group.layer_names) for group in keeping)
    assert states.block == MEMORY // pool.blocks // 4096 * 4096
    held = sum(
        group.kv_cache_spec.max_memory_usage_bytes(engine.vllm_config) // group.kv_cache_spec.page_size_bytes
        for group in keeping
    )
    assert states.blocks[cache.mamba_cache_mode] == pool.others == held
    assert states.blocks["align"] > states.blocks["none"] == len(keeping)
    # A key and a value of float32 for each layer and head.
    model_config = engine.vllm_config.model_config
    heads = model_config.get_total_num_kv_heads() * model_config.get_head_size()
    assert found.model.token == of.layers * 2 * 4 * heads
    # Stock vLLM's kernels for Mamba 2 fail on CPUs with the prefix cache.
    prompt, most = numbers(1, 999), 0
    for _ in range(2 if name == "lfm2" or not cached else 0):
        engine.add(prompt, 20)
        while engine.scheduler.requests:
            rows = engine.manager.coordinator.single_type_managers
            for index, group in enumerate(groups):
                if group in keeping:
                    row = next(iter(rows[index].req_to_blocks.values()), [])
                    most = max(most, sum(not block.is_null for block in row))
            engine.step()
    assert most <= states.blocks[cache.mamba_cache_mode] // len(keeping)


KINDS = [
    ("cake", "exact"),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (("cake", "whole"), ("layer-defensivekv", "exact"), ("cake", "progressive"))
    ),
]


@pytest.mark.engine
@pytest.mark.parametrize(("policy", "kind"), KINDS)
def test_as_many_run_at_once_as_planned(tiny, tiny_model, policy, kind, same_on_both):
    """On the real engine, and each holds what was planned; a column less if its owners' pages happen to fill fewer."""
    prompt_len, output_len, budget, size = 1000, 24, 200, 32
    config = {"decode": "window"} if kind == "progressive" else {}
    if kind == "progressive":
        config["prefill"] = kind
    block = 4 * 2 * 2 * 32 * size * 4
    memory = 90 * block
    found, args = planned(
        tiny_model,
        *("--kv-eviction", policy, "--kv-eviction-budget", str(budget), "--kv-eviction-config", json.dumps(config)),
        *("--context", str(prompt_len), "--output-len", str(output_len), "--kv-cache-memory-bytes", str(memory)),
    )
    expected = found.requests[kind]
    settings = {"kv_eviction": policy, "kv_eviction_budget": budget, "kv_eviction_config": config}
    engine: Engine = tiny(
        **({} if kind == "whole" else settings),
        num_gpu_blocks_override=None,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        max_model_len=prompt_len + output_len,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    assert engine.num_free + 1 == found.pool.blocks == 90
    names = [engine.add(numbers(seed, prompt_len), output_len) for seed in range(expected.at_once + 4)]
    most, held = 0, set()
    manager = engine.manager.coordinator.single_type_managers[0]
    while engine.scheduler.requests:
        engine.step()
        most = max(most, engine.num_running)
        for row in manager.req_to_blocks.values():
            if kind == "whole" and len(row) == 32:
                held.add(32)
        for name, cut in getattr(manager, "cuts", {}).items():
            held.add(len(cut.columns) + sum(not block.is_null for block in manager.req_to_blocks[name]))
    engine.run()
    assert len(names) == expected.at_once + 4
    assert max(held) in (expected.decoding, expected.decoding - 1)
    usable = found.pool.blocks - 1
    # Whoever holds a column less than the bound leaves it to others.
    assert expected.at_once <= most <= 1 + (usable - expected.entering) // max(min(held), 1)
    if kind == "whole":
        assert most == expected.at_once == 2
    else:
        assert most > 2 * found.requests["whole"].at_once


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.parametrize("kind", ["exact", "whole"])
def test_as_many_run_at_once_beside_their_states(start_engine, tmp_path, kind, same_on_both):
    """The same where a request holds two states, for the prefix cache."""
    model, _ = save_hybrid("lfm2", tmp_path)
    block = 3 * 2 * 64 * 32 * 4
    sizes = ["--kv-cache-memory-bytes", str(90 * block), "--context", "1000", "--output-len", "24"]
    found, args = planned(model, *sizes, "--kv-eviction-budget", "200", "--enable-prefix-caching")
    assert (found.pool.blocks, found.pool.block_size, found.states.blocks["align"]) == (90, 32, 2)
    expected = found.requests[kind]
    assert (found.requests["exact"].decoding, found.requests["whole"].decoding) == (8 + 1 + 2, 32 + 2)
    engine: Engine = start_engine(
        model,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        max_model_len=1024,
        max_num_batched_tokens=512,
        **({} if kind == "whole" else {"kv_eviction": "cake", "kv_eviction_budget": 200}),
    )
    for seed in range(expected.at_once + 4):
        engine.add(numbers(seed, 1000), 24)
    most = 0
    while engine.scheduler.requests:
        engine.step()
        most = max(most, engine.num_running)
    # A column fewer is held where owners fill fewer pages, and one state within a block.
    assert expected.at_once <= most <= 1 + (89 - expected.entering) // (expected.decoding - 2)


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.parametrize("policy", ["cake", "layer-defensivekv"])
def test_memory_beside_the_pool_is_what_the_worker_takes(tiny, tiny_model, policy, same_on_both, monkeypatch):
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=200, kv_eviction_config={"decode": "window"})
    worker, divide, seen = engine.connector.worker, judging.divide, []

    def dividing(policy, scores, *args):
        tensors = [tensor for score in scores for tensor in (score.indicator, score.terms, *score.extra)]
        seen.append(sum(tensor.nbytes for tensor in tensors))
        divide(policy, scores, *args)

    monkeypatch.setattr(judging, "divide", dividing)
    for of, rows in dict(worker.reading.rows).items():
        monkeypatch.setitem(worker.reading.rows, of, type(rows)(worker.layers.grid, of))
    prompt_len = 1500
    for seed in range(3):
        engine.add(numbers(seed, prompt_len), 6, extra_args={"kv_eviction": policy})
    while len(worker.moving.held) < 3:
        engine.step()
    widest = max(int(held.used.max()) for held in worker.moving.held.values())
    tables = sum(rows.num_bytes for rows in worker.reading.rows.values())
    # Scored again whenever a block is full: the last queries are always at hand.
    queries = sum(tensor.nbytes for watched in worker.judging.watched.values() for tensor in watched.queries.values())
    engine.run()

    flags = ("--kv-eviction", policy, "--kv-eviction-budget", "200", "--context", str(prompt_len), "--output-len", "6")
    flags += ("--kv-eviction-config", '{"decode": "window"}', "--max-num-seqs", "3")
    found, _ = planned(tiny_model, *flags, "--kv-cache-memory-bytes", "1G")
    model = found.model
    assert (model.evictable, model.kv_heads, model.query_heads, model.head_size) == (4, 2, 4, 32)
    pool = capacity.Pool(0, engine.pool.num_gpu_blocks, 32, 1, 0, 0, 0)
    assert costs.table_bytes(model, pool, 3, widest, by_head=policy != "cake") == tables
    taken = {cost.what: cost.memory for cost in found.costs}
    assert seen == [taken["scores"]] * 3
    assert taken["queries of the window"] == queries > 0


@pytest.mark.parametrize("name", policy_names())
def test_scores_grow_as_on_short_prompts(name):
    # A window as long as the trials, too.
    options = {"window": 1500} if "window" in knobs(name) else {}
    policy, width, heads, length = create_policy(name, options), 16, 2, 4001
    torch.manual_seed(0)
    inputs = LayerInputs(
        torch.randn(4, policy.num_queries, width),
        torch.randn(heads, length, width),
        0.25,
        values=torch.randn(heads, length, width) if policy.needs_values else None,
        output_weight=torch.randn(8, 4 * width) if policy.needs_output_weight else None,
        budget=500,
        gate=LinearGate.random(heads, width, Rotary()),
        rotation=Rotation.plain(width),
    )
    score = policy.judge(inputs)
    taken = sum(tensor.nbytes for tensor in (score.indicator, score.terms, *score.extra))
    assert costs.score_bytes(policy, heads, length) == taken


def test_notes_are_counted(tiny_model):
    flags = (
        "--kv-eviction",
        "echo",
        "--context",
        "2000",
        "--kv-eviction-budget",
        "200",
        "--kv-cache-memory-bytes",
        "1G",
    )
    taken = [
        {
            cost.what: cost.memory
            for cost in planned(tiny_model, *flags, "--kv-eviction-config", json.dumps(config))[0].costs
        }
        for config in ({}, {"observe": 8})
    ]
    assert "notes" not in taken[0]
    # A float32 for each key of four layers and two heads.
    assert taken[1]["notes"] == 4 * 2 * 2000 * 4


def test_weights_are_those_of_the_files_or_else_of_the_config(tiny_model, tmp_path):
    tensors = load_file(f"{tiny_model}/model.safetensors")
    elements = sum(tensor.numel() for tensor in tensors.values())
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    flags = ("--context", "100", "--kv-cache-memory-bytes", "1G")
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        for model in (tiny_model, str(tmp_path)):
            assert planned(model, *flags, "--dtype", dtype)[0].weights == elements * item
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert planned(str(tmp_path), *flags)[0].weights == 12345
    pool = planned(
        tiny_model, "--context", "100", "--gpu-memory", "4", "--overhead", "1GiB", "--tensor-parallel-size", "2"
    )[0].pool
    assert pool.memory == int(4 * 2**30 * 0.92) - elements * 4 // 2 - 2**30


def test_the_flags_are_vllms(tiny_model):
    """The command line that is printed configures what was planned."""
    import cake_vllm

    cake_vllm.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for budget, context, kind in (("200", "1000", "exact"), ("200", "6000", "progressive"), ("auto", "1000", "exact")):
        sizes = (
            "--kv-eviction-budget",
            budget,
            "--context",
            context,
            "--kv-cache-memory-bytes",
            "8M",
            "--max-num-seqs",
            "64",
        )
        found, args = planned(tiny_model, *sizes)
        parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", tiny_model, *found.flags])
        config = EngineArgs.from_cli_args(parsed).create_engine_config()
        assert config.additional_config["kv_eviction"] == "cake"
        assert str(config.additional_config["kv_eviction_budget"]) == budget
        assert config.additional_config["kv_eviction_config"].get("prefill", "exact") == kind
        assert config.model_config.max_model_len == int(context) + 256
        assert config.scheduler_config.max_num_seqs == 64
        assert config.cache_config.kv_cache_memory_bytes == 8 * 2**20
        assert found.requests[kind].at_once > 0
        assert plan.as_text(found, args).endswith("--kv-cache-memory-bytes 8388608 --dtype float32")
        if kind == "progressive":
            assert found.requests["whole"].at_once == found.requests["exact"].at_once == 0
            assert "prefill has to be progressive" in found.notes[0]
    short, _ = planned(tiny_model, "--context", "230", "--kv-eviction-budget", "200", "--kv-cache-memory-bytes", "8M")
    assert not any("eviction" in part for part in short.flags)
    assert short.requests.keys() == {"whole"}


def test_costs_beyond_what_vllm_leaves_are_said(tiny_model):
    sizes = ("--context", "4000", "--kv-eviction-budget", "auto", "--gpu-memory", "1", "--overhead", "1MiB")
    found, _ = planned(tiny_model, *sizes, "--gpu-memory-utilization", "0.99")
    assert any("more than --gpu-memory-utilization 0.99 leaves (10.24 MiB): give 0." in note for note in found.notes)
    assert not any("leaves" in note for note in planned(tiny_model, *sizes, "--max-num-seqs", "8")[0].notes)


BAD = [
    (["--gpu-memory", "much"], 2, "'much' is not a size: give a number of GiB, or one such as 512MiB"),
    (["--gpu-memory", "1", "--kv-cache-memory-bytes", "1G"], 2, "not allowed with argument"),
    ([], 2, "one of the arguments --gpu-memory --kv-cache-memory-bytes is required"),
    (["--gpu-memory", "1"], 1, "nothing is left for a KV pool"),
    (
        ["--kv-cache-memory-bytes", "1G", "--kv-eviction-budget", "0"],
        2,
        "argument --kv-eviction-budget: --kv-eviction-budget '0' is not a budget",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--kv-eviction-budget", "20"],
        1,
        "--kv-eviction-budget 20 leaves nothing beside the window",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--kv-eviction-config", '{"gama": 1}'],
        1,
        "--kv-eviction-config: unknown key 'gama'",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--context", "8192"],
        1,
        "error: a prompt of 8,192 tokens and 256 generated ones are more than the 8,192 of",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--max-model-len", "16k"],
        1,
        "error: --max-model-len 16,000 is more than the 8,192 of",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--max-model-len", "1100"],
        1,
        "generated ones are more than --max-model-len 1100",
    ),
    (
        ["--kv-cache-memory-bytes", "1G", "--context", 5000 * "9"],
        2,
        "is not a whole number above 0 and up to 2147483647",
    ),
    (["--kv-cache-memory-bytes", 400 * "9"], 2, "is not a whole number above 0 and up to 1152921504606846976"),
    (["--kv-cache-memory-bytes", "8MiB"], 2, "'8MiB' is not a whole number above 0"),
    (["--kv-cache-memory-bytes", "1.5M"], 2, "'1.5M' is not a whole number above 0"),
    (["--weights", 400 * "9", "--gpu-memory", "1"], 2, "is not a size: give a number of GiB"),
    # Names of before, which vLLM has for nothing.
    (["--kv-cache-memory", "1"], 2, "one of the arguments --gpu-memory --kv-cache-memory-bytes is required"),
    (["--gpu-memory", "8", "--gpu-memory-utilization", "nan"], 2, "'nan' is not a number above 0 and up to 1"),
    # What pydantic says of vLLM's arguments takes pages.
    (["--kv-cache-memory-bytes", "1G", "--dtype", "float7"], 1, "error: --dtype: Input should be 'auto', "),
    (["--kv-cache-memory-bytes", "1G", "--kv-cache-dtype", "fp9"], 1, "error: --cache-dtype: Input should be 'auto', "),
    (
        ["--kv-cache-memory-bytes", "1G", "--tensor-parallel-size", "3"],
        1,
        "attention heads (4) must be divisible by tensor parallel size (3)",
    ),
    (["--kv-cache-memory-bytes", "1G", "--block-size", "0"], 2, "'0' is not a whole number above 0"),
]


@pytest.mark.parametrize(("flags", "status", "message"), BAD)
def test_errors_are_a_sentence(tiny_model, capsys, flags, status, message):
    try:
        got = main(["plan", tiny_model, "--context", "1000", *flags])
    except SystemExit as ended:
        got = ended.code
    assert got == status
    told = capsys.readouterr().err
    assert message in told
    assert status == 2 or len(told.splitlines()) == 1


def test_each_gpu_keeps_its_part_of_the_states(tmp_path):
    model, _ = save_hybrid("granite", tmp_path)
    sizes = ["--kv-cache-memory-bytes", "8M", "--context", "1000"]
    one, two = (planned(model, *sizes, "--tensor-parallel-size", gpus)[0] for gpus in "12")
    assert two.model.token * 2 == one.model.token
    assert one.states.memory * 0.5 < two.states.memory < one.states.memory
    assert two.states.blocks == one.states.blocks
    assert two.pool.blocks > 1.9 * one.pool.blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM builds it on GPUs")
def test_models_that_cannot_be_built_here_are_refused(tmp_path, capsys):
    """One whose linear attention asks for Triton's allocator."""
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 128}
    fields |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = AutoConfig.for_model("olmo_hybrid", architectures=["OlmoHybridForCausalLM"], **fields)
    config.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["plan", str(tmp_path), "--context", "1000", "--kv-cache-memory-bytes", "1G"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "what its layers keep, and cannot build these here (AttributeError: module 'triton' has" in told
    assert told.endswith("run it where the model is served")


def test_pipeline_stages_share_the_layers(tiny_model, tmp_path, capsys):
    sizes = ["--kv-cache-memory-bytes", "8M", "--context", "1000"]
    one, two = (planned(tiny_model, *sizes, "--pipeline-parallel-size", stages)[0] for stages in "12")
    assert (two.model.layers, two.model.token) == (2, one.model.token // 2)
    assert two.pool.blocks == 2 * one.pool.blocks
    assert two.flags[-2:] == ["--pipeline-parallel-size", "2"]
    # Five layers: the stage with three of them bounds the pool.
    odd = save_random_model(tmp_path / "odd", "llama", "LlamaForCausalLM", num_hidden_layers=5)
    assert planned(odd, *sizes, "--pipeline-parallel-size", "2")[0].pool.blocks == one.pool.blocks * 4 // 3
    hybrid, _ = save_hybrid("granite", tmp_path / "hybrid")
    capsys.readouterr()
    assert main(["plan", hybrid, *sizes, "--pipeline-parallel-size", "2"]) == 1
    assert "no plan for several GPUs with" in capsys.readouterr().err
    two_sizes = save_random_kind(tmp_path / "two", "two sizes")
    capsys.readouterr()
    assert main(["plan", two_sizes, *sizes, "--tensor-parallel-size", "2"]) == 1
    assert "whose layers differ in heads: plan it for one GPU" in capsys.readouterr().err


def test_options_are_read_as_vllm_reads_them(tiny_model):
    """Every option of ``plan`` that ``vllm serve`` has means the same there, in its short form, too."""
    import cake_vllm

    cake_vllm.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    shared = ["--kv-eviction", "snapkv", "--kv-eviction-budget", "300", "--kv-eviction-config", '{"window": 16}']
    shared += ["-tp", "2", "-pp", "2", "--kv-cache-memory-bytes", "64M", "--max-model-len", "4K", "--max-num-seqs", "7"]
    shared += ["--block-size", "32", "--dtype", "float32", "--kv-cache-dtype", "auto", "--no-enable-prefix-caching"]
    shared += ["--max-num-batched-tokens", "8.2k", "--gpu-memory-utilization", "0.5"]
    parser = argparse.ArgumentParser()
    plan.add_command(parser.add_subparsers())
    ours = vars(parser.parse_args(["plan", tiny_model, "--context", "1000", *shared]))
    vllms = vars(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(shared))
    names = [name for name in ours if name in vllms and name != "model"]
    assert len(names) == len([part for part in shared if part.startswith("-")])
    assert {name: ours[name] for name in names} == {name: vllms[name] for name in names}
    found = plan.make(argparse.Namespace(**ours))
    assert found.flags[found.flags.index("--max-model-len") + 1] == "4096"
    assert (found.pool.memory, found.model.layers) == (2**26, 2)


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"weight_map": {"a": "b"}}'])
def test_files_that_hold_no_weights(tiny_model, tmp_path, capsys, text):
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--context", "1000", "--kv-cache-memory-bytes", "1G"]
    (tmp_path / "model.safetensors").write_text(100 * "x")
    assert main(line) == 1
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert main(line) == 1
    assert "is no index of weights: give --weights" in capsys.readouterr().err


def test_quantized_weights_without_files_have_to_be_given(tmp_path, capsys):
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    save = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    AutoConfig.for_model(
        "llama", architectures=["LlamaForCausalLM"], quantization_config=scheme, **save
    ).save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--context", "1000", "--gpu-memory", "8"]
    assert main(line) == 1
    assert "not how large: give --weights" in capsys.readouterr().err
    assert main([*line, "--weights", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 2**30
