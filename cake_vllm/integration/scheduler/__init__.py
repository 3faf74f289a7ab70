"""Runs in the scheduler's process."""
