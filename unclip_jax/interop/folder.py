"""A published unCLIP in diffusers' layout as a cascade of ours: one folder, or several that complete each other.

kakaobrain/karlo-v1-alpha has a text tower and a prior, its image-variations twin an image tower instead; given both,
everything that our own cascade does works. Components may lie in any of the folders, and the first that has one counts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from unclip_jax.cascade import PUBLISHED, Cascade, check_cascade, check_widths, computing_in
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource, find_weights, open_source, read_table
from unclip_jax.config import ClipConfig, Dtype, NetworkConfig, PriorConfig, SampleConfig, TrainConfig
from unclip_jax.interop import clip as clips
from unclip_jax.interop import karlo, karlo_names
from unclip_jax.interop.clip_tokenizer import load_tokenizer
from unclip_jax.interop.loading import Place, load_params
from unclip_jax.interop.names import Entry
from unclip_jax.models.decoder import Decoder, init_decoder
from unclip_jax.models.upsampler import Upsampler, init_upsampler
from unclip_jax.stages import build

SAMPLED = 4096  # bytes of a tensor that its digest reads
PRIOR = SampleConfig(sampler="ddpm", steps=25, guidance=4.0, candidates=1)  # diffusers' defaults, as are the next two
DECODER = SampleConfig(sampler="ddpm", steps=25, guidance=8.0)
UPSAMPLER = SampleConfig(sampler="ddpm", steps=7)
AnyDtype = Dtype | Literal["auto"]


def is_published(folder: str | Path) -> bool:
    """Whether a folder holds a pipeline in diffusers' layout."""
    return (Path(folder) / PUBLISHED).is_file()


def load_folders(folders: Sequence[str | Path], dtype: AnyDtype = "auto", place: Place | None = None) -> Cascade:
    """The cascade of published folders, on devices, parameters and compute in `dtype`; place: as for `load_params`.

    dtype: `auto` keeps the parameters' and computes in float32. Raises CheckpointError in one sentence for what is
    missing, damaged, or does not belong together.
    """
    parts = _Parts([Path(folder) for folder in folders])
    _check_one_clip(parts)
    clip, tokenizer = _clip(parts, dtype, place)
    config = clip.config.network
    assert isinstance(config, ClipConfig)
    prior = _prior(parts, config, clip.digest, dtype, place) if parts.has("prior") else None
    decoder = _decoder(parts, config, clip.digest, dtype, place)
    upsampler = _upsampler(parts, decoder, dtype, place) if parts.has("super_res_first") else None
    cascade = Cascade(tokenizer, clip, prior, decoder, () if upsampler is None else (upsampler,), ())
    name = " and ".join(map(str, folders))
    for network in (prior, decoder):
        if network is not None:
            check_widths(network, config, name)
    check_cascade(cascade, name)
    return cascade


class _Parts:
    """The components of several folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        for folder in folders:
            if not is_published(folder):
                raise CheckpointError(f"'{folder}' has no {PUBLISHED}: give a folder in diffusers' layout")

    def has(self, component: str) -> bool:
        return any((folder / component).is_dir() for folder in self.folders)

    def path(self, component: str) -> Path:
        for folder in self.folders:
            if (folder / component).is_dir():
                return folder / component
        where = " and ".join(f"'{folder}'" for folder in self.folders)
        raise CheckpointError(f"{where} has no {component}: fetch the whole repository, or name one that has it too")

    def settings(self, component: str, name: str = "config.json") -> dict[str, Any]:
        return read_table(self.path(component) / name)

    def weights(self, component: str) -> TensorSource:
        stem = "model" if component in ("text_encoder", "image_encoder") else "diffusion_pytorch_model"
        return open_source(find_weights(self.path(component), stem))


def _clip(parts: _Parts, dtype: AnyDtype, place: Place | None) -> tuple[Network, Any]:
    """Both towers, or the text tower alone, and the tokenizer."""
    towers = [parts.settings("text_encoder")]
    pixels = None
    if parts.has("image_encoder"):
        towers.append(parts.settings("image_encoder"))
        if parts.has("feature_extractor"):
            pixels = parts.settings("feature_extractor", "preprocessor_config.json")
    config = replace(clips.clip_config(*towers, pixels=pixels), unit_length=False)
    source = parts.weights("text_encoder")
    params = dict(
        load_params(clips.text_entries(config), source, clips.text_shapes(config), dtype, place, clips.IGNORED)
    )
    sources = [source]
    if len(towers) > 1:
        sources.append(parts.weights("image_encoder"))
        entries, shapes = clips.vision_entries(config), clips.vision_shapes(config)
        params |= load_params(entries, sources[-1], shapes, dtype, place, clips.IGNORED)
    # Karlo's files have no temperature; OpenAI's is at its cap.
    params["log_scale"] = jax.numpy.asarray(np.log(100.0), jax.numpy.float32)
    digest = _digest(sources[:1])
    tokenizer = load_tokenizer(parts.path("tokenizer"), config)
    return _network("karlo_clip", config, params, digest, _digest(sources), dtype), tokenizer


def _check_one_clip(parts: _Parts) -> None:
    """CheckpointError where the folders' text towers differ by more than 16 bits tell: then nothing of them fits."""
    first = None
    for folder in parts.folders:
        if (folder / "text_encoder").is_dir():
            found = _Parts([folder]).weights("text_encoder").read("text_projection.weight").astype(np.float32)
            first = found if first is None else first
            if found.shape != first.shape or np.abs(found - first).max() > 0.01 * np.abs(first).max():
                raise CheckpointError(
                    f"the text towers of '{parts.folders[0]}' and '{folder}' differ: their parts are of two CLIPs, "
                    "so take all of them from cascades of one"
                )


def _prior(parts: _Parts, clip: ClipConfig, of: str, dtype: AnyDtype, place: Place | None) -> Network:
    config = karlo.prior_config(parts.settings("prior"))
    diffusion = karlo.diffusion_config(parts.settings("prior_scheduler", "scheduler_config.json"))
    run = TrainConfig("karlo_prior", config, diffusion, PRIOR)
    source = parts.weights("prior")
    constants = {name: source.read(name) for name in ("clip_mean", "clip_std") if name in source.arrays}
    shapes = jax.eval_shape(build(run, clip).init, jax.random.key(0))
    params = load_params(karlo_names.prior_entries(config), source, shapes, dtype, place, ("clip_mean", "clip_std"))
    statistics = _statistics(constants, config, source)
    return _network(run.name, config, params, of, _digest([source]), dtype, run, {"whitening": statistics})


def _statistics(found: dict[str, np.ndarray], config: PriorConfig, source: TensorSource) -> dict[str, np.ndarray]:
    """The whitening constants of a prior's file, float32."""
    if {name: array.size for name, array in found.items()} != dict.fromkeys(
        ("clip_mean", "clip_std"), config.embedding_dim
    ):
        raise CheckpointError(f"'{source.path}' lacks the prior's clip_mean and clip_std: fetch it again")
    return {name.removeprefix("clip_"): np.array(array, np.float32).reshape(-1) for name, array in found.items()}


def _decoder(parts: _Parts, clip: ClipConfig, of: str, dtype: AnyDtype, place: Place | None) -> Network:
    config = karlo.decoder_config(parts.settings("decoder"), parts.settings("text_proj"), clip.context_length)
    diffusion = karlo.diffusion_config(parts.settings("decoder_scheduler", "scheduler_config.json"))
    run = TrainConfig("karlo_decoder", config, diffusion, DECODER)
    shapes = dict(jax.eval_shape(lambda key: init_decoder(Decoder(config), key), jax.random.key(0)))
    unet = {"unet": shapes.pop("unet")}
    params, sources = {}, []
    for component, entries, expected in zip(
        ("decoder", "text_proj"), karlo_names.decoder_entries(config), (unet, shapes), strict=True
    ):
        sources.append(parts.weights(component))
        params |= load_params(entries, sources[-1], expected, dtype, place)
    return _network(run.name, config, params, of, _digest(sources), dtype, run)


def _upsampler(parts: _Parts, decoder: Network, dtype: AnyDtype, place: Place | None) -> Network:
    """Both U-Nets as one network; the last one's config leaves its size to the first's."""
    low = decoder.config.network.size  # type: ignore[union-attr]
    config = karlo.upsampler_config(parts.settings("super_res_first"), low)
    components = {"unet": "super_res_first"}
    if parts.has("super_res_last"):
        last = karlo.upsampler_config(parts.settings("super_res_last"), low, config.size)
        if last != config:
            raise CheckpointError("super_res_first and super_res_last have different configs: take both from one place")
        config, components = replace(config, last_step=True), components | {"unet_last": "super_res_last"}
    diffusion = karlo.diffusion_config(parts.settings("super_res_scheduler", "scheduler_config.json"))
    run = TrainConfig("karlo_up256", config, diffusion, UPSAMPLER)
    shapes = jax.eval_shape(lambda key: init_upsampler(Upsampler(config), key), jax.random.key(0))
    params, sources = {}, []
    for name, component in components.items():
        entries = [_moved(entry, name) for entry in karlo_names.upsampler_entries(config)]
        sources.append(parts.weights(component))
        params |= load_params(entries, sources[-1], {name: shapes[name]}, dtype, place)
    return _network(run.name, config, params, None, _digest(sources), dtype, run)


def _moved(entry: Entry, name: str) -> Entry:
    """The entry of the U-Net of another name."""
    return entry._replace(ours=(name, *entry.ours[1:]))


def _network(
    name: str,
    config: NetworkConfig,
    params: Any,
    clip: str | None,
    digest: str,
    dtype: AnyDtype,
    run: TrainConfig | None = None,
    constants: Any = None,
) -> Network:
    run = run or TrainConfig(name, config)
    computed = run if dtype == "auto" else computing_in(run, dtype)
    return Network(computed, params, constants or {}, clip, digest, {})


def _digest(sources: Sequence[TensorSource]) -> str:
    """12 hexadecimal digits that tell weights apart: names, shapes, and the beginning of every tensor."""
    digest = hashlib.sha256()
    for source in sources:
        for name in sorted(source.arrays):
            array = source.read(name)
            digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
            first = array.reshape(-1)[: max(1, SAMPLED // array.itemsize)] if array.flags.c_contiguous else array[:1]
            digest.update(np.ascontiguousarray(first).tobytes())
    return digest.hexdigest()[:12]
