"""Serving with eviction: what must not change, what must not depend on the batch, and where the memory goes."""

import pytest
from engine import Engine, same_positions
from random_models import numbers
from stock import stock
from ties import Run, assert_same

pytestmark = pytest.mark.engine


def lengths(is_v2: bool) -> list[int]:
    """Twenty prompt lengths from 10 to 4,000 (fewer and shorter on the interpreted runner)."""
    count, longest = (6, 1500) if is_v2 else (20, 4000)
    return [round(10 * (longest / 10) ** (i / (count - 1))) for i in range(count)]


@pytest.fixture(scope="module")
def mixed_prompts(is_v2) -> list[list[int]]:
    return [numbers(300 + i, length) for i, length in enumerate(lengths(is_v2))]


@pytest.fixture(scope="module")
def stock_tokens(tiny_model, mixed_prompts, is_v2) -> list[list[int]]:
    """Tokens of a vLLM that has never heard of the plugin, from a process of its own."""
    return [tokens for tokens, _ in stock(is_v2, tiny_model, mixed_prompts, 8, skip_tokenizer_init=True)]


def test_off_uses_stock_classes(tiny):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    engine: Engine = tiny(num_gpu_blocks_override=None)
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl) for layer in layers} == {CPUAttentionBackendImpl}
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    assert [type(group.kv_cache_spec) for group in groups] == [FullAttentionSpec]
    assert engine.vllm_config.kv_transfer_config is None
    assert engine.vllm_config.additional_config == {}
    assert engine.vllm_config.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"kv_eviction": "none"}, {"kv_eviction": "cake", "kv_eviction_budget": 4000}],
    ids=["unused", "none", "budget-of-the-longest-prompt"],
)
def test_nothing_changes_where_nothing_is_evicted(tiny, mixed_prompts, stock_tokens, kwargs):
    engine: Engine = tiny(num_gpu_blocks_override=None, **kwargs)
    assert engine.evicts == (kwargs.get("kv_eviction") == "cake")
    assert engine.generate(mixed_prompts, 8) == stock_tokens


@pytest.fixture(scope="module")
def in_one_chunk(prompts, is_v2) -> list[list[int]]:
    # Chunks of 256 end with one of one token. Triton's interpreter is slow.
    lengths = (500, 1025) if is_v2 else (1000, 2049)
    return [prompts[of][:length] for of, length in zip((1000, 2049), lengths, strict=True)]


_seen: dict[str, list[Run]] = {}


@pytest.mark.parametrize("chunk", [8192, 256])
def test_chunk_size_and_batch_do_not_matter(start_engine, in_one_chunk, chunk):
    engine: Engine = start_engine(kv_eviction="cake", kv_eviction_budget=200, max_num_batched_tokens=chunk)
    alone = [engine.runs([prompt], 16)[0] for prompt in in_one_chunk]
    together = engine.runs(in_one_chunk, 16)
    reference = _seen.setdefault("reference", alone)
    for run, expected in zip([*alone, *together], 2 * reference, strict=True):
        assert len(run.kept) == 30
        assert_same(run, expected)


@pytest.fixture
def evicting(start_engine) -> Engine:
    return start_engine(kv_eviction="cake", kv_eviction_budget=0.2, max_num_batched_tokens=512)


def test_pages_return_after_many_requests(tiny):
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=0.2, max_num_batched_tokens=512)
    names = [engine.add(numbers(i, 100 + 60 * i), 4 + i) for i in range(20)]
    done = engine.run()
    assert {len(done[name]) for name in names} == {4 + i for i in range(20)}
    assert engine.is_idle()


def test_pages_return_after_abort(evicting: Engine, text_ids):
    evicting.stats()
    prefilling = evicting.add(text_ids[:1500], 50)
    evicting.step()
    evicting.abort(prefilling)
    evicting.run()
    assert evicting.is_idle()
    assert not evicting.stats()

    decoding = evicting.add(text_ids[:1000], 500)
    finishing = evicting.add(text_ids[:700], 30)
    for _ in range(10):
        evicting.step()
    assert evicting.stats()["requests"] == 2
    assert evicting.pool.get_num_free_blocks() > evicting.num_free - 60
    evicting.abort(decoding)
    assert list(evicting.run()) == [finishing]
    assert evicting.is_idle()


def test_memory_is_free_while_the_request_runs(evicting: Engine, text_ids):
    prompt = text_ids[:1600]
    evicting.stats()
    evicting.add(prompt, 20)
    while not (stats := evicting.stats()):
        evicting.step()
    held = evicting.num_free - evicting.pool.get_num_free_blocks()
    assert held == 1600 // 32 - stats["freed_blocks"]
    kept = sum(stats["kept_tokens"])
    # 20% of the prompt, and less than a block more in each layer.
    assert 30 * 320 <= kept < 30 * (320 + 32)
    assert stats["evicted_tokens"] == 1600 - 32 * held
    assert stats["rounding_tokens"] == 32 * held - 320 < 64
    evicting.run()


@pytest.fixture
def tiny_ids(text_ids) -> list[int]:
    return [token % 250 for token in text_ids]


def test_pages_return_when_the_model_length_ends_a_request(tiny, tiny_ids):
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=100, max_model_len=600)
    assert [len(tokens) for tokens in engine.generate([tiny_ids[:590], tiny_ids[:400]], 1000)] == [10, 200]
    assert engine.is_idle()


def test_a_preempted_request_is_evicted_again(tiny, tiny_ids, same_on_both):
    """A pool too small for the load: everything finishes, with the tokens that it has alone."""
    # Two requests of 10 blocks fit, one of them evicted; their output does not.
    pool = {"max_model_len": 512, "num_gpu_blocks_override": 16 + 1}
    options = {"decode": "off"}
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=128, kv_eviction_config=options, **pool)
    prompts = [tiny_ids[400 * i : 400 * i + 320] for i in range(2)]
    alone = [engine.runs([prompt], 110)[0] for prompt in prompts]
    engine.stats()
    names = [engine.add(prompt, 110) for prompt in prompts]
    preemptions: dict[str, int] = {}
    done: dict[str, list[int]] = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        done |= engine.step()
        for request in engine.scheduler.requests.values():
            preemptions[request.request_id.rsplit("-", 1)[0]] = request.num_preemptions
    assert engine.is_idle()
    assert list(preemptions.values()) == [0, 1], "the pool was not tight enough to test anything"
    assert engine.stats()["requests"] == 3
    assert [len(done[name]) for name in names] == [110, 110]
    for name, reference in zip(names, alone, strict=True):
        assert_same(engine.run_of(name), reference)


def test_eviction_in_place_when_the_pool_is_full(start_engine, text_ids):
    """Without free pages to copy to, the prompt's own pages are reused; the result is the same."""
    roomy: Engine = start_engine(kv_eviction="cake", kv_eviction_budget=300, max_model_len=760)
    prompt = text_ids[:700]
    (expected,) = roomy.trace([prompt], 20)
    assert roomy.stats()["in_place"] == 0
    blocks = -(-760 // 32) + 1
    tight: Engine = start_engine(
        kv_eviction="cake", kv_eviction_budget=300, max_model_len=760, num_gpu_blocks_override=blocks
    )
    (got,) = tight.trace([prompt], 20)
    stats = tight.stats()
    assert stats["in_place"] == 1
    assert stats["freed_blocks"] > 0
    assert got[0] == expected[0]
    assert same_positions(got[1], expected[1])
    assert tight.is_idle()


def test_sixteen_requests_run_in_a_pool_for_three(tiny, tiny_ids, same_on_both):
    """One full prompt is in prefill while the evicted ones decode; stock vLLM runs three."""
    length, concurrent = 2000, 16
    pool = {"max_model_len": length + 300, "max_num_batched_tokens": length}
    per_prompt = -(-(length + 60) // 32)
    prompts = [tiny_ids[200 * i : 200 * i + length] for i in range(concurrent)]
    assert most_running(tiny(num_gpu_blocks_override=3 * per_prompt + 1, **pool), prompts[:5], 60) == 3
    engine: Engine = tiny(
        kv_eviction="cake", kv_eviction_budget=0.1, num_gpu_blocks_override=3 * per_prompt + 1, **pool
    )
    assert most_running(engine, prompts, 60) == concurrent


def most_running(engine: Engine, prompts: list[list[int]], num_tokens: int) -> int:
    """vLLM's own count of running requests, at its highest."""
    for prompt in prompts:
        engine.add(prompt, num_tokens)
    most = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        most = max(most, engine.num_running)
    assert engine.is_idle()
    return most


def test_engines_of_one_process(no_engine, tiny_model, same_on_both):
    """vLLM has one KV connector per process: who comes second is refused with a sentence, and who was there goes on.

    A stock engine that was there first knows nothing of it.
    """
    no_engine()
    settings = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 300}
    evicting = settings | {"kv_eviction": "cake", "kv_eviction_budget": 100}
    stock = Engine(tiny_model, **settings)
    whole = stock.generate([numbers(3, 600)], 20)
    engine = Engine(tiny_model, **evicting)
    expected = engine.generate([numbers(3, 600)], 20)
    assert expected != whole
    stock.forget_prefixes()
    assert stock.generate([numbers(3, 600)], 20) == whole
    for second in (settings, evicting | {"kv_eviction_budget": 200}):
        with pytest.raises(RuntimeError, match="lives in this process, and another one cannot start beside it: shut"):
            Engine(tiny_model, **second)
        engine.forget_prefixes()
        assert engine.generate([numbers(3, 600)], 20) == expected
    engine.shutdown()
    del stock.llm, stock.core
    engine = Engine(tiny_model, **evicting)
    assert engine.generate([numbers(3, 600)], 20) == expected
    engine.shutdown()
