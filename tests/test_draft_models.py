"""Drafts from a model whose layers lie in the blocks of the request: they read what is most recent, and nobody else's.

What is served and kept is what it would be without drafts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from engine import Engine
from random_models import numbers, save_random_eagle, save_random_mtp
from replay import Replay
from test_drafts import crowd, drafts
from ties import Run, assert_same

from cake_vllm import policies
from cake_vllm.integration.worker import graphs
from cake_vllm.integration.worker.dealing import keep_recent
from cake_vllm.policies import create_policy
from cake_vllm.policies.streamingllm import StreamingLLM

NUM_DRAFTS, BLOCK = 3, 32


@pytest.fixture
def speculation(tiny_model, tmp_path_factory) -> Callable[[str], dict]:
    """The configuration of a method; a draft model is the target itself, and so is the model of an MTP layer."""

    def of(method: str) -> dict:
        path, model = tmp_path_factory.getbasetemp() / method, tiny_model
        if method != "draft_model":
            model = str(path)
            if not path.exists():
                save_random_mtp(path) if method == "mtp" else save_random_eagle(path, method)
        return {"method": method, "model": model, "num_speculative_tokens": NUM_DRAFTS}

    return of


@pytest.mark.parametrize("num_columns", [1, 2, 5])
def test_the_first_block_and_the_last_ones_are_kept(num_columns):
    """Blocks are numbers, their pages hold positions: over many evictions, in which columns come, change and go."""
    pages, held, start = {}, (), 0
    for step, (num_new, columns) in enumerate(
        [
            (9, range(100, 100 + num_columns)),
            # More columns; fewer; some of them blocks of the row.
            (4, range(100, 101 + num_columns)),
            (1, range(101, 101 + num_columns)),
            (3, range(500, 500 + num_columns)),
        ]
    ):
        row = [500 + index if step == 3 else 200 + start + index for index in range(num_new)]
        pages |= {block: start + index for index, block in enumerate(row)}
        before = [*held, *row]
        held, sources, targets = keep_recent(held, num_new, columns)
        assert len(set(targets)) == len(targets)
        pages |= dict(zip(targets, [pages[before[source]] for source in sources], strict=True))
        start += num_new
        assert set(held) <= set(columns)
        read = [pages[block] for block in held]
        assert read[-1:] == [start - 1]
        assert read == sorted({*read})
        assert len(held) == min(len(columns), len(before))
        if len(held) > 1:
            # A single column has no room for it.
            assert read[0] == 0 or num_columns == 1


class Watch:
    """What is drafted step by step; with ``poison`` nothing but garbage lies in blocks that are nobody's."""

    def __init__(self, engine: Engine, poison: bool):
        self.engine, self.poison, self.drafted = engine, poison, []

    def run(self) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            self.drafted.append({name.rsplit("-")[0]: of.spec_token_ids for name, of in scheduler.requests.items()})
            if self.poison:
                grid = engine.connector.worker.layers.whole
                free = torch.tensor([block.block_id for block in engine.pool.blocks if not block.ref_cnt])
                for layer in range(grid.num_layers):
                    grid.pages[grid.layer_pages(layer, free)] = 1e4


def serve(engine: Engine, num_tokens: int, poison: bool = False) -> tuple[list[Run], list]:
    """Rows of all kinds in one batch."""
    names = [
        engine.add(numbers(seed, length), num_tokens, extra_args=wish, logprobs=2, detokenize=False)
        for seed, (length, wish) in enumerate(
            [(300, {}), (50, {}), (420, {"kv_eviction": "layer-defensivekv"}), (400, {"kv_eviction": "none"}), (90, {})]
        )
    ]
    watch = Watch(engine, poison)
    watch.run()
    return [engine.run_of(name) for name in names], [list(step.values()) for step in watch.drafted]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        pytest.param("eagle", "cake", {"decode": "off"}, marks=pytest.mark.contract),
        ("draft_model", "cake", {"decode": "cake"}),
        pytest.param("draft_model", "tova", {"decode": "off"}, marks=pytest.mark.full),
        pytest.param("eagle3", "tova", {"decode": "window"}, marks=pytest.mark.full),
    ],
)
def test_rows_of_all_kinds_share_a_batch(tiny, speculation, is_v2, method, name, options):
    """What drafts read is their request's: nothing changes them that is written into blocks which are nobody's."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100, "kv_eviction_config": options, "max_num_seqs": 8}
    settings |= {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 200, "max_model_len": 1024}
    num_tokens = 8 if is_v2 else 60
    plain: Engine = tiny(**settings)
    plain.stats()
    expected, stats = serve(plain, num_tokens)[0], plain.stats()
    engine: Engine = tiny(**settings, speculative_config=speculation(method))
    runs, drafted = serve(engine, num_tokens)
    got = engine.stats()
    engine.forget_prefixes()
    again, poisoned = serve(engine, num_tokens, poison=True)
    assert drafted == poisoned
    assert sum(len(tokens) for step in drafted for tokens in step) > NUM_DRAFTS * num_tokens
    for run, other, reference in zip(runs, again, expected, strict=True):
        assert other.tokens == run.tokens
        assert_same(run, reference)
    assert got["requests"] == stats["requests"] == 2
    assert got["trims"] == stats["trims"]
    assert is_v2 or (stats["trims"] > 0) == (options["decode"] != "off")
    assert engine.is_idle()


@dataclass(frozen=True)
class HeadStreaming(StreamingLLM):
    """Heads that could keep different tokens, and do not."""

    selection: ClassVar[str] = "all"


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "decode", "prefill"),
    [
        pytest.param("streamingllm", "off", "progressive", marks=pytest.mark.full),
        pytest.param("head-streaming", "window", "progressive", marks=pytest.mark.full),
        ("head-streaming", "off", "exact"),
        pytest.param("streamingllm", "window", "exact", marks=pytest.mark.contract),
    ],
)
def test_who_reads_what_the_target_reads_drafts_what_it_says(
    tiny, speculation, monkeypatch, is_v2, name, decode, prefill
):
    """The target drafts for itself, and keeps what draft layers keep: the first block, and the last ones.

    What is drafted in the very step that evicts comes from all that there was.
    """
    monkeypatch.setitem(policies._POLICIES, "head-streaming", f"{__name__}:HeadStreaming")
    engine: Engine = tiny(
        kv_eviction=name,
        kv_eviction_budget=4 * BLOCK,
        kv_eviction_config={"n_sink": BLOCK, "decode": decode, "prefill": prefill},
        speculative_config=speculation("draft_model"),
        max_num_batched_tokens=256,
        max_model_len=1024,
    )
    before, num_tokens = drafts(engine), 8 if is_v2 else 100
    engine.stats()
    engine.generate([numbers(60, 300), numbers(61, 700)][: 1 if is_v2 else 2], num_tokens)
    accepted, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    stats = engine.stats()
    assert stats["failures"] == 0
    assert (stats["trims"] > 3) == (decode == "window" and not is_v2)
    # At its end a request is given more drafts than it needs.
    assert rejected <= NUM_DRAFTS * (2 * stats["requests"] + stats["trims"])
    assert accepted > (3 if is_v2 else 100)
    assert engine.is_idle()


@pytest.mark.engine
def test_a_policy_that_fails_leaves_drafts_what_they_read(tiny, speculation, monkeypatch, same_on_both):
    """Its request reads on what it has, and so does what drafts for it."""
    engine: Engine = tiny(
        kv_eviction="streamingllm",
        kv_eviction_budget=4 * BLOCK,
        kv_eviction_config={"n_sink": BLOCK, "decode": "window", "prefill": "exact"},
        speculative_config=speculation("draft_model"),
        max_num_batched_tokens=256,
        max_model_len=1024,
    )
    before, count = drafts(engine), 0
    settle = StreamingLLM.settle

    def failing(self, scores, budget):
        nonlocal count
        count += 1
        if count > 1 + len(engine.connector.worker.layers.target):
            raise ArithmeticError("no more")
        return settle(self, scores, budget)

    monkeypatch.setattr(StreamingLLM, "settle", failing)
    engine.stats()
    engine.generate([numbers(60, 300)], 100)
    stats = engine.stats()
    assert stats["failures"] == 1
    accepted, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    assert rejected <= NUM_DRAFTS * (3 + stats["trims"])
    assert accepted > 50
    assert engine.is_idle()


class Attended:
    """Computes what a draft layer should answer from the keys and values that it was ever given, by their position."""

    def __init__(self, engine: Engine):
        self.worker, self.held, self.num_checked = engine.connector.worker, None, 0
        (layer,) = self.worker.layers.drafts
        self.impl, self.forward, self.begin = layer.impl, layer.impl.forward, self.worker.begin
        self.keys, self.values = torch.zeros(2, 1024, 2, 32)

    def before(self, plan, metadata) -> None:
        self.begin(plan, metadata)
        self.held = next(iter(self.worker.moving.held.values())) if plan.redirected else None

    def __call__(self, layer, query, key, value, cache, metadata, output, *args, **kwargs):
        self.forward(layer, query, key, value, cache, metadata, output, *args, **kwargs)
        if metadata is None:
            return output
        num_new, end = int(metadata.query_start_loc[1]), int(metadata.seq_lens[0])
        self.keys[end - num_new : end], self.values[end - num_new : end] = key[:num_new], value[:num_new]
        seen = torch.ones(num_new, end, dtype=torch.bool).tril(end - num_new)
        if self.held is not None:
            assert graphs.step.plan.redirected, "drafts choose their graphs by it"
            start, count = self.held.start * BLOCK, len(self.held.drafted)
            seen[:, BLOCK : start - (count - 1) * BLOCK] = False
            self.num_checked += count < self.held.start
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:num_new].transpose(0, 1),
            self.keys[:end].transpose(0, 1),
            self.values[:end].transpose(0, 1),
            attn_mask=seen,
            scale=self.impl.scale,
            enable_gqa=True,
        )
        # Weights are random and so is what they make: some of these numbers are in the hundreds.
        bound = 1e-4 * max(float(expected.abs().max()), 1)
        torch.testing.assert_close(
            output[:num_new].view(num_new, -1, 32), expected.transpose(0, 1), atol=bound, rtol=1e-4
        )
        return output


@pytest.mark.engine
@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("eagle3", "layer-defensivekv", {"decode": "window"}),
        pytest.param("eagle", "cake", {"decode": "cake", "prefill": "progressive"}, marks=pytest.mark.full),
        pytest.param("mtp", "cake", {"decode": "off"}, marks=pytest.mark.full),
    ],
)
def test_a_head_reads_the_first_block_and_the_last_ones(
    start_engine, tiny_model, speculation, monkeypatch, is_v2, method, name, options
):
    """Through prefill in chunks, drafts that are rejected, and blocks given back."""
    draft = speculation(method)
    engine: Engine = start_engine(
        draft["model"] if method == "mtp" else tiny_model,
        skip_tokenizer_init=True,
        num_gpu_blocks_override=200,
        kv_eviction=name,
        kv_eviction_budget=100,
        kv_eviction_config=options,
        speculative_config=draft,
        max_num_batched_tokens=256,
        max_model_len=1024,
    )
    attended = Attended(engine)
    monkeypatch.setattr(attended.impl, "forward", attended)
    monkeypatch.setattr(attended.worker, "begin", attended.before)
    engine.generate([numbers(70, 600)], 8 if is_v2 else 120)
    assert attended.num_checked > (8 if is_v2 else 100)
    assert graphs.step.plan is None


@pytest.mark.engine
@pytest.mark.parametrize("method", ["draft_model", pytest.param("eagle", marks=pytest.mark.full)])
def test_a_pool_that_is_too_small(tiny, speculation, same_on_both, method):
    """Private columns, blocks of the row taken in place, and those of drafts come back, whoever is preempted."""
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget=100,
        kv_eviction_config={"decode": "window"},
        num_gpu_blocks_override=30,
        max_model_len=700,
        speculative_config=speculation(method),
    )
    crowd(engine, [numbers(6 + i, 60 + 60 * i) for i in range(8)])
    assert engine.stats()["in_place"]
    # A prompt from the cache, whose blocks have what the draft layers wrote there.
    prompt = numbers(20, 321)
    first, again = (engine.generate([prompt], 40)[0] for _ in range(2))
    assert first == again
    assert engine.num_cached(list(engine.outputs)[-1]) >= 256
    assert engine.is_idle()


@pytest.mark.engine
@pytest.mark.full
def test_requests_that_are_cut_when_memory_is_short(tiny, speculation, same_on_both):
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget="auto",
        kv_eviction_config={"min_tokens": 64},
        num_gpu_blocks_override=40,
        max_model_len=700,
        speculative_config=speculation("draft_model"),
    )
    engine.stats()
    done = engine.generate([numbers(30 + i, 200 + 60 * i) for i in range(5)], 120)
    stats = engine.stats()
    assert [len(tokens) for tokens in done] == [120] * 5
    assert stats["cuts"] > 2
    assert stats["failures"] == 0
    assert engine.is_idle()


@pytest.mark.engine
@pytest.mark.full
def test_a_real_model_drafts_for_itself(start_engine, model_dir, text_ids, same_on_both):
    """What is served is what a replay says that knows of no drafts; most of what is drafted is served."""
    engine: Engine = start_engine(
        kv_eviction="cake",
        kv_eviction_budget=256,
        max_num_batched_tokens=512,
        speculative_config={"method": "draft_model", "model": model_dir, "num_speculative_tokens": NUM_DRAFTS},
    )
    prompt = text_ids[:700]
    (served,) = engine.served([prompt], 80)
    Replay(model_dir).verify(prompt, served, create_policy("cake", {}), 256, block_size=BLOCK)
    accepted, rejected = drafts(engine)
    assert accepted > rejected


@pytest.mark.engine
@pytest.mark.full
def test_drafts_that_are_verified_a_step_late(tiny, speculation, asynchronous, same_on_both):
    """Under asynchronous scheduling, which vLLM turns off on a CPU, though it runs there."""
    settings = {"kv_eviction": "streamingllm", "kv_eviction_budget": 4 * BLOCK, "max_num_batched_tokens": 256}
    settings |= {"kv_eviction_config": {"n_sink": BLOCK, "decode": "off"}, "max_model_len": 1024}
    wishes = [(300, {}), (50, {}), (420, {"kv_eviction": "none"}), (700, {}), (90, {})]

    def serve(engine: Engine) -> list[Run]:
        names = [
            engine.add(numbers(60 + seed, length), 100, extra_args=wish, logprobs=2, detokenize=False)
            for seed, (length, wish) in enumerate(wishes)
        ]
        engine.run()
        return [engine.run_of(name) for name in names]

    expected = serve(tiny(**settings))
    engine: Engine = tiny(**settings, speculative_config=speculation("draft_model"), **asynchronous)
    assert engine.vllm_config.scheduler_config.async_scheduling
    for run, reference in zip(serve(engine), expected, strict=True):
        assert_same(run, reference)
    assert engine.stats()["requests"] == 2
    accepted, rejected = drafts(engine)
    assert rejected <= NUM_DRAFTS * (2 + len(wishes))
    assert accepted > 300
