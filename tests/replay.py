"""Eviction replayed on a plain Hugging Face model: what the engine must agree with, token for token.

Uses ``cake_vllm.policies`` and nothing else of the plugin. The prompt is computed in full, or in chunks with eviction
after each; each layer's cache is pruned to the positions that the policy chose (rounded up to whole blocks as the
paged engine does), and greedy decoding goes on over the pruned cache.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cake_vllm.policies import LayerInputs, PagedPrompt, Policy


def _right_aligned(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention whose last query sees all keys, whatever other layers hold."""
    causal = causal_lower_right(query.shape[2], key.shape[2]) if query.shape[2] > 1 else None
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("right_aligned", _right_aligned)


@dataclass
class State:
    """A request's cache, the last queries of each layer and, after an eviction, the layers' counts.

    ``gaps`` are the distances of the two best log probabilities at each forward.
    """

    cache: DynamicCache
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    length: int = 0
    gaps: list[float] = field(default_factory=list)


class Replay:
    """A Hugging Face model that decodes greedily over a pruned cache."""

    def __init__(self, model_dir: str):
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="right_aligned"
        )
        self.model.eval()
        #: What the positions of the last prompt were worth, by layer.
        self.ranks: list[torch.Tensor] = []
        #: Distances of the two best log probabilities at the last tokens.
        self.gaps: list[float] = []
        self._prefilled: dict[tuple[int, ...], tuple[State, int]] = {}
        self._state = State(DynamicCache())
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._capture(index), with_kwargs=True)

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        num_tokens: int,
        policy: Policy,
        budget: int,
        block_size: int,
        decode: str | None = None,
        chunk: int | None = None,
    ) -> tuple[list[int], list[list[list[int]]]]:
        """Greedy tokens, and what was kept per layer and KV head: indices into the cache before the last chunk's end.

        ``decode`` is the policy's default if it is not given; with ``chunk`` prefill is progressive.
        """
        decode = decode or policy.decodes[0]
        if chunk is None:
            state, token = copy.deepcopy(self._prefill(tuple(prompt)))
            kept = self._prune(state, policy, budget, block_size)
        else:
            state = State(DynamicCache())
            for start in range(0, len(prompt), chunk):
                token = self._forward(state, prompt[start : start + chunk])
                kept = self._prune(state, policy, budget, block_size)
        tokens = [token]
        while len(tokens) < num_tokens:
            tokens.append(self._forward(state, tokens[-1:]))
            if decode != "off" and state.length % block_size == 0 and state.length > budget:
                self._trim(state, policy, block_size, decode)
        self.gaps = state.gaps[-num_tokens:]
        return tokens, kept

    def _forward(self, state: State, tokens: list[int]) -> int:
        """Computes tokens and returns the next one."""
        self._state = state
        positions = torch.arange(state.length, state.length + len(tokens))[None]
        state.length += len(tokens)
        logits = self.model(
            torch.tensor([tokens]), past_key_values=state.cache, position_ids=positions, logits_to_keep=1
        ).logits
        best = logits[0, -1].topk(2)
        state.gaps.append(float(best.values[0] - best.values[1]))
        return int(best.indices[0])

    def _trim(self, state: State, policy: Policy, block_size: int, decode: str) -> None:
        """Eviction while decoding, once per block, in layers that hold more blocks than their count needs."""
        for index, (layer, count) in enumerate(zip(state.cache.layers, state.counts, strict=True)):
            target = -(-(count + policy.protected) // block_size) * block_size
            if layer.keys.shape[2] <= target:
                continue
            inputs = self._inputs(state, index, 1 if decode == "cake" else policy.num_queries)
            keep = policy.trim if decode == "cake" else policy.rescore
            _gather(layer, keep(inputs, target - policy.protected).sort(dim=-1).values)

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[State, int]:
        """The state after the whole prompt, and the next token; computed once a prompt."""
        if prompt not in self._prefilled:
            state = State(DynamicCache())
            self._prefilled[prompt] = state, self._forward(state, list(prompt))
        return self._prefilled[prompt]

    def _capture(self, index: int):
        """Keeps the last 64 post-RoPE queries."""

        def hook(attention, args, kwargs):
            hidden = kwargs.get("hidden_states", args[0] if args else None)[:, -64:]
            cos, sin = kwargs["position_embeddings"]
            query = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            query = apply_rotary_pos_emb(query, query, cos[:, -64:], sin[:, -64:])[0][0]
            before = self._state.queries.get(index, query[:, :0])
            self._state.queries[index] = torch.cat([before, query], dim=1)[:, -64:]

        return hook

    def _inputs(self, state: State, index: int, num_queries: int) -> LayerInputs:
        layer, queries = state.cache.layers[index], state.queries[index]
        return LayerInputs(
            queries[:, queries.shape[1] - num_queries :],
            layer.keys[0],
            layer.keys.shape[-1] ** -0.5,
            values=layer.values[0],
            output_weight=self.model.model.layers[index].self_attn.o_proj.weight,
            layer_index=index,
        )

    def _prune(self, state: State, policy: Policy, budget: int, block_size: int) -> list[list[list[int]]]:
        layers, length = state.cache.layers, state.length
        if not policy.is_evicted(length, budget):
            state.counts = [budget - policy.protected] * len(layers)
            return [[list(range(length))] * layer.keys.shape[1] for layer in layers]
        scores = [policy.score(self._inputs(state, index, policy.num_queries)) for index in range(len(layers))]
        counts = policy.budgets(scores, length, budget)
        kept, self.ranks, state.counts = [], [], []
        for layer, score, count in zip(layers, scores, counts, strict=True):
            _, num_heads, num_cached, _ = layer.keys.shape
            paged = PagedPrompt(num_cached, policy.protected, block_size)
            count = min(count, num_cached - policy.protected)
            ratio = min(1.0, budget / num_cached)
            ranks = policy.rank(score, num_cached, ratio)
            state.counts.append(count)
            self.ranks.append(ranks)
            pages = paged.pages(count)
            if pages == paged.full_blocks:
                kept.append([list(range(num_cached))] * num_heads)
                continue
            tail = torch.arange(paged.full_len, num_cached).expand(num_heads, -1)
            positions = torch.cat([paged.positions(ranks, pages), tail], dim=1)
            chosen = policy.keep(score, [count] * num_heads, num_cached, ratio)
            for rank, ours, head in zip(ranks, chosen, positions.tolist(), strict=True):
                lost = sorted(set(ours.tolist()) - set(head))
                least = (
                    rank[[position for position in head if position < min(len(rank), paged.full_len)]].min()
                    if lost
                    else 0
                )
                assert (rank[lost] == least).all(), "rounding to whole blocks lost a position that was chosen"
            _gather(layer, positions)
            kept.append(positions.tolist())
        return kept


def _gather(layer, positions: torch.Tensor) -> None:
    index = positions[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
    layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
