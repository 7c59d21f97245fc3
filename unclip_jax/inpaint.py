"""Inpainting: a picture, a mask and a prompt, through all of a cascade's resolutions.

Every stage keeps what it knows while it samples: the picture, reduced by area to the stage's size, is put back at every
step, so that what is new grows together with it. The decoder either resamples (RePaint: no training, several walks) or
was trained to inpaint and sees picture and mask. Prompts say what the whole picture shows when it is done, since that
is how a cascade's captions speak.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.diffusion.inpainting import Known
from unclip_jax.generate import check, generate
from unclip_jax.inputs import RECOMMENDED, Options
from unclip_jax.masks import checked, resize_mask, resize_picture

Method = Literal["resample", "finetuned"]


def inpaint(
    cascade: Cascade,
    picture: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "p q"],
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | int = 0,
    options: Options = RECOMMENDED,
    method: Method | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> UInt8[np.ndarray, "b size size 3"]:
    """Pictures of prompts that show something new where the mask is true, uint8 [b size size 3].

    picture: square, of any size; it is brought to the output's size, and what of it is not masked comes back bit by
    bit. mask: of the picture's size, see `masks`. method: how the decoder does it, None: finetuned where the cascade
    can. seeds, progress: as for `generate`. Raises ValueError in one sentence for what cannot be painted.
    """
    height, width, _ = picture.shape
    if height != width:
        raise ValueError(f"inpainting takes square pictures, not {width} x {height} px: crop it first, or outpaint it")
    checked(mask, (width, height))
    size = check(cascade, options)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    shape = (len(prompts), size, size)
    known = Known(
        np.broadcast_to(resize_picture(picture, size), (*shape, 3)), np.broadcast_to(resize_mask(mask, size), shape)
    )
    return repaint(cascade, known, prompts, seeds, options, method, progress)


def repaint(
    cascade: Cascade,
    known: Known,
    prompts: Sequence[str],
    seeds: Sequence[int] | int = 0,
    options: Options = RECOMMENDED,
    method: Method | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> UInt8[np.ndarray, "b size size 3"]:
    """As `inpaint`, with a picture and a mask for each prompt, at the output's size already."""
    cascade, options = painter(cascade, options, method)
    painted = generate(cascade, prompts, seeds, options, progress, known=known)
    return np.where(known.repaint[..., None], painted, known.picture)


def painter(cascade: Cascade, options: Options, method: Method | None) -> tuple[Cascade, Options]:
    """The cascade with the decoder that inpaints, and a sampler that it can do it with.

    Raises ValueError where the cascade or the sampler cannot use the method.
    """
    if options.resamples is not None and not 1 <= options.resamples <= 100:
        raise ValueError(f"resamples must lie between 1 and 100, not {options.resamples}")
    match method or ("resample" if cascade.inpaint is None else "finetuned"):
        case "finetuned":
            if cascade.inpaint is None:
                raise ValueError("this cascade has no inpaint.safetensors: train one, or choose the method resample")
            return cascade._replace(decoder=cascade.inpaint), options
        case "resample":
            if options.sampler == "dpm":
                raise ValueError("dpm cannot walk back up the noise levels: choose ddim or ddpm to resample")
            advised = cascade.decoder.config.sample.sampler
            # Several steps of memory mean nothing after a jump.
            sampler = "ddim" if advised == "dpm" else advised
            return cascade, options._replace(sampler=options.sampler or sampler)
