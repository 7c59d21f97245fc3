"""Whether hosts can train together, found out in a minute by plain TCP before a runtime waits for them without end.

Every host tells host 0 who it is, which code, versions and config it has, its clock and whether it can write to the
shared folder; host 0 compares, and every host leaves with the same answer: peers to go on with, or one sentence.
The meeting is at the port after the coordinator's, where the connections stay open for the watchdog; the coordinator's
own port is tried too, since that is where jax waits.
"""

import hashlib
import json
import os
import secrets
import selectors
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import unclip_jax
from unclip_jax.watchdog import Peer

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
STORAGE = 10.0  # seconds in which a small file has to be written, and seen by others
CLOCKS = 5.0  # seconds that clocks may differ by: storage and its credentials go by them


class HostsError(RuntimeError):
    """Hosts that cannot train together; the message names the host and what to do."""


class Hello(NamedTuple):
    """What a host says of itself.

    host, hosts: its number, and how many it was told there are. name: the machine's. facts: what has to be equal
    everywhere. clock: seconds since 1970. token: what it wrote to the shared folder. problem: that it knows of itself.
    """

    host: int
    hosts: int
    name: str
    facts: Mapping[str, str]
    clock: float
    token: str
    problem: str | None


def facts_of(config: Any, options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What has to be the same on every host: code, versions, compiler flags, the config's fields, and `options`."""
    facts = {"code": _code(), "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    facts |= {name: os.environ[name] for name in FLAGS if name in os.environ}
    return facts | {name: str(value) for name, value in (options or {}).items()} | _flat(config)


def _code() -> str:
    """Version and digest of the package's sources, which are what runs, committed or not."""
    folder = Path(unclip_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{unclip_jax.__version__} ({digest.hexdigest()[:12]})"


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in fields(config) if is_dataclass(config) else ():
        value = getattr(config, entry.name)
        name = f"{prefix}{entry.name.replace('_', '-')}"
        found |= _flat(value, f"{name}.") if is_dataclass(value) else {f"--{name}": str(value)}
    return found


def meet(
    host: int, hosts: int, address: str, port: int, facts: Mapping[str, str], shared: Path, timeout: float = 60.0
) -> dict[int, Peer]:
    """The peers of this host, once all hosts are there and fit: all others on host 0, host 0 on the others.

    address, port: of jax's coordinator on host 0; the meeting is at port + 1. shared: a folder that all hosts write to.
    timeout: seconds that hosts may start apart. Raises HostsError on every host that can be reached.
    """
    token = secrets.token_hex(8)
    problem = _within(STORAGE, shared, lambda: _write(shared, host, token))
    hello = Hello(host, hosts, socket.gethostname(), facts, 0.0, token, problem)
    return _lead(hello, port, shared, timeout) if host == 0 else _follow(hello, address, port, shared, timeout)


def _lead(own: Hello, port: int, shared: Path, timeout: float) -> dict[int, Peer]:
    """Host 0: gathers all others, compares and answers."""
    with ExitStack() as stack:
        # Whoever has found the second port tries the first, which is open by then.
        probed, meeting = (stack.enter_context(_server(number)) for number in (port, port + 1))
        hellos, peers, ahead = _gather(own, meeting, probed, timeout)
        try:
            problem = _problem(hellos, ahead) or _missing(own.hosts, hellos, port, timeout)
            if problem is None:
                _tell(peers, {"token": own.token})
                problem = _unseen(shared, hellos, peers)
        except BaseException:
            _tell(peers, {"problem": "host 0 was stopped while the hosts met"})
            raise
        _tell(peers, {"name": own.name} if problem is None else {"problem": problem})
        shutil.rmtree(shared / ".hosts", ignore_errors=True)
        if problem is not None:
            raise HostsError(problem)
        return peers


def _server(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise HostsError(
            f"host 0 cannot listen at port {port} ({error.strerror}): end the process that holds it, or give "
            f"--coordinator with another port"
        ) from error


def _gather(
    own: Hello, meeting: socket.socket, probed: socket.socket, timeout: float
) -> tuple[dict[int, Hello], dict[int, Peer], dict[int, float]]:
    """Hellos and peers by number, and by how many seconds their clocks are ahead; until all are there or it is time."""
    hellos, peers, ahead = {0: own}, {}, {0: 0.0}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for server in (meeting, probed):
            selector.register(server, selectors.EVENT_READ)
        while len(hellos) < own.hosts and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.data is None:
                    connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                    if key.fileobj is probed:
                        connection.close()
                    else:
                        selector.register(connection, selectors.EVENT_READ, Peer(connection))
                    continue
                peer = key.data
                try:
                    messages = peer.read()
                    hello = _hello(messages[0]) if messages else None
                except (OSError, EOFError, ValueError, TypeError):  # somebody else's connection
                    selector.unregister(key.fileobj)
                    peer.close()
                    continue
                if hello is not None:
                    selector.unregister(key.fileobj)
                    first = hellos.get(hello.host)
                    if first is not None:
                        twice = f"is there twice, on {first.name} and {hello.name}: give every host its own --host"
                        hellos[hello.host] = first._replace(problem=twice)
                        peer.close()
                        continue
                    peer.name = hello.name
                    hellos[hello.host], peers[hello.host] = hello, peer
                    ahead[hello.host] = hello.clock - time.time()
    return hellos, peers, ahead


def _hello(message: Mapping[str, Any]) -> Hello:
    hello = Hello(**message)
    numbers = isinstance(hello.host, int) and isinstance(hello.hosts, int) and isinstance(hello.clock, float)
    texts = isinstance(hello.name, str) and isinstance(hello.token, str) and isinstance(hello.problem, str | None)
    facts = isinstance(hello.facts, dict) and all(isinstance(value, str) for value in hello.facts.values())
    if not (numbers and texts and facts and hello.host > 0):
        raise ValueError("no hello")
    return hello


def _missing(hosts: int, hellos: Mapping[int, Hello], port: int, timeout: float) -> str | None:
    missing = [number for number in range(hosts) if number not in hellos]
    if not missing:
        return None
    return (
        f"{_named(missing)} of {hosts} did not report within {timeout:.0f} s (they are numbered from 0): start the "
        f"same command on every host, and let them reach host 0 ({hellos[0].name}) at ports {port} and {port + 1}"
    )


def _problem(hellos: Mapping[int, Hello], ahead: Mapping[int, float]) -> str | None:
    """The first reason why these hosts cannot train together, None where they can."""
    own = hellos[0]
    for number, hello in sorted(hellos.items()):
        who = f"host {number} ({hello.name})"
        if hello.hosts != own.hosts:
            return f"{who} was told that there are {hello.hosts} hosts, and host 0 that there are {own.hosts}"
        if hello.problem is not None:
            return f"{who} {hello.problem}"
        if abs(ahead[number]) > CLOCKS:
            side = "ahead of" if ahead[number] > 0 else "behind"
            return f"the clock of {who} is {abs(ahead[number]):.0f} s {side} host 0's: let both follow a time server"
    differing: dict[tuple[tuple[str, str, str], ...], list[int]] = {}
    for number, hello in sorted(hellos.items()):
        keys = sorted(hello.facts.keys() | own.facts.keys())
        pairs = ((key, hello.facts.get(key, "none"), own.facts.get(key, "none")) for key in keys)
        if found := tuple(pair for pair in pairs if pair[1] != pair[2]):
            differing.setdefault(found, []).append(number)
    if not differing:
        return None
    found, numbers = next(iter(differing.items()))
    names = ", ".join(hellos[number].name for number in numbers[:3])
    parts = [f"{key} {theirs[:80]} where host 0 has {ours[:80]}" for key, theirs, ours in found[:3]]
    rest = f" and {len(found) - 3} more differences" if len(found) > 3 else ""
    installed = any(not key.startswith("--") for key, *_ in found)
    advice = "install the same on every host" if installed else "start the same command on every host"
    return f"{_named(numbers)} ({names}) has {', '.join(parts)}{rest}: {advice}"


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"host {shown}" if len(numbers) == 1 else f"hosts {shown}"


def _unseen(shared: Path, hellos: Mapping[int, Hello], peers: Mapping[int, Peer]) -> str | None:
    """Why the shared folder is none, None where everyone sees what host 0 wrote and host 0 what they wrote."""
    deadline = time.monotonic() + STORAGE
    for number in peers:
        left = max(deadline - time.monotonic(), 0.1)
        if _within(
            left + 1, shared, lambda number=number, left=left: _read(shared, number, hellos[number].token, left)
        ):
            return _apart(shared, number, hellos[number].name)
    for number, peer in peers.items():
        peer.connection.settimeout(2 * STORAGE)
        try:
            seen = peer.read()[0].get("seen")
        except (OSError, EOFError, ValueError, IndexError):
            return f"host {number} ({peer.name}) stopped while the hosts met: its own log may say why"
        if not seen:
            return _apart(shared, number, peer.name)
    return None


def _apart(shared: Path, number: int, name: str) -> str:
    return (
        f"host {number} ({name}) and host 0 do not see each other's files in '{shared}': --out has to be one folder "
        f"for all hosts, such as a mounted bucket"
    )


def _follow(own: Hello, address: str, port: int, shared: Path, timeout: float) -> dict[int, Peer]:
    """Another host: finds host 0, tells it, and does what it answers."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            peer = Peer(socket.create_connection((address, port + 1), timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"host {own.host} of {own.hosts} did not reach host 0 at {address}, port {port + 1}, within "
                    f"{timeout:.0f} s ({error.strerror or error}): start the same command on host 0, and let the "
                    f"firewall open ports {port} and {port + 1} between the hosts"
                ) from error
            time.sleep(0.5)
    try:
        with socket.create_connection((address, port), timeout=5):
            pass
    except OSError as error:
        blocked = f"does not reach port {port} of host 0 ({error.strerror or error}): let the firewall open it"
        own = own._replace(problem=own.problem or blocked)
    try:
        peer.connection.settimeout(timeout + 3 * STORAGE)
        peer.send(own._replace(clock=time.time())._asdict())
        answer = _answer(peer)
        if "token" in answer:
            token = str(answer["token"])
            unseen = _within(STORAGE + 1, shared, lambda: _read(shared, 0, token, STORAGE))
            peer.send({"seen": unseen is None})
            answer = _answer(peer)
    except (OSError, EOFError, ValueError) as error:
        raise HostsError(
            f"host 0 at {address} stopped while the hosts met ({error}): its own log may say why"
        ) from error
    if "problem" in answer:
        raise HostsError(str(answer["problem"]))
    peer.name = str(answer.get("name", address))
    return {0: peer}


def _answer(peer: Peer) -> dict[str, Any]:
    while not (messages := peer.read()):
        pass
    return messages[0]


def _tell(peers: Mapping[int, Peer], message: Mapping[str, Any]) -> None:
    for peer in peers.values():
        with suppress(OSError):
            peer.send(message)


def _write(shared: Path, host: int, token: str) -> str | None:
    path = shared / ".hosts" / str(host)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(token), encoding="utf-8")
    except OSError as error:
        return f"cannot write to '{shared}' ({error.strerror or error}): --out has to be a folder that it can write to"
    return None


def _read(shared: Path, host: int, token: str, seconds: float) -> str | None:
    """None once a host's token is read; mounted buckets take a moment to show what another host wrote."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError, ValueError):
            if json.loads((shared / ".hosts" / str(host)).read_text(encoding="utf-8")) == token:
                return None
        if time.monotonic() > deadline:
            return "unseen"
        time.sleep(0.2)


def _within(seconds: float, shared: Path, check: Callable[[], str | None]) -> str | None:
    """What a check of the storage says, or that it did not answer: a mount that hangs cannot be interrupted."""
    said: list[str | None] = []
    thread = threading.Thread(target=lambda: said.append(check()), daemon=True)
    thread.start()
    thread.join(seconds)
    return (
        said[0] if said else f"gets no answer from the storage of '{shared}' within {seconds:.0f} s: look at its mount"
    )
