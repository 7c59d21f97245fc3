from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.interop.karlo import decoder_config, prior_config, upsampler_config
from unclip_jax.interop.karlo_names import decoder_entries, prior_entries, upsampler_entries, whitening_entries
from unclip_jax.interop.names import Entry, export
from unclip_jax.models.decoder import Decoder, init_decoder
from unclip_jax.models.prior import Prior, Whitening
from unclip_jax.models.upsampler import Upsampler, init_upsampler, resize_low

TOLERANCE = 1e-4
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def torch_layout(x) -> np.ndarray:
    return np.array(np.moveaxis(np.asarray(x), -1, 1), order="C")


def comes_back(entries: list[Entry], params: Any, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether parameters export to the very tensors that they were filled from."""
    exported = export(entries, params)
    return exported.keys() == tensors.keys() and all(np.array_equal(exported[name], tensors[name]) for name in tensors)


def masks(length: int) -> jax.Array:
    """An empty caption, one with padding and one without."""
    return jnp.arange(length) < jnp.array([2, length // 2 + 1, length])[:, None]


PRIORS = {
    "two_heads": {},
    "three_heads": {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 20},
    "wide": {"num_attention_heads": 4, "num_layers": 3, "num_embeddings": 6},
}


@pytest.mark.parametrize("changes", PRIORS.values(), ids=PRIORS)
def test_prior_is_that_of_diffusers(oracle, fill, changes):
    theirs = oracle.prior(**changes)
    config, tensors = prior_config(theirs.config), oracle.tensors(theirs)
    n, z = config.context_length, config.embedding_dim
    given = {"x": normal(3, z), "t": jnp.array([999, 500, 0]), "text_states": normal(3, n, z), "text_mask": masks(n)}
    given["text_embedding"] = normal(3, z)
    shapes = jax.eval_shape(partial(Prior(config).init, **given), jax.random.key(0))["params"]
    statistics = {entry.theirs: tensors.pop(entry.theirs) for entry in whitening_entries(config)}
    params = fill(prior_entries(config), tensors, shapes)
    assert comes_back(prior_entries(config), params, tensors)

    ours = jax.jit(Prior(config).apply)({"params": params}, **given)
    wanted = oracle.call(
        theirs,
        hidden_states=given["x"],
        timestep=given["t"],
        proj_embedding=given["text_embedding"],
        encoder_hidden_states=given["text_states"],
        attention_mask=given["text_mask"],
    )
    assert np.abs(ours - wanted).max() < TOLERANCE
    assert np.abs(wanted).max() > 0.3

    shape = {"whitening": Whitening(*[jax.ShapeDtypeStruct((z,), jnp.float32)] * 2)._asdict()}
    whitening = Whitening(**fill(whitening_entries(config), statistics, shape)["whitening"])
    restored = theirs.post_process_latents(oracle.torch.from_numpy(wanted)).detach().numpy()
    assert np.abs(whitening.restore(jnp.asarray(wanted)) - restored).max() < 1e-6


DECODERS = {
    "two_levels": ({}, {}, 11),
    "three_levels": (
        {"widths": (32, 48, 64), "attends": (False, True, True), "layers_per_block": 2, "cross_attention_dim": 40},
        {"cross_attention_dim": 40, "clip_extra_context_tokens": 3},
        7,
    ),
    "attention_everywhere": (
        {"widths": (64, 32), "attends": (True, True), "attention_head_dim": 8, "resnet_time_scale_shift": "default"},
        {"time_embed_dim": 256, "clip_embeddings_dim": 20},
        5,
    ),
}


@pytest.mark.parametrize(("changes", "projection_changes", "n"), DECODERS.values(), ids=DECODERS)
def test_decoder_is_that_of_diffusers(oracle, fill, changes, projection_changes, n):
    unet, projections = oracle.decoder(**changes), oracle.projections(**projection_changes)
    config = decoder_config(unet.config, projections.config, context_length=n)
    module, (of_unet, of_projections) = Decoder(config), decoder_entries(config)
    shapes = jax.eval_shape(partial(init_decoder, module), jax.random.key(0))
    tensors = oracle.tensors(unet) | oracle.tensors(projections)
    variables = {"params": fill([*of_unet, *of_projections], tensors, shapes)}
    assert comes_back([*of_unet, *of_projections], variables["params"], tensors)

    # Two prompts beside their unconditional halves, which see the null embedding and the empty caption's states.
    z, side = config.image_embedding_dim, config.size
    image, text, states, mask = normal(2, z), normal(4, z), normal(4, n, z), masks(n)[jnp.array([0, 0, 1, 2])]
    keep = jnp.array([False, False, True, True])
    conditioned = jax.jit(partial(module.apply, method="condition"))
    condition = conditioned(variables, jnp.concatenate([image, image]), states, mask, text, keep, jnp.ones(4, bool))
    context, embedding = oracle.call(
        projections,
        image_embeddings=image,
        prompt_embeds=text,
        text_encoder_hidden_states=states,
        do_classifier_free_guidance=True,
    )
    assert np.abs(condition.context - context).max() < TOLERANCE
    assert np.abs(condition.embedding - embedding).max() < TOLERANCE

    x, t = normal(4, side, side, 3), jnp.array([999, 0, 500, 42])
    visible = jnp.concatenate([jnp.ones((4, config.extra_tokens), bool), mask], axis=1)
    assert np.array_equal(condition.mask, visible)
    taught = condition._replace(context=jnp.asarray(context), embedding=jnp.asarray(embedding))
    ours = jax.jit(module.apply)(variables, x, t, taught)
    wanted = oracle.call(
        unet,
        sample=torch_layout(x),
        timestep=t,
        encoder_hidden_states=context,
        class_labels=embedding,
        attention_mask=visible,
    )
    assert np.abs(torch_layout(ours) - wanted).max() < TOLERANCE
    assert np.abs(wanted).max() > 0.3


UPSAMPLERS = {
    "two_levels": {},
    "three_levels": {"widths": (32, 40, 72), "layers_per_block": 2, "norm_eps": 1e-6},
    "one_level": {"widths": (48,), "resnet_time_scale_shift": "scale_shift", "out_channels": 6},
}


@pytest.mark.parametrize("changes", UPSAMPLERS.values(), ids=UPSAMPLERS)
def test_upsampler_is_that_of_diffusers(oracle, fill, changes):
    theirs = oracle.upsampler(**changes)
    config = upsampler_config(theirs.config, low_size=4)
    module = Upsampler(config)
    shapes = jax.eval_shape(partial(init_upsampler, module), jax.random.key(0))
    params = fill(upsampler_entries(config), oracle.tensors(theirs), shapes)
    assert comes_back(upsampler_entries(config), params, oracle.tensors(theirs))
    x, t, low = normal(2, 16, 16, 3), jnp.array([999, 166]), normal(2, 4, 4, 3)

    resized = resize_low(low, 16)
    interpolate = partial(oracle.torch.nn.functional.interpolate, size=(16, 16), mode="bicubic", antialias=True)
    bicubic = interpolate(oracle.torch.from_numpy(torch_layout(low))).numpy()
    assert np.abs(torch_layout(resized) - bicubic).max() < 2e-6

    ours = jax.jit(module.apply)({"params": params}, x, t, resized)
    wanted = oracle.call(theirs, sample=np.concatenate([torch_layout(x), bicubic], axis=1), timestep=t)
    assert np.abs(torch_layout(ours) - wanted).max() < TOLERANCE
    assert np.abs(wanted).max() > 0.3
