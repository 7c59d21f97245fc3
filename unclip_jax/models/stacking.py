"""Parameters of transformers whose blocks are scanned, from those whose blocks stand side by side, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def stack_blocks(params: Any) -> Any:
    """A network's parameters as `TransformerConfig.scan` wants them: block_0, block_1, ... become one block.

    Every leaf of it has a leading axis, one entry per layer. params: dicts of numpy or jax arrays; what is stacked
    already, or is no transformer's, stays.
    """
    if not isinstance(params, Mapping):
        return params
    names = sorted((name for name in params if re.fullmatch(r"block_\d+", name)), key=lambda name: int(name[6:]))
    rest = {name: stack_blocks(part) for name, part in params.items() if name not in names}
    if not names:
        return rest
    return {**rest, "block": jax.tree.map(_stacked, *(params[name] for name in names))}


def unstack_blocks(params: Any) -> Any:
    """The inverse of stack_blocks: parameters as every published file names them."""
    if not isinstance(params, Mapping):
        return params
    rest = {name: unstack_blocks(part) for name, part in params.items() if name != "block"}
    if "block" not in params:
        return rest
    layers = len(jax.tree.leaves(params["block"])[0])
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["block"]) for i in range(layers)}


def _stacked(*leaves: Any) -> Any:
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)
