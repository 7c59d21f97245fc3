"""Many hosts that run one program: which of them this is, their start-up, and what only one of them does."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax.preemption import Preempted
from unclip_jax.preflight import HostsError, meet
from unclip_jax.watchdog import Watchdog

PORT = 8482  # of the coordinator, as jax chooses it on TPUs
DEVICES = 300.0  # seconds in which the accelerators of all hosts have to come up


class Hosts(NamedTuple):
    """How many processes there are, which one this is, where number 0 listens, and this one's devices (None: all)."""

    count: int
    index: int
    address: str
    port: int
    devices: list[int] | None = None


def find(count: int | None = None, index: int | None = None, coordinator: str | None = None) -> Hosts | None:
    """The hosts of this run, None where there is one.

    What is not given is taken from JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS, else jax finds it:
    on TPU slices, GKE, Slurm and Open MPI. count=1 asks nobody. Raises HostsError where a part is missing.
    """
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    if count == 1:
        return None
    index = _number("JAX_PROCESS_ID") if index is None else index
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    devices = None
    if None in (count, index, coordinator):
        coordinator, count, index, devices = _detected(coordinator, count, index)
    if count in (None, 1) and index in (None, 0):
        return None
    if count is None or index is None or not coordinator or not 0 <= index < count:
        raise HostsError(
            f"--hosts {count}, --host {index}, --coordinator {coordinator}: give the number of hosts, which one "
            f"this is, counted from 0, and the address of host 0, as in --hosts 4 --host 1 --coordinator 10.0.0.2"
        )
    address, port = _address(coordinator)
    return Hosts(count, index, address, port, devices)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise HostsError(f"{name} is '{text}': it has to be a number")
    return None if text is None else int(text)


def _address(text: str) -> tuple[str, int]:
    """Host and port of "host", "host:port", "[v6]:port"."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        return text.strip("[]"), PORT
    if not port.isdecimal() or not 0 < int(port) < 65535:
        raise HostsError(f"--coordinator {text}: the port has to be a number below 65535")
    return host.strip("[]"), int(port)


def _detected(coordinator: str | None, count: int | None, index: int | None) -> tuple[Any, Any, Any, Any]:
    """What jax.distributed would find out; it offers no way to ask without starting."""
    try:
        from jax._src.clusters import ClusterEnv

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a package for Kubernetes is not installed
            return ClusterEnv.auto_detect_unset_distributed_params(coordinator, count, index, None, None, 60)
    except (ImportError, AttributeError, TypeError):  # another jax
        return coordinator, count, index, None
    except Exception as error:
        raise HostsError(
            f"which of how many hosts this is cannot be found out ({error}): give --hosts, --host and --coordinator, "
            f"or --hosts 1"
        ) from error


@contextmanager
def together(
    hosts: Hosts | None, facts: Mapping[str, str], shared: Path, timeout: float = 60.0
) -> Iterator[Watchdog | None]:
    """While this is open, the hosts run as one: they have met, jax knows all devices, and a watchdog looks on.

    facts: as of preflight.facts_of. shared: a folder that all hosts write to. timeout: seconds that hosts may start
    apart, and after which a silent one counts as gone. Yields None where there is one host. Raises HostsError before
    the start; once started, a host that stops ends the processes of all with a sentence.
    """
    if hosts is None:
        yield None
        return
    peers = meet(hosts.index, hosts.count, hosts.address, hosts.port, facts, shared, timeout)
    with Watchdog(hosts.index, peers, timeout=timeout) as watchdog:
        late = f"the devices of all {hosts.count} hosts did not come up within {DEVICES:.0f} s: look at the logs of all"
        with watchdog.within(DEVICES, late):
            jax.distributed.initialize(
                f"{f'[{hosts.address}]' if ':' in hosts.address else hosts.address}:{hosts.port}",
                hosts.count,
                hosts.index,
                hosts.devices,
                initialization_timeout=int(timeout),
            )
            _check_devices(hosts)
        stopped = None
        try:
            yield watchdog
        except Preempted as notice:  # every host ends here, in good order
            stopped = notice
        jax.distributed.shutdown()
    if stopped is not None:
        raise stopped


def _check_devices(hosts: Hosts) -> None:
    held = Counter(device.process_index for device in jax.devices())
    if len(held) != hosts.count:
        raise HostsError(
            f"jax sees devices of {len(held)} hosts where {hosts.count} met: is JAX_PLATFORMS the same on all?"
        )
    most = max(held.values())
    if fewer := [process for process, count in sorted(held.items()) if count < most]:
        raise HostsError(f"process {fewer[0]} has {held[fewer[0]]} devices and others have {most}: replace its machine")


def is_first() -> bool:
    """Whether this process is the one that writes logs, previews and weights."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until every process comes to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def whole(tree: Any) -> Any:
    """The tree with whole arrays, of numpy where hosts share them, on the first process; None on the others.

    Every process has to call it.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kept = []
    for leaf in leaves:
        value = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        if is_first():
            kept.append(value)
    return structure.unflatten(kept) if is_first() else None
