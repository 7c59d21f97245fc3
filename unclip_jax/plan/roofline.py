"""How long a step takes at least: computing at each block's efficiency, updating, and what the interconnect adds.

    convolutions, transformers, attention   FLOPs (recomputed ones too) / (chips x peak x efficiency of the block)
    optimiser                               2.25 x bytes of the state / HBM bandwidth: read and write it, read gradients
    interconnect                            bytes on the wire / bandwidth of the torus axes of the group, less what
                                            asynchronous ones move in OVERLAP of the computing time

Sums, not a simulation: host, input, pipeline bubbles and the order of operations are left out. No TPU was asked.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    PriorConfig,
    TrainConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.models.unet import level_widths
from unclip_jax.plan.dump import Collective
from unclip_jax.plan.slices import Slice

# Where no block of a kind was compiled, as for GPUs: what the compiler's cycles give for typical ones on v5p.
ASSUMED = {"convolutions": 0.85, "transformers": 0.65, "attention": 0.4}
UPDATE = 2.25  # times the bytes of the state go between chip and HBM in an update
OVERLAP = 0.7  # share of the computing time in which asynchronous collectives find something to hide behind
SECONDS_PER_DAY = 86400.0


class Block(NamedTuple):
    """What decides how fast a block runs: its kind, channels, and side of the picture or length of the sequence."""

    kind: str
    width: int
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.width} {self.size}"


class Roofline(NamedTuple):
    """Seconds of one step, whose parts add up to `step`.

    assumed: share of the FLOPs whose block's efficiency was not compiled.
    at_peak: computing alone, at the peak of the chips. traffic: HBM bytes of the program / bandwidth, at most.
    interconnect: all of it, hidden or not. hidden: of it, asynchronous. share: model FLOPs per second / peak.
    """

    parts: dict[str, float]
    step: float
    at_peak: float
    traffic: float
    interconnect: float
    hidden: float
    images_per_second: float
    share: float
    assumed: float


def block_of(path: str, config: TrainConfig, clip: ClipConfig | None, what: str) -> Block:
    """The block that a module path belongs to."""
    network = config.network
    match network:
        case ClipConfig():
            clip = network
        case UpsamplerConfig(unet=unet) | DecoderConfig(unet=unet) if "unet" in path:
            return _unet_block(path, unet, _side(config, what))
    if clip is not None and "image_transformer" in path:
        return Block("transformers", clip.vision.width, (clip.image_size // clip.patch_size) ** 2 + 1)
    if clip is not None and "text_transformer" in path:
        return Block("transformers", clip.text.width, clip.context_length)
    match network:
        case PriorConfig(transformer=part, context_length=n):
            return Block("transformers", part.width, n + 4)
        case ArPriorConfig(transformer=part, context_length=n, components=k):
            return Block("transformers", part.width, n + 1 + k)
        case UpsamplerConfig() | DecoderConfig() if network.text_encoder is not None:
            return Block("transformers", network.text_encoder.width, network.context_length)
    return Block("transformers", 0, 0)


def _side(config: TrainConfig, what: str) -> int:
    match config.network:
        case UpsamplerConfig(size=size, crop_fraction=share):
            return (config.data.crop or int(size * share)) if what == "train" else size
        case DecoderConfig(size=size):
            return size
    return 0


def _unet_block(path: str, unet: UNetConfig, side: int) -> Block:
    widths, side = level_widths(unet), side // unet.patch
    level = re.search(r"(?:down|up)_(\d+)_", path)
    at = int(level[1]) if level else len(widths) - 1 if "middle" in path else 0
    kind = "attention" if re.search(r"_attention", path) else "convolutions"
    return Block(kind, widths[at], side // 2**at)


def by_block(flops: Mapping[str, float], config: TrainConfig, clip: ClipConfig | None, what: str) -> dict[Block, float]:
    """FLOPs of every distinct block."""
    total: dict[Block, float] = defaultdict(float)
    for path, value in flops.items():
        total[block_of(path, config, clip, what)] += value
    return dict(total)


def efficiency(table: Mapping[str, float], block: Block) -> tuple[float, bool]:
    """Share of the peak at which a block runs, and whether it is assumed: to be that of the nearest compiled block.

    The nearest in width and size on a logarithmic scale, where convolutions lose what fills no lanes of 128.
    """
    if str(block) in table:
        return table[str(block)], False
    alike = [Block(kind, int(width), int(size)) for kind, width, size in map(str.split, table) if kind == block.kind]
    if not alike:
        return ASSUMED[block.kind] * _filled(block), True

    def distance(other: Block) -> float:
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(block[1:], other[1:], strict=True))

    near = min(alike, key=distance)
    return min(1.0, table[str(near)] / _filled(near) * _filled(block)), True


def _filled(block: Block) -> float:
    """The share of lanes that a block's channels fill."""
    lanes = 128 * -(-block.width // 128)
    return block.width / lanes if block.kind == "convolutions" and lanes else 1.0


def combine(
    seconds: Mapping[str, float], update: float, waiting: float, hidden: float, weights: float = 0.0
) -> dict[str, float]:
    """The parts of a step: computing by kind, waiting for weights if that takes longer, update, and transfers."""
    computing = sum(seconds.values())
    parts = {**seconds, "optimiser": update, "interconnect": waiting + max(0.0, hidden - OVERLAP * computing)}
    if weights > computing:
        parts["waiting for weights"] = weights - computing
    return parts


def roofline(
    compute: Mapping[Block, float],
    model_flops: float,
    table: Mapping[str, float],
    place: Slice,
    images: int,
    *,
    state_bytes: float = 0.0,
    weight_bytes: float = 0.0,
    interconnect: float = 0.0,
    hidden: float = 0.0,
    traffic: float = 0.0,
    passes: int = 1,
) -> Roofline:
    """The roofline of one step.

    compute: FLOPs of every block, recomputed ones included, over all chips. state_bytes: per chip, of a training state
    (0 in sampling). weight_bytes: per chip, of all passes through the weights. interconnect: seconds, of which hidden
    are asynchronous. traffic: bytes. passes: bf16 products that a product takes: 6 in float32.
    """
    chip, peak = place.generation, place.chips * place.generation.peak
    seconds: dict[str, float] = defaultdict(float)
    assumed = 0.0
    for block, flops in compute.items():
        share, guess = efficiency(table, block)
        seconds[block.kind] += passes * flops / (peak * share)
        assumed += flops * guess
    update = UPDATE * state_bytes / chip.bandwidth
    parts = combine(seconds, update, interconnect - hidden, hidden, weight_bytes / chip.bandwidth)
    step, total = sum(parts.values()), sum(compute.values())
    return Roofline(
        parts, step, passes * total / peak, traffic / chip.bandwidth, interconnect, hidden,
        images / step, model_flops / step / peak, assumed / max(total, 1.0),
    )  # fmt: skip


def transfer_seconds(
    collectives: Iterable[Collective], place: Slice, places: Sequence[Sequence[int]], slices: Sequence[int]
) -> float:
    """Seconds that collectives take one after another; places, slices: of each device of the mesh, in its order."""
    return sum((one.wire / _bandwidth(one, place, places, slices) for one in collectives), 0.0)


def _bandwidth(one: Collective, place: Slice, places: Sequence[Sequence[int]], slices: Sequence[int]) -> float:
    """Bytes/s per chip: both directions of every axis that the group spans as a whole ring, one of a part of it."""
    chip = place.generation
    if len({slices[device] for device in one.first}) > 1:
        return chip.network
    total = 0.0
    for axis, side in enumerate(place.sides):
        spanned = len({places[device][axis] for device in one.first})
        if spanned > 1:
            whole = place.wraps(axis) and spanned == side and one.kind != "collective-permute"
            total += chip.link * (2 if whole else 1)
    return total or chip.link
