"""A small classifier on embeddings: logistic regression, or one hidden layer, with balanced classes and L2.

The strength of the L2 penalty is chosen by cross-validation, and the threshold from the scores that every example got
from a probe that had not seen it: the highest at which the asked share of positives is still found.
"""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_safetensors
from unclip_jax.checkpoint.writing import replacing, save_file
from unclip_jax.curate.features import Features
from unclip_jax.curate.manifest import CurationError

FOLDS = 5
SHRINKAGE = 0.03
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of which cross-validation takes one
STEPS, RATE, BATCH = 300, 0.05, 1024  # of Adam, on so many examples at once where there are more


class Layers(NamedTuple):
    """Parameters of a probe; `hidden` is None in a logistic regression."""

    hidden: Float[Array, "z h"] | None
    hidden_bias: Float[Array, " h"] | None
    output: Float[Array, " h"]
    bias: Float[Array, ""]


class Probe(NamedTuple):
    """A trained classifier of features, from which a mean is taken and which a matrix whitens, and its threshold."""

    mean: Float[np.ndarray, " z"]
    matrix: Float[np.ndarray, "z z"]
    layers: Layers
    threshold: float = 0.0
    features: Features = "image"  # what it reads

    def logits(self, features: Float[np.ndarray, "n z"]) -> Float[np.ndarray, " n"]:
        """Log odds that a row is positive."""
        if features.shape[1] != len(self.mean):
            raise CurationError(
                f"the probe reads {len(self.mean)} features and these have {features.shape[1]}: is it of another CLIP?"
            )
        layers, x = jax.tree.map(jnp.asarray, (self.layers, (features - self.mean) @ self.matrix))
        return np.asarray(_compiled_logits(layers, x))


class Trained(NamedTuple):
    """A probe, and what cross-validation says of it.

    held_out: log odds of every example by a probe that had not seen it. penalty: the L2 that was chosen. without: the
    probes that had not seen one fold each.
    """

    probe: Probe
    held_out: Float[np.ndarray, " n"]
    penalty: float
    without: tuple[Probe, ...] = ()


def train(
    features: Float[np.ndarray, "n z"],
    labels: Bool[np.ndarray, " n"],
    hidden: int = 0,
    seed: int = 0,
    sample: Float[np.ndarray, "s z"] | None = None,
    folds: Int[np.ndarray, " n"] | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
) -> Trained:
    """A probe of labelled rows, classes weighted alike.

    hidden: width of the hidden layer, 0: logistic regression. sample: rows of the whole source, None: the examples,
    whose covariance is whitened: what tells things apart is often a direction of little variance. folds: which
    of FOLDS sets an example is of, None: drawn. weights: of the examples within their classes, None: alike. Raises
    CurationError where a class has fewer than two examples.
    """
    check_labels(labels)
    mean, matrix = whitening(features if sample is None else sample)
    x, y = jnp.asarray((features - mean) @ matrix), jnp.asarray(labels, jnp.float32)
    folds = _folds(labels, seed) if folds is None else folds
    # The last of the sets is all examples; the others each leave one fold out.
    masks = np.stack([folds != fold for fold in range(FOLDS)] + [np.ones(len(labels), bool)])
    weights = _balanced(labels, np.ones(len(labels)) if weights is None else weights)
    if len(labels) <= BATCH:
        batches, sets = np.broadcast_to(np.arange(len(labels)), (STEPS, len(labels))), masks * weights
    else:  # what weighs more is drawn more often, and then counts as much as any
        drawn = np.random.default_rng([seed, 7]).choice(len(labels), (STEPS, BATCH), p=weights / weights.sum())
        batches, sets = drawn, masks
    sets = jnp.asarray(sets, jnp.float32)
    layers = _train_all(hidden, x, y, sets, jnp.asarray(PENALTIES), jnp.asarray(batches), jax.random.key(seed))
    by_penalty = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(len(PENALTIES))]
    logits = np.stack([jax.vmap(_logits, (0, None))(each, x) for each in by_penalty])  # [penalty, set, row]
    held_out = logits[:, folds, np.arange(len(labels))]
    losses = (np.logaddexp(0, np.where(labels, -held_out, held_out)) * weights).mean(1)
    best = int(np.argmin(losses))
    each = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), by_penalty[best]) for i in range(FOLDS + 1)]
    *without, probe = (Probe(mean, matrix, own) for own in each)
    return Trained(probe, held_out[best], PENALTIES[best], tuple(without))


def check_labels(labels: Bool[np.ndarray, " n"]) -> None:
    """Raises CurationError where a class has fewer than two examples."""
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < 2:
        raise CurationError(
            f"the labels hold {positives} to remove and {len(labels) - positives} to keep: label at least two of each"
        )


def threshold_for(held_out: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], recall: float) -> float:
    """The highest threshold at which a share `recall` of new positives is to be expected (split conformal prediction).

    With fewer than 1 / (1 - recall) positives it is the least of their scores. CurationError for other shares.
    """
    if not 0 < recall <= 1:
        raise CurationError(f"a recall of {recall:g} cannot be reached: ask for more than 0 and at most 1")
    scores = np.sort(held_out[labels])
    return float(scores[max(0, int(np.floor((1 - recall) * (len(scores) + 1) + 1e-9)) - 1)])


def whitening(sample: Float[np.ndarray, "s z"]) -> tuple[Float[np.ndarray, " z"], Float[np.ndarray, "z z"]]:
    """Mean and matrix under which rows have about unit covariance; SHRINKAGE of the mean variance is added to each."""
    mean = sample.mean(0)
    variances, directions = np.linalg.eigh((sample - mean).T.astype(np.float64) @ (sample - mean) / len(sample))
    matrix = directions / np.sqrt(np.maximum(variances, 0) + SHRINKAGE * variances.mean() + 1e-12)
    return mean, matrix.astype(np.float32)


def _folds(labels: Bool[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """A fold of every example: each class dealt out in turn."""
    rng, folds = np.random.default_rng([seed, 1]), np.zeros(len(labels), np.int64)
    for value in (False, True):
        places = rng.permutation(np.flatnonzero(labels == value))
        folds[places] = np.arange(len(places)) % FOLDS
    return folds


def _balanced(labels: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Weights of mean 1 under which both classes count alike."""
    sums = np.where(labels, weights[labels].sum(), weights[~labels].sum())
    return weights / sums * len(labels) / 2


def _logits(layers: Layers, x: Float[Array, "n z"]) -> Float[Array, " n"]:
    highest = jax.lax.Precision.HIGHEST
    if layers.hidden is not None and layers.hidden_bias is not None:
        x = jax.nn.gelu(jnp.matmul(x, layers.hidden, precision=highest) + layers.hidden_bias)
    return jnp.matmul(x, layers.output, precision=highest) + layers.bias


_compiled_logits = jax.jit(_logits)


def _loss(layers: Layers, x: Array, y: Array, mask: Array, penalty: Array) -> Array:
    """Balanced cross entropy of the rows of a mask, and the penalty on matrices."""
    positive, negative = (y * mask).sum(), ((1 - y) * mask).sum()
    weights = mask * (y / jnp.maximum(positive, 1) + (1 - y) / jnp.maximum(negative, 1)) / 2
    logits = _logits(layers, x)
    entropy = (weights * (jnp.logaddexp(0.0, logits) - y * logits)).sum()
    matrices = [layers.output] if layers.hidden is None else [layers.output, layers.hidden]
    return entropy + penalty * sum((matrix**2).sum() for matrix in matrices) / 2


@partial(jax.jit, static_argnums=0)
def _train_all(hidden: int, x: Array, y: Array, masks: Array, penalties: Array, batches: Array, key: Array) -> Layers:
    """Probes for all penalties and sets of rows, side by side: leaves [penalty set ...]."""
    start = _start(hidden, x.shape[1], key)

    def one(penalty: Array, mask: Array) -> Layers:
        def step(state: tuple, place: tuple[Array, Array]) -> tuple[tuple, None]:
            (layers, first, second), (number, rows) = state, place
            gradient = jax.grad(_loss)(layers, x[rows], y[rows], mask[rows], penalty)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
            second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradient)
            rate = RATE * (1 - number / STEPS)
            correct = jnp.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
            layers = jax.tree.map(lambda w, m, v: w - rate * correct * m / (jnp.sqrt(v) + 1e-8), layers, first, second)
            return (layers, first, second), None

        zeros = jax.tree.map(jnp.zeros_like, start)
        numbers = jnp.arange(STEPS, dtype=jnp.float32)
        (layers, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), (numbers, batches))
        return layers

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(penalties, masks)


def _start(hidden: int, width: int, key: Array) -> Layers:
    if not hidden:
        return Layers(None, None, jnp.zeros((width,)), jnp.zeros(()))
    inner, outer = jax.random.split(key)
    matrix = jax.random.normal(inner, (width, hidden)) * width**-0.5
    return Layers(matrix, jnp.zeros((hidden,)), jax.random.normal(outer, (hidden,)) * hidden**-0.5, jnp.zeros(()))


def save_probe(path: Path, probe: Probe, clip: str) -> None:
    """Writes a probe, with the digest of the CLIP whose embeddings it reads."""
    tensors = {"mean": probe.mean, "matrix": probe.matrix}
    tensors |= {name: np.atleast_1d(leaf) for name, leaf in probe.layers._asdict().items() if leaf is not None}
    about = {"threshold": probe.threshold, "clip": clip, "features": probe.features}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"probe": json.dumps(about)})


def load_probe(path: Path, clip: str | None = None) -> Probe:
    """A probe, or a linear head with the tensors `weight` and `bias`, such as an aesthetic predictor's.

    clip: the digest that a probe must carry; a foreign head carries none. Raises CurationError in one sentence.
    """
    try:
        arrays, metadata = open_safetensors(path)
    except CheckpointError as error:
        raise CurationError(f"the head cannot be read: {error}") from error
    if {"weight", "bias"} == set(arrays):
        weight, bias = (np.asarray(arrays[name], np.float32).reshape(-1) for name in ("weight", "bias"))
        layers = Layers(None, None, weight, bias[0])  # type: ignore[arg-type]
        return Probe(np.zeros(len(weight), np.float32), np.eye(len(weight), dtype=np.float32), layers)
    if "probe" not in metadata or not {"mean", "matrix", "output", "bias"} <= set(arrays):
        raise CurationError(f"'{path}' is no probe, and no linear head of the tensors weight [1 z] and bias [1]")
    about = json.loads(metadata["probe"])
    if clip is not None and about["clip"] != clip:
        raise CurationError(
            f"'{path}' was trained on embeddings of the CLIP {about['clip']}, not of {clip}: train it on these"
        )
    arrays = {name: np.array(array, np.float32) for name, array in arrays.items()}
    layers = Layers(arrays.get("hidden"), arrays.get("hidden_bias"), arrays["output"], arrays["bias"][0])  # type: ignore
    return Probe(arrays["mean"], arrays["matrix"], layers, about["threshold"], about.get("features", "image"))
