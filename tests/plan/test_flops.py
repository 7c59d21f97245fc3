"""FLOPs of tiny functions and networks against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.plan.flops import count

ROWS, WIDTH, LENGTH = 4, 8, 5
PRODUCT = 2 * ROWS * WIDTH * WIDTH


def counted(function, *shapes, trips=1):
    return count(jax.make_jaxpr(function)(*[jnp.zeros(shape) for shape in shapes]), trips)


def test_a_scan_counts_its_length_and_a_backward_pass_twice_the_forward():
    def loss(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=LENGTH)[0].sum()

    assert counted(loss, (WIDTH, WIDTH), (ROWS, WIDTH)).total == LENGTH * PRODUCT
    assert counted(jax.grad(loss, (0, 1)), (WIDTH, WIDTH), (ROWS, WIDTH)).total == 3 * LENGTH * PRODUCT


def test_what_is_computed_again_is_no_model_flop():
    def block(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(function):
        return jax.grad(lambda w, x: function(w, function(w, x)).sum(), (0, 1))

    plain = counted(loss(block), (WIDTH, WIDTH), (ROWS, WIDTH))
    remat = counted(loss(jax.checkpoint(block)), (WIDTH, WIDTH), (ROWS, WIDTH))
    assert remat.total == plain.total == 3 * 4 * PRODUCT
    assert sum(plain.again.values()) == 0
    assert sum(remat.again.values()) == 4 * PRODUCT


def test_loops_of_unknown_length_take_the_given_one_and_branches_the_costlier():
    def loop(w, x, n):
        def body(state):
            i, x = state
            return i + 1, jax.lax.cond(i > 2, lambda: x @ w @ w, lambda: x @ w)

        return jax.lax.while_loop(lambda state: state[0] < n, body, (0.0, x))[1]

    assert counted(loop, (WIDTH, WIDTH), (ROWS, WIDTH), (), trips=7).total == 7 * 2 * PRODUCT


def test_a_mapped_body_counts_on_every_shard():
    mesh = jax.sharding.AbstractMesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    jaxpr = jax.make_jaxpr(mapped)(jnp.zeros((4 * ROWS, WIDTH)), jnp.zeros((WIDTH, WIDTH)))
    assert count(jaxpr).total == 4 * PRODUCT


@pytest.mark.parametrize("side", [1, 3])
def test_a_convolution_and_its_gradients_count_alike(side):
    def loss(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    shapes = (side, side, 3, WIDTH), (ROWS, 6, 6, 3)
    met = (6 * side - 2 * (side // 2)) ** 2  # the outermost outputs meet padding with one tap of three
    forward = 2 * ROWS * met * 3 * WIDTH
    assert counted(loss, *shapes).total == forward
    gradient = jax.make_jaxpr(jax.grad(lambda k, x: (loss(k, x) ** 2).sum(), (0, 1)))(*map(np.zeros, shapes))
    assert count(gradient).total == 3 * forward


def geometry(seed):
    """A convolution of any stride, dilation, spread, groups and padding, of cut-off inputs too; operands of ones."""
    draw = np.random.default_rng(seed)
    sides = int(draw.integers(1, 3))
    kernel, strides, spread, dilation = (draw.integers(1, 4, sides) for _ in range(4))
    size = draw.integers(4, 8, sides)
    padding = draw.integers(-2, 5, (sides, 2))
    short = (size - 1) * spread + 1 + padding.sum(1) - (kernel - 1) * dilation
    padding[:, 1] += np.maximum(1 - short, 0)  # at least one output
    groups = int(draw.integers(1, 3))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, strides.tolist(), [tuple(both) for both in padding.tolist()], spread.tolist(), dilation.tolist(),
            feature_group_count=groups,
        )  # fmt: skip

    return convolve, np.ones((2, 2 * groups, *size), np.float32), np.ones((4, 2, *kernel), np.float32)


@pytest.mark.parametrize("seed", range(16))
def test_every_tap_that_meets_an_input_counts_and_no_other(seed):
    convolve, x, w = geometry(seed)
    products = float(convolve(x, w).sum())  # of ones: each product adds one
    jaxpr = jax.make_jaxpr(convolve)(x, w)
    assert count(jaxpr).total == 2 * products
    said = jax.jit(convolve).lower(x, w).cost_analysis() or {}
    assert said.get("flops", 0) == 2 * products
    both = jax.make_jaxpr(lambda x, w, y: jax.vjp(convolve, x, w)[1](y))(
        x, w, np.zeros(jaxpr.out_avals[0].shape, np.float32)
    )
    assert count(both).total == 6 * products
