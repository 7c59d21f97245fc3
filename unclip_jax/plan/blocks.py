"""Block efficiencies: each distinct block compiled to the end for one chip, and the compiler's own cycles summed.

`python -m unclip_jax.plan.blocks [CONFIG ...] [--tpu v4,v5e,v5p,v6e]` adds what is missing to efficiencies.json, which
ships beside this file: forward and backward pass, bf16, as share of the chip's peak. A minute or so each; stop it and
start it again as you like.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    PriorConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.models.unet import level_widths
from unclip_jax.overrides import available_configs, load_config
from unclip_jax.plan.dump import cycles
from unclip_jax.plan.kernels import asking, read_bundles
from unclip_jax.plan.roofline import Block
from unclip_jax.plan.slices import GENERATIONS, Slice
from unclip_jax.plan.worker import TPU_ENVIRONMENT

TABLE = Path(__file__).with_name("efficiencies.json")
PIXELS = 16 * 64 * 64  # per chip, of a residual block: a batch of 16 at 64 px, and of 8 above
TOKENS = 8 * 1024  # per chip, of a transformer's or an attention block


def known(generation: str) -> dict[str, float]:
    """The efficiencies of a generation's blocks by `str(Block)`."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(generation, {}) if TABLE.exists() else {}


def distinct(config: TrainConfig) -> list[Block]:
    """The distinct blocks of a config's training step, one per kind, width and size."""
    network = config.network
    match network:
        case ClipConfig(vision=vision, text=text):
            patches = (network.image_size // network.patch_size) ** 2 + 1
            return [
                Block("transformers", vision.width, patches),
                Block("transformers", text.width, network.context_length),
            ]
        case PriorConfig(transformer=part, context_length=n):
            return [Block("transformers", part.width, n + 4)]
        case ArPriorConfig(transformer=part, context_length=n, components=k):
            return [Block("transformers", part.width, n + 1 + k)]
    unet, side = network.unet, config.data.crop or config.data.size
    side = int(network.size * network.crop_fraction) if isinstance(network, UpsamplerConfig) else side
    blocks = []
    for level, width in enumerate(level_widths(unet)):
        blocks.append(Block("convolutions", width, side // unet.patch // 2**level))
        if 2**level in unet.attention_factors:
            blocks.append(Block("attention", width, side // unet.patch // 2**level))
    if network.text_encoder is not None:
        blocks.append(Block("transformers", network.text_encoder.width, network.context_length))
    return blocks


def build_block(block: Block, config: TrainConfig) -> tuple[Any, tuple[Any, ...]]:
    """A block's forward and backward pass, and the shapes of its parameters and inputs, bf16."""
    import jax
    import jax.numpy as jnp

    from unclip_jax.models.transformer import Block as TransformerBlock
    from unclip_jax.models.unet_blocks import AttentionBlock, ResBlock

    def shape(*sides: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sides, dtype)

    side, width, network = block.size, block.width, config.network
    unet = network.unet if isinstance(network, DecoderConfig | UpsamplerConfig) else UNetConfig()
    norm: dict[str, Any] = {"groups": unet.groups, "epsilon": unet.norm_epsilon, "dtype": "bfloat16"}
    match block.kind:
        case "convolutions":
            rows = max(8, PIXELS // side**2 if side >= 32 else 64)
            module: Any = ResBlock(width, scale_shift=unet.scale_shift, **norm)
            inputs = (shape(rows, side, side, width), shape(rows, unet.embedding_dim))
        case "attention":
            rows = max(8, TOKENS // side**2)
            told = network.context_length + network.extra_tokens if isinstance(network, DecoderConfig) else 0
            module = AttentionBlock(head_channels=unet.head_channels, **norm)
            context = shape(rows, told, unet.context_dim or 0), shape(rows, 1, 1, told + side**2, dtype=jnp.int32)
            inputs = (shape(rows, side, side, width), *(context if told else ()))
        case _:
            part = _transformer(network, width)
            module, rows = TransformerBlock(part), max(8, TOKENS // side)
            inputs = (shape(rows, side, width), shape(rows, 1, 1, side, dtype=jnp.bool_))
    params = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), *inputs)
    params = jax.tree.map(lambda x: shape(*x.shape), params)

    def both(params: Any, cotangent: Any, x: Any, *rest: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            y = module.apply(params, x, *rest)
            return y[0] if isinstance(y, tuple) else y

        return jax.vjp(forward, params, x)[1](cotangent)

    return both, (params, inputs[0], *inputs)


def _transformer(network: Any, width: int) -> TransformerConfig:
    from dataclasses import replace

    match network:
        case ClipConfig():
            part = network.vision if network.vision.width == width else network.text
        case PriorConfig() | ArPriorConfig():
            part = network.transformer
        case _:
            part = network.text_encoder
    return replace(part, dtype="bfloat16")


def compile_block(block: Block, config: TrainConfig, generation: str, folder: Path) -> float:
    """The share of one chip's peak at which a block runs, by the compiler's cycles.

    To be run in a child process, with `kernels.asking(folder)` in its environment.
    """
    import jax
    from jax.experimental import topologies

    from unclip_jax import sharding
    from unclip_jax.plan import flops

    chip = GENERATIONS[generation]
    devices = topologies.get_topology_desc(**Slice(chip, chip.sides[0]).request()).devices
    mesh = sharding.make_mesh("dp", devices)
    function, arguments = build_block(block, config)
    place = sharding.replicated(mesh)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with sharding.on(mesh):
        traced = jax.jit(function).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    with next(folder.glob("*after_codegen.txt")).open() as lines:
        seconds = cycles(lines, read_bundles(folder)) / chip.clock
    return flops.count(traced.jaxpr).total / seconds / chip.peak


def main(arguments: list[str] | None = None) -> None:
    """Fills the table; see the module."""
    parser = argparse.ArgumentParser("python -m unclip_jax.plan.blocks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="*", help="names (default: every dalle2 and karlo config)")
    parser.add_argument("--tpu", default=",".join(GENERATIONS), help="generations, separated by commas")
    parser.add_argument("--one", nargs=2, metavar=("BLOCK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        kind, width, size = options.one[0].split()
        share = compile_block(
            Block(kind, int(width), int(size)), load_config(options.configs[0]), options.tpu, Path(options.one[1])
        )
        (Path(options.one[1]) / "share").write_text(str(share))
        return
    names = options.configs or [name for name in available_configs() if name.startswith(("dalle2", "karlo"))]
    for name in names:
        for block in distinct(load_config(name)):
            for generation in options.tpu.split(","):
                if str(block) not in known(generation):
                    _add(name, block, generation)


def _add(name: str, block: Block, generation: str) -> None:
    with tempfile.TemporaryDirectory(prefix="unclip-block-") as folder:
        command = [
            sys.executable,
            "-m",
            "unclip_jax.plan.blocks",
            name,
            "--tpu",
            generation,
            "--one",
            str(block),
            folder,
        ]
        environment = {**os.environ, **TPU_ENVIRONMENT, "LIBTPU_INIT_ARGS": asking(Path(folder))}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            print(f"{generation} {block}: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return
        share = float((Path(folder) / "share").read_text())
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table.setdefault(generation, {})[str(block)] = round(share, 3)
    part = TABLE.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(TABLE)
    print(f"{generation} {block}: {100 * share:.0f}% of peak", flush=True)


if __name__ == "__main__":
    main()
