"""What a request may ask for over HTTP, on every endpoint; what it is told, however it ends; and what is refused."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import numpy as np
import pytest
from conftest import ROOT, as_users_start
from engine import Engine, same_positions
from random_models import numbers
from vllm.exceptions import VLLMValidationError
from vllm.v1.serial_utils import MsgpackEncoder

from cake_vllm.config import parse_budget

sys.path.insert(0, str(ROOT / "deploy"))

from demo import samples, server

BUDGET, LAYERS = 128, 4
IDS = list(range(1000, 1500))
TEXT = " ".join(map(str, range(250)))
MESSAGES = [{"role": "user", "content": TEXT}]
REPORT = {"kv_eviction_report": "true"}
GREEDY = {"temperature": 0, "ignore_eos": True}

#: Endpoints by what they are called here: path, and a body with a prompt that is evicted.
ENDPOINTS = {
    "completions": ("v1/completions", {"prompt": IDS, "max_tokens": 8, **GREEDY}),
    "chat": ("v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, **GREEDY}),
    "responses": ("v1/responses", {"input": TEXT, "max_output_tokens": 8, "temperature": 0}),
    "messages": ("v1/messages", {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}),
    "generate": ("inference/v1/generate", {"token_ids": IDS, "sampling_params": {"max_tokens": 8, **GREEDY}}),
}


@pytest.fixture(scope="module")
def url(chatty_model):
    """A server as users start it, with the endpoints that control it and those for token ids."""
    flags = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "2048", "--enforce-eager"]
    flags += ["--enable-scale-out", "--kv-eviction", "cake", "--kv-eviction-budget", str(BUDGET)]
    with ExitStack() as stack:
        # Engines of other tests run beside this server, with the environment as it was.
        with as_users_start(VLLM_SERVER_DEV_MODE="1"):
            address = stack.enter_context(server(chatty_model, *flags))
        yield address


def post(url: str, path: str, body: dict) -> tuple[int, dict]:
    """Status and answer."""
    data = json.dumps({"model": "demo", **body}).encode()
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else {"stream": text.decode()}
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(url: str, endpoint: str, wishes: dict, **more) -> tuple[int, dict]:
    path, body = ENDPOINTS[endpoint]
    if endpoint == "generate":
        body = {**body, "sampling_params": {**body["sampling_params"], "extra_args": wishes}}
    else:
        body = {**body, "vllm_xargs": wishes}
    return post(url, path, body | more)


def report(answer: tuple[int, dict]) -> dict:
    status, body = answer
    assert status == 200, body
    return body["kv_transfer_params"]["kv_eviction"]


def kept_as_many_as_asked(told: dict, budget: int = BUDGET) -> bool:
    return len(told["kept_tokens"]) == LAYERS and budget <= sum(told["kept_tokens"]) / LAYERS < budget + 32


def refusal(answer: tuple[int, dict]) -> str:
    """The message of an HTTP 400."""
    status, body = answer
    assert status == 400, body
    return body["error"]["message"]


@pytest.mark.slow
@pytest.mark.contract
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_reports(url, endpoint):
    told = report(ask(url, endpoint, REPORT))
    assert (told["policy"], told["budget"]) == ("cake", BUDGET)
    assert kept_as_many_as_asked(told)
    status, silent = ask(url, endpoint, {})
    assert (status, silent.get("kv_transfer_params")) == (200, None)


@pytest.mark.slow
def test_every_end_is_reported(url):
    """By length, stop string, stop token and end of text, at the second token and later."""
    path, body = ENDPOINTS["completions"]
    _, whole = post(url, path, {**body, "return_token_ids": True})
    text, tokens = whole["choices"][0]["text"], whole["choices"][0]["token_ids"]
    ends = {
        "length": {},
        "a stop string": {"stop": [text[len(text) // 2 :][:4]]},
        "a stop string at once": {"stop": [text[:3]]},
        "a stop token": {"stop_token_ids": [tokens[3]]},
        "the end of the text": {"ignore_eos": False, "min_tokens": 3, "logit_bias": {"2": 100}},
    }
    reasons = {}
    for end, how in ends.items():
        answer = post(url, path, {**body, **how, "vllm_xargs": REPORT})
        assert kept_as_many_as_asked(report(answer)), end
        reasons[end] = answer[1]["choices"][0]["finish_reason"]
    assert reasons == {"length": "length"} | dict.fromkeys(list(ends)[1:], "stop")


@pytest.mark.slow
@pytest.mark.parametrize("evicted", [True, False])
def test_an_abort_is_reported(url, evicted):
    """Of a request that was evicted, and of one that was too short for it."""
    path, body = ENDPOINTS["completions"]
    body = {**body, "prompt": IDS if evicted else IDS[:50], "max_tokens": 1500, "vllm_xargs": REPORT}
    answers = []
    client = threading.Thread(target=lambda: answers.append(post(url, path, body)))
    tokens = "vllm:generation_tokens_total"
    before = sum(value for *_, value in samples(url, tokens))
    client.start()
    deadline = time.monotonic() + 60
    while sum(value for *_, value in samples(url, tokens)) < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    post(url, "pause?mode=abort", {})
    post(url, "resume", {})
    client.join()
    told = report(answers[0])
    assert answers[0][1]["choices"][0]["finish_reason"] == "abort"
    assert kept_as_many_as_asked(told) if evicted else told == {"policy": "cake", "budget": 128, "kept_tokens": None}


#: Wishes that no endpoint takes, and words of the answer.
BAD_WISHES = [
    ({"kv_eviction": "cade"}, "kv_eviction 'cade' is unknown: choose none, "),
    ({"kv_eviction_budget": -1}, "kv_eviction_budget -1 is not a budget"),
    ({"kv_eviction_buget": 64}, "kv_eviction_buget is unknown: a request may give kv_eviction, kv_eviction_budget, "),
    ({"kv-eviction-budget": 64}, "kv-eviction-budget is unknown: a request may give"),
    ({"KV_EVICTION": "none"}, "KV_EVICTION is unknown: a request may give"),
    ({"kv_eviction_report": "maybe"}, "kv_eviction_report 'maybe' is neither yes nor no: give true or false"),
    ({"kv_eviction_config": "{"}, "kv_eviction_config is not valid JSON"),
    ({"kv_eviction_config": "[1]"}, "kv_eviction_config must be a JSON object"),
    ({"kv_eviction_config": '{"gama": 1}'}, "kv_eviction_config: gama is unknown to cake; a request may give cascade"),
    ({"kv_eviction_config": '{"gamma": -1}'}, "kv_eviction_config: gamma must be a finite number of at least 0"),
    # Numbers that no message carries or no tensor is multiplied with, and text that takes a parser's breath.
    (
        {"kv_eviction_budget": "1" + 30 * "0", **REPORT},
        "is not a budget: give a positive whole number of tokens up",
    ),
    ({"kv_eviction_config": '{"gamma": 1' + 20 * "0" + "}"}, "kv_eviction_config: gamma must be a finite number"),
    ({"kv_eviction_config": '{"gamma": 1' + 400 * "0" + "}"}, "kv_eviction_config: gamma must be a finite number"),
    ({"kv_eviction_config": 200_000 * "["}, "kv_eviction_config is not valid JSON"),
]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_bad_wishes_get_status_400(url, endpoint, stream):
    """Streams too, whose status is sent before they begin."""
    for wishes, message in BAD_WISHES:
        assert message in refusal(ask(url, endpoint, wishes, stream=stream))
    ((*_, waiting),) = samples(url, "vllm:num_requests_waiting")
    assert waiting == 0


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat", "responses"])
def test_wishes_beside_vllm_xargs_are_refused(url, endpoint):
    """These endpoints take any key, and nobody would read it."""
    assert "kv_eviction_budget is a key of vllm_xargs" in refusal(ask(url, endpoint, {}, kv_eviction_budget=64))


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_report_that_would_not_arrive_is_refused(url, endpoint):
    """A stream has no place for it."""
    message = "kv_eviction_report is about one choice, in an answer that is not streamed"
    assert message in refusal(ask(url, endpoint, REPORT, stream=True))
    status, answer = ask(url, endpoint, {"kv_eviction_report": "no"}, stream=True)
    assert status == 200
    assert "data:" in answer["stream"]


@pytest.mark.slow
def test_a_report_is_about_one_choice(url):
    several = [
        ("completions", {"n": 2, "temperature": 1}),
        ("completions", {"prompt": [IDS, IDS]}),
        ("completions", {"prompt": [TEXT, "short"]}),
        ("completions", {"use_beam_search": True}),
        ("chat", {"n": 2, "temperature": 1}),
        ("chat", {"use_beam_search": True}),
    ]
    for endpoint, more in several:
        assert "kv_eviction_report is about one choice" in refusal(ask(url, endpoint, REPORT, **more))
        assert ask(url, endpoint, {"kv_eviction_report": "false"}, **more)[0] == 200
    for one in ([IDS], [TEXT]):
        assert kept_as_many_as_asked(report(ask(url, "completions", REPORT, prompt=one)))
    batch = {"messages": [MESSAGES, MESSAGES], "max_tokens": 4}
    for wishes, status in (({}, 200), ({"kv_eviction": "none"}, 200), (REPORT, 400), ({"kv_eviction": "cade"}, 400)):
        assert post(url, "v1/chat/completions/batch", {**batch, "vllm_xargs": wishes})[0] == status


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [0, 8])
def test_echoed_prompts_have_their_own_probabilities(url, max_tokens):
    """They are those of the whole prompt, whatever is kept of it afterwards; also if nothing is generated."""
    more = {"echo": True, "logprobs": 2, "max_tokens": max_tokens}
    status, whole = ask(url, "completions", {"kv_eviction": "none"}, **more)
    assert status == 200
    evicted = ask(url, "completions", REPORT, **more)
    told = report(evicted)
    assert kept_as_many_as_asked(told) if max_tokens else told["kept_tokens"] is None
    ours, stock = (answer["choices"][0]["logprobs"] for answer in (evicted[1], whole))
    assert len(ours["tokens"]) == len(IDS) + max_tokens
    # The first token that is generated comes from the whole prompt, too.
    num_same = len(IDS) + min(max_tokens, 1)
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert ours[key][:num_same] == stock[key][:num_same]


@pytest.mark.slow
def test_yes_and_no_as_people_write_them(url):
    for yes in (True, 1, "true", "True", "1", "yes", "on"):
        assert kept_as_many_as_asked(report(ask(url, "completions", {"kv_eviction_report": yes})))
    for no in (False, 0, "false", "False", "0", "no", "off"):
        status, answer = ask(url, "completions", {"kv_eviction_report": no})
        assert (status, answer["kv_transfer_params"]) == (200, None)


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_beam_search_is_not_evicted(url, endpoint):
    """Wishes are checked; only the one for no eviction can be granted."""
    beams = {"use_beam_search": True, "n": 2}
    assert "kv_eviction 'cade' is unknown" in refusal(ask(url, endpoint, {"kv_eviction": "cade"}, **beams))
    for wishes in ({"kv_eviction": "snapkv"}, {"kv_eviction_budget": 64}, {"kv_eviction_config": '{"gamma": 1}'}):
        assert f"{next(iter(wishes))} has no effect on beam search" in refusal(ask(url, endpoint, wishes, **beams))
    assert ask(url, endpoint, {"kv_eviction": "none"}, **beams)[0] == 200


@pytest.fixture
def engine(tiny) -> Engine:
    return tiny(kv_eviction="cake", kv_eviction_budget=300, max_num_batched_tokens=512)


@pytest.mark.engine
def test_knobs_of_another_policy(engine: Engine, same_on_both):
    """They are laid over its defaults."""
    wishes = {"kv_eviction": "streamingllm", "kv_eviction_config": {"n_sink": 7}}
    ((_, positions),) = engine.trace([numbers(41, 900)], 4, extra_args=wishes)
    for layer in positions:
        assert layer[0][:8].tolist() != list(range(8))
        assert layer[0][:7].tolist() == list(range(7))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"kv_eviction_config": {"gama": 1}}, "kv_eviction_config: gama is unknown to cake; a request may give"),
        ({"kv_eviction_config": {"decode": "off"}}, "kv_eviction_config: decode is for the server to choose"),
        ({"kv_eviction_config": {"window": 64}}, "kv_eviction_config: window of a request may be 32 at most, not 64"),
        ({"kv_eviction_config": {"pool_kernel": 10001}}, "pool_kernel of a request may be 5 at most, not 10001"),
        ({"kv_eviction": "none", "kv_eviction_config": {"gamma": 1}}, "kv_eviction_config has no effect without"),
        ({"kv_eviction": "knorm", "kv_eviction_config": {"gamma": 1}}, "kv_eviction_config: gamma is unknown to knorm"),
        ({"kv_eviction_buget": 100}, "kv_eviction_buget is unknown: a request may give"),
        ({"kv_eviction_report": 2}, "kv_eviction_report 2 is neither yes nor no"),
        (
            {"kv_eviction_report": True, "kv_eviction_budget": 10**19},
            "kv_eviction_budget 10000000000000000000 is not a",
        ),
    ],
)
def test_wishes_are_refused_where_there_is_no_http(engine: Engine, wishes, message):
    with pytest.raises(VLLMValidationError, match=message):
        engine.add([1, 2, 3], 4, extra_args=wishes)
    with pytest.raises(VLLMValidationError, match="kv_eviction_report is about one choice: set n to 1"):
        engine.add([1, 2, 3], 4, n=2, temperature=1.0, extra_args=REPORT)
    assert engine.is_idle()


@pytest.mark.engine
def test_one_set_of_parameters_for_several_requests(engine: Engine):
    """What the front end writes into a request's parameters stays there."""
    wishes = {"kv_eviction_report": True, "kv_eviction_budget": 100}
    names = [engine.add(numbers(seed, 700), 4, extra_args=wishes) for seed in (42, 43)]
    engine.run()
    assert wishes == {"kv_eviction_report": True, "kv_eviction_budget": 100}
    for name in names:
        assert engine.outputs[name].kv_transfer_params["kv_eviction"]["budget"] == 100


@pytest.mark.engine
def test_what_the_front_end_leaves_in_a_request_can_be_sent(engine: Engine):
    """Numpy's numbers pass for Python's until they are sent, and by then the request is registered."""
    wishes = {"kv_eviction_budget": np.float64(0.2), "kv_eviction_config": {"gamma": np.float64(3)}, **REPORT}
    name = engine.add(numbers(44, 700), 4, extra_args=wishes)
    (request,) = engine.scheduler.requests.values()
    MsgpackEncoder().encode(request.sampling_params)
    engine.run()
    assert engine.outputs[name].kv_transfer_params["kv_eviction"]["budget"] == 0.2
    assert type(parse_budget(np.float64(0.2))) is float


KNOBS = {"gamma": 0, "window": 8}


@pytest.mark.engine
def test_knobs_of_a_request(engine: Engine, tiny, same_on_both):
    """It gets what an engine with these knobs gives; neighbours in its batch get the server's."""
    prompt = numbers(40, 900)
    runs = []
    for config in (KNOBS, json.dumps(KNOBS)):
        engine.forget_prefixes()
        runs += engine.trace([prompt], 30, extra_args={"kv_eviction_config": config})
    (default,) = engine.trace([prompt], 30)
    alone: Engine = tiny(
        kv_eviction="cake", kv_eviction_budget=300, kv_eviction_config=KNOBS, max_num_batched_tokens=512
    )
    (theirs,) = alone.trace([prompt], 30)
    for ours in runs:
        assert ours[0] == theirs[0]
        assert same_positions(ours[1], theirs[1])
        assert not same_positions(ours[1], default[1])


@pytest.mark.engine
def test_wishes_without_eviction(tiny, same_on_both):
    engine: Engine = tiny()
    for wishes in ({"kv_eviction_config": {"gamma": 1}}, {"kv_eviction_report": True}):
        with pytest.raises(VLLMValidationError, match=f"{next(iter(wishes))} needs a server with eviction"):
            engine.add([1, 2, 3], 4, extra_args=wishes)
    with pytest.raises(VLLMValidationError, match="kv_eviction_buget is unknown"):
        engine.add([1, 2, 3], 4, extra_args={"kv_eviction_buget": 100})
    engine.generate([[1, 2, 3]], 4, extra_args={"kv_eviction": "none", "kv_eviction_report": False})
