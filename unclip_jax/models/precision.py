"""Compute dtypes and matrix precision, set in one place."""

import jax
import jax.numpy as jnp

from unclip_jax.config import Dtype


def dtype_of(name: Dtype) -> jnp.dtype:
    """The jax dtype that a config names."""
    return jnp.dtype(name)


def precision_of(name: Dtype) -> jax.lax.Precision | None:
    """Matrix precision for a compute dtype: float32 means float32 also on TPU and GPU matrix units."""
    return jax.lax.Precision.HIGHEST if name == "float32" else None
