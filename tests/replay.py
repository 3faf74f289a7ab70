"""Eviction replayed on a plain Hugging Face model: what the engine must agree with, token for token.

Uses ``cake_vllm.policies`` and nothing else of the plugin. The prompt is computed in full, or in chunks with eviction
after each; each layer's cache is pruned to the positions that the policy chose (rounded up to whole blocks as the
paged engine does), and greedy decoding goes on over the pruned cache.

A replay can follow what was served: wherever the engine decided otherwise it shows that this was a tie, and goes on as
the engine did. So one tie does not hide what comes after it.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from ties import GAP_BOUND, RANK_BOUND, Served, assert_tie
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from cake_vllm.integration.gates import GateFile
from cake_vllm.policies import LayerInputs, PagedPrompt, Policy
from cake_vllm.policies.entries import LinearGate, Rotary, Rotation

#: The replay whose model is being computed.
_running: list["Replay"] = []
AttentionInterface.register("replayed", lambda *args, **kwargs: _running[0]._attention(*args, **kwargs))


@dataclass
class State:
    """A request's cache, the last 64 queries of each layer and, after an eviction, the heads' counts by layer.

    Heads that hold different numbers of tokens are aligned at the end; ``valid`` says where they have something.
    ``notes`` are the policy's, if it takes any.
    ``gap`` is the distance of the two best log probabilities at the last forward.
    ``traded`` are the full blocks of the length at which it was evicted last.
    """

    cache: DynamicCache
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: list[list[int]] = field(default_factory=list)
    valid: dict[int, torch.Tensor] = field(default_factory=dict)
    is_evicted: bool = False
    length: int = 0
    gap: float = 0.0
    traded: int = 0


class Replay:
    """A Hugging Face model that decodes greedily over a pruned cache: of its layers of full attention, of which a layer
    that reads another's keys and values is none of its own.

    Args:
        model_dir: the model.
        dtype: that it is computed in.
        rank_bound: see :mod:`ties`.
        gap_bound: see :mod:`ties`.
        gates: of the model, for policies that need them.
    """

    def __init__(
        self,
        model_dir: str,
        dtype: torch.dtype = torch.float32,
        rank_bound: float = RANK_BOUND,
        gap_bound: float = GAP_BOUND,
        gates: GateFile | None = None,
    ):
        self.model = self._load(model_dir, dtype)
        self.model.eval()
        config = self.model.config.get_text_config()
        num_own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_own
        self._chunked = [index for index, kind in enumerate(kinds) if kind == "chunked_attention"]
        self._evictable = [index for index, kind in enumerate(kinds[:num_own]) if kind in ("full_attention", "hybrid")]
        # Layers without a cache of their own read that of the last one of their kind.
        self._owners = {
            index: max(own for own in range(num_own) if kinds[own] == kind)
            for index, kind in enumerate(kinds)
            if index >= num_own
        }
        self._has_states = bool({"conv", "linear_attention", "hybrid"} & set(kinds))
        self.gates = gates
        self.rank_bound, self.gap_bound = rank_bound, gap_bound
        # What is still to be followed: evictions, each by layer and KV head; none if nothing is.
        self._choices: Iterator[list[list[torch.Tensor]]] | None = None
        self._prefilled: dict[tuple[int, ...], tuple[State, int]] = {}
        self._state = self._start()
        #: Distance of the two best log probabilities at each token that was generated last.
        self.gaps: list[float] = []
        # By layer, all queries of the last forward.
        self._latest: dict[int, torch.Tensor] = {}

    def verify(self, prompt: list[int], served: Served, policy: Policy, budget: int, block_size: int, **ways) -> None:
        """Follows what was served; ``ways`` are those of :meth:`generate`.

        Raises:
            AssertionError: if a token or a kept position is another one, and it was not a tie.
        """
        self._choices = iter(served.choices)
        self.generate(prompt, len(served.tokens), policy, budget, block_size, follow=served.tokens, **ways)
        assert next(self._choices, None) is None, "an eviction that the replay knows nothing of"
        self._choices = None

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        num_tokens: int,
        policy: Policy,
        budget: int,
        block_size: int,
        page_size: int = 0,
        decode: str | None = None,
        chunk: int | None = None,
        hit: int = 0,
        follow: list[int] | None = None,
        every: int = 1,
        late: Mapping[int, int] | None = None,
    ) -> tuple[list[int], list[list[list[int]]]]:
        """Greedy tokens, and what was kept per layer and KV head: indices into the cache before the last chunk's end.

        Blocks are given back in pages of ``page_size`` tokens, of their own size if that is not given.
        ``decode`` is the policy's default if it is not given, and comes every so many tokens, in whole blocks;
        with ``chunk`` prefill is progressive;
        the first ``hit`` tokens come from the prefix cache, and no notes are taken of them.
        ``late`` says at which lengths generated tokens are evicted, and up to where, if that is not at once.
        """
        decode, sizes = decode or policy.decodes[0], (block_size, page_size or block_size)
        if chunk is None and policy.takes_notes:
            state = self._start()
            if hit:
                self._forward(state, prompt[:hit])
            token = self._forward(state, prompt[hit:])
            self._note(state, policy, hit)
            kept = self._prune(state, policy, budget, sizes)
        elif chunk is None:
            state, token = copy.deepcopy(self._prefill(tuple(prompt)))
            kept = self._prune(state, policy, budget, sizes)
        else:
            state = self._start()
            for start in range(0, len(prompt), chunk):
                token = self._forward(state, prompt[start : start + chunk])
                self._note(state, policy, start)
                kept = self._prune(state, policy, budget, sizes)
        state.notes.clear()
        tokens: list[int] = []
        self.gaps = []
        while True:
            if follow is not None and token != follow[len(tokens)]:
                assert state.gap < self.gap_bound, f"token {len(tokens)} is {follow[len(tokens)]} instead of {token}"
                token = follow[len(tokens)]
            tokens.append(token)
            self.gaps.append(state.gap)
            if len(tokens) == num_tokens:
                return tokens, kept
            token = self._forward(state, [token])
            end = state.length if late is None else late.get(state.length, 1)
            is_last = late is None and len(tokens) + 1 == num_tokens
            held = state.traded if state.is_evicted else -(-budget // block_size)
            is_due = end % block_size == 0 and end // block_size >= held + -(-every // block_size)
            assert is_due or late is None or end == 1, f"{end} tokens were cut before it was time"
            if decode != "off" and is_due and not is_last:
                state.traded = end // block_size
                with _hidden(state, self._evictable, state.length - end):
                    self._trim(state, policy, sizes[1], decode)

    @staticmethod
    def _load(model_dir: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="replayed")

    @property
    def decoder(self) -> torch.nn.Module:
        """What the attention layers are in."""
        return self.model.model

    def _start(self) -> State:
        # Told of the layers, it would also give back what a window does not see.
        return State(DynamicCache(config=self.model.config) if self._has_states else DynamicCache())

    def _forward(self, state: State, tokens: list[int]) -> int:
        """Computes tokens and returns the next one."""
        self._state = state
        _running[:] = [self]
        logits = self._logits(state, tokens)
        state.length += len(tokens)
        best = logits[0, -1].topk(2)
        state.gap = float(best.values[0] - best.values[1])
        return int(best.indices[0])

    def _logits(self, state: State, tokens: list[int]) -> torch.Tensor:
        """``[1, 1, vocabulary]``, behind the last of tokens that come after those of ``state``."""
        positions = torch.arange(state.length, state.length + len(tokens))[None]
        return self.model(
            torch.tensor([tokens]), past_key_values=state.cache, position_ids=positions, logits_to_keep=1
        ).logits

    def _trim(self, state: State, policy: Policy, page_size: int, decode: str) -> None:
        """Eviction while decoding, once per block: of heads that hold more blocks than their count needs."""
        state.is_evicted = True
        choice = next(self._choices) if self._choices else None
        for place, (index, counts) in enumerate(zip(self._evictable, state.counts, strict=True)):
            inputs = self._inputs(state, index, 1 if decode == "cake" else policy.num_queries)
            targets = [-(-(count + policy.protected) // page_size) * page_size for count in counts]
            lengths = self._lengths(state, index)
            if all(length <= target for length, target in zip(lengths, targets, strict=True)):
                continue
            if decode == "cake":
                keep = list(policy.trim(inputs, targets[0] - policy.protected).sort(dim=-1).values)
                ranks = policy.trim_ranks(inputs, targets[0] - policy.protected)
            else:
                kept = [min(length, target) for length, target in zip(lengths, targets, strict=True)]
                counts, num_cached = [count - policy.protected for count in kept], inputs.keys.shape[1]
                keep = policy.rescore(inputs, counts)
                (score,) = policy.settle([policy.judge(replace(inputs, budget=max(kept)))], max(kept))
                ranks = policy.ranks(score, num_cached, max(kept) / num_cached, counts)
            gather(state, index, keep if choice is None else follow_choice(keep, choice[place], ranks, self.rank_bound))

    def _lengths(self, state: State, index: int) -> list[int]:
        """Tokens that each head of a layer holds."""
        keys = state.cache.layers[index].keys
        return state.valid[index].sum(dim=1).tolist() if index in state.valid else [keys.shape[2]] * keys.shape[1]

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[State, int]:
        """The state after the whole prompt, and the next token; computed once a prompt."""
        if prompt not in self._prefilled:
            state = self._start()
            self._prefilled[prompt] = state, self._forward(state, list(prompt))
        return self._prefilled[prompt]

    def _attention(self, module, query, key, value, mask, scaling=None, sliding_window=None, s_aux=None, **kwargs):
        """Attention whose last query sees all keys, whatever other layers and heads hold."""
        index, state, (num_new, length) = module.layer_idx, self._state, (query.shape[2], key.shape[2])
        self._latest[index] = query[0]
        before = state.queries.get(index, query[0, :, :0])
        state.queries[index] = torch.cat([before, query[0]], dim=1)[:, -64:]
        owner = self._owners.get(index, index)
        seen = causal_lower_right(num_new, length) if num_new > 1 else None
        if owner in state.valid or sliding_window or s_aux is not None or index in self._chunked:
            seen = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
        if sliding_window:
            seen = seen.triu(length - num_new - sliding_window + 1)
        if index in self._chunked:
            chunk = torch.arange(length) // self.model.config.attention_chunk_size
            seen = seen & (chunk == chunk[length - num_new :].unsqueeze(1))
        if owner in state.valid:
            valid = state.valid[owner]
            state.valid[owner] = valid = pad(valid, (0, length - valid.shape[1]), value=True)
            seen = (valid[:, None] & seen).repeat_interleave(query.shape[1] // len(valid), dim=0)[None]
        if s_aux is not None:
            # One more key, of which each head's logit is its sink, and whose value is nothing.
            seen = torch.zeros(1, query.shape[1], num_new, length).masked_fill(~seen, float("-inf"))
            seen = torch.cat([seen, s_aux.view(1, -1, 1, 1).expand(1, -1, num_new, 1)], dim=-1)
            key, value = pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1))
        output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    def _note(self, state: State, policy: Policy, start: int) -> None:
        """Shows the policy a chunk that begins at position ``start``."""
        if not policy.takes_notes:
            return
        for index in self._evictable:
            keys, positions = state.cache.layers[index].keys[0], policy.noted(start, state.length)
            places = range(
                *(bound + keys.shape[1] - state.length for bound in (positions.start, positions.stop)), positions.step
            )
            queries = self._latest[index][:, [position - start for position in positions]]
            module = self.decoder.layers[index].self_attn
            sinks = getattr(module, "sinks", None)
            inputs = LayerInputs(queries, keys, module.scaling, valid=state.valid.get(index), sinks=sinks)
            state.notes[index] = policy.note(inputs, places, state.notes.get(index))

    def _inputs(self, state: State, index: int, num_queries: int) -> LayerInputs:
        layer, queries, valid = state.cache.layers[index], state.queries[index], state.valid.get(index)
        keys, values, module = layer.keys[0], layer.values[0], self.decoder.layers[index].self_attn
        return LayerInputs(
            queries[:, queries.shape[1] - num_queries :],
            keys,
            module.scaling,
            values=values,
            output_weight=self._output_weight(module),
            layer_index=self._evictable.index(index),
            valid=valid,
            gate=self.gates and self._gate(index),
            rotation=self._rotation(),
            sinks=getattr(module, "sinks", None),
        )

    def _gate(self, index: int) -> LinearGate:
        return self.gates.gate(index, slice(None), torch.device("cpu"))

    def _rotation(self) -> Rotation | None:
        """Of a model whose layers have the same, half by half; ``None`` of others."""
        frequencies = getattr(getattr(self.decoder, "rotary_emb", None), "inv_freq", None)
        return None if frequencies is None else Rotation(Rotary(2 * len(frequencies)), frequencies.double())

    def _output_weight(self, module: torch.nn.Module) -> torch.Tensor:
        return (module.out_proj if hasattr(module, "out_proj") else module.o_proj).weight

    def _prune(self, state: State, policy: Policy, budget: int, sizes: tuple[int, int]) -> list[list[list[int]]]:
        layers, length = [state.cache.layers[index] for index in self._evictable], state.length
        block_size, page_size = sizes
        frees = state.is_evicted or -(-(budget + page_size) // block_size) < length // block_size
        if not (policy.is_evicted(length, budget) and frees):
            state.counts = [[budget - policy.protected] * layer.keys.shape[1] for layer in layers]
            return [[list(range(length))] * layer.keys.shape[1] for layer in layers]
        state.is_evicted, state.traded = True, length // block_size
        inputs = [replace(self._inputs(state, index, policy.num_queries), budget=budget) for index in self._evictable]
        judged = [
            policy.judge(replace(of_layer, notes=state.notes.get(index)))
            for index, of_layer in zip(self._evictable, inputs, strict=True)
        ]
        scores = policy.settle(judged, budget)
        given = policy.head_budgets(scores, length, budget)
        choice = next(self._choices) if self._choices else None
        kept, state.counts = [], []
        for place, (index, score, counts) in enumerate(zip(self._evictable, scores, given, strict=True)):
            num_cached, lengths = layers[place].keys.shape[2], self._lengths(state, index)
            paged = PagedPrompt(num_cached, policy.protected, page_size, length % block_size)
            counts = [min(count, has - policy.protected) for count, has in zip(counts, lengths, strict=True)]
            ratio = min(1.0, budget / num_cached)
            ranks = policy.ranks(score, num_cached, ratio, counts)
            state.counts.append(counts)
            tail = torch.arange(paged.full_len, num_cached)
            positions = paged.positions(ranks, [paged.pages(count) for count in counts])
            if choice is not None:
                positions = follow_choice(positions, choice[place], ranks, self.rank_bound)
            positions = [torch.cat([head, tail]) for head in positions]
            chosen = policy.keep(score, counts, num_cached, ratio)
            for rank, ours, head in zip(ranks, chosen, map(torch.Tensor.tolist, positions), strict=True):
                lost = sorted(set(ours.tolist()) - set(head))
                here = [position for position in head if position < min(len(rank), paged.full_len)]
                assert not lost or (rank[lost] == rank[here].min()).all(), (
                    "rounding to whole blocks lost a position that was chosen"
                )
            gather(state, index, positions)
            kept.append([head.tolist() for head in positions])
        return kept


@contextmanager
def _hidden(state: State, layers: list[int], count: int) -> Iterator[None]:
    """As if the last ``count`` tokens of a request had not been computed yet."""
    if not count:
        yield
        return
    queries, behind = dict(state.queries), {}
    for index in layers:
        layer, valid = state.cache.layers[index], state.valid.get(index)
        behind[index] = layer.keys[:, :, -count:], layer.values[:, :, -count:]
        layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
        state.queries[index] = queries[index][:, :-count]
        if valid is not None:
            state.valid[index] = valid[:, : layer.keys.shape[2]]
    yield
    state.queries.update(queries)
    for index, (keys, values) in behind.items():
        layer = state.cache.layers[index]
        layer.keys, layer.values = torch.cat([layer.keys, keys], dim=2), torch.cat([layer.values, values], dim=2)


def follow_choice(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], ranks: torch.Tensor, bound: float
) -> list[torch.Tensor]:
    """What the engine kept in a layer's KV heads, after showing that it is what the replay keeps or as good."""
    for head, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        assert len(own) == len(other), f"KV head {head} keeps {len(other)} tokens instead of {len(own)}"
        assert_tie(own, other, ranks[head], bound=bound)
    return theirs


def gather(state: State, index: int, positions: list[torch.Tensor]) -> None:
    """Leaves what each head keeps, ascending positions in its part of the cache."""
    layer, longest = state.cache.layers[index], max(map(len, positions))
    keys, values = (
        torch.zeros(1, len(positions), longest, tensor.shape[-1], dtype=tensor.dtype)
        for tensor in (layer.keys, layer.values)
    )
    valid = torch.zeros(len(positions), longest, dtype=torch.bool)
    for head, kept in enumerate(positions):
        first = longest - len(kept)
        keys[0, head, first:], values[0, head, first:] = layer.keys[0, head, kept], layer.values[0, head, kept]
        valid[head, first:] = True
    if index in state.notes:
        notes = state.notes[index]
        state.notes[index] = notes.new_zeros(len(positions), longest)
        for head, kept in enumerate(positions):
            state.notes[index][head, longest - len(kept) :] = notes[head, kept]
    layer.keys, layer.values = keys, values
    state.valid.pop(index, None)
    if not valid.all():
        state.valid[index] = valid
