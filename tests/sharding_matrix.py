"""Every stage under every strategy on eight fake devices, against one device; a table, and JSON with --out.

    python tests/sharding_matrix.py --out matrix.json
    python tests/sharding_matrix.py --stages decoder --strategies fsdp tp

All tensors are away from zero, dropout and condition dropping are on, compute is float32. The figures are the largest
relative differences: of the loss, of a gradient to its leaf's largest entry, and of parameters after three SGD steps;
and the largest difference of a pixel of what prior, decoder and upsampler draw in turn.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from unclip_jax import sharding
from unclip_jax.config import (
    ArPriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionConfig,
    PriorConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_jax.generate import decode, upsample
from unclip_jax.inputs import Text, picture_keys, table_of
from unclip_jax.models.prior import Whitening
from unclip_jax.priors import sample_prior
from unclip_jax.sharding import as_state, make_mesh, on, place, put_batch, resolve, shard_state
from unclip_jax.stages import build
from unclip_jax.types import Batch

LIMITS = {"loss": 1e-6, "gradient": 1e-5, "parameters": 1e-5, "pixels": 1e-5}
SAMPLING = "sampling"
RATE = 0.02
ROWS, SIDE, WORDS = 8, 16, 8
# Compiling takes the time: what makes the program faster but not other is left out.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

TOWER = TransformerConfig(width=16, layers=1, heads=8, dropout=0.1)
CAUSAL = replace(TOWER, causal=True)
SCANNED = replace(CAUSAL, layers=2, scan=True)
CLIP = ClipConfig(16, SIDE, 8, TOWER, CAUSAL, vocab_size=24, context_length=WORDS)
UNET = UNetConfig(
    out_channels=6, channels=16, multipliers=(1, 2), depth=1, attention_factors=(2,), head_channels=4, context_dim=16,
    middle_attention=True, groups=4, dropout=0.1,
)  # fmt: skip
LEARNED = DiffusionConfig(learned_variance=True)
PLAIN = replace(UNET, in_channels=6, attention_factors=(), context_dim=None, middle_attention=False)
DECODER = DecoderConfig(
    UNET, size=SIDE, image_embedding_dim=16, text_dim=16, image_drop=0.3, learned_null_text=True, text_encoder=TOWER,
    vocab_size=24, context_length=WORDS,
)  # fmt: skip

STAGES = {
    "clip": TrainConfig("clip", CLIP),
    "prior": TrainConfig("prior", PriorConfig(16, 16, WORDS, SCANNED, text_drop=0.4), DiffusionConfig(prediction="x0")),
    "ar_prior": TrainConfig("ar_prior", ArPriorConfig(16, 16, WORDS, 7, 16, 8, CAUSAL, text_drop=0.4)),
    "decoder": TrainConfig("decoder", DECODER, LEARNED),
    "upsampler_256": TrainConfig("upsampler_256", UpsamplerConfig(PLAIN, low_size=4, size=SIDE), LEARNED),
    "upsampler_1024": TrainConfig(
        "upsampler_1024",
        UpsamplerConfig(replace(PLAIN, multipliers=(1, 1, 2), scale_shift=False), low_size=4, size=SIDE),
        replace(LEARNED, schedule="linear"),
    ),
}
STRATEGIES = (
    "dp", "fsdp", "tp", "hsdp", "spatial",
    "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2", "data=2,fsdp=2,spatial=2", "fsdp=2,tensor=2,spatial=2",
)  # fmt: skip


def random_tree(shapes: Any, seed: int) -> Any:
    """Leaves around 0, gains around 1, CLIP's temperature where it starts; kernels keep the size of what comes in.

    Were they small, all pictures would look alike, and CLIP's gradients be small differences of large sums.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: Any) -> np.ndarray:
        mean = {"scale": 1.0, "log_scale": 2.7}.get(path[-1].key, 0.0)
        size = 1.5 * np.prod(shape.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
        return np.asarray(mean + rng.normal(0, size, shape.shape), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_batch() -> Batch:
    """Pictures of different colours, captions of different words, one of them twice."""
    rng = np.random.default_rng(0)
    image = (rng.integers(0, 192, (ROWS, 2, 2, 3)).repeat(SIDE // 2, 1).repeat(SIDE // 2, 2)).astype(np.uint8)
    image += rng.integers(0, 64, image.shape, np.uint8)
    tokens = rng.integers(1, 20, (ROWS, WORDS)).astype(np.int32)
    tokens[:, 5], tokens[:, 6:] = 23, 0
    tokens[1] = tokens[0]  # the same caption twice
    return Batch(image, tokens, tokens > 0, image[:, ::4, ::4])  # type: ignore[arg-type]


def make_context() -> dict[str, Any]:
    """Frozen trees of any stage."""
    clip = random_tree(jax.eval_shape(build(STAGES["clip"]).init, jax.random.key(0)), 5)
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.normal(size=(16, 16)))[0][:, :7]
    low = np.full(7, -0.6)
    edges = np.linspace(-0.3, 0.3, 7)
    tables = {"mean": rng.normal(0, 0.1, 16), "components": basis, "low": low, "high": -low, "dot_edges": edges}
    empty = np.array([[21, 23, *[0] * (WORDS - 2)]], np.int32)
    return {
        "clip": clip,
        "whitening": {"mean": np.full(16, 0.1, np.float32), "std": np.full(16, 0.3, np.float32)},
        "quantiser": jax.tree.map(np.float32, tables) | {"buckets": np.int32(16)},
        "empty": {"tokens": empty, "mask": empty > 0},
    }


def shallow(config: TrainConfig) -> TrainConfig:
    """A U-Net of one level that attends in its middle alone, without learned variances or an own text encoder."""
    match config.network:
        case DecoderConfig(unet=unet) | UpsamplerConfig(unet=unet) as network:
            unet = replace(unet, out_channels=3, multipliers=(1,), attention_factors=(), channels=32)
            network = replace(network, unet=unet, text_encoder=None)
            return replace(config, network=network, diffusion=replace(config.diffusion, learned_variance=False))
    return config


def compiled(lowered: Any) -> Any:
    """A program, quickly compiled where jaxlib knows how."""
    try:
        return lowered.compile(compiler_options=QUICK)
    except jax.errors.JaxRuntimeError:
        return lowered.compile()


def three_steps(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[list[float], Any, Any, dict[str, Any]]:
    """Losses, first gradient and last parameters of a stage on a mesh, and what is to be told of the program."""
    stage = build(config, CLIP)
    context, batch = make_context(), put_batch(make_batch(), mesh)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    shardings = shard_state(shapes, mesh)
    params = jax.device_put(random_tree(shapes, 1), shardings)
    context = jax.device_put(context, shard_state(context, mesh, strict=False))

    def step(params: Any, context: Any, batch: Batch, key: jax.Array) -> Any:
        (loss, _), grads = jax.value_and_grad(stage.loss, has_aux=True)(params, context, batch, key)
        return loss, as_state(grads), as_state(jax.tree.map(lambda p, g: p - RATE * g, params, grads))

    begun, losses, first = time.monotonic(), [], None
    with on(mesh):
        keys = jax.random.split(jax.random.key(3), 3)
        lowered = jax.jit(step).lower(params, context, batch, keys[0])
        program = compiled(lowered)
        seconds = time.monotonic() - begun
        for key in keys:
            loss, grads, params = program(params, context, batch, key)
            first = grads if first is None else first
            losses.append(float(loss))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    told = {"split": split, "leaves": len(jax.tree.leaves(params)), "compile_seconds": round(seconds, 1)}
    return losses, jax.device_get(first), jax.device_get(params), told


def pictures(mesh: jax.sharding.Mesh) -> np.ndarray:
    """What prior, guided decoder and upsampler draw in turn, with U-Nets of one level.

    They predict velocities, since epsilon becomes a picture by a division by almost 0, which magnifies any rounding.
    """
    prior, *others = (shallow(STAGES[name]) for name in ("prior", "decoder", "upsampler_256"))
    decoder, upsampler = (replace(c, diffusion=replace(c.diffusion, prediction="v")) for c in others)
    rng, batch = np.random.default_rng(8), make_batch()
    keys = picture_keys(0, ROWS)
    text = Text(*(np.float32(rng.normal(size=(ROWS, *shape))) for shape in ((WORDS, 16), (WORDS,), (16,))))
    text = text._replace(mask=batch.mask)
    null = jax.tree.map(lambda x: x[:1], text)
    eta, guidance = np.float32(0), np.full((ROWS,), 2, np.float32)

    def params(config: TrainConfig) -> Any:
        return place(random_tree(jax.eval_shape(build(config, CLIP).init, jax.random.key(0)), 1))

    def run(function: Any, statics: tuple[Any, ...], *arrays: Any) -> Any:
        return compiled(function.lower(*statics, *arrays))(*arrays)

    with on(mesh):
        white, whole = Whitening(**make_context()["whitening"]), sharding.replicated(mesh)
        given = white, keys, text, null, table_of(prior, 3), guidance, eta
        white, keys, text, null, table, guidance, eta = jax.device_put(given, whole)
        z = run(sample_prior, (prior, "ddim", 2), params(prior), white, keys, text, null, table, guidance, eta)
        z = jax.device_put(z, whole)
        small = run(decode, (decoder, "ddpm"), params(decoder), keys, z, text, table, guidance, eta, eta)
        low = jax.device_put(small[:, ::4, ::4], whole)
        return np.asarray(run(upsample, (upsampler, "ddim"), params(upsampler), keys, low, table, eta))


def compare_sampling(strategies: list[str], done: Callable[[dict[str, Any]], None]) -> None:
    """Pictures under some strategies."""
    expected = pictures(make_mesh("dp", jax.devices()[:1]))
    for strategy in strategies:
        chosen = resolve(strategy, 8, slices=2 if strategy == "hsdp" else 1)
        error = float(np.abs(pictures(make_mesh(chosen)) - expected).max())
        row = {"stage": SAMPLING, "strategy": strategy, "mesh": str(chosen), "pixels": error}
        done(row | {"equal": error <= LIMITS["pixels"]})


def difference(tree: Any, reference: Any) -> tuple[float, str]:
    """The largest difference of a leaf to its largest entry, and that leaf's name.

    Softmax does not see the bias of self-attention's keys, whose gradient is nothing but rounding: its difference is
    taken to the gradient of those keys' kernel.
    """
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(reference)}
    errors = {}
    for (name, leaf), other in zip(known.items(), jax.tree.leaves(tree), strict=True):
        unseen = name.endswith("['key']['bias']") and "transformer" in name
        size = np.abs(known[name.replace("['bias']", "['kernel']")] if unseen else leaf).max()
        errors[name] = float(np.abs(other - leaf).max() / size)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def compare(config: TrainConfig, strategies: list[str], done: Callable[[dict[str, Any]], None]) -> None:
    """One stage under some strategies, each told as it is known."""
    losses, grads, params, _ = three_steps(config, make_mesh("dp", jax.devices()[:1]))
    for strategy in strategies:
        chosen = resolve(strategy, 8, slices=2 if strategy == "hsdp" else 1)
        found = three_steps(config, make_mesh(chosen))
        loss = max(abs(a - b) / abs(b) for a, b in zip(found[0], losses, strict=True))
        (gradient, leaf), (parameters, _) = difference(found[1], grads), difference(found[2], params)
        row = {"stage": config.name, "strategy": strategy, "mesh": str(chosen), "loss": loss, "gradient": gradient}
        row |= {"parameters": parameters, "worst": leaf, **found[3]}
        row["equal"] = all(row[kind] <= limit for kind, limit in LIMITS.items() if kind in row)
        done(row)


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    figures = "  ".join(f"{kind} {row[kind]:.1e}" for kind in LIMITS if kind in row)
    verdict = "equal" if row["equal"] else f"DIFFERS {row.get('worst', '')}"
    split = f"{row['split']:3}/{row['leaves']} leaves split  " if "split" in row else ""
    return f"{row['stage']:15}{row['strategy']:26}{figures}  {split}{verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, SAMPLING], default=[*STAGES, SAMPLING])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--shallow", nargs="*", choices=STAGES, default=[], help="of these the U-Net has one level")
    parser.add_argument("--out", type=Path, help="the table as JSON; what it holds already is not run again")
    options = parser.parse_args()
    sharding.rules.SMALL = 64  # so that the leaves of small networks are split as a large one's are
    known = options.out is not None and options.out.exists()
    rows = json.loads(options.out.read_text())["rows"] if known else []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if options.out is not None:
            table = {"limits": LIMITS, "jax": jax.__version__, "rows": rows}
            options.out.write_text(json.dumps(table, indent=1) + "\n")

    for name in options.stages:
        left = [s for s in options.strategies if not any((row["stage"], row["strategy"]) == (name, s) for row in rows)]
        if name == SAMPLING and left:
            compare_sampling(left, done)
        elif left:
            compare(shallow(STAGES[name]) if name in options.shallow else STAGES[name], left, done)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
