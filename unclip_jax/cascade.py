"""A loaded cascade: CLIP, prior, decoder and upsamplers that belong together, with the tokenizer that they share."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.safetensors import Network, check_tree, load_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, Dtype, PriorConfig, UpsamplerConfig
from unclip_jax.data.tokenizer import ClipTokenizer, TextTokenizer
from unclip_jax.models.quantiser import shapes
from unclip_jax.offload import Offload, cast, needs_offload, on_device
from unclip_jax.stages import build

SHIPPED = Path(__file__).parent / "weights"
PUBLISHED = "model_index.json"  # what a folder in diffusers' layout holds
Source = str | Path


class Cascade(NamedTuple):
    """The networks of one cascade.

    words: what its captions were made of, where that is known. prior, ar_prior: the diffusion prior and the
    autoregressive one, and inpaint, the decoder that was trained to inpaint, where there are such. sizes: sides of the
    pictures that it makes, in px. digest: identifies all its weights together.
    """

    tokenizer: TextTokenizer
    clip: Network
    prior: Network | None
    decoder: Network
    upsamplers: tuple[Network, ...]
    words: tuple[str, ...]
    ar_prior: Network | None = None
    inpaint: Network | None = None

    def chosen_prior(self, name: Literal["diffusion", "ar"]) -> Network:
        """The prior of a name; ValueError where the cascade lacks it."""
        if name == "diffusion":
            if self.prior is None:
                raise ValueError("this cascade has no diffusion prior, so it makes no picture of a caption alone")
            return self.prior
        if self.ar_prior is None:
            raise ValueError("this cascade has no ar_prior.safetensors: train one, or choose the prior diffusion")
        return self.ar_prior

    def require_image_tower(self) -> None:
        """ValueError where CLIP's image tower is absent, as it is in Karlo's text-to-image repository."""
        if "image_projection" not in self.clip.params:
            raise ValueError(
                "this cascade's CLIP has no image tower: name a second --weights that has an image_encoder"
            )

    @property
    def ancestral(self) -> bool:
        """Whether the decoder is to be sampled with fresh noise at every step, as Karlo's is."""
        return self.decoder.config.sample.sampler == "ddpm"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures that the stages end at, ascending, in px."""
        return (self.decoder.config.network.size, *(network.config.network.size for network in self.upsamplers))  # type: ignore[union-attr]

    @property
    def digest(self) -> str:
        """The networks' digests, joined."""
        return "-".join(network.digest[:6] for network in self.networks)

    @property
    def networks(self) -> tuple[Network, ...]:
        """All networks that there are."""
        known = (self.clip, self.prior, self.ar_prior, self.decoder, self.inpaint, *self.upsamplers)
        return tuple(network for network in known if network is not None)

    def change(self, change: Callable[[Network], Network]) -> "Cascade":
        """The cascade of changed networks."""

        def changed(network: Network | None) -> Network | None:
            return None if network is None else change(network)

        return self._replace(
            clip=change(self.clip),
            prior=changed(self.prior),
            decoder=change(self.decoder),
            upsamplers=tuple(map(change, self.upsamplers)),
            ar_prior=changed(self.ar_prior),
            inpaint=changed(self.inpaint),
        )


def tokenizer_from(clip: Network) -> ClipTokenizer:
    """The tokenizer that a CLIP was trained with, from its file."""
    kept = tuple(clip.extra.get("kept_ids", ()))
    tokenizer = ClipTokenizer(clip.config.network.context_length, kept)  # type: ignore[union-attr]
    if tokenizer.vocab_size != clip.config.network.vocab_size:  # type: ignore[union-attr]
        raise CheckpointError(f"the CLIP {clip.digest} does not carry the tokenizer that it was trained with")
    return tokenizer


def _tokenizer(clip: Network, folder: Path) -> TextTokenizer:
    """Its tokenizer, which an imported CLIP has beside it."""
    if (folder / "tokenizer").is_dir():
        from unclip_jax.interop.clip_tokenizer import load_tokenizer

        return load_tokenizer(folder / "tokenizer", clip.config.network)  # type: ignore[arg-type]
    return tokenizer_from(clip)


def load_checked(path: Path, kind: type, clip: Network | None = None) -> Network:
    """A network of one kind, with every tensor that its config calls for and no other.

    Raises CheckpointError where the file is damaged, of another kind, or trained on another CLIP than `clip`.
    """
    network = load_network(path, expect=kind)
    clip_config = clip.config.network if clip is not None else None
    check_tree(expected_shapes(network, clip_config), network.params, str(path))  # type: ignore[arg-type]
    if clip is not None and network.clip != clip.digest:
        raise CheckpointError(
            f"'{path}' was trained on the CLIP {network.clip}, not on {clip.digest}: take all of them from one cascade"
        )
    if isinstance(clip_config, ClipConfig):
        check_widths(network, clip_config, path)
    return network


def expected_shapes(network: Network, clip: ClipConfig | None = None) -> Any:
    """The tree of shapes that a network's config calls for; a published CLIP may have its text tower alone."""
    if isinstance(network.config.network, ClipConfig) and "image_projection" not in network.params:
        from unclip_jax.interop.clip import text_shapes

        return {**text_shapes(network.config.network), "log_scale": jax.ShapeDtypeStruct((), jnp.float32)}
    return jax.eval_shape(build(network.config, clip).init, jax.random.key(0))


def check_widths(network: Network, clip: ClipConfig, path: Path | str) -> None:
    """CheckpointError where a prior or decoder reads other widths than the CLIP gives, or lacks its constants."""
    match network.config.network:
        case PriorConfig(embedding_dim=image, text_dim=text, context_length=length) as config:
            if config.unit_length != clip.unit_length:
                raise CheckpointError(
                    f"'{path}' and its CLIP disagree about the length of embeddings: they are no pair"
                )
            statistics = network.constants.get("whitening", {})
            if {name: array.shape for name, array in statistics.items()} != {"mean": (image,), "std": (image,)}:
                raise CheckpointError(f"'{path}' lacks the prior's whitening constants: fetch or train it again")
        case ArPriorConfig(embedding_dim=image, text_dim=text, context_length=length) as config:
            tables = network.constants.get("quantiser", {})
            found = {name: array.shape for name, array in tables.items()}
            if found != shapes(config) or tables["buckets"] != config.buckets:
                raise CheckpointError(f"'{path}' lacks the prior's quantiser constants: fetch or train it again")
        case DecoderConfig(image_embedding_dim=image, text_encoder=None, text_dim=text, context_length=length):
            pass
        case _:
            return
    expected = (clip.embedding_dim, clip.text.width, clip.context_length)
    if (image, text, length) != expected:
        raise CheckpointError(
            f"'{path}' reads image embeddings, text states and contexts of {(image, text, length)}, "
            f"the CLIP gives {expected}: they have different configs, take all of them from one cascade"
        )


def load_clip(folder: str | Path) -> Network:
    """The CLIP of a cascade's folder; raises as load_cascade does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of weights '{folder}': check --weights")
    return load_checked(folder / "clip.safetensors", ClipConfig)


def _load_decoder(path: Path, clip: Network, channels: int) -> Network:
    """A decoder of so many input channels: 3, or 7 where it inpaints."""
    network = load_checked(path, DecoderConfig, clip)
    found = network.config.network.unet.in_channels  # type: ignore[union-attr]
    if found != channels:
        raise CheckpointError(
            f"'{path}' reads {found} channels, not {channels}: plain decoders read 3, inpainting ones 7"
        )
    return network


def load_cascade(
    source: Source | Sequence[Source] = SHIPPED,
    dtype: Dtype | Literal["auto"] = "auto",
    upsampler: Source | None = None,
    offload: Offload = "auto",
) -> Cascade:
    """The cascade of a folder or of a repository on the hub; the shipped one by default.

    source: a folder of clip, decoder and upsampler_<size>.safetensors, beside which prior, ar_prior and
    inpaint.safetensors may lie; or a folder in diffusers' layout; or, as a string, `owner/name` or
    `owner/name@revision`. Several of the latter two, in a sequence or with commas between them, complete each other.
    dtype: of parameters and compute; auto is float32 for weights of ours, and for published ones `fastest_dtype`'s.
    upsampler: a file of ours that is appended as the last stage.
    offload: always leaves the parameters in their files and puts a stage's on the device while it runs; never puts all
    there now; auto is never where they take at most offload.SHARE of the device's memory.
    Raises CheckpointError in one sentence where a file is missing, damaged, or does not belong to the others.
    """
    folders = [_local(part) for part in _sources(source)]
    if any((folder / PUBLISHED).is_file() for folder in folders):
        from unclip_jax.interop.folder import load_folders

        cascade = load_folders(folders, fastest_dtype() if dtype == "auto" else dtype, place="file")
    elif len(folders) == 1:
        cascade = _load_folder(folders[0]).change(partial(in_dtype, dtype=dtype))
    else:
        raise CheckpointError("only published cascades come in parts: name one folder of weights")
    if upsampler is not None:
        last = in_dtype(load_checked(Path(upsampler), UpsamplerConfig), dtype)
        cascade = cascade._replace(upsamplers=(*cascade.upsamplers, last))
        check_cascade(cascade, str(upsampler))
    if needs_offload(cascade.networks, offload):
        return cascade
    return cascade.change(lambda network: network._replace(params=on_device(network.params)))


def fastest_dtype() -> Dtype:
    """bfloat16 on TPUs and on GPUs of compute capability 8 or more, float16 on other GPUs, float32 elsewhere."""
    device: Any = jax.devices()[0]
    match device.platform:
        case "cpu":
            return "float32"
        case "gpu" if re.fullmatch(r"[0-7]\.\d", device.compute_capability):
            return "float16"
        case _:
            return "bfloat16"


def computing_in(config: Any, dtype: Dtype) -> Any:
    """A config whose networks, however deep they lie in it, compute in dtype."""
    changes: dict[str, Any] = {
        entry.name: dtype if entry.name == "dtype" else computing_in(getattr(config, entry.name), dtype)
        for entry in fields(config)
        if entry.name == "dtype" or is_dataclass(getattr(config, entry.name))
    }
    return replace(config, **changes)


def in_dtype(network: Network, dtype: Dtype | Literal["auto"]) -> Network:
    """A network with its parameters and compute in dtype; auto changes neither."""
    if dtype == "auto":
        return network
    return network._replace(config=computing_in(network.config, dtype), params=cast(network.params, dtype))


def _sources(source: Source | Iterable[Source]) -> Iterable[Source]:
    if not isinstance(source, str):
        return [source] if isinstance(source, Path) else list(source)
    return [source] if Path(source).exists() else source.split(",")


def _local(source: Source) -> Path:
    """The folder of a source, fetched where a string names a repository."""
    if isinstance(source, str) and "/" in source and not Path(source).exists():
        from unclip_jax.interop.hub import is_repository, snapshot

        if is_repository(source):
            return snapshot(source).folder
    return Path(source)


def _load_folder(folder: Path) -> Cascade:
    """The cascade of a folder of weights files of ours."""
    clip = load_clip(folder)
    prior_path = folder / "prior.safetensors"  # which Karlo's image variations have not
    prior = load_checked(prior_path, PriorConfig, clip) if prior_path.exists() else None
    ar_path = folder / "ar_prior.safetensors"
    ar_prior = load_checked(ar_path, ArPriorConfig, clip) if ar_path.exists() else None
    decoder = _load_decoder(folder / "decoder.safetensors", clip, channels=3)
    inpaint_path = folder / "inpaint.safetensors"
    inpaint = _load_decoder(inpaint_path, clip, channels=7) if inpaint_path.exists() else None
    found = [load_checked(path, UpsamplerConfig) for path in folder.glob("upsampler_*.safetensors")]
    upsamplers = sorted(found, key=lambda network: network.config.network.size)  # type: ignore[union-attr]
    words = tuple(clip.extra.get("words", ()))
    cascade = Cascade(_tokenizer(clip, folder), clip, prior, decoder, tuple(upsamplers), words, ar_prior, inpaint)
    check_cascade(cascade, str(folder))
    return cascade


def check_cascade(cascade: Cascade, name: str) -> None:
    """CheckpointError where the networks of the cascade `name` do not fit each other."""
    side = cascade.sizes[0]
    if cascade.inpaint is not None and cascade.inpaint.config.network.size != side:  # type: ignore[union-attr]
        raise CheckpointError(
            f"'{name}' has an inpainting decoder that does not make pictures of {side} px, as the other"
        )
    for network in cascade.upsamplers:
        config = network.config.network
        assert isinstance(config, UpsamplerConfig)
        if config.low_size != side:
            raise CheckpointError(
                f"the {config.size} px upsampler of '{name}' enlarges {config.low_size} px, not {side}"
            )
        side = config.size
