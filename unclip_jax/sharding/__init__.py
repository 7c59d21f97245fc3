"""Mesh axes, the rule table, and the shardings of training states and of batches; nothing else says PartitionSpec.

strategy   names and mixtures -> axis sizes -> a mesh
rules      a tree of shapes -> where every leaf lies, or why that cannot be
batches    the rows that a host reads, and the global arrays made of them
inside     what networks, losses and steps say of the mesh, without naming an axis
convolution  of pictures and kernels that are split
lookup     in tables that are split
compiling  options of the TPU compiler
"""

from unclip_jax.sharding.batches import batch_sharding, batch_ways, check_batch_size, host_rows, put_batch
from unclip_jax.sharding.compiling import compiler_options
from unclip_jax.sharding.convolution import convolution
from unclip_jax.sharding.inside import (
    as_leaf,
    as_state,
    check_height,
    on,
    over_heads,
    over_rows,
    place,
    platform,
    row_ways,
    rows,
    shard_number,
    shards,
    shift,
    total,
)
from unclip_jax.sharding.lookup import lookup
from unclip_jax.sharding.rules import GIANT, RULES, SMALL, Rule, is_stacked, path_name, replicated, shard_state
from unclip_jax.sharding.strategy import (
    AXES,
    NAMES,
    Strategy,
    abstract_mesh,
    make_mesh,
    resolve,
    slices_of,
    torus_of,
)

__all__ = [
    "AXES",
    "GIANT",
    "NAMES",
    "RULES",
    "SMALL",
    "Rule",
    "Strategy",
    "abstract_mesh",
    "as_leaf",
    "as_state",
    "batch_sharding",
    "batch_ways",
    "check_batch_size",
    "check_height",
    "compiler_options",
    "convolution",
    "host_rows",
    "is_stacked",
    "lookup",
    "make_mesh",
    "on",
    "over_heads",
    "over_rows",
    "path_name",
    "place",
    "platform",
    "put_batch",
    "replicated",
    "resolve",
    "row_ways",
    "rows",
    "shard_number",
    "shard_state",
    "shards",
    "shift",
    "slices_of",
    "torus_of",
    "total",
]
