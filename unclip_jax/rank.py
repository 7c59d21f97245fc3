"""What CLIP thinks of pictures: the best of several candidates, and a score that guides a sampler.

Candidate 0 of a picture is the picture that its seed gives alone. Candidate k has keys of its own, derived from that
seed and k, so that more candidates never change the first ones: the best of 4 is among the 16 of which 16 takes the
best. Pictures are compared at the decoder's size, before any upsampler has run.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from unclip_jax.config import ClipConfig, TrainConfig
from unclip_jax.diffusion.guidance import Score
from unclip_jax.models.clip import Clip, normalise
from unclip_jax.models.upsampler import resize_low
from unclip_jax.stages import encode_image, to_pixels
from unclip_jax.types import Keys, Params

RANK = 2**31  # what a picture's key is folded with for its further candidates; no stage folds with it


class Candidates(NamedTuple):
    """Every picture's candidates at the decoder's size: pictures and keys, and CLIP's cosine of picture and prompt.

    drawn: in [-1, 1], as upsamplers read them. scores: None where there is one candidate and nothing to choose.
    """

    drawn: Float[np.ndarray, "b n h w 3"]
    keys: Key[Array, "b n"]
    scores: Float[np.ndarray, "b n"] | None

    @property
    def pictures(self) -> UInt8[np.ndarray, "b n h w 3"]:
        """The candidates in bytes, as CLIP reads them."""
        rows = self.drawn.reshape(-1, *self.drawn.shape[2:])
        return np.asarray(to_pixels(jnp.asarray(rows))).reshape(self.drawn.shape)


class ClipGuidance(NamedTuple):
    """CLIP's parameters, and how hard each picture is pulled towards its caption (guidance.score_guided)."""

    params: Params
    scale: Float[Array, " b"]


def candidate_keys(keys: Keys, count: int) -> Key[Array, "b {count}"]:
    """Keys of every picture's candidates; the first is the picture's own."""
    if count == 1:
        return keys[:, None]

    def of_picture(key: Array) -> Array:
        further = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, RANK)))(jnp.arange(1, count))
        return jnp.concatenate([key[None], further])

    return jax.vmap(of_picture)(keys)


@partial(jax.jit, static_argnums=0)
def clip_scores(
    config: TrainConfig, params: Params, pictures: UInt8[Array, "b h w 3"], text: Float[Array, "b z"]
) -> Float[Array, " b"]:
    """Cosines of pictures and text embeddings; config is CLIP's."""
    assert isinstance(config.network, ClipConfig)
    return (normalise(encode_image(config.network, params, pictures)) * normalise(text)).sum(-1)


def best_of(scores: Float[np.ndarray, "b n"], count: int) -> Int[np.ndarray, " b"]:
    """The place of each picture's best candidate among its first `count`."""
    return np.argmax(scores[:, :count], axis=1)


def chosen(candidates: Candidates) -> tuple[Float[np.ndarray, "b h w 3"], Keys]:
    """The best picture of each prompt in [-1, 1], and its key."""
    drawn, keys, scores = candidates
    place = np.zeros(len(drawn), int) if scores is None else best_of(scores, scores.shape[1])
    rows = np.arange(len(drawn))
    return drawn[rows, place], keys[rows, place]


def picture_score(config: ClipConfig, params: Params, text: Float[Array, "b z"]) -> Score:
    """CLIP's logit of clean estimates in [-1, 1] and their captions: the cosine times the trained temperature's scale.

    Differentiable, for guidance.score_guided: over captions that are equally likely, it is log p(caption | picture)
    plus what all captions share.
    """
    clip, variables = Clip(config), {"params": params}
    mean, std = np.asarray(config.image_mean, np.float32), np.asarray(config.image_std, np.float32)

    def score(x0: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        if x0.shape[1] != config.image_size:
            x0 = resize_low(x0, config.image_size)
        embedding = clip.apply(variables, ((x0 + 1) / 2 - mean) / std, method="encode_image")
        cosine = (normalise(embedding) * normalise(text)).sum(-1)  # type: ignore[arg-type]
        return clip.apply(variables, method="scale") * cosine  # type: ignore[operator]

    return score
