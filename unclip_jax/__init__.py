"""unCLIP (DALL-E 2, arXiv 2204.06125) in JAX and Flax."""

__version__ = "0.1.0"

from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.generate import generate
from unclip_jax.inpaint import inpaint
from unclip_jax.inputs import Options
from unclip_jax.mural import mural
from unclip_jax.outpaint import outpaint

__all__ = ["Cascade", "Options", "generate", "inpaint", "load_cascade", "mural", "outpaint"]
