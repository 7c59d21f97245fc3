"""One training run from a config: its data, its frozen context, its loop, and the weights file that it leaves."""

import hashlib
from collections.abc import Iterator
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
from unclip_jax.config import ClipConfig, DataConfig, DecoderConfig, PriorConfig, TrainConfig, UpsamplerConfig
from unclip_jax.data.emoji import caption_words
from unclip_jax.data.loader import batches, scenes_of, tokenizer_of
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.stages import build, encode_image
from unclip_jax.train import fit
from unclip_jax.types import Batch, Params, TrainState

WHITENING_PICTURES = 8192


def weights_name(config: TrainConfig) -> str:
    """The file name of a network in a cascade's folder."""
    match config.network:
        case ClipConfig():
            return "clip.safetensors"
        case PriorConfig():
            return "prior.safetensors"
        case DecoderConfig():
            return "decoder.safetensors"
        case UpsamplerConfig(size=size):
            return f"upsampler_{size}.safetensors"


def train(
    config: TrainConfig,
    folder: Path,
    mesh: Mesh,
    *,
    init_from: Path | None = None,
    resume: bool = True,
) -> TrainState:
    """Trains a config; checkpoints, logs and samples go to folder/<name>/, the weights into the cascade in `folder`.

    A prior or decoder reads its frozen CLIP from config.clip, else from folder/clip.safetensors.
    """
    clip = _frozen_clip(config, folder)
    tokenizer = tokenizer_of(config.data) if clip is None else tokenizer_from(clip)
    if isinstance(config.network, ClipConfig) and config.network.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the captions of this data use {tokenizer.vocab_size} ids and the network has "
            f"{config.network.vocab_size}: set --network.vocab-size {tokenizer.vocab_size}"
        )
    stage = build(config, None if clip is None else _clip_config(clip))
    stored = None
    if clip is not None and isinstance(config.network, PriorConfig):
        stored = _embed(config.data, clip, tokenizer, config.data.stored or WHITENING_PICTURES, folder)
    elif config.data.stored:
        raise ValueError("only priors train on stored embeddings: set --data.stored 0")
    context = {} if clip is None else _context(clip, tokenizer, stored)
    params = None if init_from is None else _start(init_from, stage.init)

    def read(step: int) -> Iterator[Batch]:
        if config.data.stored and stored is not None:
            return _stored_batches(stored, config.data, step)
        return batches(config.data, start=step, tokenizer=tokenizer)

    def export(state: TrainState) -> None:
        constants = {"whitening": context["whitening"]} if "whitening" in context else None
        extra: dict[str, Any] = {"steps": int(state.step), "images": int(state.step) * config.data.batch_size}
        if clip is None and isinstance(config.network, ClipConfig):
            scenes = scenes_of(config.data)
            words = sorted({word for text in caption_words(scenes) for word in text.replace(",", "").split()})
            extra |= {"kept_ids": list(tokenizer.kept), "words": words, "concepts": [c.name for c in scenes.concepts]}
        identity = None if clip is None else clip.digest
        path = folder / weights_name(config)
        save_network(path, config, state.ema, constants=constants, clip=identity, extra=extra)

    return fit(config, stage, context, read, mesh, folder / config.name, params=params, resume=resume, on_save=export)


def _frozen_clip(config: TrainConfig, folder: Path) -> Network | None:
    if not isinstance(config.network, PriorConfig | DecoderConfig):
        return None
    return load_checked(Path(config.clip) if config.clip else folder / "clip.safetensors", ClipConfig)


def _clip_config(clip: Network) -> ClipConfig:
    assert isinstance(clip.config.network, ClipConfig)
    return clip.config.network


def _start(path: Path, init: Any) -> Params:
    """Float32 parameters of a weights file, checked against the network that is to be trained."""
    params = load_network(path).params
    check_tree(jax.eval_shape(init, jax.random.key(0)), params, str(path))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def _context(clip: Network, tokenizer: ClipTokenizer, stored: "Stored | None") -> dict[str, Any]:
    """The frozen trees that a prior or decoder reads."""
    context: dict[str, Any] = {"clip": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), clip.params)}
    if stored is not None:
        empty = tokenizer.encode([""])
        embeddings = stored.embedding
        # One common scale: whitening every coordinate alone would blow up the empty ones.
        mean, std = embeddings.mean(0), np.full(embeddings.shape[1], embeddings.std(0).mean())
        context["whitening"] = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
        context["empty"] = {"tokens": empty.ids, "mask": empty.mask}
    return context


class Stored(NamedTuple):
    """Pictures as the frozen CLIP sees them: embedding float32 [n z], tokens int32 [n t], mask bool [n t]."""

    embedding: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def _embed(data: DataConfig, clip: Network, tokenizer: ClipTokenizer, pictures: int, folder: Path) -> Stored:
    """The first pictures of a source, embedded once: later runs on the same CLIP and data read the file."""
    key = hashlib.sha256(repr((data, pictures, clip.digest)).encode()).hexdigest()[:12]
    path = folder / f"embeddings-{key}.npz"
    if path.exists():
        with np.load(path) as columns:
            return Stored(**columns)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), clip.params)
    embed = jax.jit(partial(encode_image, _clip_config(clip)))
    rows = []
    total = -(-pictures // data.batch_size)
    reader = islice(batches(data, tokenizer=tokenizer), total)
    for batch in tqdm(reader, total=total, desc="embedding pictures", unit="batch", dynamic_ncols=True):
        rows.append(Stored(np.asarray(embed(params, batch.image)), np.asarray(batch.tokens), np.asarray(batch.mask)))
    stored = Stored(*(np.concatenate(column) for column in zip(*rows, strict=True)))
    folder.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".part.npz")
    np.savez(partial_path, **stored._asdict())
    partial_path.replace(path)
    return stored


def _stored_batches(stored: Stored, data: DataConfig, start: int) -> Iterator[Batch]:
    """Endless batches of stored embeddings, without pictures; batch s is a pure function of (seed, s)."""
    blank = np.zeros((data.batch_size, 1, 1, 3), np.uint8)
    for step in count(start):
        rows = np.random.default_rng([data.seed, step]).integers(0, len(stored.tokens), data.batch_size)
        chosen = Stored(*(column[rows] for column in stored))
        yield Batch(blank, chosen.tokens, chosen.mask, embedding=chosen.embedding)  # type: ignore[arg-type]
