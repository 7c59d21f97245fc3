"""The real step of every network traces from shapes alone, and costs what its loop and its three passes cost."""

from collections import Counter
from dataclasses import replace

import jax
import pytest

from unclip_jax import config as c
from unclip_jax import sharding
from unclip_jax.overrides import load_config
from unclip_jax.plan.flops import count
from unclip_jax.plan.steps import build_step, frozen_clip
from unclip_jax.plan.worker import _taken

TOWER = c.TransformerConfig(width=16, layers=1, heads=2, causal=True)
CLIP = c.ClipConfig(16, 32, 16, TOWER, TOWER, vocab_size=50, context_length=12)
UNET = c.UNetConfig(channels=8, multipliers=(1, 2), depth=1, groups=4, head_channels=8, attention_factors=(2,))
OWN_TEXT = {"text_encoder": TOWER, "vocab_size": 50, "learned_null_text": True}
DECODER = c.DecoderConfig(
    replace(UNET, out_channels=6, context_dim=16, middle_attention=True),
    size=16, image_embedding_dim=16, text_dim=16, context_length=12,
)  # fmt: skip
NETWORKS = {
    "clip": CLIP,
    "prior": c.PriorConfig(16, 16, 12, TOWER),
    "ar_prior": c.ArPriorConfig(16, 16, 12, 4, 8, 4, TOWER),
    "decoder": replace(DECODER, empty_null_text=True),
    "own_text": replace(DECODER, **OWN_TEXT),
    "upsampler": c.UpsamplerConfig(replace(UNET, in_channels=6, out_channels=6, attention_factors=()), 16, 64),
}
STEPS = 3


def traced(name, what, rows=4):
    network = NETWORKS[name]
    config = c.TrainConfig(
        name, network, c.DiffusionConfig(learned_variance=name in ("decoder", "own_text", "upsampler")),
        c.SampleConfig(steps=STEPS, guidance=2.0), c.DataConfig(size=16, context_length=12),
    )  # fmt: skip
    if name == "upsampler":
        config = replace(config, data=replace(config.data, size=64, crop=16))
    clip = None if isinstance(network, c.ClipConfig | c.UpsamplerConfig) else CLIP
    mesh = sharding.make_mesh("dp", jax.devices()[:1])
    with sharding.on(mesh):
        step = build_step(config, clip, what, rows, mesh)
        return step, count(step.function.trace(*step.arguments).jaxpr, step.trips)


def test_a_training_step_traces_with_everything_that_it_reads():
    step, work = traced("own_text", "train")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.arguments[0].params))
    assert step.parameters == parameters and step.images == 4
    assert work.total > 3 * 2 * parameters  # of one row at least, both ways
    assert not sum(work.again.values())
    names = Counter(name for name, _ in _taken(step.arguments, step.function.trace(*step.arguments).jaxpr))
    leaves = len(jax.tree.leaves(step.arguments[0].params))
    # Moments and their count, the schedule's; of the frozen CLIP, which made the stored embeddings, nothing is read.
    assert names["params"] == names["ema"] == leaves and names["opt_state"] == 2 * leaves + 2
    assert names["batch"] and "context" not in names


@pytest.mark.parametrize("name", NETWORKS)
def test_samplers_trace_and_multiply_their_steps(name):
    step, work = traced(name, "sample")
    assert step.images == 4 and work.total > 0
    if step.trips > 1:
        once = count(step.function.trace(*step.arguments).jaxpr, 1).total
        assert STEPS * 0.6 < work.total / once <= STEPS


def test_a_network_finds_the_clip_of_its_family():
    assert frozen_clip(load_config("dalle2_decoder")) == load_config("dalle2_clip").network
    assert frozen_clip(load_config("dalle2_up256")) is None
    with pytest.raises(ValueError, match="--clip"):
        frozen_clip(replace(load_config("dalle2_decoder"), name="mine_decoder"))
