"""Multi-head latent attention: one vector of a token and layer, which all query heads read."""

from dataclasses import replace

import pytest
import torch
from elsewhere import in_place_of
from engine import Engine
from random_models import gates_of, let_last_layer_draft, numbers, save_random_gates, save_random_latent
from replay import Replay
from test_attention_kinds import BUDGET, verify_batch
from test_drafts import NGRAM
from test_graphs import rehearse
from ties import assert_same
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from vllm.model_executor.layers.attention.mla_attention import MLACommonDecodeMetadata
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.mla.triton_mla import TritonMLAImpl

from cake_vllm.integration.worker.latent_attention import evicting_latent_backend
from cake_vllm.policies import create_policy
from cake_vllm.policies.entries import Rotary

pytestmark = pytest.mark.engine

SETTINGS = {
    "kv_eviction": "cake",
    "kv_eviction_budget": BUDGET,
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "block_size": 16,
    # vLLM takes AMX's kernels where it finds them.
    "attention_config": {"backend": "CPU_MLA"},
    # Its own kernel for positions takes heads for tokens where queries are no matrix.
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}


class LatentReplay(Replay):
    """A plain model whose attention is computed over latents, as papers on eviction see a layer: one KV head."""

    def __init__(self, model_dir: str, **kwargs):
        super().__init__(model_dir, **kwargs)
        for layer in self.model.model.layers:
            attention = layer.self_attn
            rank, size = attention.kv_lora_rank, attention.qk_nope_head_dim
            # [H, nope, rank] and [H, V, rank]
            weight = attention.kv_b_proj.weight.detach().view(attention.num_heads, -1, rank)
            attention.to_latent, attention.from_latent = weight.split([size, weight.shape[1] - size], dim=1)
            attention.forward = lambda *args, module=attention, **kwargs: self._forward_latents(module, *args, **kwargs)

    def _forward_latents(self, module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
        asked = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
        own, turned = (
            asked.unflatten(-1, (-1, module.qk_head_dim)).transpose(1, 2).split([module.qk_nope_head_dim, 64], -1)
        )
        latent, key = module.kv_a_proj_with_mqa(hidden_states).split([module.kv_lora_rank, 64], dim=-1)
        turned, key = apply_rotary_pos_emb_interleave(turned, key.unsqueeze(1), *position_embeddings)
        latent = module.kv_a_layernorm(latent).unsqueeze(1)
        query = torch.cat([own @ module.to_latent, turned], dim=-1)
        keys, values = past_key_values.update(torch.cat([latent, key], dim=-1), latent, module.layer_idx)
        read, _ = self._attention(module, query, keys, values, attention_mask, scaling=module.scaling)
        return module.o_proj(torch.einsum("bthr,hvr->bthv", read, module.from_latent).flatten(2)), None

    def _gate(self, index):
        # Its halves are turned together: Hugging Face sorts the neighbours of the weights into them.
        gate = super()._gate(index)
        return replace(gate, rotary=replace(gate.rotary, neighbours=False))

    def _rotation(self):
        found = super()._rotation()
        return replace(found, rotary=replace(found.rotary, behind=512))

    def _output_weight(self, module):
        projection = module.o_proj.weight.unflatten(1, (module.num_heads, -1))
        return torch.einsum("ohv,hvr->ohr", projection, module.from_latent).flatten(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = save_random_latent(tmp_path_factory.mktemp("latent"))
    save_random_gates(path, rotary=Rotary(64, neighbours=True, behind=512))
    return path


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param(("cake", "layer-defensivekv", "cake"), marks=pytest.mark.contract),
        ("gate", "criticalkv", "echo"),
        pytest.param(("triattention", "cake", "rkv"), marks=pytest.mark.full),
    ],
)
def test_as_replayed(start_engine, model, policies):
    """By layer, and methods whose heads compete, which have one here, in a batch with a request that keeps all."""
    engine: Engine = start_engine(model, **SETTINGS)
    verify_batch(engine, LatentReplay(model, gates=gates_of(model)), policies, block_size=16)


@pytest.fixture
def chunked(monkeypatch):
    """Engines that start meanwhile have chunks and a prefix cache.

    vLLM switches them off for latents on CPUs without AMX, and yet has all that they take there.
    """
    check = CpuPlatform.check_and_update_config

    def checked(cls, config):
        check(config)
        config.scheduler_config.enable_chunked_prefill = True
        config.scheduler_config.max_num_batched_tokens = 96
        config.cache_config.enable_prefix_caching = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(checked))


def test_chunks_of_an_evicted_prompt_as_replayed(start_engine, model, chunked):
    """Rows of several queries each, beside a request that keeps everything."""
    options = {"prefill": "progressive", "decode": "window"}
    settings = {**SETTINGS, "kv_eviction": "layer-defensivekv", "kv_eviction_config": options}
    engine: Engine = start_engine(model, **settings, long_prefill_token_threshold=64)
    prompts = [numbers(7, 300), numbers(8, 50)]
    replay, policy = LatentReplay(model), create_policy("layer-defensivekv", {})
    for prompt, served in zip(prompts, engine.served(prompts, 40), strict=True):
        assert (len(served.choices) > 2) == (len(prompt) > BUDGET)
        replay.verify(prompt, served, policy, BUDGET, block_size=16, decode="window", chunk=64)


def test_hits_of_the_prefix_cache(start_engine, model, chunked):
    """What is kept and said is what it is without them; the first request's blocks are free when the others come."""
    engine: Engine = start_engine(model, **SETTINGS)
    engine.forget_prefixes()
    shared = numbers(10, 200)
    prompts = [[*shared, *numbers(seed, 100)] for seed in (11, 12)]
    cold = engine.runs(prompts, 12)
    engine.forget_prefixes()
    engine.generate([shared], 1)
    names = [engine.add(prompt, 12, logprobs=2, detokenize=False) for prompt in prompts]
    engine.run()
    for name, run in zip(names, cold, strict=True):
        assert engine.num_cached(name) >= 160
        assert run.kept
        assert_same(engine.run_of(name), run)


@pytest.mark.parametrize("method", ["ngram", pytest.param("mtp", marks=pytest.mark.full)])
def test_drafts(start_engine, model, chunked, tmp_path, method):
    """Rows of several queries while decoding; what is said is what is said without drafts."""
    settings = {**SETTINGS, "kv_eviction_config": {"decode": "off"}}
    if method == "mtp":
        save_random_latent(tmp_path)
        model = let_last_layer_draft(tmp_path)
    drafts = NGRAM if method == "ngram" else {"method": "mtp", "num_speculative_tokens": 2}
    prompts = [numbers(13, 90) * 3, numbers(14, 60) * 4]
    expected = start_engine(model, **settings).runs(prompts, 40)
    engine = start_engine(model, **settings, speculative_config=drafts)
    got = engine.runs(prompts, 40)
    assert engine.stats()["requests"] == 2
    for run, reference in zip(got, expected, strict=True):
        assert_same(run, reference)


@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "layer-defensivekv"])
def test_a_replayed_step_is_the_eager_one(start_engine, model, is_v2, name):
    """As full CUDA graphs of decode steps run: over buffers that stay where they are."""
    settings = {**SETTINGS, "kv_eviction": name, "kv_eviction_config": {"decode": "off"}}
    rehearse(start_engine(model, **settings), is_v2)


class InterpretedTritonMLAImpl(CPUMLAImpl):
    """vLLM's Triton kernel for decoding, in the place of the CPU's."""

    _sm_count = 1
    forward_mqa = TritonMLAImpl.forward_mqa


class StockTritonMLA(CPUMLABackend):
    """Under the only name of a backend for latents that vLLM's CPU platform asks for."""

    @staticmethod
    def get_impl_cls():
        return InterpretedTritonMLAImpl


InterpretedTritonMLA = evicting_latent_backend("InterpretedTritonMLA", StockTritonMLA, MLACommonDecodeMetadata)


@pytest.mark.slow
@pytest.mark.interpreted
def test_triton_interpreted(start_engine, tmp_path, is_v2):
    """The same tokens and positions as with the CPU's kernel."""
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    model = save_random_latent(tmp_path, num_hidden_layers=2)
    settings = {**SETTINGS, "kv_eviction_config": {"window": 8}, "kv_eviction_budget": 40, "max_model_len": 256}
    prompts = [numbers(15, 150), numbers(16, 30)]
    expected = start_engine(model, **settings).runs(prompts, 6)
    assert expected[0].kept
    with in_place_of("CPU_MLA", f"{__name__}.InterpretedTritonMLA"):
        engine = start_engine(model, **settings, seed=1)
        got = engine.runs(prompts, 6)
        layers = engine.vllm_config.compilation_config.static_forward_context.values()
        assert all(isinstance(layer.impl, InterpretedTritonMLAImpl) for layer in layers)
        engine.shutdown()
    for run, reference in zip(got, expected, strict=True):
        assert_same(run, reference)
