import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.sources import find_weights, locate, open_source

RNG = np.random.default_rng(0)
TENSORS = {
    "block.weight": RNG.normal(size=(4, 6)).astype(np.float32),
    "block.bias": RNG.normal(size=7).astype(np.float16),
    "conv.weight": RNG.normal(size=(3, 2, 1, 1)).astype(ml_dtypes.bfloat16),
    "ids": np.arange(-3, 5),
    "scale": np.full((), 0.1, np.float32),
    "none": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False, True]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def same(read: np.ndarray, written: np.ndarray) -> bool:
    return (read.dtype, read.shape, read.tobytes()) == (written.dtype, written.shape, written.tobytes())


def write(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(shape: list, first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def refuse(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(path)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 600


def test_safetensors_are_read_bit_for_bit(path: Path):
    source = open_source(path)
    assert source.shapes == {name: array.shape for name, array in TENSORS.items()}
    assert source.dtypes["conv.weight"] == ml_dtypes.bfloat16 and source.dtypes["ids"] == np.int64
    assert all(same(source.read(name), array) for name, array in TENSORS.items())
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        source.read("other")


def test_arrays_are_the_file_itself(path: Path):
    array = open_source(path).read("block.weight")
    start = path.read_bytes().index(TENSORS["block.weight"].tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.float32(123).tobytes())
    assert array[0, 0] == 123  # nothing was read ahead
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 0


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated_safetensors_are_refused(path: Path, kept: int):
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path, "truncated|cannot be read")


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ({"a": entry([2**38], 0, 2**40)}, b"1234", r"truncated \(its header claims 1099511627776 bytes"),
        ({"a": entry([2**64 + 1], 0, 4)}, b"1234", "'a'.*contradict"),
        ({"a": entry([0, 2**62, 2**62], 0, 0)}, b"", "impossible shape"),
        ({"a": entry([1] * 100, 0, 4)}, b"1234", "impossible shape"),
        ({"a": entry([2], 0, 4)}, b"1234", "'a'.*contradict"),
        ({"a": entry([-1], 0, -4)}, b"1234", "'a'.*contradict"),
        ({"a": entry([True], 0, 4)}, b"1234", "'a'.*contradict"),
        ({"a": entry([1.0], 0, 4)}, b"1234", "'a'.*contradict"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "'a'.*contradict"),
        ({"a": [1]}, b"1234", "'a'.*contradict"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"1" * 12, "'b' that overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12, "'b' that leaves a gap"),
        ({"a": entry([1], 0, 4)}, b"12345678", "damaged"),
        ({"a": entry([1], 0, 4, "Q7")}, b"1234", "unknown dtype Q7"),
        (b'{"a":1,"a":1}', b"", "two tensors or fields of the name 'a'"),
        (b'{"a":' + b"[" * 100_000, b"", "no JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "no JSON"),
        (b"\xff\xfe{}", b"", "no JSON"),
        (b"[]", b"", "no table"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, body: bytes, words: str):
    refuse(write(tmp_path / "a.safetensors", header, body), words)


def test_header_lengths_that_lie_are_refused(tmp_path: Path):
    refuse(write(tmp_path / "a.safetensors", {}, length=2**62), "claims a header of 4611686018427387904 bytes")
    refuse(write(tmp_path / "a.safetensors", {}, length=1000), "truncated")


def test_what_is_no_weights_file_is_refused(tmp_path: Path):
    refuse(tmp_path / "absent.safetensors", "there is no weights file")
    refuse(tmp_path / "picture.png", "no weights file by its name")
    pointer = tmp_path / "a.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refuse(pointer, "git lfs pull")


def shard(folder: Path, first: str = "model-1.safetensors") -> Path:
    """Two shards, the second a pickle, and their index, in which the first has another name if asked."""
    names = sorted(TENSORS)
    save_file({name: TENSORS[name] for name in names[:3]}, folder / "model-1.safetensors")
    weights = {name: torch.arange(6.0).reshape(2, 3) for name in names[3:]}
    torch.save(weights, folder / "model-2.bin")
    files = dict.fromkeys(names[:3], first) | dict.fromkeys(names[3:], "model-2.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def test_shards_of_an_index_are_one_source(tmp_path: Path):
    source = open_source(shard(tmp_path))
    assert set(source.shapes) == set(TENSORS)
    assert same(source.read("block.bias"), TENSORS["block.bias"])
    assert same(source.read("scale"), np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "..", "", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors"]
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: str):
    refuse(shard(tmp_path, name), "outside of its folder")


def test_an_index_and_its_shards_must_agree(tmp_path: Path):
    index = shard(tmp_path)
    os.rename(tmp_path / "model-1.safetensors", tmp_path / "aside")
    refuse(index, "'model-1.safetensors', and there is no such file")
    save_file({"block.bias": TENSORS["block.bias"]}, tmp_path / "model-1.safetensors")
    refuse(index, "lacks 'block.weight'")
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    refuse(index, "has, but the index does not list, 'flags'|'ids'")
    index.write_text('{"weight_map": {"a": "model.safetensors.index.json"}}')
    refuse(index, "names the index")
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a\\u0000": "a\\u0000.bin"}}'):
        index.write_text(text)
        refuse(index, "no weight_map|no usable|no such file")


def hub_cache(root: Path, repository: str) -> Path:
    """A folder as huggingface_hub lays it out, its first shard in the blobs."""
    snapshot = root / repository / "snapshots" / "0123abc" / "text_encoder"
    snapshot.mkdir(parents=True)
    (root / repository / "blobs").mkdir()
    index = shard(snapshot)
    blob = root / repository / "blobs" / "cafe"
    os.rename(snapshot / "model-1.safetensors", blob)
    (snapshot / "model-1.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    return index


def test_links_into_the_hubs_own_blobs_work(tmp_path: Path):
    index = hub_cache(tmp_path, "models--someone--karlo")
    assert same(open_source(index).read("block.weight"), TENSORS["block.weight"])
    assert find_weights(index.parent, "model") == index
    (index.parent / "model-1.safetensors").rename(index.parent / "moved")
    (index.parent / "model-1.safetensors").symlink_to("moved")  # within the folder, and from there to the blobs
    assert same(open_source(index).read("block.weight"), TENSORS["block.weight"])


def test_links_elsewhere_are_refused(tmp_path: Path):
    index = hub_cache(tmp_path, "models--someone--karlo")
    other = hub_cache(tmp_path, "models--another--karlo")
    link = index.parent / "model-1.safetensors"
    for target in (other.parents[3] / "blobs" / "cafe", other, tmp_path / "absent"):
        link.unlink()
        link.symlink_to(target)
        refuse(index, "link out of its folder")
    plain = hub_cache(tmp_path, "copied")  # a folder of that shape that is no cache of the hub
    refuse(plain, "link out of its folder")
    link.unlink()
    link.symlink_to("model-1.safetensors")  # to itself
    with pytest.raises(CheckpointError):
        locate(index.parent, link.name, index)


def test_the_best_file_of_a_folder_is_found(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no weights \(model.safetensors, its index or pytorch_model.bin\)"):
        find_weights(tmp_path, "model")
    worst_first = [
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.fp16.json",
        "model.fp16.safetensors",
        "model.safetensors.index.json",
        "model.safetensors",
    ]
    for name in worst_first:
        (tmp_path / name).touch()
        assert find_weights(tmp_path, "model").name == name
    assert find_weights(tmp_path, "model", "fp16").name == "model.fp16.safetensors"
    with pytest.raises(CheckpointError, match="of the variant ema"):
        find_weights(tmp_path, "model", "ema")
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    assert find_weights(tmp_path).name == "diffusion_pytorch_model.bin"
