"""InceptionV3 as FID reads it: the network of 2015-12-05 with TensorFlow's pooling, from the weights files of others.

Names and shapes are those of `pt_inception-2015-12-05-6726825d.pth`, as pytorch-fid and torch-fidelity publish it
(arXiv 1512.00567, arXiv 1706.08500 appendix A1). It differs from torchvision's InceptionV3 in its pooling: averages
leave the padding out of the count, and the last block's pooling takes maxima.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_source
from unclip_jax.models.precision import precision_of
from unclip_jax.sharding import rows

SIZE = 299  # px that every picture is resized to
DIM = 2048  # of the features, the last block averaged over places ("pool3")
EPSILON = 1e-3  # of the batch norms
UNUSED = ("fc.weight", "fc.bias")  # the classifier, which these files may hold or not

Image = Float[Array, "b _ _ _"]
Kernel = tuple[int, int]
Convolve = Callable[..., Image]


class Inception(NamedTuple):
    """Parameters by layer: kernel HWIO, batch norm folded into it, and bias. digest: of the tensors."""

    params: Mapping[str, Mapping[str, np.ndarray]]
    digest: str


def load_inception(path: str | Path) -> Inception:
    """The network of a weights file in float32.

    path: the published .pth, read without executing anything, or a .safetensors of the same names.
    Raises CheckpointError, which names a tensor, where one is missing, of another shape, or unknown.
    """
    source = open_source(path)
    shapes = source.shapes
    wanted = expected_shapes()
    if missing := sorted(set(wanted) - set(shapes)):
        raise CheckpointError(
            f"'{path}' lacks '{missing[0]}' and {len(missing) - 1} more of InceptionV3's {len(wanted)} tensors: "
            "fetch pt_inception-2015-12-05-6726825d.pth again"
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"'{path}' has '{name}' of shape {shapes[name]}, and FID's InceptionV3 {shape}: it is another network"
            )
    known = {*wanted, *UNUSED}
    if extra := sorted(name for name in set(shapes) - known if not name.endswith("num_batches_tracked")):
        raise CheckpointError(f"'{path}' has '{extra[0]}', which FID's InceptionV3 has not: it is another network")
    tensors = {name: np.asarray(source.read(name), np.float32) for name in wanted}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.tobytes())
    return Inception(fold(tensors), digest.hexdigest()[:12])


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Torch's tensors as kernels and biases by layer; batch norms, folded in float64, are affine maps of channels."""
    params = {}
    for layer in kernels():
        kernel, scale, bias, mean, variance = (
            np.asarray(tensors[f"{layer}.{part}"], np.float64)
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        factor = scale / np.sqrt(variance + EPSILON)
        hwio = kernel.transpose(2, 3, 1, 0) * factor
        params[layer] = {"kernel": hwio.astype(np.float32), "bias": (bias - mean * factor).astype(np.float32)}
    return params


def kernels() -> dict[str, tuple[int, int, int, int]]:
    """Shape of every layer's kernel, OIHW, read off the network itself."""
    found: dict[str, tuple[int, int, int, int]] = {}

    def note(name: str, x: Image, features: int, kernel: Kernel, stride: int = 1, pad: Kernel = (0, 0)) -> Image:
        found[name] = (features, x.shape[-1], *kernel)
        high, wide = ((side + 2 * p - k) // stride + 1 for side, p, k in zip(x.shape[1:3], pad, kernel, strict=True))
        return jnp.zeros((x.shape[0], high, wide, features))

    jax.eval_shape(partial(_blocks, note), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return found


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a weights file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, kernel in kernels().items():
        shapes[f"{layer}.conv.weight"] = kernel
        shapes |= {f"{layer}.bn.{part}": kernel[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


@partial(jax.jit, static_argnames="size")
def inception_features(
    params: Mapping[str, Mapping[str, Array]], pictures: UInt8[Array, "b h w 3"], size: int = SIZE
) -> Float[Array, "b 2048"]:
    """Features of pictures of any size; FID's are those at SIZE."""
    return _blocks(partial(_convolve, params), 2 * resized(rows(pictures.astype(jnp.float32) / 255), size) - 1)


def resized(x: Float[Array, "b h w 3"], size: int) -> Float[Array, "b {size} {size} 3"]:
    """Bilinear, without antialiasing, as torch's interpolate does with align_corners=False."""
    shape = (x.shape[0], size, size, 3)
    return jax.image.resize(x, shape, "linear", antialias=False, precision=jax.lax.Precision.HIGHEST)


def _convolve(
    params: Mapping[str, Mapping[str, Array]],
    name: str,
    x: Image,
    features: int,
    kernel: Kernel,
    stride: int = 1,
    pad: Kernel = (0, 0),
) -> Image:
    """Convolution, folded batch norm and ReLU."""
    layer = params[name]
    padding = [(side, side) for side in pad]
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of("float32"),
    )  # fmt: skip
    return rows(jax.nn.relu(y + layer["bias"]))


def _largest(x: Image, stride: int, pad: int) -> Image:
    return _over_three(x, jnp.maximum, -math.inf, stride, pad)


def _average(x: Image) -> Image:
    """Means over 3 x 3 places, of those that lie in the picture."""
    counts = _over_three(jnp.ones((1, *x.shape[1:3], 1), x.dtype), jnp.add, 0.0, 1, 1)
    return _over_three(x, jnp.add, 0.0, 1, 1) / counts


def _over_three(x: Image, join: Callable[[Image, Image], Image], outside: float, stride: int, pad: int) -> Image:
    """Joins 3 x 3 places, rows first: shifted pictures, on CPUs four times as fast as a window that is reduced."""
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=outside)
    for axis in (1, 2):
        last = (x.shape[axis] - 3) // stride * stride + 1
        one, two, three = (jax.lax.slice_in_dim(x, at, at + last, stride, axis) for at in range(3))
        x = join(join(one, two), three)
    return x


def _blocks(conv: Convolve, x: Image) -> Float[Array, "b 2048"]:
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), 2)
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3))
    x = conv("Conv2d_2b_3x3", x, 64, (3, 3), 1, (1, 1))
    x = _largest(x, 2, 0)
    x = conv("Conv2d_3b_1x1", x, 80, (1, 1))
    x = conv("Conv2d_4a_3x3", x, 192, (3, 3))
    x = _largest(x, 2, 0)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(_within(conv, name), x, pooled)
    x = _block_b(_within(conv, "Mixed_6a"), x)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _block_c(_within(conv, name), x, width)
    x = _block_d(_within(conv, "Mixed_7a"), x)
    x = _block_e(_within(conv, "Mixed_7b"), x, _average)
    x = _block_e(_within(conv, "Mixed_7c"), x, partial(_largest, stride=1, pad=1))
    return x.mean((1, 2))


def _within(conv: Convolve, block: str) -> Convolve:
    return lambda name, *arguments: conv(f"{block}.{name}", *arguments)


def _joined(*branches: Image) -> Image:
    return jnp.concatenate(branches, axis=-1)


def _block_a(conv: Convolve, x: Image, pooled: int) -> Image:
    one = conv("branch1x1", x, 64, (1, 1))
    five = conv("branch5x5_2", conv("branch5x5_1", x, 48, (1, 1)), 64, (5, 5), 1, (2, 2))
    three = conv("branch3x3dbl_1", x, 64, (1, 1))
    three = conv("branch3x3dbl_2", three, 96, (3, 3), 1, (1, 1))
    three = conv("branch3x3dbl_3", three, 96, (3, 3), 1, (1, 1))
    return _joined(one, five, three, conv("branch_pool", _average(x), pooled, (1, 1)))


def _block_b(conv: Convolve, x: Image) -> Image:
    three = conv("branch3x3", x, 384, (3, 3), 2)
    double = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x, 64, (1, 1)), 96, (3, 3), 1, (1, 1))
    return _joined(three, conv("branch3x3dbl_3", double, 96, (3, 3), 2), _largest(x, 2, 0))


def _block_c(conv: Convolve, x: Image, width: int) -> Image:
    wide, high = ((1, 7), (0, 3)), ((7, 1), (3, 0))

    def chain(name: str, *steps: tuple[int, tuple[Kernel, Kernel]]) -> Image:
        y = conv(f"{name}_1", x, width, (1, 1))
        for number, (features, (kernel, pad)) in enumerate(steps, start=2):
            y = conv(f"{name}_{number}", y, features, kernel, 1, pad)
        return y

    one = conv("branch1x1", x, 192, (1, 1))
    seven = chain("branch7x7", (width, wide), (192, high))
    double = chain("branch7x7dbl", (width, high), (width, wide), (width, high), (192, wide))
    return _joined(one, seven, double, conv("branch_pool", _average(x), 192, (1, 1)))


def _block_d(conv: Convolve, x: Image) -> Image:
    three = conv("branch3x3_2", conv("branch3x3_1", x, 192, (1, 1)), 320, (3, 3), 2)
    seven = conv("branch7x7x3_2", conv("branch7x7x3_1", x, 192, (1, 1)), 192, (1, 7), 1, (0, 3))
    seven = conv("branch7x7x3_3", seven, 192, (7, 1), 1, (3, 0))
    return _joined(three, conv("branch7x7x3_4", seven, 192, (3, 3), 2), _largest(x, 2, 0))


def _block_e(conv: Convolve, x: Image, pool: Callable[[Image], Image]) -> Image:
    def split(name: str, y: Image) -> list[Image]:
        return [conv(f"{name}a", y, 384, (1, 3), 1, (0, 1)), conv(f"{name}b", y, 384, (3, 1), 1, (1, 0))]

    one = conv("branch1x1", x, 320, (1, 1))
    three = split("branch3x3_2", conv("branch3x3_1", x, 384, (1, 1)))
    double = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x, 448, (1, 1)), 384, (3, 3), 1, (1, 1))
    double = split("branch3x3dbl_3", double)
    return _joined(one, *three, *double, conv("branch_pool", pool(x), 192, (1, 1)))
