"""unCLIP (DALL-E 2, arXiv 2204.06125) in JAX and Flax."""

__version__ = "0.1.0"
