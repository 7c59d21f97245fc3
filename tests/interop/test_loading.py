import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource, open_source
from unclip_jax.interop.loading import load_params
from unclip_jax.interop.names import Entry, conv, export, linear, norm

ENTRIES = [
    *conv("stem", ("params", "stem"), 3, 8),
    *linear("block.query", ("params", "block", "query"), 8, 12),
    *linear("block.out", ("params", "block", "out"), 12, 8, bias=False),
    *norm("norm", ("params", "norm"), 8),
    Entry("logit_scale", (), ("params", "logit_scale")),
    Entry("positions", (77,), ("params", "positions")),
]
SHAPES = {
    "stem": {"kernel": (3, 3, 3, 8), "bias": (8,)},
    "block": {"query": {"kernel": (8, 3, 4), "bias": (3, 4)}, "out": {"kernel": (3, 4, 8)}},  # heads split off
    "norm": {"scale": (8,), "bias": (8,)},
    "logit_scale": (),
    "positions": (77,),
}


def expected_shapes() -> Any:
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    tree["positions"] = jax.ShapeDtypeStruct((77,), jnp.int32)
    return {"params": tree}


EXPECTED = expected_shapes()
RNG = np.random.default_rng(0)
TREE = jax.tree.map(
    lambda leaf: np.asarray(RNG.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else np.arange(77), leaf.dtype),
    EXPECTED,
)
STEM = {"params": {"stem": EXPECTED["params"]["stem"]}}


def tensors(entries: list[Entry]) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor).copy(order="C") for name, tensor in export(entries, TREE).items()}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    save_file(tensors(ENTRIES), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_what_was_exported_is_loaded_bit_for_bit(published: Path):
    params = load_params(ENTRIES, open_source(published), EXPECTED)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    same_bits(params, TREE)


def test_a_pickle_gives_what_safetensors_gives(tmp_path: Path, published: Path):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in open_source(published).arrays.items()}
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    same_bits(load_params(ENTRIES, open_source(tmp_path / "model.ckpt"), EXPECTED), TREE)


def test_params_do_not_follow_the_file(published: Path):
    params = load_params(ENTRIES, open_source(published), EXPECTED)
    with published.open("r+b") as file:
        file.write(b"\0" * published.stat().st_size)
    same_bits(params, TREE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floating_parameters_are_cast(published: Path, dtype: Any):
    params = load_params(ENTRIES, open_source(published), EXPECTED, dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float32 else leaf, TREE)
    same_bits(params, cast)


def test_auto_keeps_what_the_file_has(tmp_path: Path):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors(ENTRIES[:2]).items()}
    save_file(half, tmp_path / "half.safetensors")
    params = load_params(ENTRIES[:2], open_source(tmp_path / "half.safetensors"), STEM)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def refuse(entries: list[Entry], path: Path, expected: Any, words: str, **more: Any) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_params(entries, open_source(path), expected, **more)
    assert str(caught.value).count("\n") == 0


def test_file_table_and_network_must_agree(tmp_path: Path, published: Path):
    tensors = dict(open_source(published).arrays)
    changed = tmp_path / "changed.safetensors"
    save_file({**tensors, "extra": np.zeros(2)}, changed)
    refuse(ENTRIES, changed, EXPECTED, "has the unknown extra")
    save_file({name: array for name, array in tensors.items() if name != "norm.bias"}, changed)
    refuse(ENTRIES, changed, EXPECTED, "lacks norm.bias")
    save_file({**tensors, "norm.bias": np.zeros(9, np.float32)}, changed)
    refuse(ENTRIES, changed, EXPECTED, r"mis-shaped norm.bias \(9,\), expected \(8,\)")
    save_file({**tensors, "norm.bias": np.zeros(8, np.int8)}, changed)
    refuse(ENTRIES, changed, EXPECTED, "norm.bias in int8, and params/norm/bias is float32")

    fewer = {"params": {key: value for key, value in EXPECTED["params"].items() if key != "norm"}}
    refuse(ENTRIES, published, fewer, "no place for, params/norm/scale")
    more = {"params": {**EXPECTED["params"], "head": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}}
    refuse(ENTRIES, published, more, "leaves 1 parameters without a tensor, among them params/head/kernel")
    wide = {"params": {**EXPECTED["params"], "positions": jax.ShapeDtypeStruct((78,), jnp.int32)}}
    refuse(ENTRIES, published, wide, r"positions of shape \(77,\), and params/positions is \(78,\)")
    twice = [*ENTRIES[:-1], Entry("positions", (77,), ("params", "norm", "scale"))]
    refuse(twice, published, EXPECTED, "two tensors for params/norm/scale")


def test_buffers_are_ignored_only_where_asked(tmp_path: Path, published: Path):
    tensors = dict(open_source(published).arrays)
    old = tmp_path / "old.safetensors"
    save_file({**tensors, "text_model.embeddings.position_ids": np.arange(77)[None]}, old)
    refuse(ENTRIES, old, EXPECTED, "unknown text_model.embeddings.position_ids")
    same_bits(load_params(ENTRIES, open_source(old), EXPECTED, ignore=["*.position_ids", "norm.*"]), TREE)


def test_tensors_are_read_in_turn_and_none_before_the_checks(published: Path):
    read = []

    class Watched(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            read.append(name)
            return super().__getitem__(name)

    source = TensorSource(published, Watched(open_source(published).arrays))
    with pytest.raises(CheckpointError):
        load_params(ENTRIES[1:], source, EXPECTED)
    assert not read
    load_params(ENTRIES, source, EXPECTED)
    assert read == [entry.theirs for entry in ENTRIES]


# Peak of anonymous memory (mapped files are not part of it) above what stood before, over the size of the parameters.
MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from unclip_jax.interop.loading import load_params
from unclip_jax.interop.names import linear
from unclip_jax.checkpoint.sources import open_source
from unclip_jax.sharding import make_mesh, shard_state

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak(action):
    jax.block_until_ready(jnp.arange(8.0))
    before, seen, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    done.set()
    thread.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    return result, (max(*seen, anonymous()) - before) / size

def case(count, side, path, dtype=np.float32):
    entries = [entry for i in range(count) for entry in linear(f"layer.{i}", (f"layer_{i}",), side, side, bias=False)]
    expected = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((side, side), dtype)} for i in range(count)}
    rng = np.random.default_rng(0)
    save_file({entry.theirs: rng.standard_normal(entry.shape, np.float32).astype(dtype) for entry in entries}, path)
    return entries, expected

folder, count = sys.argv[1], int(sys.argv[2])
entries, expected = case(count, 1024, f"{folder}/many.safetensors")
source = open_source(f"{folder}/many.safetensors")
whole, float32 = peak(lambda: load_params(entries, source, expected))
half, bfloat16 = peak(lambda: load_params(entries, source, expected, "bfloat16"))
held = lambda: source._replace(arrays={name: np.array(array) for name, array in source.arrays.items()})
_, everything_first = peak(lambda: load_params(entries, held(), expected))

mesh = make_mesh("fsdp")
shardings = shard_state(expected, mesh)
place = lambda path, shape: shardings[path[0]][path[1]]
split, sharded = peak(lambda: load_params(entries, source, expected, "auto", place))
assert split["layer_0"]["kernel"].addressable_shards[0].data.shape == (1024 // jax.device_count(), 1024)
for name in split:
    np.testing.assert_array_equal(np.asarray(split[name]["kernel"]), np.asarray(whole[name]["kernel"]))
across = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
asked = []
class Watched(np.ndarray):
    def __getitem__(self, index):
        asked.append(super().__getitem__(index).shape)
        return super().__getitem__(index)
first = source._replace(arrays={"layer.0.weight": source.read("layer.0.weight").view(Watched)})
other = load_params(entries[:1], first, {"layer_0": expected["layer_0"]}, "bfloat16", lambda path, shape: across)
assert asked == [(1024, 1024 // jax.device_count())] * jax.device_count()  # of the file, a shard at a time
np.testing.assert_array_equal(np.asarray(other["layer_0"]["kernel"]), np.asarray(half["layer_0"]["kernel"]))

print("ratios", float32, bfloat16, sharded, everything_first)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_no_second_copy_in_host_memory_and_eight_devices_hold_what_one_does(tmp_path: Path):
    # A fixed threshold makes the allocator give freed leaves back, so that each measurement stands alone.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "16"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    *ratios, everything_first = map(float, done.stdout.split("ratios")[1].split())
    assert max(ratios) <= 1.3, ratios
    assert everything_first > 1.8  # the measure sees a second copy
