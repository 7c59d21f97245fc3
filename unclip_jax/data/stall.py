"""How much of its time training waits for data."""

import time
from collections.abc import Iterator

import jax

from unclip_jax.types import Batch


class Stall:
    """Batches, timed. work: an array of the last step that was started, None before the first.

    Waiting counts while nothing is left to compute; where a step ends during it, all of it does, so the share is at
    most too high. It never counts for the first batch, which waits for processes to start.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._waited, self._since = batches, 0.0, time.monotonic()
        self.work: jax.Array | None = None

    def __iter__(self) -> "Stall":
        return self

    def __next__(self) -> Batch:
        asked = time.monotonic()
        batch = next(self._batches)
        if self.work is None:
            self._since = time.monotonic()
        elif self.work.is_ready():  # type: ignore[attr-defined]
            self._waited += time.monotonic() - asked
        return batch

    def share(self) -> float:
        """The share of the time since the last call, between 0 and 1."""
        now = time.monotonic()
        share = min(1.0, self._waited / max(now - self._since, 1e-9))
        self._waited, self._since = 0.0, now
        return share
