"""Pictures of captions in batches of any size, kept in a work folder, so that an interrupted evaluation goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.data.listing import digest_of
from unclip_jax.evaluate.features import UNREADABLE
from unclip_jax.generate import check, decode_embeddings, encode_prompts, finish, generate
from unclip_jax.inputs import Options
from unclip_jax.priors import prior_embeddings
from unclip_jax.types import Keys

Setting = dict[str, Any]  # of Options' fields, none of them None; what belongs to another prior is left out


class Drawn(NamedTuple):
    """pictures: one per caption. embeddings: of the prior, of unit length or not as its CLIP has them.

    fresh: whether all were drawn now, and none found in the work folder.
    """

    pictures: UInt8[np.ndarray, "n h w 3"]
    embeddings: Float[np.ndarray, "n z"]
    fresh: bool


def setting_of(cascade: Cascade, options: Options) -> Setting:
    """The options with the cascade's recommendations in place of None, without those that have no effect.

    ValueError in one sentence where an option makes no sense.
    """
    size = check(cascade, options)
    prior, advice = cascade.chosen_prior(options.prior).config.sample, cascade.decoder.config.sample
    chosen = options._asdict()
    usual = {
        "size": size,
        "sampler": advice.sampler,
        "steps": advice.steps,
        "guidance": advice.guidance,
        "prior_guidance": prior.guidance,
    }
    if options.prior == "diffusion":
        usual |= {"prior_steps": prior.steps, "candidates": prior.candidates}
        del chosen["prior_temperature"]
    else:
        usual |= {"prior_temperature": prior.temperature}
        del chosen["prior_steps"], chosen["candidates"]
    del chosen["resamples"]
    setting = {name: usual.get(name) if value is None else value for name, value in chosen.items()}
    if setting["sampler"] == "analytic":
        raise ValueError("only diffusion priors have analytic variances: choose the sampler ddpm, ddim or dpm")
    return setting


def draw(
    cascade: Cascade,
    captions: Sequence[str],
    seeds: Sequence[int],
    setting: Setting,
    batch: int = 16,
    folder: Path | None = None,
) -> Drawn:
    """A picture of each caption and seed, the same whatever the batch, to tolerance.

    batch: pictures at a time; the last batch is filled up, so that all share one program. folder: takes every batch as
    it comes, and gives back those that are there.
    """
    options = Options(**setting)
    key = digest_of(cascade.digest, sorted(setting.items()))
    pictures, embeddings, fresh = [], [], True
    for start in range(0, len(captions), batch):
        some, own = list(captions[start : start + batch]), list(seeds[start : start + batch])
        path = None if folder is None else folder / key / f"{digest_of(some, own)}.npz"
        found = None if path is None else _kept(path)
        if found is None:
            filled = np.minimum(np.arange(min(batch, max(len(captions), 1))), len(some) - 1)
            found = _draw(cascade, [some[i] for i in filled], [own[i] for i in filled], options)
            found = found[0][: len(some)], found[1][: len(some)]
            if path is not None:
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(file, pictures=found[0], embeddings=found[1])
        else:
            fresh = False
        pictures.append(found[0])
        embeddings.append(found[1])
    return Drawn(np.concatenate(pictures), np.concatenate(embeddings), fresh)


def _draw(
    cascade: Cascade, captions: list[str], seeds: list[int], options: Options
) -> tuple[UInt8[np.ndarray, "n h w 3"], Float[np.ndarray, "n z"]]:
    keys: Keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    text, null = encode_prompts(cascade, captions), encode_prompts(cascade, [""])
    embedding = prior_embeddings(cascade.chosen_prior(options.prior), keys, text, null, options)
    if options.rank_from > 1:
        return generate(cascade, captions, seeds, options), np.asarray(embedding, np.float32)
    pictures = decode_embeddings(cascade, keys, embedding, text, options)
    size = cascade.sizes[-1] if options.size is None else options.size
    return finish(cascade, keys, np.asarray(pictures), size), np.asarray(embedding, np.float32)


def _kept(path: Path) -> tuple[UInt8[np.ndarray, "n h w 3"], Float[np.ndarray, "n z"]] | None:
    """A batch that was drawn before; None where there is none, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["pictures"], file["embeddings"]
    except UNREADABLE:
        return None
