"""What the TPU compiler is asked for beside its defaults when it compiles a training step."""

import warnings
from functools import cache

import jax
from jax.sharding import Mesh

# As v5e has it by default: weights are gathered in pieces, fused with products that do not need them yet. On the other
# generations they are fetched before anything goes on.
GATHER_WHILE_COMPUTING = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}

# The partitioner makes a loop of small products of a product with many rows, fetching a piece of the weight in each
# turn. A layer's weight is small beside its rows: with 128 pictures on each of 8 v6e chips the decoder's step sends two
# fifths less without, in 1,200 collectives instead of 11,000. Not where heads are split: there the rows travel.
WHOLE_WEIGHTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Options of `jax.jit` for a training step on this mesh, none but on several TPUs.

    A compiler of this machine's TPUs that does not know them is told nothing, with a warning.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "tpu":
        return {}
    if jax.default_backend() == "tpu" and not _known():
        return {}
    return GATHER_WHILE_COMPUTING | (WHOLE_WEIGHTS if mesh.shape["tensor"] == 1 else {})


@cache
def _known() -> bool:
    """Whether the compiler of this machine's TPUs takes the options."""
    try:
        jax.jit(lambda: 0.0, compiler_options=GATHER_WHILE_COMPUTING | WHOLE_WEIGHTS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        warnings.warn(f"training without the options for TPUs, slower: {str(error).splitlines()[0]}", stacklevel=3)
        return False
    return True
