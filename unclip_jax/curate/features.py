"""What a probe reads of a record: CLIP's embedding of its picture, of its captions, or both."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from unclip_jax.data.embeddings import Embeddings

Features = Literal["image", "text", "both"]


def features_of(embeddings: Embeddings, rows: Int[np.ndarray, " r"], kind: Features) -> Float[np.ndarray, "r f"]:
    """What a probe reads of some rows: unit embeddings of the picture, of its captions, or of both."""
    match kind:
        case "image":
            return embeddings.unit("image", rows)
        case "text":
            return embeddings.text_mean(rows)
        case "both":
            return np.concatenate([embeddings.unit("image", rows), embeddings.text_mean(rows)], axis=1)


def in_blocks(
    embeddings: Embeddings, score: Callable[[Float[np.ndarray, "n f"]], Float[np.ndarray, " n"]], kind: Features
) -> Callable[[int], Float[np.ndarray, " n"]]:
    """Scores of a shard's rows; all shards have one shape, so that one program does for all."""
    size = embeddings.about.shard_rows

    def of_shard(number: int) -> Float[np.ndarray, " n"]:
        first = number * size
        found = features_of(embeddings, np.arange(first, min(first + size, len(embeddings))), kind)
        filled = np.zeros((size, found.shape[1]), np.float32)
        filled[: len(found)] = found
        return score(filled)[: len(found)]

    return of_shard
