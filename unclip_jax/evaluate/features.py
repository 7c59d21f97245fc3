"""Pictures as features of a network that looks at them, batch by batch over all devices, and kept for the next time."""

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from tqdm import tqdm

from unclip_jax.cascade import tokenizer_from
from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.compile_cache import user_cache
from unclip_jax.config import ClipConfig
from unclip_jax.data.embeddings import unit
from unclip_jax.data.listing import digest_of
from unclip_jax.data.tokenizer import TextTokenizer
from unclip_jax.evaluate.distances import Moments
from unclip_jax.evaluate.inception import DIM, Inception, inception_features
from unclip_jax.inputs import embed_images, encode
from unclip_jax.offload import on_device
from unclip_jax.sharding import batch_ways, put_batch, replicated

MOST = 10_000  # features that are kept one by one, for distances of all pairs
VERSION = 1
# What reading an .npz raises that is torn, or none.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Eye(NamedTuple):
    """A network that looks at pictures.

    name: says which one. see: uint8 [b h w 3] of a multiple of `ways` rows -> float32 [b dim].
    """

    name: str
    dim: int
    see: Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b d"]]
    ways: int = 1


class Seen(NamedTuple):
    """A set of pictures through an eye. features: of the first MOST of them. size: side of the pictures in px."""

    eye: str
    size: int
    moments: Moments
    features: Float[np.ndarray, "n d"]


def clip_eye(clip: Network, mesh: Mesh) -> Eye:
    """CLIP's image embeddings at unit length."""
    network = clip.config.network
    assert isinstance(network, ClipConfig)
    params = jax.device_put(jax.tree.map(np.asarray, clip.params), replicated(mesh))

    def see(pictures: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        return unit(np.asarray(embed_images(network, params, put_batch(pictures, mesh)), np.float32))

    return Eye(f"clip-{clip.digest}", network.embedding_dim, see, batch_ways(mesh))


def inception_eye(inception: Inception, mesh: Mesh) -> Eye:
    """FID's features."""
    params = jax.device_put(inception.params, replicated(mesh))

    def see(pictures: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        return np.asarray(inception_features(params, put_batch(pictures, mesh)), np.float32)

    return Eye(f"inception-{inception.digest}", DIM, see, batch_ways(mesh))


def look(eye: Eye, pictures: UInt8[np.ndarray, "n h w 3"], batch: int = 64, what: str = "") -> Seen:
    """Every picture through the eye; ValueError where there is none.

    batch: how many at a time, the last filled up; rounded up to a multiple of the eye's devices.
    """
    if not len(pictures):
        raise ValueError("there are no pictures to measure: the source is empty")
    batch = -(-min(batch, len(pictures)) // eye.ways) * eye.ways
    moments, kept = Moments.none(eye.dim), []
    bar = tqdm(total=len(pictures), desc=what, unit="picture", dynamic_ncols=True, disable=None if what else True)
    with bar:
        for start in range(0, len(pictures), batch):
            part = np.asarray(pictures[start : start + batch])
            filled = part[np.minimum(np.arange(batch), len(part) - 1)]
            found = eye.see(filled)[: len(part)]
            moments = moments.add(found)
            kept.append(found[: max(0, MOST - start)])
            bar.update(len(part))
    return Seen(eye.name, pictures.shape[1], moments, np.concatenate(kept))


def look_once(
    eye: Eye, pictures: UInt8[np.ndarray, "n h w 3"], digest: str, batch: int = 64, cache: Path | None = None
) -> Seen:
    """As `look`, of pictures that a digest identifies: what was found is kept in a folder, and read the next time.

    cache: by default UNCLIP_CACHE_DIR, else the user's cache folder.
    """
    folder = cache or Path(os.environ.get("UNCLIP_CACHE_DIR") or user_cache()) / "statistics"
    path = folder / f"{digest_of(VERSION, eye.name, digest, pictures.shape)}.npz"
    if path.is_file():
        try:
            return load_seen(path)
        except ValueError:
            path.unlink()
    seen = look(eye, pictures, batch, "real pictures")
    save_seen(seen, path)
    return seen


def save_seen(seen: Seen, path: Path) -> None:
    """Writes statistics as a .npz that other FID programs read too: mu and sigma beside what is ours."""
    covariance = seen.moments.scatter / max(seen.moments.count - 1, 1)
    facts = {"eye": seen.eye, "size": seen.size, "count": seen.moments.count, "features": seen.features}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=seen.moments.mean, sigma=covariance, **facts)  # type: ignore[arg-type]


def load_seen(path: Path) -> Seen:
    """Statistics of `save_seen`, or of other programs: mu and sigma alone, whose eye, size and features are not known.

    Raises ValueError in one sentence where the file holds no statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        mean, sigma = found["mu"].astype(np.float64), found["sigma"].astype(np.float64)
        count = int(found.get("count", 2**31))
        features = found.get("features", np.zeros((0, len(mean)), np.float32))
        eye, size = str(found.get("eye", "")), int(found.get("size", 0))
    except UNREADABLE as error:
        raise ValueError(f"'{path}' holds no statistics of pictures, an .npz of mu and sigma: {error}") from None
    if mean.ndim != 1 or sigma.shape != (len(mean), len(mean)):
        raise ValueError(f"'{path}' holds a mean and a covariance of shapes {mean.shape} and {sigma.shape}")
    return Seen(eye, size, Moments(count, mean, sigma * max(count - 1, 1)), features)


def check_comparable(real: Seen, drawn: Seen) -> None:
    """ValueError where two sets were seen by different networks, or at different sizes."""
    dims = len(real.moments.mean), len(drawn.moments.mean)
    if dims[0] != dims[1]:
        raise ValueError(
            f"statistics of {dims[0]} features cannot be compared with those of {dims[1]}: make them again"
        )
    if real.eye and real.eye != drawn.eye:
        raise ValueError(f"statistics of {real.eye} cannot be compared with features of {drawn.eye}: make them again")
    if real.size and real.size != drawn.size:
        raise ValueError(
            f"statistics of pictures of {real.size} px cannot be compared with pictures of {drawn.size} px: "
            "make them again at that size"
        )


def embed_captions(
    clip: Network, captions: tuple[str, ...], tokenizer: TextTokenizer | None = None, batch: int = 64
) -> Float[np.ndarray, "b d"]:
    """CLIP's text embeddings at unit length, by a cascade's tokenizer or CLIP's own."""
    tokens = (tokenizer or tokenizer_from(clip)).encode(list(captions))
    found = []
    for start in range(0, len(captions), batch):
        rows = np.minimum(start + np.arange(batch), len(captions) - 1)
        embedding = encode(clip.config, on_device(clip.params), tokens.ids[rows], tokens.mask[rows]).embedding
        found.append(np.asarray(embedding, np.float32)[: len(captions) - start])
    return unit(np.concatenate(found))
