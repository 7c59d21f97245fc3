"""A loaded cascade: CLIP, prior, decoder and upsamplers that belong together, with the tokenizer that they share."""

from pathlib import Path
from typing import Literal, NamedTuple

import jax

from unclip_jax.checkpoint.safetensors import Network, check_tree, load_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, PriorConfig, UpsamplerConfig
from unclip_jax.data.tokenizer import ClipTokenizer, TextTokenizer
from unclip_jax.models.quantiser import shapes
from unclip_jax.stages import build

SHIPPED = Path(__file__).parent / "weights"


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
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures that the stages end at, ascending, in px."""
        return (self.decoder.config.network.size, *(network.config.network.size for network in self.upsamplers))  # type: ignore[union-attr]

    @property
    def digest(self) -> str:
        """The networks' digests, joined."""
        networks = (self.clip, self.prior, self.ar_prior, self.decoder, self.inpaint, *self.upsamplers)
        return "-".join(network.digest[:6] for network in networks if network is not None)


def tokenizer_from(clip: Network) -> ClipTokenizer:
    """The tokenizer that a CLIP was trained with, from its file."""
    kept = tuple(clip.extra.get("kept_ids", ()))
    tokenizer = ClipTokenizer(clip.config.network.context_length, kept)  # type: ignore[union-attr]
    if tokenizer.vocab_size != clip.config.network.vocab_size:  # type: ignore[union-attr]
        raise CheckpointError(f"the CLIP {clip.digest} does not carry the tokenizer that it was trained with")
    return tokenizer


def load_checked(path: Path, kind: type, clip: Network | None = None) -> Network:
    """A network of one kind, with every tensor that its config calls for and no other.

    Raises CheckpointError where the file is damaged, of another kind, or trained on another CLIP than `clip`.
    """
    network = load_network(path, expect=kind)
    clip_config = clip.config.network if clip is not None else None
    stage = build(network.config, clip_config)  # type: ignore[arg-type]
    expected = jax.eval_shape(stage.init, jax.random.key(0))
    check_tree(expected, network.params, str(path))
    if clip is not None and network.clip != clip.digest:
        raise CheckpointError(
            f"'{path}' was trained on the CLIP {network.clip}, not on {clip.digest}: take all of them from one cascade"
        )
    if isinstance(clip_config, ClipConfig):
        check_widths(network, clip_config, path)
    return network


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


def load_cascade(folder: str | Path = SHIPPED) -> Cascade:
    """The cascade of a folder: clip, prior, decoder and upsampler_<size>.safetensors; the shipped one by default.

    ar_prior.safetensors and inpaint.safetensors may be there too.
    Raises CheckpointError in one sentence where a file is missing, damaged, or does not belong to the others.
    """
    folder = Path(folder)
    clip = load_clip(folder)
    prior = load_checked(folder / "prior.safetensors", PriorConfig, clip)
    ar_path = folder / "ar_prior.safetensors"
    ar_prior = load_checked(ar_path, ArPriorConfig, clip) if ar_path.exists() else None
    decoder = _load_decoder(folder / "decoder.safetensors", clip, channels=3)
    inpaint_path = folder / "inpaint.safetensors"
    inpaint = _load_decoder(inpaint_path, clip, channels=7) if inpaint_path.exists() else None
    found = [load_checked(path, UpsamplerConfig) for path in folder.glob("upsampler_*.safetensors")]
    upsamplers = sorted(found, key=lambda network: network.config.network.size)  # type: ignore[union-attr]
    words = tuple(clip.extra.get("words", ()))
    cascade = Cascade(tokenizer_from(clip), clip, prior, decoder, tuple(upsamplers), words, ar_prior, inpaint)
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
