"""Stages that are loaded in turn: what they compute with is the same, in the memory of the largest of them."""

import gc
import hashlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from unclip_jax import edit, offload, priors
from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.writing import Tensor
from unclip_jax.edit import variations
from unclip_jax.generate import generate
from unclip_jax.inputs import Options, Text
from unclip_jax.offload import SHARE, device_memory, needs_offload, on_device

PICTURE = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
STAGES = (  # where the compiled stages are called
    (sys.modules[generate.__module__], ("encode", "decode", "upsample", "clip_scores")),
    (priors, ("sample_prior",)),
    (edit, ("embed_images", "invert", "redraw")),
)
MARGIN = 100_000  # bytes, for pictures and embeddings


class Call(NamedTuple):
    """One call of a stage: its name, a digest of all the numbers that it was given, and bytes on the device."""

    stage: str
    given: str
    live: int


@pytest.fixture
def draw(monkeypatch):
    """Draws a prompt and a picture through every stage, of which none computes; gives the stages' calls."""
    calls: list[Call] = []
    before = 0

    def watched(name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            now = live() - before  # first: the digest's copies would count
            calls.append(Call(name, digest((given, named)), now))
            return answer(name, *given)

        return call

    for module, names in STAGES:
        for name in names:
            monkeypatch.setattr(module, name, watched(name))

    def drawn(cascade: Cascade, began: int) -> list[Call]:
        nonlocal before
        before = began
        calls.clear()
        few = Options(cascade.sizes[1], steps=2, prior_steps=2, rank_from=2)
        generate(cascade, ["a cat"], 3, few)
        variations(cascade, PICTURE, 1, 0.5, "a dog", options=few)
        assert {call.stage for call in calls} == {name for _, names in STAGES for name in names}
        return list(calls)

    return drawn


def answer(name: str, config: Any, *given: Any) -> Any:
    """What a stage would give, of the same shapes."""

    def ones(*shape: int) -> jax.Array:
        return jax.device_put(np.ones(shape, np.float32))

    network = getattr(config, "network", config)
    match name:
        case "encode":
            _, tokens, mask = given
            states = ones(*tokens.shape, network.text.width)
            return Text(states, jax.device_put(mask), ones(len(tokens), network.embedding_dim))
        case "embed_images":
            return ones(len(given[1]), network.embedding_dim)
        case "sample_prior":
            return ones(len(given[4]), network.embedding_dim)
        case "clip_scores":
            return ones(len(given[1]))
        case "invert":
            return ones(*given[2].shape)
        case "redraw":
            return ones(*given[-1].noise.shape)
        case _:
            return ones(len(given[2]), network.size, network.size, 3)


def digest(given: Any) -> str:
    arrays = [leaf for leaf in jax.tree.leaves(given) if hasattr(leaf, "dtype")]
    numbers = [leaf for leaf in arrays if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in numbers)).hexdigest()


def bytes_of(network: Network) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(network.params))


def live() -> int:
    """Bytes on the device; nothing is collected, because what a stage leaves must go away without."""
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize(("published", "dtype"), [(True, "bfloat16"), (False, "float32")], ids=["published", "ours"])
def test_stages_compute_with_the_same_in_the_memory_of_the_largest(
    draw, tiny_karlo, tiny_cascade_folder, published, dtype
):
    folders = [tiny_karlo.text, tiny_karlo.picture] if published else [tiny_cascade_folder]
    gc.collect()
    before = live()
    whole = load_cascade(folders, dtype, offload="never")
    resident, parameters = live() - before, sum(map(bytes_of, whole.networks))
    assert resident >= parameters
    expected = draw(whole, before)
    del whole
    before = live()
    turned = load_cascade(folders, dtype, offload="always")
    assert live() - before < 0.01 * parameters
    calls = draw(turned, before)
    assert [call[:2] for call in calls] == [call[:2] for call in expected]
    largest = max(map(bytes_of, turned.networks))
    assert max(call.live for call in calls) < largest + MARGIN < 0.9 * parameters, calls
    assert min(call.live for call in expected) >= parameters
    assert live() - before < MARGIN


def test_auto_asks_how_much_of_the_memory_the_parameters_take(tiny_cascade_folder, monkeypatch):
    networks = load_cascade(tiny_cascade_folder, offload="always").networks
    parameters = sum(map(bytes_of, networks))
    for memory, turns in ((None, False), (parameters / SHARE * 1.01, False), (parameters / SHARE * 0.99, True)):
        monkeypatch.setattr(offload, "device_memory", lambda memory=memory: memory)
        assert needs_offload(networks, "auto") == turns
        assert needs_offload(networks, "always") and not needs_offload(networks, "never")
    loaded = load_cascade(tiny_cascade_folder)
    assert not isinstance(jax.tree.leaves(loaded.decoder.params)[0], jax.Array)


def test_memory_is_the_device_s_own_where_it_tells(monkeypatch):
    class Gpu:
        platform = "gpu"
        stats: Any = {"bytes_limit": 12_000_000_000}

        def memory_stats(self) -> Any:
            return self.stats

    assert 2**28 < (device_memory() or 0) < 2**45  # of this machine
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    assert device_memory() == 12_000_000_000
    monkeypatch.setattr(Gpu, "stats", None)
    assert device_memory() is None


def test_leaves_are_copied_once_and_not_aliased():
    mapped, there = np.arange(64, dtype=np.float32).reshape(8, 8), jax.numpy.ones(3)
    lazy = Tensor((8, 8), np.dtype(np.float16), lambda: mapped.T)
    found: Any = on_device({"mapped": mapped, "there": there, "lazy": lazy})
    assert found["there"] is there and found["lazy"].dtype == np.float16
    expected = mapped.copy()
    mapped[:] = 0
    np.testing.assert_array_equal(found["mapped"], expected)
    np.testing.assert_array_equal(found["lazy"], expected.T)
