import json
import os
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from unclip_jax.checkpoint import CheckpointError, Network, check_tree, load_network, save_network
from unclip_jax.checkpoint import safetensors as weights
from unclip_jax.config import ClipConfig, DecoderConfig, PriorConfig, TrainConfig

CONFIG = TrainConfig("tiny", PriorConfig())
PARAMS = {
    "block": {"kernel": np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6), "bias": jnp.ones(6)},
    "scale": np.float32(0.1),
    "ids": np.arange(3, dtype=np.int32),
}
CONSTANTS = {"whiten": {"mean": np.linspace(0, 1, 5, dtype=np.float32)}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_network(tmp_path / "prior.safetensors", CONFIG, PARAMS, constants=CONSTANTS, clip="abc", extra={"images": 7})
    return tmp_path / "prior.safetensors"


def test_round_trip_is_bitwise(path: Path):
    network = load_network(path, expect=PriorConfig)
    assert isinstance(network, Network)
    assert (network.config, network.clip, network.extra) == (CONFIG, "abc", {"images": 7})
    kernel = network.params["block"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16 and network.params["scale"].shape == ()
    assert kernel.tobytes() == PARAMS["block"]["kernel"].astype(ml_dtypes.bfloat16).tobytes()
    assert network.params["ids"].dtype == np.int32
    assert network.constants["whiten"]["mean"].tobytes() == CONSTANTS["whiten"]["mean"].tobytes()
    check_tree(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)), network.params)
    again = path.with_name("again.safetensors")
    assert save_network(again, network.config, network.params, constants=network.constants) == network.digest
    assert again.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_float32_stays_float32_and_digest_follows_the_tensors(tmp_path: Path, path: Path):
    exact = tmp_path / "exact.safetensors"
    digest = save_network(exact, CONFIG, PARAMS, constants=CONSTANTS, dtype="float32")
    assert load_network(exact).params["block"]["kernel"].tobytes() == PARAMS["block"]["kernel"].tobytes()
    assert len(digest) == 12 and digest != load_network(path).digest


def test_a_clip_is_its_own_identity(tmp_path: Path):
    digest = save_network(tmp_path / "clip", TrainConfig("clip", ClipConfig()), PARAMS)
    assert load_network(tmp_path / "clip").clip == digest


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_network(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_missing_and_foreign_files(tmp_path: Path, path: Path):
    assert "there is no weights file" in _refusal(tmp_path / "none")
    assert "there is no weights file" in _refusal(tmp_path)
    save_file({"a": np.zeros(3)}, path)
    assert "was not written by unclip_jax" in _refusal(path)
    assert "holds a PriorConfig ('tiny'), not the DecoderConfig" in _refusal(_saved(path), expect=DecoderConfig)


def _saved(path: Path) -> Path:
    save_network(path, CONFIG, PARAMS)
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "short", "half", "long", "terabytes", "header"])
def test_damaged_files(path: Path, kind: str):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["params/ids"] = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    claim = json.dumps(header).encode()
    damaged = {
        "empty": b"",
        "text": b"<html>404</html>" * 9,
        "short": data[:-1],
        "half": data[: len(data) // 2],
        "long": data + b"x",
        "terabytes": len(claim).to_bytes(8, "little") + claim + data[8 + size :],
        "header": (10**13).to_bytes(8, "little") + data[8:],
    }[kind]
    path.write_bytes(damaged)
    assert "truncated or damaged, fetch it again" in _refusal(path)


def test_every_flipped_bit_is_noticed(path: Path):
    data = path.read_bytes()
    whole = load_network(path)
    for bit in random.Random(0).sample(range(8 * len(data)), 150):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        # A header padded with blanks, or a key of it in another case, may still read as the same network.
        try:
            network = load_network(path)
        except CheckpointError:
            continue
        assert network.config == whole.config and network.digest == whole.digest
    flipped = bytearray(data)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "is damaged" in _refusal(path)


def test_hostile_names_are_refused(path: Path):
    for names in (["elsewhere/a"], ["params/" + "a/" * 10_000 + "b"], ["params/a", "params/a/b"], ["params"]):
        tensors = {name: np.zeros(1, np.float32) for name in names}
        metadata = {
            "schema_version": "1",
            "config": "{}",
            "clip": "",
            "extra": "{}",
            "sha256": weights._digest(tensors),
        }
        metadata["config"] = json.dumps(weights.to_json(CONFIG))
        save_file(tensors, path, metadata=metadata | {"seal": weights._seal(metadata)})
        assert "fetch it again" in _refusal(path)


def test_check_tree_names_what_differs():
    expected = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "b": np.zeros(())}
    found = {"a": {"kernel": np.zeros((3, 2)), "wing": np.zeros(3)}, "b": np.zeros(())}
    check_tree(expected, expected)
    with pytest.raises(CheckpointError) as error:
        check_tree(expected, found, "'prior'")
    assert str(error.value) == (
        "'prior' is missing a/bias and has the unknown a/wing and has the mis-shaped a/kernel (3, 2), expected (2, 3): "
        "it belongs to another network or version"
    )


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_leaves_the_earlier_file(path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception):
    before = path.read_bytes()

    def write(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(weights, "save_file", write)
    with pytest.raises(CheckpointError, match="cannot save .*: the disk is full; free some space"):
        save_network(path, CONFIG, PARAMS)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_an_unwritable_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save .*; choose a folder that can be written"):
        save_network(tmp_path / "file" / "prior", CONFIG, PARAMS)
