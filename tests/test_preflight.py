import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from unclip_jax import preflight
from unclip_jax.config import ClipConfig, TrainConfig
from unclip_jax.hosts import HostsError, find
from unclip_jax.preflight import facts_of, meet

FACTS = {"code": "0.1.0 (abc)", "jax": "0.10.2", "--seed": "0"}


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def together(
    shared: Path, port: int, facts: list[dict[str, str]], *, hosts: int | None = None, timeout: float = 5.0, **more: Any
) -> list[Any]:
    """What every host gets, all in this process: its peers, or the error."""
    results: list[Any] = [None] * len(facts)
    folders = more.get("folders", [shared] * len(facts))
    numbers = more.get("numbers", range(len(facts)))

    def join(place: int) -> None:
        try:
            number = numbers[place]
            count = len(facts) if hosts is None else hosts
            results[place] = meet(number, count, "127.0.0.1", port, facts[place], folders[place], timeout)
        except HostsError as error:
            results[place] = error

    threads = [threading.Thread(target=join, args=[place]) for place in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        for peer in result.values() if isinstance(result, dict) else ():
            peer.close()
    return results


def refusal(results: list[Any]) -> str:
    """The one sentence that every host got."""
    assert all(isinstance(result, HostsError) for result in results) and len(set(map(str, results))) == 1, results
    sentence = str(results[0])
    assert "\n" not in sentence
    return sentence


def test_hosts_that_fit_go_on(tmp_path: Path, port: int):
    first, second, third = together(tmp_path / "out", port, [FACTS] * 3)
    assert sorted(first) == [1, 2] and sorted(second) == sorted(third) == [0]
    assert {peer.name for peer in first.values()} == {socket.gethostname()}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("jax", "0.7.1", r"host 1 \(.*\) has jax 0.7.1 where host 0 has 0.10.2: install the same"),
        ("--seed", "7", r"host 1 \(.*\) has --seed 7 where host 0 has 0: start the same command"),
        ("code", "0.1.0 (def)", r"host 1 \(.*\) has code 0.1.0 \(def\) where host 0 has 0.1.0 \(abc\): install"),
        ("libtpu", "0.0.9", r"host 1 \(.*\) has libtpu 0.0.9 where host 0 has none: install"),
    ],
)
def test_a_host_that_differs_is_named_to_all(tmp_path: Path, port: int, key: str, value: str, sentence: str):
    assert re.search(sentence, refusal(together(tmp_path, port, [FACTS, FACTS | {key: value}, FACTS])))


def test_a_missing_host_is_named_in_time(tmp_path: Path, port: int):
    start = time.monotonic()
    sentence = refusal(together(tmp_path, port, [FACTS] * 2, hosts=4, timeout=1.0))
    assert (
        sentence.startswith("hosts 2, 3 of 4 did not report within 1 s") and f"ports {port} and {port + 1}" in sentence
    )
    assert time.monotonic() - start < 5


def test_a_host_that_is_told_another_number_or_is_there_twice(tmp_path: Path, port: int):
    results = together(tmp_path, port, [FACTS] * 3, numbers=[0, 1, 1], timeout=1.0)
    assert "host 1 (" in str(results[0]) and "is there twice, on" in str(results[0])
    assert all(isinstance(result, HostsError) for result in results)


def test_host_0_that_is_not_there_is_named(tmp_path: Path, port: int):
    with pytest.raises(
        HostsError, match=rf"host 1 of 2 did not reach host 0 at 127.0.0.1, port {port + 1}, within 1 s"
    ):
        meet(1, 2, "127.0.0.1", port, FACTS, tmp_path, 1.0)


def test_a_port_that_is_taken_or_blocked_is_named(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("", port)), pytest.raises(HostsError, match=f"cannot listen at port {port}"):
        meet(0, 2, "127.0.0.1", port, FACTS, tmp_path, 1.0)
    connect = socket.create_connection

    def firewall(address: tuple[str, int], **options: Any) -> socket.socket:
        if address[1] == port:
            raise TimeoutError("timed out")
        return connect(address, **options)

    monkeypatch.setattr(socket, "create_connection", firewall)
    sentence = refusal(together(tmp_path, port, [FACTS] * 2))
    assert f"does not reach port {port} of host 0 (timed out)" in sentence and sentence.startswith("host 1 (")


def test_storage_that_is_read_only_or_not_shared_is_named(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "STORAGE", 0.5)
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "a", tmp_path / "file" / "b"]  # no folder can be made there, whoever the user is
    sentence = refusal(together(tmp_path, port, [FACTS] * 2, folders=folders))
    assert sentence.startswith("host 1 (") and "cannot write to" in sentence and "Not a directory" in sentence
    sentence = refusal(together(tmp_path, port, [FACTS] * 2, folders=[tmp_path / "a", tmp_path / "b"]))
    assert "do not see each other's files" in sentence and sentence.startswith("host 1 (")


def test_a_mount_that_hangs_is_named(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "STORAGE", 0.3)
    write = preflight._write
    monkeypatch.setattr(
        preflight, "_write", lambda shared, host, token: time.sleep(2) if host else write(shared, host, token)
    )
    assert "gets no answer from the storage of" in refusal(together(tmp_path, port, [FACTS] * 2))


def test_a_clock_that_is_wrong_is_named(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch):
    now = time.time
    follow = preflight._follow

    def late(own: Any, *arguments: Any) -> Any:
        replace = type(own)._replace

        class Late(type(own)):
            def _replace(self, **changes: Any) -> Any:
                return replace(self, **changes | ({"clock": now() - 62} if "clock" in changes else {}))

        return follow(Late(*own), *arguments)

    monkeypatch.setattr(preflight, "_follow", late)
    sentence = refusal(together(tmp_path, port, [FACTS] * 2))
    assert sentence.startswith("the clock of host 1") and "62 s behind host 0's" in sentence


def test_strangers_do_not_disturb(tmp_path: Path, port: int):
    def bother() -> None:
        for bytes_ in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b'{"host": "x"}\n', b"x" * 4096, b""):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection(("127.0.0.1", port + 1), timeout=1.0) as connection:
                        connection.sendall(bytes_)
                    break
                except OSError:
                    time.sleep(0.01)

    results: list[Any] = []
    first = threading.Thread(target=lambda: results.append(meet(0, 2, "127.0.0.1", port, FACTS, tmp_path, 8.0)))
    first.start()
    bother()
    second = meet(1, 2, "127.0.0.1", port, FACTS, tmp_path, 8.0)
    first.join(10)
    assert sorted(results[0]) == [1] and sorted(second) == [0]
    for peer in (*results[0].values(), *second.values()):
        peer.close()


def test_facts_hold_code_versions_and_every_field():
    facts = facts_of(TrainConfig("a", ClipConfig()), {"--out": "/mnt/x"})
    assert {"code", "python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "--out"} <= set(facts)
    assert facts["--network.embedding-dim"] == "768" and facts["--optim.warmup"] == "200" and facts["--seed"] == "0"
    other = facts_of(TrainConfig("a", ClipConfig(embedding_dim=8)), {"--out": "/mnt/x"})
    assert {key for key in facts if facts[key] != other[key]} == {"--network.embedding-dim"}
    assert len(json.dumps(facts)) < 10_000


def test_hosts_are_found_in_options_and_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert find() is None and find(1) is None
    assert find(4, 1, "10.0.0.2")[:4] == (4, 1, "10.0.0.2", 8482)
    assert find(4, 1, "[::1]:90")[2:4] == ("::1", 90)
    with pytest.raises(HostsError, match="--hosts 4, --host None, --coordinator None: give the number"):
        find(4)
    with pytest.raises(HostsError, match="--host 4"):
        find(4, 4, "10.0.0.2")
    with pytest.raises(HostsError, match="the port has to be"):
        find(4, 1, "10.0.0.2:seven")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    assert find()[:4] == (2, 1, "host", 1234)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(HostsError, match="JAX_PROCESS_ID is 'one'"):
        find()
