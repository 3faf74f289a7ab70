"""Runs in every worker process."""
