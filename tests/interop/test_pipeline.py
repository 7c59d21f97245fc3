"""A published folder drawn here and by diffusers with the same noise: whole pictures, for captions and for pictures."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax import edit
from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.diffusion.samplers import SamplerState, initial_noise, step_noise
from unclip_jax.generate import generate, upsample
from unclip_jax.inputs import DECODER, PRIOR, RECOMMENDED, UPSAMPLER, Options, picture_keys, stage_keys, table_of

PROMPTS = ["a red house!", "the cat on a mat under a big blue tree by the sea at night", "", "two dogs"]
PICTURE = np.random.default_rng(3).integers(0, 256, (48, 48, 3), np.uint8)
PRIOR_STEPS, DECODER_STEPS, UPSAMPLER_STEPS = 25, 25, 7  # diffusers' defaults


@pytest.fixture(scope="module")
def cascade(tiny_karlo) -> Cascade:
    return load_cascade([tiny_karlo.text, tiny_karlo.picture])


class Noise:
    """What our samplers draw for these keys, for diffusers: the beginnings by name, and the steps' in their order."""

    def __init__(self, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.schedulers import scheduling_unclip

        self.torch, self.steps = torch, []
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, **_: self._next(shape))

    def stage(self, keys: Any, shape: tuple[int, ...], steps: int) -> Any:
        begun = initial_noise(keys, shape)
        for done in range(steps - 1):  # none into clean data
            self.steps.append(self._torch(step_noise(keys, SamplerState(begun, begun, jnp.asarray(done)))))
        return self._torch(begun)

    def _next(self, shape: tuple[int, ...]) -> Any:
        noise = self.steps.pop(0)
        assert noise.shape == shape
        return noise

    def _torch(self, x: Any) -> Any:
        return self.torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1), order="C"))


@pytest.fixture
def noise(oracle, monkeypatch) -> Iterator[Noise]:
    noise = Noise(oracle.torch, monkeypatch)
    yield noise
    assert not noise.steps  # all of it was used


def stages(noise: Noise, cascade: Cascade, seed: int, count: int, decoder_steps: int) -> dict[str, Any]:
    """The noise of decoder and upsampler."""
    keys, (small, large) = picture_keys(seed, count), cascade.sizes
    return {
        "decoder_latents": noise.stage(stage_keys(keys, DECODER), (small, small, 3), decoder_steps),
        "super_res_latents": noise.stage(stage_keys(keys, UPSAMPLER + large), (large, large, 3), UPSAMPLER_STEPS),
    }


def unrounded(module: ModuleType, monkeypatch: pytest.MonkeyPatch, draw: Any, cascade: Cascade) -> np.ndarray:
    """Pictures in [0, 1] as they are before their bytes, which must be theirs rounded."""
    handed: list[Any] = []
    finish = module.finish
    monkeypatch.setattr(module, "finish", lambda *given: handed.append(given) or finish(*given))
    drawn = draw()
    ((_, keys, small, *_),), (last,) = handed, cascade.upsamplers
    assert small.dtype == np.float32 and np.abs(small).max() <= 1
    table, eta = table_of(last.config, last.config.sample.steps), np.float32(0)
    rows = (slice(row, row + 1) for row in range(len(small)))
    large = [upsample(last.config, "ddpm", last.params, keys[row], jnp.asarray(small[row]), table, eta) for row in rows]
    pictures = (np.concatenate(large) + 1) / 2
    assert np.abs(255 * pictures - drawn).max() < 0.501
    return pictures


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The 99.9th percentile of the differences of pictures in [0, 1] that are none of them flat."""
    assert ours.shape == theirs.shape and ours.std((1, 2)).min() > 0.05
    return float(np.quantile(np.abs(ours - theirs), 0.999))


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (PROMPTS, RECOMMENDED),
        (PROMPTS[1:], Options(steps=4, guidance=1.0, prior_steps=3, prior_guidance=1.0)),
        (PROMPTS[:3], Options(steps=3, guidance=5.0, prior_steps=4, prior_guidance=1.0)),
        (PROMPTS[:3], Options(steps=5, guidance=1.0, prior_steps=2, prior_guidance=6.0)),
    ],
    ids=["defaults", "guidance_off", "guided_decoder", "guided_prior"],
)
def test_pictures_of_prompts_are_those_of_diffusers(cascade, tiny_karlo, noise, monkeypatch, prompts, options):
    steps = options.prior_steps or PRIOR_STEPS, options.steps or DECODER_STEPS
    keys, seed = stage_keys(stage_keys(picture_keys(40, len(prompts)), PRIOR), 0), 40
    given = {"prior_latents": noise.stage(keys, (24,), steps[0])}
    given |= stages(noise, cascade, seed, len(prompts), steps[1])
    if options is not RECOMMENDED:
        given |= {"prior_num_inference_steps": steps[0], "decoder_num_inference_steps": steps[1]}
        given |= {"prior_guidance_scale": options.prior_guidance, "decoder_guidance_scale": options.guidance}
    theirs = tiny_karlo.text_pipeline(prompts, output_type="np", **given).images
    module = sys.modules[generate.__module__]
    ours = unrounded(module, monkeypatch, lambda: generate(cascade, prompts, seed, options), cascade)
    assert apart(ours, theirs) < 1e-3


@pytest.mark.parametrize("options", [RECOMMENDED, Options(steps=4, guidance=1.0)], ids=["defaults", "guidance_off"])
def test_variations_of_a_picture_are_those_of_diffusers(tiny_karlo, noise, monkeypatch, options):
    alone = load_cascade(tiny_karlo.picture)
    given = stages(noise, alone, 7, 2, options.steps or DECODER_STEPS)
    if options is not RECOMMENDED:
        given |= {"decoder_num_inference_steps": options.steps, "decoder_guidance_scale": options.guidance}
    pipeline = tiny_karlo.picture_pipeline
    theirs = pipeline(Image.fromarray(PICTURE), num_images_per_prompt=2, output_type="np", **given).images
    ours = unrounded(edit, monkeypatch, lambda: edit.variations(alone, PICTURE, 2, seed=7, options=options), alone)
    assert apart(ours, theirs) < 1e-3
