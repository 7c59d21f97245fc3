"""The weights that there are, and a test of every stage that they make, each caught by itself."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip_jax.cascade import PUBLISHED, SHIPPED, Cascade, load_cascade
from unclip_jax.checkpoint.safetensors import Network, load_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ArPriorConfig, ClipConfig
from unclip_jax.diffusion.schedule import StepTable, step_table, strided_timesteps
from unclip_jax.doctor.findings import Finding, sentence
from unclip_jax.generate import decode, encode_prompts, null_text, upsample
from unclip_jax.inputs import Options, Text, embed_images, per_picture, picture_keys, table_of
from unclip_jax.offload import on_device
from unclip_jax.priors import prior_embeddings

FEW = 4  # steps of a stage under test


def weights_of(source: str | Path) -> Iterator[Finding]:
    """Every weights file of a cascade, each byte verified, and whether they fit each other."""
    whole = "pip install --force-reinstall --no-deps unclip-jax, or check its files out again"
    remedy = whole if source == SHIPPED else "fetch the file again, or train that network again"
    said, broken = [], False
    if not (Path(source) / PUBLISHED).is_file():
        for path in sorted(Path(source).glob("*.safetensors")):
            try:
                network = load_network(path)
                said.append(f"{path.stem} {network.digest[:6]}")
            except CheckpointError as error:
                broken = True
                yield Finding("weights", "wrong", str(error), remedy, {"file": str(path)})
    if broken:
        return
    try:
        cascade = load_cascade(source, offload="always")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        yield Finding("weights", "wrong", sentence(error), remedy, {"source": str(source)})
        return
    sizes = ", ".join(map(str, cascade.sizes))
    files = f": {', '.join(said)}" if said else ""
    yield Finding("weights", "ok", f"{source} makes {sizes} px{files}", figures={"digest": cascade.digest})


def stages(source: str | Path) -> Iterator[Finding]:
    """Every stage for a moment, on what the stage before made, or on grey where that failed."""
    try:
        cascade = load_cascade(source)
    except (ValueError, OSError, ModuleNotFoundError):
        yield Finding("stages", "wrong", "are not tested: the weights cannot be loaded", "mend the weights first")
        return
    clip, side, keys = cascade.clip.config.network, cascade.sizes[0], picture_keys(0, 1)
    assert isinstance(clip, ClipConfig)
    picture = np.zeros((1, side, side, 3), np.float32)
    embedding = np.full((1, clip.embedding_dim), clip.embedding_dim**-0.5, np.float32)
    states = np.zeros((1, clip.context_length, clip.text.width), np.float32)
    text = null = Text(states, np.ones(states.shape[:2], bool), embedding)  # type: ignore[arg-type]

    finding, found = _run("CLIP, text", lambda: encode_prompts(cascade, ["a cat"]).embedding, embedding.shape)
    yield finding
    if found is not None:
        null, text = encode_prompts(cascade, [""]), encode_prompts(cascade, ["a cat on a blue background"])
    for prior in filter(None, (cascade.prior, cascade.ar_prior)):
        autoregressive = isinstance(prior.config.network, ArPriorConfig)
        name, options = ("AR prior", Options()) if autoregressive else ("prior", Options(prior_steps=FEW))
        draw = partial(prior_embeddings, prior, keys, text, null, options)
        finding, found = _run(name, draw, embedding.shape)
        yield finding
        embedding = embedding if found is None else found
    finding, found = _run("decoder", partial(_decoded, cascade, embedding, text), picture.shape)
    yield finding
    picture = picture if found is None else found
    if "image_projection" in cascade.clip.params:
        grey = np.full((1, clip.image_size, clip.image_size, 3), 128, np.uint8)
        draw = partial(embed_images, clip, on_device(cascade.clip.params), grey)
        yield _run("CLIP, image", draw, embedding.shape)[0]
    for network, size in zip(cascade.upsamplers, cascade.sizes[1:], strict=True):
        finding, found = _run(f"upsampler {size}", partial(_enlarged, network, picture), (1, size, size, 3))
        yield finding
        picture = np.zeros((1, size, size, 3), np.float32) if found is None else found


def _decoded(cascade: Cascade, embedding: Any, text: Text) -> Any:
    network = cascade.decoder
    advice = network.config.sample
    return decode(
        network.config, advice.sampler, on_device(network.params), picture_keys(0, 1), embedding, text,
        _few(network), per_picture(advice.guidance, 1), np.float32(advice.rescale), np.float32(advice.eta), known=None,
        null=null_text(cascade),
    )  # fmt: skip


def _enlarged(network: Network, low: Any) -> Any:
    config, advice = network.config, network.config.sample
    params, eta = on_device(network.params), np.float32(advice.eta)
    return upsample(config, advice.sampler, params, picture_keys(0, 1), jnp.asarray(low), _few(network, 1), eta, None)


def _few(network: Network, steps: int = FEW) -> StepTable:
    """A short walk in a table as long as sampling's own, whose program it so shares."""
    capacity = len(table_of(network.config, network.config.sample.steps).t)
    most = network.config.diffusion.steps
    return step_table(strided_timesteps(min(steps, most), most), capacity)


def _run(name: str, draw: Callable[[], Any], shape: tuple[int, ...]) -> tuple[Finding, np.ndarray | None]:
    """A stage run twice, the first time compiling; its result where that is as it should be."""
    try:
        begun = time.perf_counter()
        np.asarray(draw())
        compiled = time.perf_counter()
        result = np.asarray(draw(), np.float32)
        seconds = time.perf_counter() - compiled
    except Exception as error:
        text, remedy = sentence(error), "update jax and jaxlib, or report it with this line"
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            remedy = "end other programs that use the device"
        return Finding(name, "wrong", f"fails: {text}", remedy), None
    figures = {"seconds": seconds, "first_seconds": compiled - begun}
    said = f"{seconds:.2f} s, the first time {compiled - begun:.1f} s"
    if result.shape != shape or not np.isfinite(result).all():
        what = "not finite" if result.shape == shape else f"of shape {result.shape}, not {shape}"
        remedy = "set --dtype float32 where you sample, or fetch the weights again"
        return Finding(name, "wrong", f"gives numbers that are {what}", remedy, figures), None
    return Finding(name, "ok", said, figures=figures), result
