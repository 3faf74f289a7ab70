"""Multi-head latent attention: one vector of a token and layer, which all query heads read."""

import pytest
import torch
from engine import Engine
from random_models import numbers, save_random_latent
from replay import Replay
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine

BUDGET = 100
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
        own, turned = asked.unflatten(-1, (-1, module.qk_head_dim)).transpose(1, 2).split([module.qk_nope_head_dim, 64], -1)
        latent, key = module.kv_a_proj_with_mqa(hidden_states).split([module.kv_lora_rank, 64], dim=-1)
        turned, key = apply_rotary_pos_emb_interleave(turned, key.unsqueeze(1), *position_embeddings)
        latent = module.kv_a_layernorm(latent).unsqueeze(1)
        query = torch.cat([own @ module.to_latent, turned], dim=-1)
        keys, values = past_key_values.update(torch.cat([latent, key], dim=-1), latent, module.layer_idx)
        read, _ = self._attention(module, query, keys, values, attention_mask, scaling=module.scaling)
        return module.o_proj(torch.einsum("bthr,hvr->bthv", read, module.from_latent).flatten(2)), None

    def _output_weight(self, module):
        projection = module.o_proj.weight.unflatten(1, (module.num_heads, -1))
        return torch.einsum("ohv,hvr->ohr", projection, module.from_latent).flatten(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_random_latent(tmp_path_factory.mktemp("latent"))


@pytest.mark.parametrize("policies", [("cake", "layer-defensivekv", "cake"), ("snapkv", "criticalkv", "echo")])
def test_as_replayed(start_engine, model, policies):
    """By layer, and methods whose heads compete, which have one here, in a batch with a request that keeps all."""
    engine: Engine = start_engine(model, **SETTINGS)
    prompts = [numbers(length, length) for length in (420, 333, 60)]
    requests = [
        engine.add(prompt, 40, extra_args={"kv_eviction": policy}, logprobs=2, detokenize=False)
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    engine.stats()
    done = engine.run()
    assert engine.stats()["requests"] == 2
    replay = LatentReplay(model)
    for prompt, request, policy in zip(prompts, requests, policies, strict=True):
        served = engine.served_as(request, done[request])
        assert bool(served.choices) == (len(prompt) > BUDGET)
        replay.verify(prompt, served, create_policy(policy, {}), BUDGET, block_size=16)
        assert engine.run_of(request).gaps == pytest.approx(replay.gaps, rel=1e-2, abs=1e-3)
