"""Checkpoints: configs as JSON, single-file weights, (in `store`) training checkpoints, and files of other makers."""

from unclip_jax.checkpoint.safetensors import Network, check_tree, load_network, save_network
from unclip_jax.checkpoint.schema import SCHEMA_VERSION, CheckpointError, from_json, to_json

__all__ = [
    "SCHEMA_VERSION",
    "CheckpointError",
    "Network",
    "check_tree",
    "from_json",
    "load_network",
    "save_network",
    "to_json",
]
