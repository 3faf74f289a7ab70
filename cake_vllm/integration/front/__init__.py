"""Runs in the front-end process: flags, the engine's configuration, requests."""
