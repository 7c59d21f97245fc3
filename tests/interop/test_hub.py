"""The hub's real client against a server of our own on the loopback."""

import errno
import json
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.sources import find_weights
from unclip_jax.interop.hub import STEM, _weights, is_repository, snapshot

NAME = "owner/karlo"
BIG = np.random.default_rng(0).bytes(12 * 2**20)  # more than the client's buffer of 10 MiB, so that a part is kept
PIPELINE = {
    "_class_name": "UnCLIPPipeline",
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "image_encoder": [None, None],
}
NEEDED: dict[str, bytes] = {  # all different, because the client's cache keeps what is equal once
    "model_index.json": json.dumps(PIPELINE).encode(),
    "text_encoder/config.json": b'{"of": "text_encoder"}',
    "text_encoder/model.safetensors": b"towers",
    "tokenizer/vocab.json": b'{"a": 0}',
    "tokenizer/merges.txt": b"a b",
    "decoder/config.json": b'{"of": "decoder"}',
    f"decoder/{STEM}.safetensors": bytes(range(256)) * 64,
    "decoder_scheduler/scheduler_config.json": b'{"of": "scheduler"}',
}
UNNEEDED: dict[str, bytes] = {
    "README.md": b"words",
    "karlo.ckpt": b"pickle",
    "text_encoder/pytorch_model.bin": b"pickle",
    "text_encoder/model.fp16.safetensors": b"half",
    f"decoder/{STEM}.bin": b"pickle",
    f"decoder/{STEM}.safetensors.index.json": b"{}",
    "decoder/flax_model.msgpack": b"flax",
    "safety_checker/config.json": b"{}",
    "decoder/deeper/config.json": b"{}",
}
HOSTILE = ("../evil.json", "/evil.json", "decoder/../evil.json", "decoder/..json", "decoder\\evil.json", "C:/evil.json")


@pytest.fixture
def server(hub):
    """A hub with one repository."""
    hub.push(NEEDED | UNNEEDED)
    return hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        snapshot(name)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 400


def test_only_what_a_cascade_reads_is_fetched(server):
    commit = server.push(NEEDED | UNNEEDED | dict.fromkeys(HOSTILE, b"evil"))
    found = snapshot(NAME)
    assert (found.repository, found.revision, found.folder.name) == (NAME, commit, commit)
    assert files_of(found.folder) == NEEDED
    assert sorted(server.fetched()) == sorted(NEEDED)
    assert not any("evil" in path for _, path, _ in server.log)
    assert find_weights(found.folder / "text_encoder", "model").name == "model.safetensors"


def test_a_cut_connection_is_taken_up_where_it_broke(server):
    file = f"decoder/{STEM}.safetensors"
    server.push(NEEDED | {file: BIG})
    server.cuts[file] = 1
    found = snapshot(NAME)
    assert (found.folder / file).read_bytes() == BIG
    ranges = [asked for method, path, asked in server.log if method == "GET" and path.endswith(file)]
    assert len(ranges) == 2 and ranges[0] == ""
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) < len(BIG)


def test_a_connection_that_always_breaks_leaves_nothing_half_loaded(server):
    file = f"decoder/{STEM}.safetensors"
    server.cuts[file] = 1000
    refuse(NAME, "did not arrive whole .* run again")
    assert server.fetched().count(file) > 1
    held = files_of(Path(constants.HF_HUB_CACHE) / "models--owner--karlo" / "snapshots" / server.branches[NAME, "main"])
    assert file not in held and held.items() <= NEEDED.items()
    server.cuts.clear()
    server.log.clear()
    assert files_of(snapshot(NAME).folder) == NEEDED
    assert set(server.fetched()) == NEEDED.keys() - held.keys()


def test_a_part_of_a_snapshot_is_not_taken_for_the_whole(server, unplug):
    server.cuts[f"decoder/{STEM}.safetensors"] = 1000
    refuse(NAME, "did not arrive whole")
    unplug()
    refuse(NAME, "does not answer .* connect and run again")


@pytest.mark.parametrize("how", ["unplugged", "offline mode", "hub out of order"])
def test_without_the_hub_the_cache_answers(server, unplug, how: str, monkeypatch, capsys):
    def silence() -> None:
        match how:
            case "unplugged":
                unplug()
            case "offline mode":
                monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            case _:
                server.refusals["/"] = (503, "")

    first = snapshot(NAME)
    silence()
    capsys.readouterr()
    assert snapshot(NAME) == first
    said = capsys.readouterr().err
    assert said.startswith("unclip: the hub does not answer") and said.endswith(f"at {first.revision}\n")
    refuse("owner/other", "does not answer .* does not hold all of 'owner/other'")
    refuse(f"{NAME}@other", "does not answer")


def test_revisions_are_pinned(server):
    old = snapshot(NAME)
    server.log.clear()
    assert snapshot(NAME) == old and server.fetched() == []
    server.push(NEEDED | {"decoder/config.json": b'{"new": 1}'})
    new = snapshot(NAME)
    assert new.revision == server.branches[NAME, "main"] != old.revision
    assert (new.folder / "decoder/config.json").read_bytes() == b'{"new": 1}'
    assert server.fetched() == ["decoder/config.json"]
    server.log.clear()
    assert snapshot(f"{NAME}@{old.revision}") == old and server.log == []
    server.push(NEEDED | {"tokenizer/merges.txt": b"b c"}, branch="refs/pr/1")
    assert snapshot(f"{NAME}@refs/pr/1").revision == server.branches[NAME, "refs/pr/1"]


def test_shards_come_with_their_index(server):
    index, shards = f"{STEM}.safetensors.index.json", ["one.safetensors", "two.safetensors"]
    sharded = {file: data for file, data in NEEDED.items() if file != f"decoder/{STEM}.safetensors"}
    sharded |= {f"decoder/{index}": json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()}
    server.push(sharded | {f"decoder/{shards[0]}": b"1"})
    refuse(NAME, "lacks 'decoder/two.safetensors', which its index names")
    whole = sharded | {f"decoder/{shard}": b"1" for shard in shards}
    commit = server.push(whole | {f"decoder/{STEM}.bin": b"pickle", "decoder/three.safetensors": b"3"})
    assert files_of(snapshot(NAME).folder) == whole
    server.log.clear()
    assert files_of(snapshot(f"{NAME}@{commit}").folder) == whole and server.log == []
    for hostile in ("../tokenizer/vocab.json", "/etc/passwd", "..", "deep/one.safetensors"):
        server.push(whole | {f"decoder/{index}": json.dumps({"weight_map": {"a": hostile}}).encode()})
        refuse(NAME, "outside of its folder")
    for damaged in (b"{", b"[]", b'{"weight_map": [1]}'):
        server.push(whole | {f"decoder/{index}": damaged})
        refuse(NAME, "cannot be read|is no table|no weight_map")


def test_pickles_and_halves_do_where_nothing_better_is(server):
    decoder, text = f"decoder/{STEM}.safetensors", "text_encoder/model.safetensors"
    others = {file: data for file, data in NEEDED.items() if file not in (decoder, text)}
    others |= {f"decoder/{STEM}.bin": b"pickle", f"decoder/{STEM}.fp16.safetensors": b"half"}
    server.push(others | {"text_encoder/pytorch_model.bin": b"pickle", "text_encoder/model.bin": b"no one's"})
    found = files_of(snapshot(NAME).folder).keys()
    assert {f"decoder/{STEM}.fp16.safetensors", "text_encoder/pytorch_model.bin"} < found
    assert not {f"decoder/{STEM}.bin", "text_encoder/model.bin"} & found


@pytest.mark.parametrize(
    "name, refusal, words",
    [
        ("owner/absent", None, "'owner/absent' is no path here and no repository"),
        (f"{NAME}@absent", None, "a revision that the repository lacks"),
        (NAME, ("/", 401, ""), "hf auth login"),
        (NAME, ("/", 403, ""), "refuses 'owner/karlo' .403.: log in with `hf auth login`"),
        (NAME, ("/api/", 403, "GatedRepo"), "is gated: ask for access"),
        (NAME, ("/resolve/", 403, "GatedRepo"), "is gated: ask for access"),
        (NAME, ("/resolve/", 403, ""), "hf auth login"),
        (NAME, ("/", 418, ""), "with error 418: try again later"),
        ("owner/a--b", None, "cannot be a repository's name"),
        ("owner", None, "names no repository: give owner/name"),
        ("../etc/passwd", None, "names no repository: give owner/name"),
        (f"{NAME}@../../x", None, "names no repository: give owner/name"),
    ],
)
def test_refusals(server, name: str, refusal: tuple[str, int, str] | None, words: str):
    if refusal:
        server.refusals[refusal[0]] = refusal[1:]
    refuse(name, words)


def test_repositories_of_other_things(server):
    server.push({"README.md": b"words"})
    refuse(NAME, "has no model_index.json")
    server.push(NEEDED | {"model_index.json": b'{"_class_name": "Other", "decoder": [null, null]}'})
    refuse(NAME, "lists no decoder but is of 'Other'")
    server.push(NEEDED | {"model_index.json": b"{"})
    refuse(NAME, "cannot be read as JSON")
    server.push({file: data for file, data in NEEDED.items() if not file.endswith(".safetensors")})
    refuse(NAME, "has neither text_encoder/model.safetensors nor a .bin")
    assert not any(file.endswith(".safetensors") for file in server.fetched())


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of .* is full: free some of it, or set HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "the disk of .* is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: set HF_HOME"),
        (RuntimeError("something"), "did not arrive whole .RuntimeError.: run again"),
        (None, "of 'owner/karlo' did not arrive: run again"),  # as the client does when the hub falls silent midway
    ],
)
def test_what_the_machine_refuses(server, monkeypatch, error: Exception | None, words: str):
    def failing(*args: object, **options: object) -> None:
        if error:
            raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    refuse(NAME, words)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse(NAME, r"pip install 'unclip_jax\[hub\]'")


def test_names_of_repositories(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/decoder").mkdir(parents=True)
    for name in ("owner/name", "o-1/n_2.3-a", "owner/name@main", "owner/name@refs/pr/1", f"owner/name@{'0' * 40}"):
        assert is_repository(name), name
    for name in ("runs/decoder", "owner", "a/b/c", "./a/b", "/a/b", "../b", "a/..", "owner/name@", "owner/na me"):
        assert not is_repository(name), name
    for name in ("runs/decoder.safetensors", "runs/decoder.ckpt", "owner/name\n", "", "owner/name@../x"):
        assert not is_repository(name), name


@pytest.mark.parametrize("stem", ["model", STEM])
def test_the_listing_is_searched_as_the_folder_is(tmp_path: Path, stem: str):
    for base, ending in ((stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")):
        for middle in ("", ".fp16"):
            (tmp_path / f"{base}{middle}.{ending}").touch()
            (tmp_path / f"{base}.{ending}.index{middle}.json").touch()
    left = {f"decoder/{path.name}" for path in tmp_path.iterdir()}
    assert len(left) == 8
    while left:
        found = find_weights(tmp_path, stem)
        assert _weights("decoder/", stem, left) == f"decoder/{found.name}"
        found.unlink()
        left.remove(f"decoder/{found.name}")
    with pytest.raises(CheckpointError, match="neither"):
        _weights("decoder/", stem, left)
