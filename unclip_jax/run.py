"""One training run from a config: its data, its frozen context, its loop, and the weights file that it leaves."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from unclip_jax.cascade import load_checked, tokenizer_from
from unclip_jax.checkpoint.safetensors import Network, check_tree, load_network, save_network
from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DataConfig,
    DecoderConfig,
    PriorConfig,
    TrainConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.data.emoji import caption_words
from unclip_jax.data.loader import batches, scenes_of, tokenizer_of
from unclip_jax.data.reader import Chosen, check_clip, choose, stores_embeddings
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.evaluate.training import check_of
from unclip_jax.hosts import is_first, wait, whole
from unclip_jax.inputs import embed_images, encode
from unclip_jax.models import quantiser
from unclip_jax.models.stacking import stack_blocks, unstack_blocks
from unclip_jax.redraw import redrawn
from unclip_jax.sharding import check_batch_size, host_rows
from unclip_jax.stages import build
from unclip_jax.train import fit
from unclip_jax.types import Batch, Params, TrainState
from unclip_jax.watchdog import Watchdog

FITTED_PICTURES = 8192  # that a prior's constants are fitted on, where it does not train on stored ones
FITTED = ("whitening", "quantiser")  # names of those constants


def weights_name(config: TrainConfig) -> str:
    """The file name of a network in a cascade's folder."""
    match config.network:
        case ClipConfig():
            return "clip.safetensors"
        case PriorConfig():
            return "prior.safetensors"
        case ArPriorConfig():
            return "ar_prior.safetensors"
        case DecoderConfig(unet=unet):
            return "decoder.safetensors" if unet.in_channels == 3 else "inpaint.safetensors"
        case UpsamplerConfig(size=size):
            return f"upsampler_{size}.safetensors"


def train(
    config: TrainConfig,
    folder: Path,
    mesh: Mesh,
    *,
    init_from: Path | None = None,
    resume: bool = True,
    watchdog: Watchdog | None = None,
) -> TrainState:
    """Trains a config; checkpoints, logs and samples go to folder/<name>/, the weights into the cascade in `folder`.

    A prior or decoder reads its frozen CLIP from config.clip, else from folder/clip.safetensors. Hosts share `folder`.
    """
    check_batch_size(config.data.batch_size, mesh, config.optim.accumulate)
    clip = _frozen_clip(config, folder)
    tokenizer = tokenizer_of(config.data) if clip is None else tokenizer_from(clip)
    chosen = None if config.data.source == "emoji" else choose(config.data)
    if chosen is not None and clip is not None:
        check_clip(chosen.source, clip.digest)
    embedded = chosen is not None and stores_embeddings(chosen.source)
    pictures = not (embedded and isinstance(config.network, PriorConfig | ArPriorConfig))
    if isinstance(config.network, ClipConfig) and config.network.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the captions of this data use {tokenizer.vocab_size} ids and the network has "
            f"{config.network.vocab_size}: set --network.vocab-size {tokenizer.vocab_size}"
        )
    stage = build(config, None if clip is None else _clip_config(clip))
    start = None if init_from is None else load_network(init_from)
    params = None if start is None else _start(start, stage.init, str(init_from), config)
    constants, stored = {}, None
    if clip is not None and isinstance(config.network, PriorConfig | ArPriorConfig):
        constants = _known_constants(config, folder, clip, start, resume)
        if (config.data.stored and not embedded) or not constants:
            number = FITTED_PICTURES if embedded else config.data.stored or FITTED_PICTURES
            stored = _embed(config.data, clip, tokenizer, number, folder, chosen)
            constants = constants or _fitted_constants(config, clip, stored)
    elif config.data.stored:
        raise ValueError("only priors train on stored embeddings: set --data.stored 0")
    context = {} if clip is None else _context(clip, tokenizer, constants)
    own = host_rows(mesh, config.data.batch_size)
    lows = redrawn(config.data, folder) if config.data.redrawn else None

    def read(step: int) -> Iterator[Batch]:
        if config.data.stored and stored is not None and not embedded:
            return _stored_batches(stored, config.data, step, own)
        return batches(
            config.data, start=step, tokenizer=tokenizer, rows=own, redrawn=lows, chosen=chosen, pictures=pictures
        )

    def export(state: TrainState) -> None:
        extra: dict[str, Any] = {"steps": int(state.step), "images": int(state.step) * config.data.batch_size}
        if clip is None and isinstance(config.network, ClipConfig) and config.data.source == "emoji":
            scenes = scenes_of(config.data)
            words = sorted({word for text in caption_words(scenes) for word in text.replace(",", "").split()})
            extra |= {"kept_ids": list(tokenizer.kept), "words": words, "concepts": [c.name for c in scenes.concepts]}
        identity = None if clip is None else clip.digest
        path, average = folder / weights_name(config), whole(state.ema)
        if is_first():
            save_network(path, config, average, constants=constants, clip=identity, extra=extra)

    check = check_of(config, clip, tokenizer, constants) if config.eval_every else None
    if config.keep_by == "score" and (not config.eval_every or config.save_every % config.eval_every):
        raise ValueError(
            f"checkpoints are kept by a score that is measured every {config.eval_every} steps and saved every "
            f"{config.save_every}: let --eval-every divide --save-every"
        )

    def evaluate(state: TrainState) -> dict[str, float]:
        assert check is not None
        return check(whole(state.ema))

    place = folder / config.name
    return fit(
        config, stage, context, read, mesh, place, params=params, resume=resume, on_save=export,
        evaluate=None if check is None else evaluate, watchdog=watchdog,
    )  # fmt: skip


def _frozen_clip(config: TrainConfig, folder: Path) -> Network | None:
    if not isinstance(config.network, PriorConfig | ArPriorConfig | DecoderConfig):
        return None
    return load_checked(Path(config.clip) if config.clip else folder / "clip.safetensors", ClipConfig)


def _clip_config(clip: Network) -> ClipConfig:
    assert isinstance(clip.config.network, ClipConfig)
    return clip.config.network


def _start(network: Network, init: Any, name: str, config: TrainConfig) -> Params:
    """Float32 parameters of a weights file, checked against the network that is to be trained.

    An inpainting decoder may start from a plain one: its further input channels then begin at zero (GLIDE).
    """
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), network.params)
    match network.config.network, config.network:
        case DecoderConfig(unet=plain), DecoderConfig(unet=inpaints) if plain.in_channels < inpaints.in_channels:
            params = widen_stem(params, plain, inpaints)
    expected = jax.eval_shape(init, jax.random.key(0))
    if jax.tree.structure(expected) != jax.tree.structure(params):  # blocks may be scanned here and not there
        either = stack_blocks(params), unstack_blocks(params)
        params = next((one for one in either if jax.tree.structure(one) == jax.tree.structure(expected)), params)
    check_tree(expected, params, name)
    return params


def widen_stem(params: Params, old: UNetConfig, new: UNetConfig) -> Params:
    """A decoder's parameters with zeros for the input channels that the new U-Net has beside the old one's."""
    stem = params["unet"]["stem"]
    *window, _, features = stem["kernel"].shape
    unfolded = stem["kernel"].reshape(*window, old.patch**2, old.in_channels, features)
    wider = jnp.pad(unfolded, [(0, 0)] * 3 + [(0, new.in_channels - old.in_channels), (0, 0)])
    kernel = wider.reshape(*window, -1, features)
    return {**params, "unet": {**params["unet"], "stem": {**stem, "kernel": kernel}}}


def _known_constants(
    config: TrainConfig, folder: Path, clip: Network, start: Network | None, resume: bool
) -> dict[str, Any]:
    """The constants of the run that goes on, else of the weights that it starts from; {} if there are none."""
    own = folder / weights_name(config)
    if resume and own.exists() and any((folder / config.name / "checkpoints").glob("*")):
        last = load_network(own)
        start = last if last.config.name == config.name else start
    if start is None or start.clip != clip.digest:
        return {}
    return {name: start.constants[name] for name in FITTED if name in start.constants}


def _fitted_constants(config: TrainConfig, clip: Network, stored: "Stored") -> dict[str, Any]:
    """A prior's constants, fitted on embeddings."""
    if isinstance(config.network, ArPriorConfig):
        network, size = config.network, config.data.batch_size
        parts = [slice(i, i + size) for i in range(0, min(FITTED_PICTURES, len(stored.tokens)), size)]
        text = [encode(clip.config, clip.params, stored.tokens[part], stored.mask[part]).embedding for part in parts]
        sizes = (network.components, network.buckets, network.dot_buckets)
        return {"quantiser": quantiser.fit(stored.embedding, np.concatenate(text), *sizes)._asdict()}
    # One common scale: whitening every coordinate alone would blow up the empty ones.
    mean, std = stored.embedding.mean(0), np.full(stored.embedding.shape[1], stored.embedding.std(0).mean())
    return {"whitening": {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}}


def _context(clip: Network, tokenizer: ClipTokenizer, constants: dict[str, Any]) -> dict[str, Any]:
    """The frozen trees that a prior or decoder reads."""
    empty = tokenizer.encode([""])
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), clip.params)
    return {"clip": params, "empty": {"tokens": empty.ids, "mask": empty.mask}, **constants}


class Stored(NamedTuple):
    """Pictures as the frozen CLIP sees them: embedding float32 [n z], tokens int32 [n t], mask bool [n t]."""

    embedding: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def _embed(
    data: DataConfig, clip: Network, tokenizer: ClipTokenizer, pictures: int, folder: Path, chosen: Chosen | None = None
) -> Stored:
    """The first pictures of a source, embedded once: later runs on the same CLIP and data read the file."""
    identity = clip.digest if chosen is None else clip.digest + chosen.source.digest
    files = replace(data, weights=_content(data.weights), skip=_content(data.skip))
    key = hashlib.sha256(repr((files, pictures, identity)).encode()).hexdigest()[:12]
    path = folder / f"embeddings-{key}.npz"
    if is_first() and not path.exists():
        _embed_to(path, data, clip, tokenizer, pictures, chosen)
    wait(f"embeddings {key}")
    with np.load(path) as columns:
        return Stored(**columns)


def _content(path: str | None) -> str | None:
    """Digest of a file on which the order of records depends: it may be written anew under its name."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embed_to(
    path: Path, data: DataConfig, clip: Network, tokenizer: ClipTokenizer, pictures: int, chosen: Chosen | None
) -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), clip.params)
    embed = partial(embed_images, _clip_config(clip))
    rows = []
    total = -(-pictures // data.batch_size)
    embedded = chosen is not None and stores_embeddings(chosen.source)
    reader = islice(batches(data, tokenizer=tokenizer, chosen=chosen, pictures=not embedded), total)
    for batch in tqdm(reader, total=total, desc="embedding pictures", unit="batch", dynamic_ncols=True):
        embedding = embed(params, batch.image) if batch.embedding is None else batch.embedding
        rows.append(Stored(np.asarray(embedding), np.asarray(batch.tokens), np.asarray(batch.mask)))
    stored = Stored(*(np.concatenate(column) for column in zip(*rows, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".part.npz")
    np.savez(partial_path, **stored._asdict())
    partial_path.replace(path)


def _stored_batches(stored: Stored, data: DataConfig, start: int, own: np.ndarray) -> Iterator[Batch]:
    """Endless batches of stored embeddings, without pictures; batch s is a pure function of (seed, s); its own rows."""
    blank = np.zeros((len(own), 1, 1, 3), np.uint8)
    for step in count(start):
        rows = np.random.default_rng([data.seed, step]).integers(0, len(stored.tokens), data.batch_size)
        chosen = Stored(*(column[rows[own]] for column in stored))
        yield Batch(blank, chosen.tokens, chosen.mask, embedding=chosen.embedding)  # type: ignore[arg-type]
