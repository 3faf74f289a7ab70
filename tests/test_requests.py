"""What a request may ask for itself, and what it may use beside eviction."""

import json

import numpy as np
import pytest
from engine import Engine
from random_models import numbers, save_random_adapter
from ties import Run, assert_same
from transformers.models.llama.modeling_llama import LlamaModel
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

pytestmark = pytest.mark.engine


@pytest.fixture
def engine(tiny) -> Engine:
    return tiny(kv_eviction="cake", kv_eviction_budget=300, max_num_batched_tokens=512)


def test_a_smaller_budget_does_not_meet_a_long_prefix_hit(engine: Engine):
    """The engine's own settings let a short prompt hit all but its last block, and this request needs a window."""
    prompt = numbers(21, 310)
    engine.forget_prefixes()
    own = {"kv_eviction_budget": 60, "kv_eviction_report": 1}
    (cold,) = engine.runs([prompt], 30, extra_args=own)
    names = [engine.add(prompt, 4), engine.add(prompt, 30, extra_args=own)]
    engine.run()
    assert engine.num_cached(names[0]) == 288
    assert_same(engine.run_of(names[1]), cold)
    assert engine.is_idle()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kv_eviction": "cade"}, "kv_eviction 'cade' is unknown: choose none, "),
        ({"kv_eviction_budget": 0}, "kv_eviction_budget 0 is not a budget"),
        ({"kv_eviction_budget": 20}, "kv_eviction_budget 20 leaves nothing beside the window"),
        ({"kv_eviction": "none", "kv_eviction_budget": 20}, "kv_eviction_budget has no effect"),
    ],
)
def test_bad_wishes_are_refused(engine: Engine, wish, message):
    with pytest.raises(VLLMValidationError, match=f"^{message}"):
        engine.add([1, 2, 3], 4, extra_args=wish)
    assert engine.is_idle()


def test_a_policy_that_raises_costs_no_request(engine: Engine, monkeypatch):
    """Whether it scores, divides or ranks: the request is served with all it has, and the next one is evicted.

    The log says where it raised.
    """
    from cake_vllm.integration.worker import judging
    from cake_vllm.policies.cake import Cake

    prompt, logged = numbers(23, 900), []
    monkeypatch.setattr(judging.logger, "warning_once", lambda form, *args: logged.append(form % args))

    def cold(**params) -> list[list[int]]:
        engine.forget_prefixes()
        return engine.generate([prompt], 30, **params)

    evicted = cold()
    engine.stats()
    unlimited = cold(extra_args={"kv_eviction": "none"})
    assert evicted != unlimited
    for method in ("score", "budgets", "rank"):

        def fail(*args, **kwargs):
            raise ArithmeticError("no")

        with monkeypatch.context() as patch:
            patch.setattr(Cake, method, fail)
            assert cold() == unlimited
        assert "ArithmeticError: no" in logged[-1]
        assert f'{__file__}", line' in logged[-1]
        stats = engine.stats()
        assert (stats["failures"], stats["requests"], stats["freed_blocks"]) == (1, 0, 0)
        assert engine.is_idle()
    assert cold() == evicted


WISHES = [
    {},
    {"kv_eviction": "none"},
    {"kv_eviction_budget": 100},
    {"kv_eviction": "layer-defensivekv", "kv_eviction_budget": "0.5"},
    {"kv_eviction": "snapkv"},
    {"kv_eviction_budget": "auto"},
]


def test_requests_with_budgets_of_their_own(engine: Engine, tiny, is_v2):
    """In one batch they get what engines that are set up for each of them give."""
    prompt = numbers(20, 900)
    engine.forget_prefixes()
    engine.stats()
    names = [engine.add(prompt, 40, extra_args={**wish, "kv_eviction_report": 1}) for wish in WISHES]
    engine.run()
    together = dict(zip(names, map(engine.run_of, names), strict=True))
    reports = [engine.outputs[name].kv_transfer_params["kv_eviction"] for name in names]
    assert [report["policy"] for report in reports] == ["cake", "none", "cake", "layer-defensivekv", "snapkv", "cake"]
    assert [report["budget"] for report in reports] == [300, None, 100, 0.5, 300, "auto"]
    means = [np.mean(report["kept_tokens"]) if report["kept_tokens"] else None for report in reports]
    assert [np.shape(report["kept_tokens"]) for report in reports[:5]] == [(4,), (), (4,), (4, 2), (4,)]
    assert means[1] is None
    assert 300 <= means[0] < 380
    assert 100 <= means[2] < 180
    assert 450 <= means[3] < 530
    assert 300 <= means[4] < 332
    assert engine.is_idle()
    # The automatic budget depends on the load; and each of the others is an engine, two of which will do on V2.
    for name, wish in list(zip(names, WISHES, strict=True))[1 : 3 if is_v2 else 5]:
        settings = {"kv_eviction": "cake", "kv_eviction_budget": 300} | wish
        if settings["kv_eviction"] == "none":
            settings = {}
        alone: Engine = tiny(max_num_batched_tokens=512, **settings)
        assert_same(together[name], *alone.runs([prompt], 40))


def test_wishes_need_a_server_with_eviction(tiny):
    engine: Engine = tiny()
    with pytest.raises(VLLMValidationError, match="kv_eviction needs a server with eviction: start it with"):
        engine.add([1, 2, 3], 4, extra_args={"kv_eviction": "cake"})
    engine.generate([[1, 2, 3]], 4, extra_args={"kv_eviction": "none"})


def test_progressive_prefill_bounds_what_a_request_may_ask_for(tiny):
    options = {"prefill": "progressive"}
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=300, kv_eviction_config=options)
    for wish in ({"kv_eviction_budget": 400}, {"kv_eviction": "none"}, {"kv_eviction": "knorm"}):
        with pytest.raises(VLLMValidationError, match="must not let it hold more than the server's"):
            engine.add([1, 2, 3], 4, extra_args=wish)
    assert len(engine.generate([numbers(22, 900)], 4, extra_args={"kv_eviction_budget": 200})[0]) == 4


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_a_failure_while_pages_are_moved(tiny, monkeypatch, name):
    """Owners that were moved stay moved, the others keep what they have, and every page comes back."""
    from cake_vllm.kernels import BlockLayout

    settings = {"max_model_len": 960, "max_num_batched_tokens": 512}
    prompt, move, answers = numbers(24, 900), BlockLayout.move, []
    # Copied, and in place.
    for blocks in (1500, 32):
        engine: Engine = tiny(kv_eviction=name, kv_eviction_budget=300, num_gpu_blocks_override=blocks, **settings)
        whole = engine.generate([prompt], 50, extra_args={"kv_eviction": "none"})
        evicted = engine.generate([prompt], 50)
        engine.forget_prefixes()
        calls = []

        def fail_third(*args, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
            move(*args)

        engine.stats()
        with monkeypatch.context() as patch:
            patch.setattr(BlockLayout, "move", fail_third)
            answers += engine.generate([prompt], 50)
        stats = engine.stats()
        assert (stats["failures"], stats["requests"]) == (1, 0)
        assert stats["freed_blocks"] == stats["in_place"] == 0
        assert answers[-1] not in (whole[0], evicted[0])
        assert engine.is_idle()
    assert answers[0] == answers[1]


@pytest.fixture
def smol(start_engine) -> Engine:
    return start_engine(kv_eviction="cake", kv_eviction_budget=150, max_num_batched_tokens=512)


def test_sampling_features(smol: Engine, text_ids, same_on_both):
    """Each beside a request of another kind, in one batch, on prompts that are evicted."""
    prompts = [text_ids[1000 * i : 1000 * i + 500] for i in range(7)]
    (plain,) = smol.runs([prompts[0]], 12)
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
    params = {
        "plain": {},
        "n": {"n": 3, "temperature": 1.0, "output_kind": RequestOutputKind.FINAL_ONLY},
        "logprobs": {"logprobs": 3},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "stop": {"stop": ["e"], "max_tokens": 60},
        "json": {"structured_outputs": StructuredOutputsParams(json=schema), "max_tokens": 40, "ignore_eos": False},
        "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    }
    smol.stats()
    names = {
        what: smol.add(prompt, **({"max_tokens": 12} | wish))
        for prompt, (what, wish) in zip(prompts, params.items(), strict=True)
    }
    smol.run()
    outputs = {what: smol.outputs[name] for what, name in names.items()}
    assert_same(smol.run_of(names["plain"]), plain)
    assert len(outputs["n"].outputs) == 3
    assert all(len(step) >= 3 for step in outputs["logprobs"].outputs[0].logprobs)
    assert len(outputs["prompt_logprobs"].prompt_logprobs) == 500
    assert outputs["stop"].outputs[0].finish_reason == "stop"
    assert isinstance(json.loads(outputs["json"].outputs[0].text)["year"], int)
    assert smol.stats()["requests"] == len(params) + 2
    assert smol.is_idle()


def test_an_interruption_leaves_no_page_behind(smol: Engine, text_ids):
    """As between training steps: what runs is aborted, the cache forgotten, and serving goes on."""
    names = [smol.add(text_ids[300 * i : 300 * i + 400], 50) for i in range(3)]
    for _ in range(6):
        smol.step()
    smol.abort(*names)
    smol.run()
    smol.forget_prefixes()
    assert smol.is_idle()
    assert len(smol.llm.generate({"prompt_token_ids": text_ids[:400]}, SamplingParams(max_tokens=5))) == 1
    assert smol.is_idle()


def test_prompt_logprobs_do_not_depend_on_eviction(smol: Engine, start_engine, text_ids, same_on_both):
    """They come from the whole prompt."""
    prompt = text_ids[2000:2400]

    def logprobs(engine: Engine) -> list[float]:
        name = engine.add(prompt, 2, prompt_logprobs=0)
        engine.run()
        steps = engine.outputs[name].prompt_logprobs[1:]
        return [next(iter(step.values())).logprob for step in steps]

    ours = logprobs(smol)
    assert ours == pytest.approx(logprobs(start_engine()), abs=1e-4)


def test_lora_beside_the_base_model(tiny, tmp_path, same_on_both):
    """Requests with and without an adapter, evicted in one batch; served in full they are stock vLLM's."""
    adapter = LoRARequest("adapter", 1, save_random_adapter(tmp_path / "adapter", num_layers=4))
    settings = {"enable_lora": True, "max_lora_rank": 8, "max_num_batched_tokens": 512}
    prompt = numbers(25, 700)

    def served(engine: Engine, **params) -> list[Run]:
        names = [engine.add(prompt, 20, lora_request=lora, **params) for lora in (None, adapter)]
        engine.run()
        return [engine.run_of(name) for name in names]

    stock = served(tiny(**settings))
    engine: Engine = tiny(kv_eviction="criticalkv", kv_eviction_budget=100, **settings)
    assert [run.tokens for run in served(engine, extra_args={"kv_eviction": "none"})] == [run.tokens for run in stock]
    engine.stats()
    together = served(engine)
    assert engine.stats()["requests"] == 2
    # The adapter's row alone: stock vLLM on CPUs gives the base model's rows other tokens in a mixed batch.
    assert_same(together[1], *engine.runs([prompt], 20, lora_request=adapter))
    assert len({tuple(run.tokens) for run in (*stock, *together)}) == 4
    assert engine.is_idle()


def test_a_model_of_transformers_is_evicted_as_vllms_own(tiny, monkeypatch, same_on_both):
    """With the projections found, which `criticalkv` weighs values by."""
    for name in ("__init__", "__call__"):
        # vLLM changes the class, which models are made and replayed with.
        monkeypatch.setattr(LlamaModel, name, getattr(LlamaModel, name))
    settings = {"kv_eviction": "criticalkv", "kv_eviction_budget": 200, "max_num_batched_tokens": 512}
    prompts = [numbers(26, 700), numbers(27, 900)]
    ours = tiny(**settings).runs(prompts, 8)
    theirs = tiny(**settings, model_impl="transformers").runs(prompts, 8)
    for run, reference in zip(theirs, ours, strict=True):
        assert_same(run, reference)
