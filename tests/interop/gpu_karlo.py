"""Karlo at full size on one GPU: how fast the cascade samples and how fast its decoder trains, random weights.

python tests/interop/gpu_karlo.py --out RESULTS.json [--only sample train] [--batches 1 8 32] [--train 32 64 128]
    [--attention auto xla] [--dtype bfloat16] [--budget SECONDS] [--profile] [--hlo FOLDER] [--tiny]

Sampling is what generate runs: 25 steps of the prior, 25 of the decoder, both guided, 7 of the upsampler (the last by
its second network), 256 px. Training is train.train_step on configs/karlo_decoder with stored image embeddings: float32
parameters, AdamW and moving average. Every figure is printed and written as soon as it is measured, and what no time is
left for is named; a share is that of the rate that a matrix product of 8192^3 reached in the same run. No part of the
tests: pytest does not collect it.
"""

import argparse
import gc
import importlib.metadata
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout that the script is part of

import jax
import jax.numpy as jnp
import numpy as np
from gpu_measure import START, Programs, Report, guarded, memory, profile, random_params, spread, timed
from jax.experimental.layout import Format, Layout

from unclip_jax.cascade import computing_in
from unclip_jax.config import ClipConfig, Dtype, TrainConfig, TransformerConfig
from unclip_jax.generate import decode, upsample
from unclip_jax.inputs import Text, per_picture, picture_keys, table_of
from unclip_jax.models import unet_blocks
from unclip_jax.models.prior import Whitening
from unclip_jax.overrides import load_config
from unclip_jax.priors import sample_prior
from unclip_jax.sharding import make_mesh
from unclip_jax.stages import build
from unclip_jax.train import init_state, jitted_step
from unclip_jax.types import Batch

TERAFLOPS = {"prior": 0.329, "decoder": 1.217, "upsampler": 8.497}  # of a step of one picture, guidance included
TRAINING = 3 * 1.217 / 2  # of one picture's update: a forward pass, and twice that backwards
SIDE = 8192  # of the matrices whose product is the peak
STAGES: dict[str, Any] = {"prior": sample_prior, "decoder": decode, "upsampler": upsample}


def configs(tiny: bool, dtype: Dtype) -> dict[str, TrainConfig]:
    """Karlo's four runs, computing in dtype."""
    runs = {name: load_config(f"karlo_{name}") for name in ("clip", "prior", "decoder", "up256")}
    networks: dict[str, Any] = {name: run.network for name, run in runs.items()}
    networks["up256"] = replace(networks["up256"], last_step=True)
    runs["prior"] = replace(
        runs["prior"], sample=replace(runs["prior"].sample, candidates=1)
    )  # as of published weights
    if tiny:
        small = TransformerConfig(48, 1, 4, activation="quick_gelu", causal=True)
        networks["clip"] = replace(networks["clip"], text=small, vision=small, embedding_dim=48)
        prior = TransformerConfig(64, 1, 4, causal=True)
        networks["prior"] = replace(networks["prior"], embedding_dim=48, text_dim=48, transformer=prior)
        changes: dict[str, Any] = {"channels": 32, "depth": 1, "head_channels": 32, "multipliers": (1, 2)}
        unet = replace(networks["decoder"].unet, **changes, context_dim=64, attention_factors=(2,))
        networks["decoder"] = replace(networks["decoder"], unet=unet, image_embedding_dim=48, text_dim=48, size=16)
        networks["up256"] = replace(
            networks["up256"], unet=replace(networks["up256"].unet, **changes), low_size=16, size=32
        )
    return {name: computing_in(replace(run, network=networks[name]), dtype) for name, run in runs.items()}


def shapes_of(run: TrainConfig, clip: ClipConfig) -> Any:
    return jax.eval_shape(build(run, clip).init, jax.random.key(0))


def measure_peak(dtype: Dtype, tiny: bool, report: Report) -> float:
    """TFLOP/s of a matrix product, and GB/s of a copy."""
    side, chained = 512 if tiny else SIDE, 10
    a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(dtype) for i in (1, 2))
    product = jax.jit(jnp.matmul)

    def run() -> Any:
        return [product(a, b) for _ in range(chained)][-1]

    seconds = timed(run, report, 15)
    rate = chained * 2 * side**3 / statistics.median(seconds) / 1e12
    report.add("peak", teraflops=rate, side=side, **spread(seconds))
    return rate


class Sampling:
    """The three stages with random weights; with layouts, each program chooses how parameters lie in memory."""

    def __init__(self, runs: dict[str, TrainConfig], dtype: Dtype, layouts: bool) -> None:
        self.layouts, clip = layouts, runs["clip"].network
        assert isinstance(clip, ClipConfig)
        names = {"prior": "prior", "decoder": "decoder", "upsampler": "up256"}
        self.configs = {stage: runs[name] for stage, name in names.items()}
        self.params = {stage: random_params(shapes_of(run, clip), dtype) for stage, run in self.configs.items()}
        self.clip = clip

    def arguments(self, stage: str, b: int) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
        """What is static of a stage's function, its arguments after the parameters, and those by name."""
        run, keys = self.configs[stage], picture_keys(0, b)
        advice, z, network = run.sample, self.clip.embedding_dim, run.network
        table, eta = table_of(run, advice.steps), np.float32(advice.eta)
        guidance = per_picture(advice.guidance, b)
        match stage:
            case "prior":
                whitening = Whitening(jnp.zeros(z), jnp.ones(z))
                text, null = self.text(b), self.text(1)
                rest = whitening, keys, text, null, table, guidance, eta
                return (run, advice.sampler, advice.candidates), rest, {}
            case "decoder":
                rest = keys, jnp.ones((b, z)), self.text(b), table, guidance, np.float32(advice.rescale), eta
                return (run, advice.sampler), rest, {"null": self.text(1)}
            case _:
                side = network.low_size  # type: ignore[union-attr]
                low = jax.random.uniform(jax.random.key(3), (b, side, side, 3), minval=-1.0)
                return (run, advice.sampler), (keys, low, table, eta), {}

    def text(self, b: int) -> Text:
        """Made-up states of captions of 20 tokens."""
        n, z = self.clip.context_length, self.clip.embedding_dim
        states = jax.random.normal(jax.random.key(b), (b, n, self.clip.text.width))
        return Text(states, jnp.broadcast_to(jnp.arange(n) < 20, (b, n)), jax.random.normal(jax.random.key(0), (b, z)))

    def lower(self, stage: str, b: int) -> Any:
        """The stage's own function as a program of (parameters, other arguments, those by name)."""
        static, rest, named = self.arguments(stage, b)

        def run(params: Any, rest: Any, named: Any) -> Any:
            return STAGES[stage](*static, params, *rest, **named)

        placed: dict[str, Any] = {"in_shardings": (Format(Layout.AUTO), None, None)} if self.layouts else {}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.params[stage])
        return jax.jit(run, **placed).lower(shapes, rest, named)

    def placed(self, stage: str, program: Any) -> Any:
        """The stage's parameters as the program wants them to lie."""
        params = self.params[stage]
        return jax.device_put(params, program.input_formats[0][0]) if self.layouts else params


def measure_sampling(options: argparse.Namespace, report: Report, programs: Programs, peak: float) -> None:
    sampling = Sampling(configs(options.tiny, options.dtype), options.dtype, options.layouts)
    jax.block_until_ready(sampling.params)
    report.add("sampling", numbers=sum(leaf.size for leaf in jax.tree.leaves(sampling.params)), **memory())
    groups = [options.batches[:1], options.batches[1:]]  # the first batch is measured before the others compile
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for number, attention in enumerate(options.attention):
        for group in groups:
            lower = {
                _name(stage, b, attention): partial(sampling.lower, stage, b)
                for b in group
                for stage in (TERAFLOPS if number == 0 else ["decoder"])
            }
            if not group or not report.enough(f"compile {', '.join(lower)}", 30):
                continue
            with choosing(attention):
                compiled = programs.compile(lower)
            for b in group:
                own = {stage: compiled.get(_name(stage, b, attention)) for stage in TERAFLOPS}
                previous = found.get((options.attention[0], b), {})
                found[attention, b] = {stage: program or previous.get(stage) for stage, program in own.items()}
                for stage, program in own.items():
                    name = _name(stage, b, attention)
                    if program is not None and report.enough(name, 10):
                        guarded(
                            name,
                            report,
                            partial(measure_stage, sampling, stage, b, program, name, options, report, peak),
                        )
                name = _name("cascade", b, attention)
                if None not in found[attention, b].values() and report.enough(name, 15):
                    guarded(
                        name,
                        report,
                        partial(
                            measure_cascade,
                            sampling,
                            b,
                            found[attention, b],
                            name,
                            options.attention[0],
                            report,
                            peak,
                            options.tiny,
                        ),
                    )


def _name(what: str, b: int, attention: str) -> str:
    return f"{what} b{b} {attention}"


def choosing(attention: str) -> Any:
    """Traces with one implementation of attention: the package's choice, always XLA's, or cuDNN's wherever it can."""
    jax.clear_caches()  # of traces with another; what is compiled stays
    stack = ExitStack()
    if attention != "auto":
        stack.enter_context(patch.object(unet_blocks, "flash", lambda query: attention == "cudnn"))
    return stack


def measure_stage(
    sampling: Sampling, stage: str, b: int, program: Any, name: str, options: Any, report: Report, peak: float
) -> None:
    _, rest, named = sampling.arguments(stage, b)
    params = sampling.placed(stage, program)

    def run() -> Any:
        return program(params, rest, named)

    finite = bool(jnp.isfinite(run()).all())
    seconds, steps = timed(run, report), sampling.configs[stage].sample.steps
    median = statistics.median(seconds)
    share = None if options.tiny else TERAFLOPS[stage] * b * steps / median / peak
    report.add(
        name, ms_per_step=1e3 * median / steps, seconds=median, share_of_peak=share, finite=finite,
        **spread(seconds), **memory(program),
    )  # fmt: skip
    if options.profile:
        profile(name, run, report)


def measure_cascade(
    sampling: Sampling, b: int, compiled: dict[str, Any], name: str, first: str, report: Report, peak: float, tiny: bool
) -> None:
    arguments = {stage: sampling.arguments(stage, b)[1:] for stage in STAGES}
    params = {stage: sampling.placed(stage, compiled[stage]) for stage in STAGES}

    def run() -> Any:
        embedding = compiled["prior"](params["prior"], *arguments["prior"])
        (keys, _, *rest), named = arguments["decoder"]
        small = compiled["decoder"](params["decoder"], (keys, embedding, *rest), named)
        (keys, _, *rest), named = arguments["upsampler"]
        return compiled["upsampler"](params["upsampler"], (keys, small, *rest), named)

    seconds = timed(run, report)
    median = statistics.median(seconds)
    work = sum(TERAFLOPS[stage] * run.sample.steps for stage, run in sampling.configs.items())
    report.add(
        name, seconds=median, images_per_s=b / median, share_of_peak=None if tiny else b * work / median / peak,
        **spread(seconds), **memory(),
    )  # fmt: skip
    alone, steps = report.results.get(_name("upsampler", 1, first), {}).get("seconds"), ("prior", "decoder")
    stages = [report.results.get(_name(stage, b, first), {}).get("seconds") for stage in steps]
    if b > 1 and alone and None not in stages:  # as generate does
        report.add(name, images_per_s_upsampled_one_at_a_time=b / (sum(stages) + b * alone))


def measure_training(options: argparse.Namespace, report: Report, programs: Programs, peak: float) -> None:
    runs = configs(options.tiny, options.dtype)
    config, clip_run, clip = runs["decoder"], runs["clip"], runs["clip"].network
    assert isinstance(clip, ClipConfig)
    stage, mesh, n = build(config, clip), make_mesh(devices=jax.devices()[:1]), clip.context_length
    empty = {"tokens": np.full((1, n), 49407, np.int32), "mask": np.arange(n)[None] < 2}
    context = jax.device_put({"clip": random_params(shapes_of(clip_run, clip), options.dtype), "empty": empty})

    def fresh() -> Any:
        given = random_params(shapes_of(config, clip), jnp.float32)
        return jax.block_until_ready(init_state(config, stage, mesh, given))

    state = fresh()
    report.add("training", numbers=sum(leaf.size for leaf in jax.tree.leaves(state.params)), **memory())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf) / 1e9
    key = jax.random.key(1)
    for attention in options.attention:
        batches = {b: training_batch(config, clip, b) for b in options.train}
        step = jitted_step(config, stage, mesh)
        for group in (options.train[:2], options.train[2:]):
            lower = {_name("train", b, attention): partial(step.lower, like, context, batches[b], key) for b in group}
            if not group or not report.enough(f"compile {', '.join(lower)}", 60):
                continue
            with choosing(attention):
                compiled = programs.compile(lower)
            for b in group:
                name = _name("train", b, attention)
                if (program := compiled.get(name)) is None or not report.enough(name, 20):
                    continue
                if (needed := memory(program).get("program_gb", 0)) > limit:
                    report.add(name, failed=f"the program takes {needed:.1f} GB, the device gives {limit:.1f}")
                    continue
                holder = [fresh() if state is None else state]
                state = None
                guarded(
                    name,
                    report,
                    partial(measure_updates, program, holder, context, batches[b], key, b, name, options, report, peak),
                )
                # A failed update may have consumed what was donated to it.
                state = None if "failed" in report.results[name] else holder[0]


def training_batch(config: TrainConfig, clip: ClipConfig, b: int) -> Batch:
    """Random pictures with embeddings, and captions of 20 tokens."""
    side, n, rng = config.network.size, clip.context_length, np.random.default_rng(b)  # type: ignore[union-attr]
    tokens, mask = rng.integers(1, 49000, (b, n), np.int32), np.broadcast_to(np.arange(n) < 20, (b, n))
    image = rng.integers(0, 256, (b, side, side, 3), np.uint8)
    embedding = rng.standard_normal((b, clip.embedding_dim), np.float32)
    parts: list[Any] = [image, np.where(mask, tokens, 0), mask, None, embedding]
    return jax.device_put(Batch(*parts))


def measure_updates(
    program: Any, holder: list[Any], context: Any, batch: Batch, key: Any, b: int, name: str, options: Any,
    report: Report, peak: float,
) -> None:  # fmt: skip
    def run() -> Any:
        holder[0], metrics = program(holder[0], context, batch, key)
        return metrics

    loss, skipped = (float(run()[metric]) for metric in ("loss", "skipped"))
    seconds = timed(run, report, 8)
    median = statistics.median(seconds)
    share = None if options.tiny else TRAINING * b / median / peak
    report.add(
        name, ms_per_step=1e3 * median, images_per_s=b / median, share_of_peak=share, loss=loss, skipped=skipped,
        **spread(seconds), **memory(program),
    )  # fmt: skip
    if options.profile:
        profile(name, run, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that the script works")
    parser.add_argument("--only", nargs="+", choices=["sample", "train"], default=["sample", "train"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of sampling")
    parser.add_argument("--train", type=int, nargs="+", default=[32, 64], help="batches of training")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--attention", nargs="+", choices=["auto", "xla", "cudnn"], default=["auto"])
    parser.add_argument("--layouts", action="store_true", help="parameters of sampling lie as each program chooses")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds after which nothing new begins")
    parser.add_argument("--profile", action="store_true", help="the kernels that take most of each measurement")
    parser.add_argument("--hlo", type=Path, help="folder for the optimised programs")
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, for a second run on the same machine")
    parser.add_argument("--flags-note", default="", help="kept with the results")
    options = parser.parse_args()
    if options.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
    report, device = Report(options.out, options.budget), jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    report.add(
        "run", command=" ".join([sys.executable, *sys.argv]), note=options.flags_note, device=device.device_kind,
        backend=getattr(device.client, "platform_version", ""), cores=os.cpu_count(), versions=versions,
        xla_flags=os.environ.get("XLA_FLAGS", ""), dtype=options.dtype, date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip
    peak, programs = measure_peak(options.dtype, options.tiny, report), Programs(report, options.hlo)
    for what, measure in (("sample", measure_sampling), ("train", measure_training)):
        if what in options.only:
            guarded(what, report, partial(measure, options, report, programs, peak))
            gc.collect()
    report.add("done", seconds=time.monotonic() - START)
    sys.stdout.flush()
    os._exit(0)  # what still compiles is not waited for


if __name__ == "__main__":
    main()
