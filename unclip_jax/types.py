"""The vocabulary of the package: arrays, batches, predictions, denoisers and training states."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

Params = Mapping[str, Any]  # a tree of parameters, as flax gives it
Keys = Key[Array, " b"]  # one random key per example: its noise is the same alone, in a batch or on a mesh
Timesteps = Int[Array, " b"]


class Batch(NamedTuple):
    """What a loader hands to every stage.

    image: uint8 [b h w 3], RGB at the stage's own resolution.
    tokens: int32 [b n], padded with the tokenizer's pad id.
    mask: bool [b n], true on real tokens.
    low: uint8 [b k k 3], the degraded low-resolution picture (upsamplers), else None.
    embedding: float32 [b z], CLIP's stored embedding of the picture, else None and computed where it is needed.
    """

    image: UInt8[Array, "b h w 3"]
    tokens: Int[Array, "b n"]
    mask: Bool[Array, "b n"]
    low: UInt8[Array, "b k k 3"] | None = None
    embedding: Float[Array, "b z"] | None = None


class Prediction(NamedTuple):
    """What a denoiser says of a noisy input x_t.

    x0: the clean estimate, of x's shape, float32.
    log_variance: log of the reverse step's variance interpolation, raw network output in [-1, 1]
        (equation 15 of arXiv 2102.09672: 1 chooses beta, -1 the posterior's), or None where variances are fixed.
    """

    x0: Float[Array, "b ..."]
    log_variance: Float[Array, "b ..."] | None = None


Denoise = Callable[[Float[Array, "b ..."], Timesteps], Prediction]


class Loss(Protocol):
    """Loss of a batch: a scalar float32 and scalars to log.

    params are trained; context holds frozen trees (CLIP, whitening statistics) that no gradient reaches.
    """

    def __call__(
        self, params: Params, context: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Loss and metrics of one batch."""
        ...


class Stage(NamedTuple):
    """One trainable network as pure functions (DESIGN: every stage is trained by the same loop).

    init: key -> parameters, float32.
    loss: see Loss.
    preview: (params, context, batch, keys) -> uint8 [b h w 3] pictures for the sample grid, or None.
    """

    init: Callable[[Key[Array, ""]], Params]
    loss: Loss
    preview: Callable[[Params, Params, Batch, Keys], UInt8[Array, "b h w 3"]] | None = None


class TrainState(NamedTuple):
    """Everything that training carries from step to step; a NamedTuple, so that Orbax restores it.

    step: int32 scalar, updates attempted. skipped: int32 scalar, consecutive updates dropped for non-finite gradients.
    params, ema: float32 trees of one structure. opt_state: optax state.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any
    skipped: Int[Array, ""]


PRNGKey = Key[Array, ""]
Scalar = Num[Array, ""]

__all__ = [
    "Batch",
    "Denoise",
    "Keys",
    "Loss",
    "PRNGKey",
    "Params",
    "Prediction",
    "Scalar",
    "Stage",
    "Timesteps",
    "TrainState",
]
