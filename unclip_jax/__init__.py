"""unCLIP (DALL-E 2, arXiv 2204.06125) in JAX and Flax."""

__version__ = "0.1.0"
__all__ = ["Cascade", "Options", "generate", "inpaint", "load_cascade", "mural", "outpaint"]

_missed: Exception | None = None
try:
    from unclip_jax.cascade import Cascade, load_cascade
    from unclip_jax.generate import generate
    from unclip_jax.inpaint import inpaint
    from unclip_jax.inputs import Options
    from unclip_jax.mural import mural
    from unclip_jax.outpaint import outpaint
except Exception as error:  # jax is missing or broken, and `unclip doctor`, which says so, must start all the same
    _missed = error


def __getattr__(name: str) -> object:
    """Raises what kept a public name from being imported."""
    if name in __all__ and _missed is not None:
        raise _missed
    raise AttributeError(f"module 'unclip_jax' has no attribute '{name}'")
