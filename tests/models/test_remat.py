"""What blocks compute again changes memory, and nothing else."""

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import Remat, TransformerConfig, UNetConfig
from unclip_jax.models.transformer import Transformer
from unclip_jax.models.unet import UNet

TRANSFORMER = TransformerConfig(width=8, layers=2, heads=2, dropout=0.5)
UNET = UNetConfig(
    channels=8, multipliers=(1,), depth=1, attention_factors=(1,), head_channels=8, context_dim=4, groups=4,
    dropout=0.5,
)  # fmt: skip
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)


def transformer_loss(remat: Remat, params: Any) -> jax.Array:
    module = Transformer(replace(TRANSFORMER, remat=remat))
    y = module.apply({"params": params}, X, None, False, rngs={"dropout": jax.random.key(1)})
    return jnp.square(jnp.asarray(y)).mean()


def unet_loss(remat: Remat, params: Any, context: Any) -> jax.Array:
    module, x = UNet(replace(UNET, remat=remat)), jnp.ones((2, 8, 8, 3))
    mask = jnp.ones((2, 3), bool)
    y = module.apply(
        {"params": params}, x, jnp.ones(2), None, context, mask, deterministic=False,
        rngs={"dropout": jax.random.key(1)},
    )  # fmt: skip
    return jnp.square(jnp.asarray(y)).mean()


def kept(loss: Any, *arguments: Any) -> int:
    """Numbers that a loss keeps for its backward pass."""
    backward = jax.eval_shape(lambda *inner: jax.vjp(loss, *inner)[1], *arguments)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_gradients_are_the_same_with_the_same_dropout():
    params = Transformer(TRANSFORMER).init(jax.random.key(0), X)["params"]
    expected, *others = (
        jax.jit(jax.grad(lambda params, remat=remat: transformer_loss(remat, params)))(params)
        for remat in get_args(Remat)
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for grads in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), grads, expected)


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_less_is_kept_from_policy_to_policy_and_the_parameters_are_named_alike(network):
    key = jax.random.key(0)
    trees, sizes = [], []
    for remat in get_args(Remat):
        if network == "transformer":
            trees.append(jax.eval_shape(Transformer(replace(TRANSFORMER, remat=remat)).init, key, X)["params"])
            sizes.append(kept(lambda params, remat=remat: transformer_loss(remat, params), trees[-1]))
        else:
            context = jnp.ones((2, 3, 4))
            module = UNet(replace(UNET, remat=remat))
            trees.append(
                jax.eval_shape(module.init, key, jnp.ones((1, 8, 8, 3)), jnp.ones(1), None, context[:1])["params"]
            )
            sizes.append(kept(lambda p, c, remat=remat: unet_loss(remat, p, c), trees[-1], context))
    assert trees[0] == trees[1] == trees[2]
    weights = sum(leaf.size for leaf in jax.tree.leaves(trees[0]))
    everything, products, inputs = (size - weights for size in sizes)
    assert inputs < products < everything, sizes
