import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Nothing of the package is imported up here: pytest loads this file before jaxtyping's import hook is in place.

# Tests compile many programs and run each on a few numbers, so LLVM's optimisations cost more than they give. Without
# them jax 0.6 rounds worse: it takes two decibels from a reconstruction.
if not version("jax").startswith("0.6."):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would spin beside the other test processes


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled programs for all processes of this run, which inherit it, and none of the user's."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="unclip-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def operations() -> Callable[[Any], list[Any]]:
    """From a traced program to every equation of it, inner programs included."""
    import jax

    def found(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from found(inner)

    return lambda jaxpr: list(found(jaxpr))


@pytest.fixture
def exact_division() -> Iterator[None]:
    """The processor, for what equals another program's float32 bit by bit: GPUs do not divide as exactly."""
    import jax

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(scope="session")
def tiny_cascade_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cascade of tiny random networks for 64, 256 and 1024 px, output layers away from zero."""
    import jax
    import numpy as np

    from unclip_jax import config as c
    from unclip_jax.checkpoint import save_network
    from unclip_jax.data.tokenizer import kept_ids
    from unclip_jax.models.quantiser import Quantiser
    from unclip_jax.stages import build

    folder = tmp_path_factory.mktemp("cascade")
    text = (
        "a an the of to on left right above below with background and openmoji drawing picture small big it "
        "cat dog apple banana red blue pink green yellow white house car"
    )
    words, kept = sorted(text.split()), kept_ids([text])
    tower = c.TransformerConfig(width=16, layers=1, heads=2)
    clip_config = c.ClipConfig(
        embedding_dim=16,
        image_size=64,
        patch_size=16,
        vision=tower,
        text=c.TransformerConfig(width=24, layers=1, heads=2, causal=True),
        vocab_size=len(kept) + 3,
        context_length=16,
    )
    unet = {"channels": 8, "multipliers": (1,), "depth": 1, "groups": 4, "head_channels": 8}
    decoder_unet = c.UNetConfig(**unet, patch=8, attention_factors=(1,), context_dim=16, middle_attention=True)

    def upsampler(size: int, patch: int) -> c.UpsamplerConfig:
        return c.UpsamplerConfig(c.UNetConfig(**unet, in_channels=6, patch=patch), low_size=size // 4, size=size)

    networks = {
        "clip": clip_config,
        "prior": c.PriorConfig(16, 24, 16, c.TransformerConfig(width=16, layers=1, heads=2, causal=True)),
        "decoder": c.DecoderConfig(
            decoder_unet, image_embedding_dim=16, text_dim=24, learned_null_text=True, context_length=16
        ),
        "upsampler_256": upsampler(256, 16),
        "upsampler_1024": upsampler(1024, 32),
        "ar_prior": c.ArPriorConfig(16, 24, 16, 4, 8, 4, c.TransformerConfig(width=16, layers=1, heads=2, causal=True)),
    }
    rng = np.random.default_rng(0)

    def random_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(mean + rng.normal(0, 0.2, leaf.shape), np.float32)

    digest = None
    for name, network in networks.items():
        diffusion = c.DiffusionConfig(prediction="v")
        sample = c.SampleConfig("ddim", steps=3, guidance=2.0)
        constants, extra = None, {}
        if name == "clip":
            extra = {"kept_ids": list(kept), "words": words, "concepts": ["cat", "dog", "apple"]}
        if name == "prior":
            diffusion, sample = c.DiffusionConfig(prediction="x0", clip=5.0), c.SampleConfig("ddpm", 3, 1.5)
            constants = {"whitening": {"mean": np.full(16, 0.1, np.float32), "std": np.full(16, 0.3, np.float32)}}
        if name == "ar_prior":
            low, basis = np.full(4, -1, np.float32), np.eye(16, dtype=np.float32)
            tables = Quantiser(basis[9] / 9, basis[:, :4], low, -low, np.asarray(8, np.int32), low[1:])  # type: ignore
            constants = {"quantiser": tables._asdict()}
        config = c.TrainConfig(f"tiny_{name}", network, diffusion, sample)
        shapes = jax.eval_shape(build(config, clip_config).init, jax.random.key(0))
        params = jax.tree_util.tree_map_with_path(random_leaf, shapes)
        saved = save_network(
            folder / f"{name}.safetensors",
            config,
            params,
            constants=constants,
            clip=digest if name in ("prior", "ar_prior", "decoder") else None,
            extra=extra,
        )
        digest = saved if name == "clip" else digest
    return folder
