"""`unclip evaluate`: loads what an evaluation needs, prints its table, writes its figures and its sheet."""

import shlex
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, in_dtype, load_cascade, load_checked, load_clip
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ArPriorConfig, PriorConfig, UpsamplerConfig
from unclip_jax.evaluate.report import Figures, Report, table, write
from unclip_jax.generate import check_seeds
from unclip_jax.inputs import Options, options_of

SILENT = ("run", "rest", "debug", "command", "what")


def evaluate_to_files(options: Namespace) -> None:
    """Runs one evaluation, prints its table and writes what the options ask for.

    Raises ValueError or CheckpointError in one sentence where an option or a weights file cannot be used.
    """
    if options.n is not None and options.n < 1:
        raise ValueError(f"n must be at least 1, not {options.n}")
    if options.large < 0:
        raise ValueError(f"large must not be negative, but is {options.large}")
    check_seeds(options.seed, options.seed + (options.n or 0))
    compile_cache.enable()
    start = time.perf_counter()
    report, weights = _evaluate(options, options.weights or SHIPPED)
    facts: dict[str, Any] = {
        "what": options.what,
        "command": command_line(options),
        "weights": weights,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(table(report.figures))
    write(report, facts, options.out, options.pictures)


def command_line(options: Namespace) -> str:
    """The command that these options came from."""
    words = ["unclip", "evaluate", options.what]
    for name, value in vars(options).items():
        if name not in SILENT and value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def _evaluate(options: Namespace, folder: str | Path) -> tuple[Report, dict[str, str]]:
    """The report of one evaluation and the digests of the networks that it used."""
    match options.what:
        case "scenes":
            return _scenes(options, folder)
        case "ranking":
            from unclip_jax.evaluate.faithfulness import Faithfulness
            from unclip_jax.evaluate.ranking import ranking_report

            cascade = load_cascade(folder, options.dtype)
            shown = options.n or 256, 0, options.shuffle, False, options.seed, _sampling(options), options.objects
            task = Faithfulness(*shown)
            return ranking_report(cascade, task), {"cascade": cascade.digest}
        case "edits":
            from unclip_jax.evaluate.edits import EditTask, edits_report

            cascade = load_cascade(folder, options.dtype)
            task = EditTask(options.n or 64, options.seed, _sampling(options))
            return edits_report(cascade, task), {"cascade": cascade.digest}
        case "painting":
            from unclip_jax.evaluate.painting import PaintingTask, painting_report

            cascade = load_cascade(folder, options.dtype)
            paint = PaintingTask(options.n or 64, options.large, options.seed, _sampling(options), options.method)
            return painting_report(cascade, paint), {"cascade": cascade.digest}
        case "clip":
            from unclip_jax.evaluate.retrieval import clip_report

            clip = in_dtype(load_clip(folder), options.dtype)
            return clip_report(clip, options.n or 8), {"clip": clip.digest}
        case "prior":
            from unclip_jax.evaluate.retrieval import prior_report
            from unclip_jax.evaluate.variances import compare_samplers

            if options.compare and options.prior == "ar":
                raise ValueError("the autoregressive prior has no variances to compare: leave out --compare")
            clip = in_dtype(load_clip(folder), options.dtype)
            if options.prior == "ar":
                prior = load_checked(Path(folder) / "ar_prior.safetensors", ArPriorConfig, clip)
            else:
                prior = load_checked(Path(folder) / "prior.safetensors", PriorConfig, clip)
            prior = in_dtype(prior, options.dtype)
            report = (compare_samplers if options.compare else prior_report)(
                clip, prior, options.n or 4, options.seed, _sampling(options)
            )
            return report, {"clip": clip.digest, "prior": prior.digest}
        case _:
            return _upsamplers(options, folder)


def _scenes(options: Namespace, folder: str | Path) -> tuple[Report, dict[str, str]]:
    from unclip_jax.evaluate.faithfulness import Faithfulness, faithfulness_report, truth_report

    count = options.n or 256
    if options.truth:
        return truth_report(count, options.shuffle, objects=options.objects), {}
    if options.true_embedding and options.rank_from not in (None, 1):
        raise ValueError("pictures of the true embedding are not ranked: leave out --rank-from or --true-embedding")
    cascade = load_cascade(folder, options.dtype)
    task = Faithfulness(
        count, options.large, options.shuffle, options.true_embedding, options.seed, _sampling(options), options.objects
    )
    return faithfulness_report(cascade, task), {"cascade": cascade.digest}


def _upsamplers(options: Namespace, folder: str | Path) -> tuple[Report, dict[str, str]]:
    from unclip_jax.evaluate.upsampling import upsampler_report

    paths = sorted(Path(folder).glob("upsampler_*.safetensors"))
    if not paths:
        raise CheckpointError(f"there is no upsampler_<size>.safetensors in '{folder}': check --weights")
    networks = {path.stem: in_dtype(load_checked(path, UpsamplerConfig), options.dtype) for path in paths}
    networks = dict(sorted(networks.items(), key=lambda pair: pair[1].config.network.size))  # type: ignore[union-attr]
    figures: Figures = {}
    rows = []
    for network in networks.values():
        report = upsampler_report(network, options.n or 32, options.seed)
        figures |= report.figures
        rows += report.rows
    return Report(figures, tuple(rows)), {name: network.digest for name, network in networks.items()}


def _sampling(options: Namespace) -> Options:
    usual = 16 if options.what == "ranking" else 1
    return options_of(vars(options) | {"rank_from": usual if options.rank_from is None else options.rank_from})
