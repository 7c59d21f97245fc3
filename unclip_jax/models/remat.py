"""What blocks keep for the backward pass, and what they compute again."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from unclip_jax.config import Remat


def products(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Whether an operation's result is kept by "products": convolutions and matrix products, but no attention logits.

    What is left to compute again are norms, activations and attention: little work, most of the memory.
    """
    match primitive.name:
        case "conv_general_dilated":
            return True
        case "dot_general":
            _, (batch, _) = parameters["dimension_numbers"]
            return not batch
    return False


def remembering(remat: Remat, function: Callable[..., Any], *, looped: bool = False) -> Callable[..., Any]:
    """function(module, *arrays), keeping what the policy says between its forward and its backward pass.

    looped: it is the body of a scan, whose passes are two loops: no barrier need keep the compiler from merging them.
    """
    match remat:
        case "none":
            return function
        case "products":
            return nn.remat(function, policy=products, prevent_cse=not looped)
        case "block":
            return nn.remat(function, prevent_cse=not looped)
