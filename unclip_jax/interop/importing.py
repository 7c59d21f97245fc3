"""Published weights as a folder of ours: a pipeline in diffusers' layout, Karlo's original checkpoints, or a CLIP."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from unclip_jax.cascade import Cascade, check_cascade, check_widths
from unclip_jax.checkpoint.safetensors import Network, save_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource, find_weights, open_source, read_table
from unclip_jax.checkpoint.writing import new_folder
from unclip_jax.config import ClipConfig, DecoderConfig, Dtype, PriorConfig, TrainConfig, UpsamplerConfig
from unclip_jax.interop import clip as clips
from unclip_jax.interop import karlo_names
from unclip_jax.interop.clip_tokenizer import WORDS, HubTokenizer, load_tokenizer, save_tokenizer
from unclip_jax.interop.folder import DECODER, PRIOR, UPSAMPLER, is_published, load_folders
from unclip_jax.interop.hub import is_repository, snapshot
from unclip_jax.interop.karlo_original import original_decoder, original_prior, original_upsampler
from unclip_jax.interop.loading import load_params
from unclip_jax.interop.names import Entry
from unclip_jax.overrides import load_config
from unclip_jax.stages import build
from unclip_jax.types import Params

TOKENIZER = "tokenizer"  # the folder, beside clip.safetensors, of the tokenizer's files
ORIGINALS = {  # files of a folder of Karlo's original checkpoints
    "prior": "prior-ckpt-step=*.ckpt",
    "decoder": "decoder-ckpt-step=*.ckpt",
    "upsamplers": "improved-sr-ckpt-step=*.ckpt",
    "statistics": "ViT-L-14_stats.th",
}


def import_weights(
    sources: Sequence[str], out: str | Path, dtype: Dtype | Literal["auto"] = "auto", clip: Path | None = None
) -> None:
    """Writes published weights as files of ours, with the tokenizer's files; `out` appears whole or not at all.

    sources: folders, or repositories as owner/name[@revision]; several pipelines complete each other. dtype: of the
    parameters; `auto` keeps theirs. clip: a CLIPModel's folder, for Karlo's original checkpoints, which have none that
    is read. One tensor at a time is in memory. Where the weights came from stays in every file's `extra`.
    Raises CheckpointError in one sentence for what is missing, damaged, or does not belong together.
    """
    folders, origins = [], []
    for source in sources:
        if is_repository(source):
            found = snapshot(source, clip=True)
            folders.append(found.folder)
            origins.append({"source": found.repository, "revision": found.revision})
        else:
            folders.append(Path(source))
            origins.append({"source": Path(source).absolute().name})
    kinds = {kind_of(folder) for folder in folders}
    if len(kinds) > 1 or (len(folders) > 1 and kinds != {"diffusers"}):
        raise CheckpointError("only pipelines in diffusers' layout complete each other: import the others one by one")
    match kinds.pop():
        case "diffusers":
            cascade = load_folders(folders, place="file")
        case "original":
            cascade = original_cascade(folders[0], clip)
        case "clip":
            network, tokenizer = clip_network(folders[0])
            with new_folder(out) as folder:
                _save_clip(network, tokenizer, folder, dtype, {"imported": origins})
            return
        case _:
            raise CheckpointError(
                f"'{folders[0]}' is no folder of a pipeline in diffusers' layout, of Karlo's checkpoints or of a CLIP: "
                "check the path"
            )
    save_cascade(cascade, out, dtype, {"imported": origins})


def kind_of(folder: Path) -> Literal["diffusers", "original", "clip", "unknown"]:
    """What layout a folder has."""
    if is_published(folder):
        return "diffusers"
    if any(any(folder.glob(pattern)) for pattern in ORIGINALS.values()):
        return "original"
    if (folder / "config.json").is_file():
        return "clip"
    return "unknown"


def save_cascade(cascade: Cascade, out: str | Path, dtype: Dtype | Literal["auto"], extra: dict[str, Any]) -> None:
    """Writes a published cascade as files of ours that `load_cascade(out)` reads."""
    with new_folder(out) as folder:
        digest = _save_clip(cascade.clip, cascade.tokenizer, folder, dtype, extra)
        named = {"prior": cascade.prior, "decoder": cascade.decoder}
        named |= {f"upsampler_{network.config.network.size}": network for network in cascade.upsamplers}  # type: ignore[union-attr]
        for name, network in named.items():
            if network is not None:
                of = None if isinstance(network.config.network, UpsamplerConfig) else digest
                save_network(
                    folder / f"{name}.safetensors",
                    network.config,
                    network.params,
                    constants=network.constants,
                    dtype=dtype,
                    clip=of,
                    extra=extra,
                )


def _save_clip(
    network: Network, tokenizer: Any, folder: Path, dtype: Dtype | Literal["auto"], extra: dict[str, Any]
) -> str:
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder / TOKENIZER)
    return save_network(folder / "clip.safetensors", network.config, network.params, dtype=dtype, extra=extra)


def clip_network(folder: Path, unit_length: bool = True) -> tuple[Network, HubTokenizer | None]:
    """A CLIPModel's folder, its parameters not read yet, and its tokenizer, where the folder has one."""
    settings = {name: _json(folder / name) for name in ("config.json", "preprocessor_config.json")}
    if (kind := (settings["config.json"] or {}).get("model_type")) != "clip":
        raise CheckpointError(f"'{folder / 'config.json'}' is of a model of type {kind!r}, not of a whole clip")
    pixels = settings["preprocessor_config.json"]
    config = replace(clips.clip_config(settings["config.json"], pixels=pixels), unit_length=unit_length)
    source = open_source(find_weights(folder, "model"))
    params = load_params(clips.entries(config), source, clips.shapes(config), place="file", ignore=clips.IGNORED)
    words = any((folder / name).is_file() for name in WORDS)
    return _network(TrainConfig("clip", config), params), load_tokenizer(folder, config) if words else None


def original_cascade(folder: Path, clip: Path | None, configs: Callable[[str], TrainConfig] = load_config) -> Cascade:
    """Karlo's original checkpoints with a CLIPModel's folder, their parameters not read yet.

    The schedulers are those of the published pipeline, which clips the prior at 5 where Karlo's own code has 10, so
    that the same weights make the same pictures. configs: of karlo_prior, karlo_decoder and karlo_up256.
    """
    if clip is None:
        raise CheckpointError(
            f"the CLIP in '{folder}' is an archive of code, which is not run: name the folder of "
            "openai/clip-vit-large-patch14 in Hugging Face's layout with --clip"
        )
    paths = {name: _only(folder, pattern) for name, pattern in ORIGINALS.items()}
    network, tokenizer = clip_network(clip, unit_length=False)
    if tokenizer is None:
        raise CheckpointError(f"'{clip}' has no tokenizer: fetch its vocab.json and merges.txt too")
    clip_config = network.config.network
    assert isinstance(clip_config, ClipConfig)
    samples = {"karlo_prior": PRIOR, "karlo_decoder": DECODER, "karlo_up256": UPSAMPLER}
    runs = {name: replace(configs(name), sample=sample) for name, sample in samples.items()}
    sources = {name: open_source(path) for name, path in paths.items()}
    prior = _original_prior(runs["karlo_prior"], sources["prior"], sources["statistics"], clip_config)
    decoder = _original_decoder(runs["karlo_decoder"], sources["decoder"], clip_config)
    upsampler = _original_upsampler(runs["karlo_up256"], sources["upsamplers"])
    cascade = Cascade(tokenizer, network, prior, decoder, (upsampler,), ())
    for part in (prior, decoder):
        check_widths(part, clip_config, str(folder))
    check_cascade(cascade, str(folder))
    return cascade


def _original_prior(run: TrainConfig, source: TensorSource, statistics: TensorSource, clip: ClipConfig) -> Network:
    config = run.network
    assert isinstance(config, PriorConfig)
    original, names = original_prior(source, statistics, config), ("clip_mean", "clip_std")
    params = load_params(karlo_names.prior_entries(config), original, _shapes(run, clip), place="file", ignore=names)
    constants = {name.removeprefix("clip_"): np.array(original.read(name), np.float32).reshape(-1) for name in names}
    return _network(run, params, {"whitening": constants})


def _original_decoder(run: TrainConfig, source: TensorSource, clip: ClipConfig) -> Network:
    config = run.network
    assert isinstance(config, DecoderConfig)
    entries = [entry for table in karlo_names.decoder_entries(config) for entry in table]
    return _network(run, load_params(entries, original_decoder(source, config), _shapes(run, clip), place="file"))


def _original_upsampler(run: TrainConfig, source: TensorSource) -> Network:
    assert isinstance(run.network, UpsamplerConfig)
    config = replace(run.network, last_step=True)
    run = replace(run, network=config)
    shapes, params = _shapes(run), {}
    for name in ("unet", "unet_last"):
        original = original_upsampler(source, config, last=name == "unet_last")
        entries: list[Entry] = [
            entry._replace(ours=(name, *entry.ours[1:])) for entry in karlo_names.upsampler_entries(config)
        ]
        params |= load_params(entries, original, {name: shapes[name]}, place="file")
    return _network(run, params)


def _shapes(run: TrainConfig, clip: ClipConfig | None = None) -> Params:
    return jax.eval_shape(build(run, clip).init, jax.random.key(0))


def _network(run: TrainConfig, params: Params, constants: Params | None = None) -> Network:
    return Network(run, params, constants or {}, None, "", {})


def _only(folder: Path, pattern: str) -> Path:
    """The file of a pattern; the last one where a folder has those of several steps."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise CheckpointError(f"'{folder}' has no {pattern}: fetch all of Karlo's checkpoints into one folder")
    return found[-1]


def _json(path: Path) -> dict[str, Any] | None:
    """A table of settings, or None where there is no such file."""
    return read_table(path) if path.is_file() else None
