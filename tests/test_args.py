"""Flags, keyword arguments and refusals on the real engine arguments; no weights are loaded."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT
from random_models import save_random_gates, save_random_model
from transformers import AutoConfig

import cake_vllm
from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration import engine
from cake_vllm.integration.front import gate, plugin, refusals

cake_vllm.register()

from vllm import envs  # noqa: E402
from vllm.config import KVTransferConfig, ModelConfig  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.attention.backend import AttentionImpl  # noqa: E402

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
PER_HEAD = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {},
    "kv_cache_scheme": {"type": "float", "num_bits": 8, "strategy": "attn_head", "symmetric": True},
}
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def save_config(path, model_type: str, architecture: str, **fields) -> str:
    """A model directory without weights."""
    config = AutoConfig.for_model(model_type, architectures=[architecture], **fields)
    config.save_pretrained(path)
    return str(path)


@pytest.fixture
def llama(tmp_path) -> str:
    return save_config(tmp_path, "llama", "LlamaForCausalLM", hidden_size=64, num_hidden_layers=2, vocab_size=128)


def configure(model: str, **kwargs):
    return EngineArgs(model, skip_tokenizer_init=True, dtype="float32", **kwargs).create_engine_config()


def offloading(**extra) -> KVTransferConfig:
    return KVTransferConfig("OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)


def test_the_method_is_chosen_by_what_there_is(tmp_path, monkeypatch):
    """`--kv-eviction auto`: with gates of the model, and without; said once, and every process reads the choice."""
    model = save_random_model(tmp_path / "model", "llama", "LlamaForCausalLM")
    monkeypatch.setenv("CAKE_VLLM_GATES", str(tmp_path / "gates"))
    for name, said in (("echo", f"make them with: cake-vllm calibrate {model}"), ("gate", str(tmp_path / "gates"))):
        with mock.patch.object(plugin.logger, "info") as log:
            vllm_config = configure(model, kv_eviction="auto", kv_eviction_budget="auto")
        assert vllm_config.additional_config["kv_eviction"] == name
        (line,) = [form % tuple(args) for (form, *args), _ in log.call_args_list if "KV eviction by" in form]
        assert f"by {name}: " in line
        assert said in line
        save_random_gates(model)


def test_registering_twice_wraps_once():
    before = EngineArgs.create_engine_config
    gate.enter()
    assert EngineArgs.create_engine_config is before


@pytest.mark.parametrize("asked", [None, *engine.BACKENDS])
def test_the_attention_backend_is_left_as_it_was(llama, asked):
    """What vLLM then chooses by itself on a GPU: ``test_flashinfer.py``."""
    attention = {"backend": asked} if asked else {}
    backend = configure(llama, kv_eviction="cake", attention_config=attention).attention_config.backend
    assert (backend and backend.name) == asked


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_command_line(cls, llama):
    parser = cls.add_cli_args(FlexibleArgumentParser())
    line = ["--model", llama, "--kv-eviction", "cake", "--kv-eviction-budget", "0.5", "--kv-eviction-config.gamma", "7"]
    args = cls.from_cli_args(parser.parse_args(line))
    assert args.additional_config == {
        "kv_eviction": "cake",
        "kv_eviction_budget": 0.5,
        "kv_eviction_config": {"gamma": 7},
    }
    assert cls.from_cli_args(parser.parse_args(["--model", llama])).additional_config == {}


def test_api_servers_read_what_the_first_process_read(llama):
    """Several of them are spawned with the parsed line, and read vLLM's own arguments in it before plugins load."""
    line = ["--model", llama, "--kv-eviction", "cake", "--kv-eviction-budget", "64"]
    args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(line)
    for _ in range(2):
        settings = AsyncEngineArgs.from_cli_args(args).additional_config
        assert settings == {"kv_eviction": "cake", "kv_eviction_budget": 64} == args.additional_config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--kv-eviction", "cade"], "argument --kv-eviction: invalid choice: 'cade' (choose from"),
        (["--kv-eviction-budget", "0"], "argument --kv-eviction-budget: --kv-eviction-budget '0' is not a budget"),
        (["--kv-eviction-config", "[]"], "--kv-eviction-config must be a JSON object"),
    ],
)
def test_command_line_refusals(line, message, capsys):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(line)
    assert message in capsys.readouterr().err


def test_three_ways_are_one(llama):
    by_name = configure(llama, kv_eviction="cake", kv_eviction_budget=512)
    by_dict = configure(llama, additional_config={"kv_eviction": "cake", "kv_eviction_budget": 512})
    assert by_name.additional_config == by_dict.additional_config
    assert by_name.additional_config["kv_eviction_budget"] == 512


def test_contradicting_ways_are_refused(llama):
    with pytest.raises(ValueError, match="--kv-eviction-budget contradicts the key 'kv_eviction_budget'"):
        configure(llama, kv_eviction="cake", kv_eviction_budget=512, additional_config={"kv_eviction_budget": 256})


@pytest.mark.parametrize("key", ["kv-eviction", "kvEviction", "kv_eviction_buget", "KV_EVICTION", "kv_eviction_report"])
@pytest.mark.parametrize("beside", [{}, {"kv_eviction": "cake"}])
def test_keys_that_nobody_reads_are_refused(llama, key, beside):
    message = f"{key} is unknown: --additional-config may give kv_eviction, kv_eviction_budget, kv_eviction_config"
    with pytest.raises(ValueError, match=message):
        configure(llama, additional_config={**beside, key: "cake", "other": 1})
    line = ["--model", llama, "--additional-config", json.dumps({**beside, key: "cake"})]
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(line)
    with pytest.raises(ValueError, match=message):
        EngineArgs.from_cli_args(args)


def test_keys_of_others_are_left_alone(llama):
    others = {"kv_cache": 1, "eviction": {"kv_eviction": 1}, "kv": None}
    assert configure(llama, additional_config=others).additional_config == others


def test_none_is_as_good_as_nothing(llama):
    assert configure(llama, kv_eviction="none").additional_config == {}
    with pytest.raises(ValueError, match="--kv-eviction contradicts the key 'kv_eviction'"):
        configure(llama, kv_eviction="none", additional_config={"kv_eviction": "cake"})


def test_what_is_switched_on(llama):
    config = configure(llama, kv_eviction="cake", additional_config={"other": 1})
    assert config.kv_transfer_config.kv_connector == engine.CONNECTOR
    assert config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager
    assert config.additional_config["other"] == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kv_eviction": "cade"}, "--kv-eviction 'cade' is unknown"),
        ({"kv_eviction_budget": 128}, "no effect without --kv-eviction"),
        ({"kv_eviction": "cake", "kv_eviction_budget": 0}, "--kv-eviction-budget 0 is not a budget"),
        ({"kv_eviction": "cake", "disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager yet"),
        (
            {"kv_eviction": "cake", "attention_config": {"backend": "FLEX_ATTENTION"}},
            "the attention backend FLEX_ATTENTION yet: choose CPU_ATTN, FLASH_ATTN, FLASHINFER, TRITON_ATTN",
        ),
    ],
)
def test_refused(llama, kwargs, message):
    with pytest.raises(ValueError, match=message):
        configure(llama, **kwargs)


def test_drafts_are_served_beside_all_ways_to_evict(llama):
    """Verified in time or a step late, as on GPUs."""
    config = configure(llama, kv_eviction="cake", speculative_config=NGRAM)
    ways = [KVEvictionConfig("cake", 256, {"decode": way}) for way in ("off", "window", "cake")]
    for config.scheduler_config.async_scheduling in (False, True):
        for way in (*ways, KVEvictionConfig("cake", "auto", {})):
            refusals.refuse_engine(way, config)


#: What the documentation calls those of the following two tests.
DRAFTERS = "models that draft in parallel or with another KV cache than the target's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "heads"}, "KV heads of another number or size than the target's"),
        ({"disable_padded_drafter_batch": True}, "disable_padded_drafter_batch"),
        ({"parallel_drafting": True}, "parallel_drafting"),
        ({"attention_backend": "TRITON_ATTN"}, "an attention_backend that is not the target's"),
        ({"kv_cache_dtype": "fp8"}, "a kv_cache_dtype that is not the target's"),
        ({"draft_tensor_parallel_size": 1}, "a draft_tensor_parallel_size that is not the target's"),
    ],
)
def test_draft_models_that_are_refused(llama, tmp_path, change, message):
    fields = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    save_config(tmp_path / "heads", "llama", "LlamaForCausalLM", **fields, num_key_value_heads=4)
    speculation = {"method": "draft_model", "model": llama, "num_speculative_tokens": 2}
    kwargs = {"kv_eviction": "cake", "tensor_parallel_size": 1 + ("draft_tensor_parallel_size" in change)}
    assert configure(llama, **kwargs, speculative_config=speculation).num_lookahead_tokens == 2
    both = configure(llama, **kwargs, attention_config={"backend": "TRITON_ATTN"}, speculative_config=speculation)
    assert both.speculative_config.attention_backend.name == "TRITON_ATTN"
    if "model" in change:
        change = {"model": str(tmp_path / change["model"])}
    with pytest.raises(ValueError, match=f"with a --speculative-config with {message} yet: use another, or drop"):
        configure(llama, **kwargs, speculative_config=speculation | change)


def test_draft_models_beside_sliding_windows_are_refused(llama, tmp_path):
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    gemma = save_config(tmp_path / "gemma", "gemma2", "Gemma2ForCausalLM", hidden_size=64, vocab_size=128, **layers)
    for target, draft in ((gemma, llama), (llama, gemma)):
        speculation = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
        with pytest.raises(
            ValueError, match="with layers with a sliding window or chunks, the target's or its own, yet: use"
        ):
            configure(target, kv_eviction="cake", speculative_config=speculation)


STATES = "drafts beside layers that keep states"


@pytest.mark.parametrize("speculation", [NGRAM, {"method": "draft_model", "num_speculative_tokens": 2}])
def test_drafts_beside_states_are_refused(llama, tmp_path, speculation):
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    model = save_config(tmp_path / "lfm2", "lfm2", "Lfm2ForCausalLM", hidden_size=64, vocab_size=128, **layers)
    if speculation is not NGRAM:
        speculation = speculation | {"model": llama}
    with pytest.raises(ValueError, match="for Lfm2ForCausalLM, whose layers keep states, yet: drop one of the two"):
        configure(model, kv_eviction="cake", speculative_config=speculation)
    assert configure(model, kv_eviction="cake").model_config.is_hybrid


@pytest.mark.parametrize(
    ("model_type", "modules", "message"),
    [("mtp", 2, "several modules that take turns"), ("gemma4_mtp", 1, "layers that read the target's KV cache")],
)
def test_heads_that_draft_in_another_way_are_refused(llama, model_type, modules, message):
    speculation = {"method": "draft_model", "model": llama, "num_speculative_tokens": 2}
    config = configure(llama, kv_eviction="cake", speculative_config=speculation)
    # As vLLM describes such heads.
    config.speculative_config.method = "mtp"
    heads = config.speculative_config.draft_model_config.hf_config
    heads.model_type, heads.num_nextn_predict_layers = model_type, 1
    if model_type == "mtp":
        refusals.refuse_engine(KVEvictionConfig("cake", 256, {}), config)
    heads.num_nextn_predict_layers = modules
    with pytest.raises(ValueError, match=message):
        refusals.refuse_engine(KVEvictionConfig("cake", 256, {}), config)


COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()

#: By what the documentation calls them.
FEATURES = {
    "context parallelism": ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size yet: set it to 1"),
    "dual-batch overlap": ({"enable_dbo": True}, "--enable-dbo yet: drop it"),
    "fast prefill of shared KV layers": ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill yet: drop it"),
    "drafts by a class of one's own": (
        {"speculative_config": {"method": "custom_class", "model": "a.Proposer", "num_speculative_tokens": 2}},
        "--speculative-config of method custom_class yet: use one of ngram, ngram_gpu, suffix, medusa, eagle, eagle3,",
    ),
    "KV caches with a scale for each token": (
        {"kv_cache_dtype": "fp8_per_token_head"},
        "--kv-cache-dtype fp8_per_token_head yet: choose auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2",
    ),
    "KV caches of eight bits in some full-attention layers and not in others": (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]},
        "--kv-cache-dtype-skip-layers that names some layers of full attention and not the others yet: name all of",
    ),
    "KV caches of four bits": ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4 yet: choose auto, float16"),
    "KV caches with a scale for each head": (
        {"hf_overrides": {"quantization_config": PER_HEAD}},
        "a checkpoint whose KV cache has a scale for each head yet: choose one with a scale for each layer, or serve",
    ),
    "progressive prefill where pictures are attended to in both directions": (
        {"kv_eviction_config": {"prefill": "progressive"}, "hf_overrides": {"is_mm_prefix_lm": True}},
        "prefill progressive for LlamaForCausalLM, whose pictures are attended to in both directions, yet: drop it, or",
    ),
    "KV connectors other than OffloadingConnector": (
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        "--kv-transfer-config of ExampleConnector, which was never run beside it, yet: use OffloadingConn",
    ),
    "KV offloading by LMCache": (
        {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        "--kv-offloading-backend lmcache, which was never run beside it, yet: use OffloadingConnector, or drop one of",
    ),
    "KV offloading in tiers": (
        {"kv_transfer_config": offloading(spec_name="TieringOffloadingSpec")},
        "the offloading spec TieringOffloadingSpec, which was never run beside it, yet: set spec_name to CPUOffloading",
    ),
    "KV offloading with drafts over pipeline stages": (
        {"kv_offloading_size": 1.0, "speculative_config": NGRAM, "pipeline_parallel_size": 2},
        "KV offloading and a --speculative-config over pipeline stages yet: drop one of the three",
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_are_refused(llama, feature):
    kwargs, message = FEATURES[feature]
    with pytest.raises(ValueError, match=f"--kv-eviction does not work together with {message}"):
        configure(llama, kv_eviction="snapkv", **kwargs)


def test_refusal_comes_twice_from_the_same_arguments(llama):
    """vLLM makes a config from the same arguments in several processes."""
    args = EngineArgs(llama, skip_tokenizer_init=True, dtype="float32", kv_eviction="cake")
    assert args.create_engine_config().additional_config == args.create_engine_config().additional_config


def test_the_other_connector_for_offloading_is_refused(llama, monkeypatch):
    """It is chosen by a variable, when vLLM makes its configuration."""
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    with pytest.raises(ValueError, match="the KV connector SimpleCPUOffloadConnector, which was never run beside it"):
        configure(llama, kv_eviction="cake", kv_offloading_size=1.0)


@pytest.mark.parametrize(
    "asked",
    [
        {"kv_offloading_size": 2.0},
        {"kv_transfer_config": offloading(cpu_bytes_to_use=2 << 30)},
        {"kv_transfer_config": offloading(store_threshold=2), "kv_offloading_size": 2.0},
    ],
)
def test_offloading_runs_beside_eviction(llama, asked):
    """Both connectors are children of one, and it is said once; the same arguments may be used again."""
    args = EngineArgs(llama, skip_tokenizer_init=True, dtype="float32", kv_eviction="cake", **asked)
    for _ in range(2):
        with mock.patch.object(plugin.logger, "info") as log:
            config = args.create_engine_config()
        assert sum("runs beside" in call.args[0] for call in log.call_args_list) == 1
        transfer = config.kv_transfer_config
        assert transfer.kv_connector == engine.BESIDE
        ours, theirs = transfer.kv_connector_extra_config["connectors"]
        assert (ours["kv_connector"], theirs["kv_connector"]) == (engine.CONNECTOR, "OffloadingConnector")
        assert theirs["kv_connector_extra_config"]["cpu_bytes_to_use"] == 2 << 30
        assert not config.scheduler_config.disable_hybrid_kv_cache_manager


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (("gemma3_text", "Gemma3ForCausalLM", "sliding_attention"), {}),
        (("gemma3_text", "Gemma3ForCausalLM", "sliding_attention"), {"speculative_config": NGRAM}),
        (("lfm2", "Lfm2ForCausalLM", "conv"), {"block_size": 64}),
        (("gemma3_text", "Gemma3ForCausalLM", "sliding_attention"), {"pipeline_parallel_size": 2}),
    ],
)
def test_offloading_runs_beside_windows_states_drafts_and_stages(tmp_path, kind, more):
    model_type, architecture, other = kind
    fields = {"vocab_size": 128, "sliding_window": 64, "layer_types": [other, "full_attention"], **SMALL}
    model = save_config(tmp_path, model_type, architecture, **fields)
    config = configure(model, kv_eviction="cake", kv_offloading_size=1.0, **more)
    assert config.kv_transfer_config.kv_connector == engine.BESIDE


SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
MODELS = {
    "sparse attention over latents": (
        "deepseek_v3",
        "DeepseekV32ForCausalLM",
        {**SMALL, "index_topk": 64},
        "sparse attention over latents",
    ),
    "encoder-decoder models": (
        "whisper",
        "WhisperForConditionalGeneration",
        {"d_model": 64},
        "encoder-decoder attention",
    ),
    "pooling models": ("bert", "BertModel", {"hidden_size": 64, "num_attention_heads": 2}, "pooling models"),
    "models without attention": ("mamba", "MambaForCausalLM", SMALL, "models without attention"),
    "a sliding window in every layer": ("mistral", "MistralForCausalLM", SMALL, "a sliding window in every layer"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_evicted(tmp_path, name):
    model_type, architecture, fields, what = MODELS[name]
    model = save_config(tmp_path, model_type, architecture, **fields)
    with pytest.raises(ValueError, match=f"--kv-eviction cannot evict from .*{what}.* {architecture} has"):
        configure(model, kv_eviction="cake")


def test_a_sliding_window_as_long_as_what_is_served_is_not_refused(tmp_path):
    model = save_config(tmp_path, "mistral", "MistralForCausalLM", sliding_window=600, **SMALL)
    for served in ({"max_model_len": 600}, {"disable_sliding_window": True}):
        assert configure(model, kv_eviction="cake", **served).model_config.max_model_len == 600
    with pytest.raises(ValueError, match=r"serve it up to 600 tokens, .* with --disable-sliding-window"):
        configure(model, kv_eviction="cake", max_model_len=601)


#: Known when the model's layers are built, before there are weights.
ATTENTION = {
    "ALiBi": ({"alibi_slopes": [1.0]}, "ALiBi"),
}
LATENT = "latent attention with a sliding window"
LATENT_HYBRID = "latent attention beside layers that keep states"


class StockImpl(AttentionImpl):
    """Stands in for a stock backend's, which needs an engine around it."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **kwargs):
        pass

    def forward(self, *args, **kwargs):
        raise NotImplementedError


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_cannot_be_evicted(name):
    from cake_vllm.integration.worker.attention import EvictingImpl

    kwargs, what = ATTENTION[name]
    impl = type("Impl", (EvictingImpl, StockImpl), dict.fromkeys(EvictingImpl.__abstractmethods__))
    impl(8, 64, 1.0)
    with pytest.raises(ValueError, match=f"--kv-eviction cannot evict from models with {what}"):
        impl(8, 64, 1.0, **kwargs)


def test_latent_attention_that_cannot_be_evicted():
    from cake_vllm.integration.worker.latent_attention import EvictingLatentImpl

    impl = type("Impl", (EvictingLatentImpl, StockImpl), dict.fromkeys(EvictingLatentImpl.__abstractmethods__))
    impl(8, 64, 1.0)
    with pytest.raises(ValueError, match=f"--kv-eviction cannot evict from models with {LATENT}"):
        impl(8, 64, 1.0, sliding_window=64)


def test_latent_hybrids_cannot_be_evicted(tmp_path):
    """Stock vLLM cannot configure one (Kimi Linear) on a CPU."""
    vllm_config = configure(save_config(tmp_path, "deepseek_v3", "DeepseekV3ForCausalLM", **SMALL))
    config = KVEvictionConfig("cake", 100, {})
    refusals.refuse_engine(config, vllm_config)
    with (
        mock.patch.object(ModelConfig, "is_hybrid", True),
        pytest.raises(ValueError, match=f"--kv-eviction cannot evict from .*{LATENT_HYBRID}"),
    ):
        refusals.refuse_engine(config, vllm_config)


def test_the_documentation_lists_what_is_refused():
    (row,) = (line for line in COMPATIBILITY.splitlines() if line.startswith("| refused at start-up"))
    known = {*FEATURES, DRAFTERS, STATES, *MODELS, *ATTENTION, LATENT, LATENT_HYBRID}
    assert set(row.split("|")[2].strip().split(", ")) == known


def test_the_documentation_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", COMPATIBILITY))
    assert named
    assert named <= {file.name for file in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.31.9", False), ("0.32.0+cpu", True), ("0.32.1.post1", True), ("0.33.2", True), ("0.34.0rc1", False)],
)
def test_versions(version, supported):
    assert gate.is_supported(version) is supported


def test_other_vllm_versions_are_refused_when_eviction_is_used(llama, monkeypatch):
    monkeypatch.setattr(gate, "vllm", SimpleNamespace(__version__="0.40.0"))
    configure(llama)
    with pytest.raises(ValueError, match=r"--kv-eviction needs vLLM >= 0\.32 and < 0\.34, and this is 0\.40\.0"):
        configure(llama, kv_eviction="cake")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS leaves out cake_vllm, which --kv-eviction needs: add it to the list"),
        ("VLLM_USE_RUST_FRONTEND", "1", "--kv-eviction does not work together with VLLM_USE_RUST_FRONTEND yet: unset"),
    ],
)
def test_every_process_must_load_the_plugin(llama, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    envs.disable_envs_cache()
    configure(llama)
    with pytest.raises(ValueError, match=message):
        configure(llama, kv_eviction="cake")


@pytest.mark.slow
def test_a_server_has_the_flags():
    run = subprocess.run(
        [*VLLM, "serve", "--help=KVEviction"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    for name in ("--kv-eviction {none,auto,adakv,cake,", "--kv-eviction-budget N|F|auto", "--kv-eviction-config JSON"):
        assert name in run.stdout


@pytest.mark.slow
def test_the_server_refuses_before_it_loads_anything(llama):
    run = subprocess.run(
        [*VLLM, "serve", llama, "--kv-eviction", "cake", "--kv-eviction-config", '{"gama": 1}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "--kv-eviction-config: unknown key 'gama'" in run.stderr
    assert "Loading" not in run.stderr + run.stdout
