"""The settings, parsed once: what a server is set to, and what a request may ask of it. Imports no vLLM."""

from cake_vllm.config.requests import REPORT_KEY, REQUEST_KEYS, check_keys, for_request, parse_flag, wishes_of
from cake_vllm.config.settings import (
    AUTO,
    BUDGET_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    KEYS,
    OFF,
    POLICY_KEY,
    KVEvictionConfig,
    argument,
    flag,
    parse_budget,
    parse_options,
)

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
    "KVEvictionConfig",
    "argument",
    "check_keys",
    "flag",
    "for_request",
    "parse_budget",
    "parse_flag",
    "parse_options",
    "wishes_of",
]
