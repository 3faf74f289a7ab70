"""Subcommands of ``cake-vllm``, one module each."""
