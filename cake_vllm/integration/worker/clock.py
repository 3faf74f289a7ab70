"""How long evictions hold steps up, without anybody waiting for the device to say so."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Moment:
    """Of the host's clock; as ``torch.cuda.Event`` is of the device's."""

    def record(self) -> None:
        """Now."""
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """Whether it is past."""
        return True

    def elapsed_time(self, later: "Moment") -> float:
        """Milliseconds to a later one."""
        return (later._seconds - self._seconds) * 1e3


class Clock:
    """Adds up parts of a step, and reads them when the device has long passed them.

    Args:
        moment: makes a moment that is still to be recorded.
        lag: after how many more steps one is read; as many on all ranks, so that their times are of the same step.
    """

    def __init__(self, moment: Callable[[], Any], lag: int):
        self._moment, self._lag = moment, lag
        self._parts: list[tuple[Any, Any]] = []
        self._ended: deque[list[tuple[Any, Any]]] = deque()

    @classmethod
    def of(cls, device: torch.device, most_under_way: int) -> "Clock":
        """A device's; on a CPU steps are over when they end.

        Args:
            device: of the KV caches.
            most_under_way: steps that may have begun before the first of them is known to be over.
        """
        if device.type == "cpu":
            return cls(Moment, 0)
        return cls(partial(torch.cuda.Event, enable_timing=True), most_under_way + 1)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, as a part of the step."""

        def part(*args: Any, **kwargs: Any) -> Any:
            start, end = self._moment(), self._moment()
            start.record()
            try:
                return function(*args, **kwargs)
            finally:
                end.record()
                self._parts.append((start, end))

        return part

    def end_step(self) -> float:
        """Seconds of the parts of the step that ended ``lag`` steps before this one; 0 if it had none."""
        self._ended.append(self._parts)
        self._parts = []
        parts = self._ended.popleft() if len(self._ended) > self._lag else []
        if not all(end.query() for _, end in parts):
            # Which must not be; nobody waits for it.
            return 0.0
        return sum(start.elapsed_time(end) for start, end in parts) / 1e3
