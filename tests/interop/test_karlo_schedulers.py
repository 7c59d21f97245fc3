from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import DiffusionConfig
from unclip_jax.diffusion.gaussian import denoiser
from unclip_jax.diffusion.guidance import clip_static
from unclip_jax.diffusion.samplers import SamplerState, ddpm, step_noise
from unclip_jax.diffusion.schedule import StepTable, make_schedule, step_table, strided_timesteps
from unclip_jax.interop.karlo import diffusion_config

PRIOR = {"prediction_type": "sample", "variance_type": "fixed_small_log", "clip_sample_range": 5.0}
DECODER = {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample_range": 1.0}
UPSAMPLER = {"prediction_type": "epsilon", "variance_type": "fixed_small_log"}


@partial(jax.jit, static_argnums=0)
def step(config: DiffusionConfig, output: jax.Array, x: jax.Array, keys: jax.Array, table: StepTable, done: jax.Array):
    """x at the next timestep, and the noise that went into it."""
    schedule = make_schedule(config)
    denoise = clip_static(denoiser(config, schedule, lambda x, t: output), config.clip or 0)
    state = SamplerState(x, jnp.zeros_like(x), done)
    after = ddpm(schedule, "learned" if config.learned_variance else "small")(denoise, state, table, keys)
    return after.x, step_noise(keys, state)


def torch_layout(x: np.ndarray) -> np.ndarray:
    return np.array(np.moveaxis(np.asarray(x), -1, 1), order="C")


@pytest.mark.parametrize("settings", [PRIOR, DECODER, UPSAMPLER], ids=["prior", "decoder", "upsampler"])
def test_steps_are_those_of_the_unclip_scheduler(oracle, monkeypatch, settings, exact_division):
    from diffusers.schedulers import scheduling_unclip

    config = diffusion_config(settings)
    shape = (2, 24) if settings is PRIOR else (2, 8, 8, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    rng = np.random.default_rng(1)
    for count in (25, 7, 3):
        theirs = oracle.scheduler(**settings)
        theirs.set_timesteps(count)
        times = strided_timesteps(count)
        assert theirs.timesteps.tolist() == times.tolist()
        assert times[-1] == 0
        for done, t in enumerate(times.tolist()):
            x = rng.normal(size=shape).astype(np.float32)
            output = rng.normal(size=shape).astype(np.float32)
            if config.learned_variance:
                output = np.concatenate([output, rng.uniform(-1, 1, shape).astype(np.float32)], axis=-1)
            after, noise = step(config, output, x, keys, step_table(times), jnp.asarray(done))
            drawn = oracle.torch.from_numpy(torch_layout(noise))
            monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, drawn=drawn, **_: drawn)
            following = oracle.torch.tensor(int(times[done + 1])) if done + 1 < count else None
            wanted = oracle.call(
                theirs.step,
                model_output=torch_layout(output),
                timestep=oracle.torch.tensor(t),
                sample=torch_layout(x),
                prev_timestep=following,
            )
            assert np.abs(torch_layout(after) - wanted).max() < 2e-6, (count, t)
