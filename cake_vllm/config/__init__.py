"""The settings, parsed once: what a server is set to, and what a request may ask of it. Imports no vLLM."""

from cake_vllm.config.keys import (
    AUTO,
    BUDGET_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    KEYS,
    OFF,
    POLICY_KEY,
    WITH_GATES,
    WITHOUT_GATES,
    argument,
    check_keys,
    flag,
    parse_budget,
    parse_options,
    wishes_of,
)
from cake_vllm.config.requests import REPORT_KEY, REQUEST_KEYS, as_json, for_request, parse_flag
from cake_vllm.config.settings import KVEvictionConfig

__all__ = [
    "AUTO",
    "BUDGET_KEY",
    "CONFIG_KEY",
    "DEFAULT_BUDGET",
    "KEYS",
    "OFF",
    "POLICY_KEY",
    "REPORT_KEY",
    "REQUEST_KEYS",
    "WITHOUT_GATES",
    "WITH_GATES",
    "KVEvictionConfig",
    "argument",
    "as_json",
    "check_keys",
    "flag",
    "for_request",
    "parse_budget",
    "parse_flag",
    "parse_options",
    "wishes_of",
]
