"""A cascade of ours as a folder in diffusers' layout, which its UnCLIPPipeline loads.

Without a prior, but with an image tower, it is one for UnCLIPImageVariationPipeline, and with both the image tower lies
beside what UnCLIPPipeline reads. What only training and sampling know (drop rates, steps, guidance) has no place there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclip_jax.cascade import Cascade
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.writing import Tensor, new_folder, save_file, write_json
from unclip_jax.config import ClipConfig, DecoderConfig, PriorConfig, UpsamplerConfig
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.interop import clip, karlo, karlo_names
from unclip_jax.interop.clip_pixels import preprocessor
from unclip_jax.interop.clip_tokenizer import save_tokenizer
from unclip_jax.interop.hub import INDEX, STEM
from unclip_jax.interop.karlo_settings import REFUSED
from unclip_jax.interop.names import Entry, export

PIPELINE, VARIATIONS = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
CLASSES = {  # library and class of every component, as the published index has them
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "prior": ["diffusers", "PriorTransformer"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
ABSENT = {PIPELINE: ("feature_extractor", "image_encoder"), VARIATIONS: ("prior", "prior_scheduler")}


def export_cascade(cascade: Cascade, out: str | Path) -> None:
    """Writes a cascade in diffusers' layout; `out` appears whole or not at all, with one tensor at a time in memory.

    Tensors keep their dtype. `UnCLIPPipeline.from_pretrained(out)` of diffusers 0.42 needs what it needs for the
    published folder: `diffusers.pipelines.unclip = diffusers.pipelines.deprecated.unclip`. An upsampler with one
    network for all steps is written as both of theirs.
    Raises CheckpointError naming all that diffusers lacks, before anything is written, and where `out` is there already
    or cannot be written.
    """
    folder = _Folder()
    folder.lacks(PIPELINE, _beyond(cascade))
    folder.add(lambda: _clip(cascade.clip))
    if cascade.prior is not None:
        prior = cascade.prior
        folder.add(lambda: _prior(prior))
        folder.add(lambda: _scheduler("prior", prior))
    folder.add(lambda: _decoder(cascade.decoder))
    folder.add(lambda: _scheduler("decoder", cascade.decoder))
    for upsampler in cascade.upsamplers:
        folder.add(lambda network=upsampler: _upsampler(network))
        folder.add(lambda network=upsampler: _scheduler("super_res", network))
    folder.check()

    pipeline = PIPELINE if cascade.prior is not None else VARIATIONS
    index = {name: classes for name, classes in CLASSES.items() if name not in ABSENT[pipeline]}
    with new_folder(out) as place:
        write_json(place / INDEX, {"_class_name": pipeline, **index})
        save_tokenizer(cascade.tokenizer, place / "tokenizer")  # type: ignore[arg-type]
        for name, content in folder.files.items():
            if name.endswith(".json"):
                write_json(place / name, content)
            else:
                save_file(content, place / name, metadata={"format": "pt"})


Files = dict[str, dict[str, Any]]  # by path: settings of a .json, tensors of a .safetensors


class _Folder:
    """The files to be written, and the reasons why they cannot be."""

    def __init__(self) -> None:
        self.files: Files = {}
        self.reasons: list[str] = []

    def lacks(self, name: str, lacking: dict[str, bool]) -> None:
        if names := [what for what, there in lacking.items() if there]:
            self.reasons.append(f"diffusers' {name} has no {', no '.join(names)}")

    def add(self, component: Callable[[], Files]) -> None:
        try:
            self.files |= component()
        except CheckpointError as error:
            self.reasons.append(str(error).removesuffix(REFUSED))

    def check(self) -> None:
        if self.reasons:
            raise CheckpointError(f"this cascade cannot be exported: {'; '.join(dict.fromkeys(self.reasons))}")


def _beyond(cascade: Cascade) -> dict[str, bool]:
    """What no unCLIP of diffusers has, as a whole."""
    config, tokenizer = cascade.clip.config.network, cascade.tokenizer
    assert isinstance(config, ClipConfig)
    kept = tokenizer.kept if isinstance(tokenizer, ClipTokenizer) else ()
    return {
        f"third stage (here to {cascade.sizes[-1]} px)": len(cascade.upsamplers) > 1,
        "cascade without an upsampler": not cascade.upsamplers,
        "cascade without a prior and an image tower": cascade.prior is None and not _sees(cascade.clip),
        "autoregressive prior": cascade.ar_prior is not None,
        "inpainting decoder": cascade.inpaint is not None,
        "CLIP embeddings of unit length": config.unit_length,
        f"vocabulary cut to {len(kept)} words": bool(kept),
    }


def _sees(network: Network) -> bool:
    return "image_projection" in network.params


def _clip(network: Network) -> Files:
    config = network.config.network
    assert isinstance(config, ClipConfig)
    files: Files = {
        "text_encoder/config.json": clip.hf_text_config(config),
        "text_encoder/model.safetensors": _tensors(clip.text_entries(config), network),
    }
    if _sees(network):
        files |= {
            "image_encoder/config.json": clip.hf_vision_config(config),
            "image_encoder/model.safetensors": _tensors(clip.vision_entries(config), network),
            "feature_extractor/preprocessor_config.json": preprocessor(config),
        }
    return files


def _prior(network: Network) -> Files:
    config = network.config.network
    assert isinstance(config, PriorConfig)
    settings = karlo.prior_json(config)
    statistics = export(karlo_names.whitening_entries(config), network.constants)
    return _model("prior", settings, _tensors(karlo_names.prior_entries(config), network) | statistics)


def _decoder(network: Network) -> Files:
    config = network.config.network
    assert isinstance(config, DecoderConfig)
    settings = karlo.decoder_json(config)
    files: Files = {}
    for name, own, entries in zip(("decoder", "text_proj"), settings, karlo_names.decoder_entries(config), strict=True):
        files |= _model(name, own, _tensors(entries, network))
    return files


def _upsampler(network: Network) -> Files:
    config = network.config.network
    assert isinstance(config, UpsamplerConfig)
    settings, entries = karlo.upsampler_json(config), karlo_names.upsampler_entries(config)
    last = [entry._replace(ours=("unet_last", *entry.ours[1:])) for entry in entries] if config.last_step else entries
    return _model("super_res_first", settings, _tensors(entries, network)) | _model(
        "super_res_last", settings, _tensors(last, network)
    )


def _scheduler(stage: str, network: Network) -> Files:
    return {f"{stage}_scheduler/scheduler_config.json": karlo.diffusion_json(network.config.diffusion)}


def _model(name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return {f"{name}/config.json": settings, f"{name}/{STEM}.safetensors": dict(tensors)}


def _tensors(entries: list[Entry], network: Network) -> dict[str, Tensor]:
    return export(entries, network.params)
