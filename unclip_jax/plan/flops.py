"""Floating-point operations of a traced function, counted from its jaxpr with every loop multiplied out.

A multiplication and an addition are two; matrix products and convolutions alone count, as is usual for a model's FLOPs.
Of a convolution's taps only those that meet an input do, as compilers count: at 8 px a sixth of 3 x 3 meets padding.
"""

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from unclip_jax.models.flash import SCOPE


class Work(NamedTuple):
    """FLOPs by the path of the module that asked for them.

    model: without what rematerialisation computes again. again: that.
    """

    model: dict[str, float]
    again: dict[str, float]

    @property
    def total(self) -> float:
        """Of the model alone, as model FLOPs utilisation counts."""
        return float(sum(self.model.values()))


def count(jaxpr: ClosedJaxpr | Jaxpr, trips: int = 1) -> Work:
    """FLOPs of a jaxpr over all devices; trips: iterations of loops whose number is data, as a sampler's."""
    work = Work(defaultdict(float), defaultdict(float))
    _add(work, _open(jaxpr), 1.0, "", trips)
    return work


def _open(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _add(work: Work, jaxpr: Jaxpr, times: float, outer: str, trips: int) -> None:
    for eqn in jaxpr.eqns:
        path = f"{outer}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            flops = times * (_dot(eqn) if name == "dot_general" else _conv(eqn))
            (work.again if _repeated(path) else work.model)[_module(path)] += flops
            continue
        match name:
            case "scan":
                inner = times * eqn.params["length"]
            case "while":
                inner = times * trips
            case "pallas_call" if SCOPE in path:
                # Attention: queries by keys, and by values; backwards two of each. That the kernel computes logits
                # again is its own affair, and part of how fast it is.
                flops = times * float(path.rsplit(SCOPE, 1)[1].split("/")[0].rstrip(")"))
                back = len(eqn.outvars) > 1
                where = work.again if _repeated(path) and not back else work.model
                where[_module(path)] += flops * (4 if back else 2)
                continue
            case "pallas_call":
                inner = times * math.prod(eqn.params["grid_mapping"].grid)
            case "shard_map":
                manual = eqn.params.get("manual_axes") or eqn.params["mesh"].axis_names
                inner = times * math.prod(eqn.params["mesh"].shape[axis] for axis in manual)
            case "cond":
                branches = [count(branch, trips) for branch in eqn.params["branches"]]
                largest = max(branches, key=lambda branch: branch.total)
                for ours, theirs in zip(work, largest, strict=True):
                    for key, value in theirs.items():
                        ours[_module(f"{path}/{key}")] += times * value
                continue
            case _:
                inner = times
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    _add(work, _open(part), inner, path, trips)


def _repeated(path: str) -> bool:
    """Whether it is computed again: in a backward pass what is neither transposed nor kept from before."""
    return "rematted_computation" in path and "transpose(" not in path.rsplit("rematted_computation", 1)[1]


def _module(path: str) -> str:
    """The modules in a name stack, without transformations: jvp(Decoder)/unet/stem -> Decoder/unet/stem."""
    words = re.sub(r"\b(?:transpose|jvp|vmap|jit|checkpoint|rematted_computation|remat)\b|[()]", "", path)
    return "/".join(word for word in words.split("/") if word)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _conv(eqn: Any) -> float:
    numbers, given = eqn.params["dimension_numbers"], eqn.params
    (picture, kernel), out = (variable.aval.shape for variable in eqn.invars), eqn.outvars[0].aval.shape
    met = math.prod(
        taps(out[o], kernel[k], picture[i], stride, int(low), spread, dilation)
        for i, k, o, stride, (low, _), spread, dilation in zip(
            *(spec[2:] for spec in numbers),
            given["window_strides"], given["padding"], given["lhs_dilation"], given["rhs_dilation"],
            strict=True,
        )
    )  # fmt: skip
    rows, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2.0 * rows * features * kernel[numbers.rhs_spec[1]] * met


def taps(out: int, kernel: int, size: int, stride: int = 1, low: int = 0, spread: int = 1, dilation: int = 1) -> int:
    """Pairs of an output and a tap of the kernel that meet an input, along one side of a convolution.

    Padding is no input, nor are the zeros that spread inputs `spread` apart; compilers leave both out. low: padding
    before the first input, negative where inputs are cut off. dilation: how far apart the kernel's taps are.
    """
    places, last = np.arange(out) * stride - low, (size - 1) * spread
    tapped = (places + tap * dilation for tap in range(kernel))
    return sum(int(np.count_nonzero((at >= 0) & (at <= last) & (at % spread == 0))) for at in tapped)
