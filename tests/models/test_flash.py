"""The kernel's wrapper against attention with logits, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from unclip_jax.models import flash
from unclip_jax.models.transformer import attend


@pytest.mark.skipif(not hasattr(pltpu, "force_tpu_interpret_mode"), reason="this jax cannot interpret TPU kernels")
def test_padded_keys_and_hidden_keys_are_invisible():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, n, 1, 32)), jnp.bfloat16) for n in (256, 300, 300))
    mask = jnp.asarray(rng.random((2, 1, 1, 300)) < 0.7)

    def squares(attention, key):
        return jnp.square(attention(key).astype(jnp.float32)).sum(), attention(key)

    def blocks(key):
        return flash.attend_blocks(query, key, value, mask)

    def logits(key):
        return attend(query, key, value, mask, None)

    with pltpu.force_tpu_interpret_mode():
        grad, found = jax.grad(lambda key: squares(blocks, key), has_aux=True)(key)
    expected_grad, expected = jax.grad(lambda key: squares(logits, key), has_aux=True)(key)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=0.01)
    np.testing.assert_allclose(grad.astype(np.float32), expected_grad.astype(np.float32), atol=0.05)
    assert not flash.suits(query, mask)  # here is no TPU
