"""A published folder drawn here and by diffusers with the same noise: whole pictures, for captions and for pictures."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax import edit
from unclip_jax.cascade import Cascade, in_dtype, load_cascade
from unclip_jax.checkpoint.sources import TensorSource
from unclip_jax.diffusion.samplers import SamplerState, initial_noise, step_noise
from unclip_jax.generate import decode, encode_prompts, generate, upsample
from unclip_jax.inputs import (
    DECODER,
    PRIOR,
    RECOMMENDED,
    UPSAMPLER,
    Options,
    Text,
    per_picture,
    picture_keys,
    stage_keys,
    table_of,
)
from unclip_jax.interop import karlo_names
from unclip_jax.interop.loading import load_params
from unclip_jax.models.prior import Whitening
from unclip_jax.offload import on_device
from unclip_jax.priors import prior_embeddings

PROMPTS = ["a red house!", "the cat on a mat under a big blue tree by the sea at night", "", "two dogs"]
PICTURE = np.random.default_rng(3).integers(0, 256, (40, 57, 3), np.uint8)  # of no square
PRIOR_STEPS, DECODER_STEPS, UPSAMPLER_STEPS = 25, 25, 7  # diffusers' defaults
FEW = 8

PARTS = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")


@pytest.fixture(scope="module")
def cascade(tiny_karlo) -> Cascade:
    return load_cascade([tiny_karlo.text, tiny_karlo.picture], "float32")


class Noise:
    """What our samplers draw for these keys, for diffusers: the beginnings by name, and the steps' in their order."""

    def __init__(self, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.schedulers import scheduling_unclip

        self.torch, self.steps = torch, []
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, dtype, **_: self._next(shape).to(dtype))

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
    if options.steps == 4:  # the programs are compiled by now
        turned = load_cascade([tiny_karlo.text, tiny_karlo.picture], "float32", offload="always")
        np.testing.assert_array_equal(
            generate(turned, prompts, seed, options), generate(cascade, prompts, seed, options)
        )


@pytest.mark.parametrize("options", [RECOMMENDED, Options(steps=4, guidance=1.0)], ids=["defaults", "guidance_off"])
def test_variations_of_a_picture_are_those_of_diffusers(tiny_karlo, noise, monkeypatch, options):
    alone = load_cascade(tiny_karlo.picture, "float32")
    given = stages(noise, alone, 7, 2, options.steps or DECODER_STEPS)
    if options is not RECOMMENDED:
        given |= {"decoder_num_inference_steps": options.steps, "decoder_guidance_scale": options.guidance}
    pipeline = tiny_karlo.picture_pipeline
    theirs = pipeline(Image.fromarray(PICTURE), num_images_per_prompt=2, output_type="np", **given).images
    ours = unrounded(edit, monkeypatch, lambda: edit.variations(alone, PICTURE, 2, seed=7, options=options), alone)
    assert apart(ours, theirs) < 1e-3


class Stages(NamedTuple):
    """What every stage makes: embeddings [b z], whitened, and pictures of both sizes in [-1, 1], channels first."""

    prior: np.ndarray
    decoder: np.ndarray
    upsampler: np.ndarray


def our_stages(cascade: Cascade, keys: Any, text: Text, null: Text, given: Stages | None) -> Stages:
    """Every stage of ours alone: the later ones go on from `given`; None: from what was made here."""
    prior, decoder, (last,) = cascade.prior, cascade.decoder, cascade.upsamplers
    assert prior is not None
    statistics, advice, eta = Whitening(**prior.constants["whitening"]), decoder.config.sample, np.float32(0)
    white = statistics.whiten(prior_embeddings(prior, keys, text, null, Options(prior_steps=FEW)))
    embedding = statistics.restore(jnp.asarray(white if given is None else given.prior))
    table, guidance = table_of(decoder.config, FEW), per_picture(advice.guidance, len(keys))
    small = decode(
        decoder.config, "ddpm", decoder.params, keys, embedding, text, table, guidance, eta, eta, null=null
    )  # fmt: skip
    low = small if given is None else jnp.moveaxis(jnp.asarray(given.decoder), 1, -1)
    table = table_of(last.config, last.config.sample.steps)
    rows = (slice(row, row + 1) for row in range(len(low)))
    large = [upsample(last.config, "ddpm", last.params, keys[row], low[row], table, eta) for row in rows]
    return Stages(np.asarray(white), *(np.moveaxis(np.asarray(x), -1, 1) for x in (small, np.concatenate(large))))


def their_stages(noise: Noise, pipeline: Any, dtype: Any, keys: Any, given: Stages | None) -> Stages:
    """Every stage of diffusers alone, in a dtype, as its pipeline runs them."""
    torch, large = noise.torch, pipeline.super_res_first.config.sample_size
    prior, projections, decoder, first, last = (copy.deepcopy(getattr(pipeline, name)).to(dtype) for name in PARTS)
    embeds, states, mask = pipeline._encode_prompt(PROMPTS, "cpu", 1, True)
    embeds, states = embeds.to(dtype), states.to(dtype)

    def walk(scheduler: Any, keys: Any, shape: tuple[int, ...], steps: int, predict: Any) -> Any:
        x = noise.stage(keys, shape, steps).to(dtype)
        scheduler.set_timesteps(steps)
        for t, earlier in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
            x = scheduler.step(predict(x, t, earlier is None), t, x, prev_timestep=earlier).prev_sample
        return x

    def embedding(x: Any, t: Any, _: bool) -> Any:
        out = prior(torch.cat([x] * 2), t, embeds, states, mask).predicted_image_embedding
        absent, present = out.chunk(2)
        return absent + 4 * (present - absent)

    def picture(x: Any, t: Any, _: bool) -> Any:
        out = decoder(torch.cat([x] * 2), t, told, class_labels=time, attention_mask=padded).sample
        (absent, _), (present, variance) = (part.split(3, dim=1) for part in out.chunk(2))
        return torch.cat([absent + 8 * (present - absent), variance], dim=1)

    def larger(x: Any, t: Any, ends: bool) -> Any:
        return (last if ends else first)(torch.cat([x, low], dim=1), t).sample

    with torch.no_grad():
        white = walk(pipeline.prior_scheduler, stage_keys(stage_keys(keys, PRIOR), 0), (24,), FEW, embedding)
        start = white if given is None else torch.from_numpy(given.prior).to(dtype)
        told, time = projections(
            image_embeddings=prior.post_process_latents(start), prompt_embeds=embeds,
            text_encoder_hidden_states=states, do_classifier_free_guidance=True,
        )  # fmt: skip
        padded = torch.nn.functional.pad(mask, (projections.clip_extra_context_tokens, 0), value=True)
        side = decoder.config.sample_size
        small = walk(pipeline.decoder_scheduler, stage_keys(keys, DECODER), (side, side, 3), FEW, picture).clamp(-1, 1)
        start = small if given is None else torch.from_numpy(given.decoder).to(dtype)
        # Torch has this in float32 alone on a CPU.
        low = torch.nn.functional.interpolate(start.float(), size=[large] * 2, mode="bicubic", antialias=True).to(dtype)
        own = stage_keys(keys, UPSAMPLER + large)
        x = walk(pipeline.super_res_scheduler, own, (large, large, 3), UPSAMPLER_STEPS, larger).clamp(-1, 1)
    return Stages(*(part.float().numpy() for part in (white, small, x)))


def shaken(cascade: Cascade, pipeline: Any, torch: Any, seed: int) -> tuple[Cascade, Any]:
    """Another cascade of the same shapes, for both sides; the pipeline given stays as it is."""
    other, random = copy.copy(pipeline), torch.Generator().manual_seed(seed)
    for name in PARTS:
        setattr(other, name, copy.deepcopy(getattr(pipeline, name)))
        for key, tensor in getattr(other, name).named_parameters():
            if not key.startswith("clip_"):
                tensor.data *= 1 + 0.2 * torch.randn(tensor.shape, generator=random)
    prior, decoder, (last,) = cascade.prior, cascade.decoder, cascade.upsamplers
    assert prior is not None
    unet, context = karlo_names.decoder_entries(decoder.config.network)  # type: ignore[arg-type]
    enlarging = karlo_names.upsampler_entries(last.config.network)  # type: ignore[arg-type]

    def filled(entries: Any, name: str, params: Any) -> Any:
        tensors = {key: tensor.detach().numpy() for key, tensor in getattr(other, name).state_dict().items()}
        source = TensorSource(Path(name), tensors)
        return load_params(entries, source, params, ignore=("clip_mean", "clip_std"))

    two = {}
    for name, part in (("unet", "super_res_first"), ("unet_last", "super_res_last")):
        moved = [entry._replace(ours=(name, *entry.ours[1:])) for entry in enlarging]
        two |= filled(moved, part, {name: last.params[name]})
    rest = {name: leaf for name, leaf in decoder.params.items() if name != "unet"}
    both = filled(unet, "decoder", {"unet": decoder.params["unet"]}) | filled(context, "text_proj", rest)
    entries = karlo_names.prior_entries(prior.config.network)  # type: ignore[arg-type]
    return cascade._replace(
        prior=prior._replace(params=filled(entries, "prior", prior.params)),
        decoder=decoder._replace(params=both),
        upsamplers=(last._replace(params=two),),
    ), other


def test_stages_in_bfloat16_are_as_near_to_float32_as_those_of_diffusers(cascade, tiny_karlo, noise):
    """Over several networks; both sides go on from what float32 made of the stage before. Run with -s for the table."""
    torch, text, null = noise.torch, encode_prompts(cascade, PROMPTS), encode_prompts(cascade, [""])
    squares: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for seed in (0, 100, 200):
        keys, (own, pipeline) = picture_keys(seed, len(PROMPTS)), shaken(cascade, tiny_karlo.text_pipeline, torch, seed)
        theirs = their_stages(noise, pipeline, torch.float32, keys, None)
        ours = our_stages(own, keys, text, null, theirs)
        assert all(np.abs(a - b).max() < 0.01 * b.std() for a, b in zip(ours, theirs, strict=True))
        half = own.change(lambda network: in_dtype(network, "bfloat16"))
        half = half.change(lambda network: network._replace(params=on_device(network.params)))
        found = our_stages(half, keys, text, null, theirs)
        squares["ours"].append([np.square(a - b).mean() / b.var() for a, b in zip(found, ours, strict=True)])
        found = their_stages(noise, pipeline, torch.bfloat16, keys, theirs)
        squares["theirs"].append([np.square(a - b).mean() / b.var() for a, b in zip(found, theirs, strict=True)])
    distances = {side: np.sqrt(np.mean(rows, axis=0)) for side, rows in squares.items()}
    print("\n| bfloat16, RMS distance to float32 over its spread | ours | diffusers' | ratio |\n|---|---|---|---|")
    for stage, one, other in zip(Stages._fields, *distances.values(), strict=True):
        print(f"| {stage} | {one:.4f} | {other:.4f} | {one / other:.2f} |")
    assert (distances["ours"] <= 1.5 * distances["theirs"]).all()
    assert (distances["ours"] > 0).all() and (distances["theirs"] < 0.2).all()
