import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from unclip_jax.watchdog import Peer, Watchdog


@pytest.fixture
def pair() -> Iterator[tuple[Peer, Peer]]:
    """Host 0's connection with host 1, and host 1's with host 0."""
    a, b = socket.socketpair()
    yield Peer(a, "one"), Peer(b, "zero")
    a.close()
    b.close()


def wait_for(condition: Any, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_host_that_dies_is_named_at_once(pair: tuple[Peer, Peer]):
    ended: list[str] = []
    with Watchdog(0, {1: pair[0]}, timeout=30.0, end=ended.append):
        pair[1].close()
        assert wait_for(lambda: ended) and ended[0].startswith("host 1 (one) stopped without a word")
    assert len(ended) == 1


def test_a_host_that_falls_silent_is_named(pair: tuple[Peer, Peer]):
    ended: list[str] = []
    with Watchdog(0, {1: pair[0]}, timeout=0.5, end=ended.append):
        assert wait_for(lambda: ended) and ended[0].startswith("host 1 (one) has not been heard of for 0 s")


def test_hosts_that_end_well_say_so(pair: tuple[Peer, Peer]):
    ended: list[str] = []
    with Watchdog(0, {1: pair[0]}, timeout=5.0, end=ended.append):
        with Watchdog(1, {0: pair[1]}, timeout=5.0, end=ended.append) as other:
            other.at(3, "trains")
        time.sleep(0.3)
    assert not ended


def test_an_error_reaches_the_others(pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch):
    from unclip_jax import watchdog

    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    ended: list[str] = []
    with Watchdog(0, {1: pair[0]}, timeout=30.0, end=ended.append):
        with pytest.raises(ValueError), Watchdog(1, {0: pair[1]}, timeout=30.0, end=ended.append):
            raise ValueError("the data\nare gone")
        assert wait_for(lambda: ended)
    assert ended[0] == f"host 1 ({socket.gethostname()}) stopped: the data are gone"


def test_hosts_that_hang_are_named(pair: tuple[Peer, Peer]):
    ended: list[str] = []
    with (
        Watchdog(0, {1: pair[0]}, timeout=2.0, stall=0.8, end=ended.append) as first,
        Watchdog(1, {0: pair[1]}, timeout=2.0, end=lambda sentence: None) as second,
    ):
        first.at(7, "trains")
        second.at(7, "trains")
        time.sleep(1.0)  # compiling the first step may take longer
        assert not ended
        first.at(8, "trains")
        second.at(8, "reads its rows of")
        first.at(9, "trains")
        assert wait_for(lambda: ended)
    assert (
        "no host has come further for 1 s: host 1 (one) reads its rows of step 8, the others: trains step 9" in ended[0]
    )


def test_the_time_of_a_start_is_bounded(pair: tuple[Peer, Peer]):
    ended: list[str] = []
    with Watchdog(0, {1: pair[0]}, timeout=30.0, end=ended.append) as watchdog:
        with watchdog.within(5.0, "early"):
            pass
        with watchdog.within(0.05, "the devices did not come up"):
            time.sleep(0.3)
    assert ended == ["the devices did not come up"]
