"""Hosts that watch one another while they work: when one stops, every other one says which and ends.

Host 0 holds a TCP connection with each other host. Both ends send a line every few seconds, which says at what step
they are. A process that was killed closes its connection at once, a machine that is gone falls silent, and a host that
hangs stays at its step: a collective operation would wait for all three for ever.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

LIMIT = 1 << 20  # bytes of one line
BEATS = 5  # lines within the time after which a silent host counts as gone
STALL = 1800.0  # seconds: compiling, or saving to a slow bucket, takes less
GRACE = 3.0  # seconds in which the host that failed first is heard of, and in which a failing process ends


class Peer:
    """Another host: JSON objects over a TCP connection, one a line.

    `read` and `send` raise OSError or EOFError where the connection has ended, ValueError for what is no such line.
    """

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        connection.settimeout(GRACE)
        self.connection, self.name = connection, name
        self._part, self._lock = b"", threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one object."""
        with self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Waits for bytes, and gives the objects that are complete with them."""
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError("the connection was closed")
        *lines, self._part = (self._part + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if len(self._part) > LIMIT or not all(isinstance(message, dict) for message in messages):
            raise ValueError("no line of this protocol")
        return messages

    def close(self) -> None:
        """Ends the connection."""
        self.connection.close()


class Place(NamedTuple):
    """Where a host is: its step, what it does there, and since when (monotonic seconds)."""

    step: int
    doing: str
    since: float


def end_process(sentence: str) -> None:
    """Ends this process with code 1, whatever its other threads wait for."""
    print(f"\nunclip: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """Watches the hosts that this one is connected with: all of them on host 0, host 0 on the others.

    peers: by number. timeout: seconds after which a silent host counts as gone. stall: seconds without a step, after
    the first, before all end. end: called with the sentence that names the host that stopped.
    """

    def __init__(
        self,
        host: int,
        peers: Mapping[int, Peer],
        *,
        timeout: float = 60.0,
        stall: float = STALL,
        end: Callable[[str], None] = end_process,
    ) -> None:
        self.host, self.peers, self.timeout, self.stall, self._end = host, dict(peers), timeout, stall, end
        self._places: dict[int, Place] = {}
        self._heard = dict.fromkeys(self.peers, time.monotonic())
        self._first: int | None = None
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
            return
        self._closing.set()
        self._broadcast({"bye": True})
        self._thread.join(self.timeout)
        for peer in self.peers.values():
            peer.close()

    def at(self, step: int, doing: str) -> None:
        """Notes what this host does, in words that follow its name: ("trains", 120)."""
        self._first = step if self._first is None else self._first
        self._places[self.host] = Place(step, doing, time.monotonic())

    @contextmanager
    def within(self, seconds: float, sentence: str) -> Iterator[None]:
        """Ends all hosts with a sentence where the block takes longer."""
        timer = threading.Timer(seconds, self._stop, [sentence])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _fail(self, error: BaseException) -> None:
        """Tells the others why this host stops, unless it stops because another one did."""
        if self._ended.wait(GRACE):
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        self._broadcast({"end": f"host {self.host} ({socket.gethostname()}) stopped: {reason[:1000]}"})
        # What else runs in this process, such as a save that waits for all hosts, must not keep it.
        timer = threading.Timer(GRACE, os._exit, [1])
        timer.daemon = True
        timer.start()

    def _watch(self) -> None:
        beat, due = self.timeout / BEATS, 0.0
        with selectors.DefaultSelector() as selector:
            for number, peer in self.peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, number)
            while not self._closing.is_set() and not self._ended.is_set():
                for key, _ in selector.select(min(beat / 2, 0.5)):
                    if not self._listen(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now >= due:
                    due = now + beat
                    place = self._places.get(self.host)
                    self._broadcast({"at": None if place is None else [place.step, place.doing]})
                self._look(now)

    def _listen(self, number: int) -> bool:
        """Reads what a host sent; false where it will send no more."""
        peer = self.peers[number]
        try:
            for message in peer.read():
                self._heard[number] = time.monotonic()
                if "end" in message:
                    self._stop(str(message["end"]))
                if "bye" in message:
                    del self._heard[number]
                    return False
                if message.get("at"):
                    step, doing = message["at"]
                    if self._places.get(number, (None, None))[:2] != (step, doing):
                        self._places[number] = Place(int(step), str(doing), time.monotonic())
        except TimeoutError:
            pass
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            if not self._closing.is_set():
                self._stop(
                    f"host {number} ({peer.name}) stopped without a word: it was killed, ran out of memory, or its "
                    f"machine is gone; its own log may say why, and the same command goes on from the last checkpoint"
                )
            return False
        return True

    def _look(self, now: float) -> None:
        """Ends all where a host is silent, or where none comes further."""
        for number, heard in list(self._heard.items()):
            if now - heard > self.timeout:
                self._stop(
                    f"host {number} ({self.peers[number].name}) has not been heard of for {self.timeout:.0f} s: its "
                    f"machine or its network is gone; the same command goes on from the last checkpoint"
                )
        places = dict(self._places)
        own = places.get(self.host)
        if self.host or own is None or self._first is None or own.step <= self._first:
            return
        if all(now - place.since > self.stall for place in places.values()):
            behind = min(places, key=lambda number: (places[number].step, number))
            others = sorted({f"{place.doing} step {place.step}" for n, place in places.items() if n != behind})
            self._stop(
                f"no host has come further for {self.stall:.0f} s: host {behind} ({self._name(behind)}) "
                f"{places[behind].doing} step {places[behind].step}, the others: {'; '.join(others)[:500]}"
            )

    def _name(self, number: int) -> str:
        return self.peers[number].name if number in self.peers else socket.gethostname()

    def _stop(self, sentence: str) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._broadcast({"end": sentence})
            self._end(sentence)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        for peer in self.peers.values():
            with suppress(OSError):  # whoever does not read any more is noticed by what it does not send
                peer.send(message)
