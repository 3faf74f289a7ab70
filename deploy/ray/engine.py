"""What a replica runs: vLLM's engine and its OpenAI-compatible app, from the flags of ``vllm serve``."""

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger


class Load(StatLoggerBase):
    """The last that each of a replica's engines said of its queue and its KV cache."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self._last: dict[int, Any] = {}

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0) -> None:
        """Remembers an engine's step."""
        if scheduler_stats is not None:
            self._last[engine_idx] = scheduler_stats

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def read(self) -> dict[str, float]:
        """Waiting requests, and the share of the KV cache in use."""
        engines = self._last.values()
        waiting = sum(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs for stats in engines)
        return {"waiting": waiting, "kv_usage": max((stats.kv_cache_usage for stats in engines), default=0.0)}


async def start(model: str, flags: list[str]) -> tuple[AsyncLLM, Load, FastAPI]:
    """Starts an engine whose series go to Ray's metrics.

    Raises:
        SystemExit: a flag is none of ``vllm serve``.
    """
    load_general_plugins()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    validate_parsed_serve_args(args)
    context = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(context)
    load = Load(config)
    loggers = [RayPrometheusStatLogger, lambda *_: load]
    engine = AsyncLLM.from_vllm_config(config, usage_context=context, stat_loggers=loggers)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    # vLLM's handler of a dead engine tells vLLM's own HTTP server to stop; here the replica's check_health sees it.
    app.state.server = SimpleNamespace()
    return engine, load, app
