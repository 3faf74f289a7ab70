"""An executor of the tests' own: its worker is a bare process that hears of the engine by pickles on a pipe alone.

Run as a program, this file is the worker.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import Lock
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.network_utils import get_file_store_init_method
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase


class BareExecutor(Executor):
    """Forks nothing and shares nothing."""

    def _init_executor(self) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        pickle.dump(self.vllm_config, self.process.stdin)
        self.collective_rpc("load_model")
        current_platform.update_block_size_for_backend(self.vllm_config)

    def collective_rpc(
        self,
        method: str | Callable,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
        non_block: bool = False,
    ) -> Any:
        pickle.dump((method, args, kwargs or {}), self.process.stdin)
        self.process.stdin.flush()
        result = pickle.load(self.process.stdout)
        if not non_block:
            return [result]
        future: Future = Future()
        future.set_result(result)
        return future

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        return self._one("execute_model", scheduler_output, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        return self._one("sample_tokens", grammar_output, non_block)

    def _one(self, method: str, argument: Any, non_block: bool) -> Any:
        result = self.collective_rpc(method, args=(argument,), non_block=non_block)
        return result if non_block else result[0]

    def check_health(self) -> None:
        assert self.process.poll() is None

    def shutdown(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # What vLLM prints is not an answer.
    os.dup2(2, 1)
    assert "cake_vllm" not in sys.modules
    config = pickle.load(sys.stdin.buffer)
    worker = WorkerWrapperBase(rpc_rank=0)
    worker.init_worker(
        [
            {
                "vllm_config": config,
                "local_rank": 0,
                "rank": 0,
                "distributed_init_method": get_file_store_init_method(),
                "is_driver_worker": True,
                "shared_worker_lock": Lock(),
            }
        ]
    )
    worker.init_device()
    while True:
        try:
            method, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        result = run_method(worker, method, args, kwargs)
        if isinstance(result, AsyncModelRunnerOutput):
            result = result.get_output()
        if method == "load_model":
            current_platform.update_block_size_for_backend(config)
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
