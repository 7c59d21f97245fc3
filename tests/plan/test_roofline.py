"""The roofline's arithmetic against figures worked out elsewhere, and the collectives' way over a torus."""

import pytest

from unclip_jax.config import (
    ClipConfig,
    DecoderConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.plan.dump import Collective
from unclip_jax.plan.roofline import OVERLAP, Block, block_of, efficiency, roofline, transfer_seconds
from unclip_jax.plan.scaling import STRATEGIES, Step, kept_wires, scaling, step_of, wire_bytes
from unclip_jax.plan.slices import GENERATIONS, GIB, parse_slice

# The paper's decoder at batch 2048, TFLOP of a forward pass per picture, and the efficiencies of its blocks.
BATCH = 2048
CONV, TEXT, ATTENTION = Block("convolutions", 512, 64), Block("transformers", 2048, 256), Block("attention", 1024, 32)
FORWARD = {CONV: 1.37e12, TEXT: 0.63e12, ATTENTION: 0.22e12}
STATE = 3.33 * GIB  # per chip: parameters, average and moments over 16 chips
FLASH, EINSUM = 0.33, 0.18
REMAT, KEPT = 29.9e9, 22.7e9  # bytes on a chip's wire: gathered weights (twice, once), reduced gradients


def decoder(name, passes, attention, wire):
    place = parse_slice(name)
    transfer = wire / (4 * place.generation.link)
    table = {str(CONV): 0.92, str(TEXT): 0.85, str(ATTENTION): attention}
    return roofline(
        {block: passes * BATCH * flops for block, flops in FORWARD.items()},
        3 * BATCH * sum(FORWARD.values()), table, place, BATCH,
        state_bytes=STATE, interconnect=transfer, hidden=transfer * (place.generation.name == "v5e"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "passes", "attention", "wire", "milliseconds", "share", "images"),
    [
        ("v5p-128", 4, FLASH, REMAT, 894, 52, 2291),
        ("v5p-128", 4, EINSUM, REMAT, 1049, 44, 1953),
        ("v5p-128", 3, FLASH, KEPT, 672, 69, 3047),
        ("v4-256", 4, FLASH, REMAT, 847, 46, 2418),
        ("v5e-256", 4, FLASH, REMAT, 481, 56, 4262),
        ("v5e-64", 4, FLASH, REMAT, 1893, 57, 1082),
    ],
)
def test_the_decoders_step_takes_what_it_was_worked_out_to(name, passes, attention, wire, milliseconds, share, images):
    found = decoder(name, passes, attention, wire)
    assert 1e3 * found.step == pytest.approx(milliseconds, rel=0.006)
    assert 100 * found.share == pytest.approx(share, abs=0.7)
    assert found.images_per_second == pytest.approx(images, rel=0.006)
    assert found.assumed == 0


def test_asynchronous_transfers_hide_behind_most_of_the_computing_time():
    place = parse_slice("v5p-128")

    def exposed(interconnect, hidden):
        work = {CONV: 64 * place.generation.peak}  # a second at peak
        line = roofline(work, 1.0, {str(CONV): 1.0}, place, 1, interconnect=interconnect, hidden=hidden)
        assert line.step == pytest.approx(1.0 + line.parts["interconnect"])
        return line.parts["interconnect"]

    assert exposed(0.3, 0.0) == pytest.approx(0.3) and exposed(0.3, 0.2) == pytest.approx(0.1)
    assert exposed(1.0, 1.0) == pytest.approx(1.0 - OVERLAP)


def test_a_collective_is_as_fast_as_the_torus_axes_that_its_group_spans():
    place = parse_slice("v5p-128")
    places = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    link = place.generation.link

    def seconds(group, kind="all-gather", slices=(0,) * 64):
        return transfer_seconds([Collective(kind, len(group), 1, 1e9, tuple(group))], place, places, slices)

    ring, plane, part = range(4), range(16), range(2)
    assert seconds(ring) == pytest.approx(0.75e9 / (2 * link))
    assert seconds(plane) == pytest.approx(15 / 16 * 1e9 / (4 * link))
    assert seconds(part) == pytest.approx(0.5e9 / link)
    assert seconds(plane, "all-reduce") == pytest.approx(2 * seconds(plane))
    across = [0] * 32 + [1] * 32
    assert seconds((0, 63), slices=across) == pytest.approx(0.5e9 / place.generation.network)


UNET = UNetConfig(channels=64, multipliers=(1, 2), attention_factors=(2,), context_dim=8, middle_attention=True)
DECODER = TrainConfig("d", DecoderConfig(UNET, text_encoder=TransformerConfig(96, 2, 2), context_length=16))


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("Decoder/unet/stem", Block("convolutions", 64, 64)),
        ("Decoder/unet/down_0_1/conv_0", Block("convolutions", 64, 64)),
        ("Decoder/unet/up_1_attention_0/query", Block("attention", 128, 32)),
        ("Decoder/unet/middle_1/conv_0", Block("convolutions", 128, 32)),
        ("Decoder/text_encoder/transformer/block_1/mlp_in", Block("transformers", 96, 16)),
        ("Clip.encode_text/text_transformer/block_0/query", Block("transformers", 768, 77)),
    ],
)
def test_module_paths_lead_to_blocks(path, block):
    assert block_of(path, DECODER, ClipConfig(), "train") == block


def test_upsamplers_train_on_crops_and_sample_whole():
    config = TrainConfig("u", UpsamplerConfig(UNetConfig(in_channels=6, channels=64, multipliers=(1, 2))))
    sizes = [block_of("Upsampler/unet/down_1_0", config, None, what).size for what in ("train", "sample")]
    assert sizes == [32, 128]


def test_what_was_not_compiled_is_assumed_and_loses_its_empty_lanes():
    full, padded = Block("convolutions", 256, 8), Block("convolutions", 192, 8)
    assert efficiency({str(full): 0.8}, full) == (0.8, False)
    assert efficiency({}, padded)[0] == pytest.approx(0.75 * efficiency({}, full)[0])
    assert efficiency({}, padded)[1]
    far = {str(Block("convolutions", 512, 64)): 0.5, str(Block("attention", 256, 8)): 0.1}
    assert efficiency({str(full): 0.8, **far}, padded) == (pytest.approx(0.6), True)  # like the nearest of its kind
    assert efficiency(far, Block("convolutions", 1024, 64)) == (0.5, True)


def test_each_strategy_stops_paying_and_copies_of_slices_go_furthest():
    step = Step(3.563e9, BATCH, 3 * BATCH * 2.22e12, summed=2e7, halo=3e6, told=1e7)
    rows = scaling(step, GENERATIONS["v5p"])
    last = {s: max((r.chips for r in rows if r.strategy == s and r.pays), default=0) for s in STRATEGIES}
    assert 0 < last["fsdp"] <= last["dp"]
    wire = {r.strategy: r.wire for r in rows if r.chips == 64}
    assert wire["dp"] < wire["hsdp"] < wire["fsdp"] * 1.1
    # 4,096 chips have no picture each, unless eight of them share one.
    assert {r.strategy: r.possible for r in rows if r.chips == 4096} == {
        "dp": False, "fsdp": False, "hsdp": False, "tp": True, "spatial": True,
    }  # fmt: skip


def test_what_splitting_a_picture_costs_is_read_off_the_network():
    unet = UNetConfig(out_channels=3, in_channels=6, channels=32, multipliers=(1,), depth=1, attention_factors=())
    config = TrainConfig("upsampler", UpsamplerConfig(unet, low_size=4, size=16))
    step = step_of(config)
    # Training crops are 4 px wide; one residual block down, two in the middle and two up end in a sum of 32 channels.
    assert step.summed == 5 * 32 * 4 * 4
    # Two rows of each 3 x 3 convolution: stem, two per block (those that go up take a skip along), and out.
    assert step.halo == 2 * 4 * (6 + (3 * 2 + 2 * 3 + 1) * 32) and step.told == 0
    assert wire_bytes("dp", step, 8) == pytest.approx(2 * 7 / 8 * 2 * step.parameters)


def test_kept_plans_send_what_their_strategy_is_to_send():
    found = kept_wires("dalle2_decoder", "v5p")
    step = Step(3.563e9, BATCH, 3 * BATCH * 2.22e12, summed=2e7, halo=3e6, told=1e7)
    assert ("dp", 64) in found and sum(strategy == "hsdp" for strategy, _ in found) > 4
    for (strategy, chips), wire in found.items():
        assert 0.95 < wire / wire_bytes(strategy, step, chips) < 1.15
