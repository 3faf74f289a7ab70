"""Any history of requests, over a lower tier that has more room than the pool, and not enough for all prompts.

What the tier holds under a prompt's hash is what the prompt computes when nobody evicts it, and in the end nothing is
left of any request, in the pool or below.
"""

import pytest
from counting import living
from engine import Engine, Late
from hybrids import save_hybrid
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from random_models import KINDS, numbers, save_random_kind
from test_lifecycle import ELASTIC, PROGRESSIVE, SHARED, Lifecycle
from tiers import Chunk, Tier, beside, exact_chunks, inexact, of_target

pytestmark = pytest.mark.engine

#: All that histories ask for begins as one of these; crowds, and who thinks, come where budgets are elastic.
PROMPTS = [SHARED, *(numbers(71 + seed, 640) for seed in range(4))]
OF_CROWDS = [numbers(first + seed, 640) for first in (171, 181) for seed in range(6)]


class TieredLifecycle(Lifecycle):
    """The same, as far as vLLM's offloading survives it."""

    def __init__(self, engine: Engine, late: Late | None, exact: dict[bytes, Chunk]):
        super().__init__(engine, late)
        self.tier, self.exact = Tier(engine), exact

    @property
    def may_clear(self) -> bool:
        """A pause that clears caches preempts what runs, and vLLM ends if that is loaded before it hears of it."""
        return False

    def reset(self, running: bool, external: bool) -> None:
        # For the same reason nothing that runs starts again; nor can vLLM forget what is being copied.
        if not self.tier.half._jobs:
            super().reset(False, external)

    @rule(lengths=st.lists(st.integers(400, 640), min_size=2, max_size=5), count=st.integers(4, 16))
    def come_back(self, lengths, count):
        """Conversations that push each other out."""
        for prompt, length in zip(PROMPTS, lengths, strict=False):
            self.alive.append(self.engine.add(prompt[:length], 8))
        self.step(count)

    def rehearse(self) -> None:
        """The same, and comes back when the pool has forgotten what the tier has not."""
        for prompt in PROMPTS:
            # No longer than what is exact of it where it is evicted as it comes.
            for length in (140, 640):
                self.engine.generate([prompt[:length]], 8)
                self.tier.drain()
                self.reset(False, False)
        super().rehearse()

    def teardown(self):
        self.core.resume_scheduler()
        self.tier.drain()
        super().teardown()
        self.tier.drain()
        chunks, exact = self.tier.chunks(), self.exact
        if self.engine.connector.worker.layers.drafts:
            # Where a prompt's own blocks become columns, these have not written to them yet.
            chunks, exact = of_target(self.engine, chunks), of_target(self.engine, exact)
        assert inexact(chunks, exact) == 0


def hits(engine: Engine) -> int:
    """Tokens that were loaded, ever."""
    return next(of.value for of in engine.llm.get_metrics() if of.name == "vllm:external_prefix_cache_hits")


#: By kind of model: blocks of a pool in which vLLM preempts, tokens of a block, and bytes of a tier that forgets.
POOLS = {"llama": (56, 32, 80 << 16), "sinks": (84, 32, 90 << 15), "lfm2": (34, 64, 40 * 3 << 15)}


@pytest.fixture
def model_of(tiny_model, tmp_path_factory):
    """A small model of a kind."""

    def of(kind: str) -> str:
        if kind == "llama":
            return tiny_model
        path = tmp_path_factory.mktemp(kind)
        return save_random_kind(path, kind) if kind in KINDS else save_hybrid(kind, path)[0]

    return of


@pytest.mark.parametrize(
    ("options", "when", "kind"),
    [
        (PROGRESSIVE, "a step late", "llama"),
        pytest.param(ELASTIC, "at once", "llama", marks=pytest.mark.full),
        pytest.param(PROGRESSIVE, "drafts, too", "llama", marks=pytest.mark.full),
        pytest.param({}, "at once", "sinks", marks=pytest.mark.full),
        pytest.param(PROGRESSIVE, "a step late", "lfm2", marks=pytest.mark.full),
    ],
)
def test_any_history_over_a_small_tier(start_engine, model_of, options, when, kind, monkeypatch, request, same_on_both):
    """In a pool in which vLLM preempts, and a tier that forgets."""
    blocks, size, room = POOLS[kind]
    small = {
        "skip_tokenizer_init": True,
        "block_size": size,
        "kv_eviction": "cake",
        "max_model_len": 700,
        "num_gpu_blocks_override": 30 if options is ELASTIC else blocks,
        **beside(cpu_bytes_to_use=room),
        **(request.getfixturevalue("drafts_a_step_late") if when == "drafts, too" else {}),
    }
    prompts = [*PROMPTS, *(OF_CROWDS if options is ELASTIC else ())]
    # Windows and states wherever a block ends.
    dense = {"max_num_batched_tokens": 256} if kind == "llama" else {"max_num_batched_tokens": size}
    dense |= {} if kind == "llama" else {"prefix_cache_retention_interval": size}
    model = model_of(kind)
    exacting = start_engine(model, **small, **dense, kv_eviction_budget=100, kv_eviction_config={})
    # One after the other, as they do not fit in together.
    exact = {key: chunk for prompt in prompts for key, chunk in exact_chunks(exacting, [prompt]).items()}
    assert len(exact) == (1 if kind == "llama" else 2) * len(prompts) * 640 // size
    budget = "auto" if options is ELASTIC else 100
    engine: Engine = start_engine(
        model, **small, max_num_batched_tokens=256, kv_eviction_budget=budget, kv_eviction_config=options
    )
    assert 1000 // size < Tier(engine).half.manager._num_chunks < len(exact)
    late = None
    if when == "a step late":
        late = Late(engine.scheduler.connector.scheduler, monkeypatch)
        # The halves agree again when the report is there.
        monkeypatch.setattr(engine, "_check_halves", lambda: None)
    engine.stats()
    loaded = hits(engine)
    TieredLifecycle(engine, late, exact).rehearse()
    assert hits(engine) - loaded >= 128 * len(PROMPTS)
    stats = engine.stats()
    assert stats["cuts" if options is ELASTIC else "requests"] > 5
    run_state_machine_as_test(
        lambda: TieredLifecycle(engine, late, exact),
        settings=settings(
            max_examples=4,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert stats["failures"] == engine.stats().get("failures", 0) == 0
    assert not living()
