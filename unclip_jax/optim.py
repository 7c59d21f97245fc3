"""The learning rate, AdamW with clipping and a decay mask, and the moving average of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from unclip_jax.config import OptimConfig
from unclip_jax.sharding import SMALL, is_stacked, path_name
from unclip_jax.types import Params


def learning_rate(config: OptimConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Learning rate of the update number `step`, counted from 0.

    Rises linearly over `warmup` updates (the first is already above zero), then stays constant, or falls by a half
    cosine to `final_fraction` of its peak over `decay_steps` updates and stays there.
    """
    done = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum(1.0, (done + 1) / max(config.warmup, 1))
    if config.decay_steps is None:
        return config.learning_rate * rise
    progress = jnp.clip((done - config.warmup) / max(config.decay_steps, 1), 0.0, 1.0)
    fall = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * rise * fall


def updates_done(opt_state: Any) -> Int[Array, ""]:
    """How many updates an optimiser has made: steps that were skipped do not count."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def decay_mask(params_shape: Any) -> Any:
    """Tree of booleans, true where weight decay applies.

    Only matrices decay: leaves named kernel or embedding with two or more axes. Norms, biases, temperatures, learned
    positions and null conditions do not.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(entry.key) for entry in path]
        free = any("position" in name or "null" in name for name in names)
        return names[-1] in ("kernel", "embedding") and len(leaf.shape) >= 2 and not free

    return jax.tree_util.tree_map_with_path(decays, params_shape)


def clip_by_known_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times min(1, limit / norm), where norm, their global norm, is given by who logs it, or computed."""

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: Float[Array, ""] | None = None, **others: Any
    ) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) if norm is None else norm))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer(config: OptimConfig, params_shape: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101) or Muon, after clipping by the global norm; `params_shape` is a tree of shapes.

    Gradients arrive already averaged over accumulated micro-batches; `norm` is their global norm, where it is known.
    """
    clip = clip_by_known_norm(config.clip_norm)

    def rate(step: Any) -> Array:
        return learning_rate(config, jnp.asarray(step))

    match config.kind:
        case "adamw":
            return optax.chain(
                clip,
                optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
                optax.add_decayed_weights(config.weight_decay, decay_mask(params_shape)),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            descend = muon(
                rate,
                weight_decay=config.weight_decay,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(_matrix_axes, tree),
                # Steps as large as Adam's usually are, so that one learning rate suits both (arXiv 2502.16982 eq. 4).
                consistent_rms=0.2,
            )
            return optax.chain(clip, descend)


def _matrix_axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
    """How Muon reads a leaf as a matrix of inputs by outputs; None for those that AdamW keeps.

    These are vectors and tables, and the ends of a network, where pixels and times come in or pixels go out. A leaf of
    scanned layers is one matrix per layer.
    """
    names = [str(entry.key) for entry in path]
    ends = {"stem", "patches", "time_0"} & set(names) or names[-2:] == ["out", "kernel"] and len(names) <= 3
    if names[-1] != "kernel" or len(leaf.shape) < 2 or ends:
        return None
    last = len(leaf.shape) - 1
    return MuonDimensionNumbers(tuple(range(is_stacked(path_name(path)), last)), last)


def ema_update(ema: Params, params: Params, step: Int[Array, ""] | int, decay: float) -> Params:
    """Moving average after update number `step`, with decay min(decay, (1 + step) / (10 + step)).

    The warm-up lets early samples follow the parameters instead of their random start.
    """
    done = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda average, new: average + (1 - keep) * (new - average), ema, params)


def join_vectors(tree: Params) -> Params:
    """Parameters, or what has a number for each of theirs, with all short vectors end to end in one, "vectors".

    Biases, scales and shifts are most leaves of a network and next to none of its numbers: a step that updates them at
    once is much smaller. AdamW treats them alike, since matrices alone decay.
    """
    vectors = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree) if _is_short(leaf)]
    if not vectors:
        return tree
    rest = jax.tree.map(lambda leaf: None if _is_short(leaf) else leaf, tree)
    return {**rest, "vectors": jnp.concatenate(vectors)}


def part_vectors(joined: Params, like: Params) -> Params:
    """The inverse of join_vectors; like: a tree of the shapes that it had."""
    sizes = [leaf.size for leaf in jax.tree.leaves(like) if _is_short(leaf)]
    if not sizes:
        return joined
    rest = iter(jax.tree.leaves({name: part for name, part in joined.items() if name != "vectors"}))
    vectors = iter(jnp.split(joined["vectors"], np.cumsum(sizes)[:-1]))
    return jax.tree.map(lambda leaf: next(vectors).reshape(leaf.shape) if _is_short(leaf) else next(rest), like)


def map_like(function: Callable[[Any], Any], tree: Any, params: Params) -> Any:
    """A training state with function applied to each tree in it of the structure of `params`: averages, moments."""
    structure = jax.tree.structure(params)

    def alike(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda node: function(node) if alike(node) else node, tree, is_leaf=alike)


def _is_short(leaf: Any) -> bool:
    return leaf.ndim <= 1 and leaf.size < SMALL
