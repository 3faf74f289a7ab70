"""Two API servers before two data-parallel engines: whichever a request meets, it is served, checked and counted."""

import json
import re
import sys
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, as_users_start

sys.path.insert(0, str(ROOT / "deploy"))

from demo import samples, server

pytestmark = [pytest.mark.slow, pytest.mark.full]

BUDGET, LAYERS, REQUESTS = 128, 4, 12


@pytest.fixture(scope="module")
def url(chatty_model):
    flags = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "2048", "--enforce-eager"]
    flags += ["--kv-eviction", "cake", "--kv-eviction-budget", str(BUDGET), "--num-gpu-blocks-override", "1000"]
    flags += ["--api-server-count", "2", "--data-parallel-size", "2"]
    with as_users_start(), server(chatty_model, *flags) as address:
        yield address


def post(url: str, body: dict, rank: int = 0) -> dict:
    """Over a connection of its own, which either API server may take; to the engine ``rank``."""
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank), "Connection": "close"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps({"model": "demo", **body}).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_any_server_and_any_rank(url):
    wishes = {"kv_eviction_report": True}
    for number in range(REQUESTS):
        body = {"prompt": list(range(1000 + number, 1500 + number)), "max_tokens": 4, "ignore_eos": True}
        told = post(url, {**body, "vllm_xargs": wishes}, rank=number % 2)["kv_transfer_params"]["kv_eviction"]
        assert BUDGET <= sum(told["kept_tokens"]) / LAYERS < BUDGET + 32
    for _ in range(REQUESTS):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, {"prompt": [1, 2, 3], "stream": True, "vllm_xargs": {"kv_eviction": "cade"}})
        assert refused.value.code == 400
    # The last statistics travel with a step's output.
    for rank in range(2):
        post(url, {"prompt": [5, 6, 7], "max_tokens": 3}, rank)
    counted = samples(url, "vllm:kv_eviction_requests_total")
    assert sorted((re.search(r'engine="(\d)"', labels)[1], value) for _, labels, value in counted) == [
        ("0", REQUESTS / 2),
        ("1", REQUESTS / 2),
    ]
    kept = samples(url, "vllm:kv_eviction_kept_tokens")
    # One of each layer and engine, not one of each process as well.
    assert len(kept) == 2 * LAYERS
    assert not any("pid=" in labels for _, labels, _ in kept)
