"""Eviction replayed on a plain Hugging Face model: what the engine must agree with, token for token.

Uses ``cake_vllm.policies`` and nothing else of the plugin. The prompt is computed in full, each layer's cache is
pruned to the positions that the policy chose (rounded up to whole blocks as the paged engine does), and greedy
decoding goes on over the pruned cache.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cake_vllm.policies import LayerInputs, PagedPrompt, Policy

#: The longest window that a replayed policy may have.
MOST_QUERIES = 64


class Replay:
    """A Hugging Face model that decodes greedily over a pruned cache."""

    def __init__(self, model_dir: str):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model.eval()
        #: What the positions of the last prompt were worth, by layer.
        self.ranks: list[torch.Tensor] = []
        self._prefilled: dict[tuple[int, ...], tuple[DynamicCache, dict[int, torch.Tensor], torch.Tensor]] = {}

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], num_tokens: int, policy: Policy, budget: int, block_size: int
    ) -> tuple[list[int], list[list[list[int]]]]:
        """Greedy tokens, and the positions kept per layer and KV head."""
        cache, queries, logits = copy.deepcopy(self._prefill(tuple(prompt)))
        kept, counts = self._prune(cache, queries, len(prompt), policy, budget, block_size)
        tokens = [int(logits[0, -1].argmax())]
        hooks = self._capture_queries(queries, 1)
        while len(tokens) < num_tokens:
            length = len(prompt) + len(tokens)
            position = torch.tensor([[length - 1]])
            logits = self.model(torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=position).logits
            tokens.append(int(logits[0, -1].argmax()))
            if policy.trims and length % block_size == 0 and length > budget:
                self._trim(cache, queries, counts, policy, block_size)
        for hook in hooks:
            hook.remove()
        return tokens, kept

    def _trim(
        self,
        cache: DynamicCache,
        queries: dict[int, torch.Tensor],
        counts: list[int],
        policy: Policy,
        block_size: int,
    ) -> None:
        """Eviction while decoding, once per block, in layers that hold more blocks than their count needs."""
        for index, (layer, count) in enumerate(zip(cache.layers, counts, strict=True)):
            target = -(-(count + policy.protected) // block_size) * block_size
            if layer.keys.shape[2] <= target:
                continue
            keys, size = layer.keys[0], layer.keys.shape[-1]
            picked = policy.trim(queries[index], keys, target - policy.protected, size**-0.5).sort(dim=-1).values
            index = picked[None, :, :, None].expand(-1, -1, -1, size)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[DynamicCache, dict[int, torch.Tensor], torch.Tensor]:
        """The full cache, the last post-RoPE queries by layer, and the last logits; computed once a prompt."""
        if prompt not in self._prefilled:
            queries: dict[int, torch.Tensor] = {}
            hooks = self._capture_queries(queries, MOST_QUERIES)
            cache = DynamicCache()
            logits = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
            for hook in hooks:
                hook.remove()
            self._prefilled[prompt] = cache, queries, logits
        return self._prefilled[prompt]

    def _capture_queries(self, queries: dict[int, torch.Tensor], most: int) -> list:
        return [
            layer.self_attn.register_forward_pre_hook(_capture(queries, index, most), with_kwargs=True)
            for index, layer in enumerate(self.model.model.layers)
        ]

    def _prune(
        self,
        cache: DynamicCache,
        queries: dict[int, torch.Tensor],
        prompt_len: int,
        policy: Policy,
        budget: int,
        block_size: int,
    ) -> tuple[list[list[list[int]]], list[int]]:
        everything = list(range(prompt_len))
        if not policy.is_evicted(prompt_len, budget):
            whole = [[everything] * layer.keys.shape[1] for layer in cache.layers]
            return whole, [budget - policy.protected] * len(whole)
        weights = [layer.self_attn.o_proj.weight for layer in self.model.model.layers]
        scores = [
            policy.score(
                LayerInputs(
                    queries[i][:, queries[i].shape[1] - policy.num_queries :],
                    layer.keys[0],
                    layer.keys.shape[-1] ** -0.5,
                    values=layer.values[0],
                    output_weight=weights[i],
                    layer_index=i,
                )
            )
            for i, layer in enumerate(cache.layers)
        ]
        counts = policy.budgets(scores, prompt_len, budget)
        paged = PagedPrompt(prompt_len, policy.protected, block_size)
        kept = []
        self.ranks = [policy.rank(score, prompt_len, budget / prompt_len) for score in scores]
        for layer, score, count, ranks in zip(cache.layers, scores, counts, self.ranks, strict=True):
            pages = paged.pages(count)
            if pages == paged.full_blocks:
                kept.append([everything] * layer.keys.shape[1])
                continue
            tail = torch.arange(paged.full_len, prompt_len).expand(layer.keys.shape[1], -1)
            ratio = budget / prompt_len
            moved = paged.positions(ranks, pages)
            positions = torch.cat([moved, tail], dim=1)
            for chosen, head in zip(
                policy.keep(score, [count] * len(moved), prompt_len, ratio), positions.tolist(), strict=True
            ):
                assert set(chosen.tolist()) <= set(head), "rounding to whole blocks lost a position that was chosen"
            index = positions[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
            kept.append(positions.tolist())
        return kept, counts


def _capture(queries: dict[int, torch.Tensor], index: int, window: int):
    def hook(attention, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)[:, -window:]
        cos, sin = kwargs["position_embeddings"]
        query = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        queries[index] = apply_rotary_pos_emb(query, query, cos[:, -window:], sin[:, -window:])[0][0]

    return hook
