"""Notices that this machine will be taken away: SIGTERM, and on Google's machines what their metadata server says."""

import os
import signal
import threading
import urllib.request
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"  # TRUE or FALSE
POLL = 5.0  # seconds between two looks; a preempted machine has about 30 left


class Preempted(Exception):
    """Training was told to stop, and has saved its step."""

    code = 128 + signal.SIGTERM  # of the process, by which a supervisor knows that there is more to do


class Preemption:
    """Listens while it is open; `reached` says when to save and stop, at the same step on every host.

    Beside one host alone it leaves SIGTERM to jax, whose coordinator lets the hosts agree on a step.
    """

    def __init__(self, metadata: str | None = None, poll: float = POLL) -> None:
        self._metadata, self._poll = metadata, poll
        self._noticed, self._closed = threading.Event(), threading.Event()
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        if self._metadata is None and jax.default_backend() == "tpu":
            self._metadata = METADATA
        if self._metadata is not None:
            threading.Thread(target=self._ask, name="preemption", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether training ends after this step; to be asked after every step, by every host."""
        if jax.process_count() == 1:
            return self._noticed.is_set()
        return multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed.set()

    def _ask(self) -> None:
        assert self._metadata is not None
        request = urllib.request.Request(self._metadata, headers={"Metadata-Flavor": "Google"})
        while not self._closed.wait(self._poll):
            try:
                with urllib.request.urlopen(request, timeout=self._poll) as answer:
                    preempted = answer.read(16).strip() == b"TRUE"
            except (OSError, ValueError):  # no such server, or it is busy
                continue
            if preempted:
                os.kill(os.getpid(), signal.SIGTERM)
                return
