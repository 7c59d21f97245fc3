"""`unclip eval`: how good a cascade is on a captioned source, at one setting or along a sweep, as one HTML report."""

import json
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, Cascade, load_cascade
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.evaluate import html, plots
from unclip_jax.evaluate.drawing import Setting, draw, setting_of
from unclip_jax.evaluate.extras import memorisation_report
from unclip_jax.evaluate.faithfulness import judge_of
from unclip_jax.evaluate.features import (
    check_comparable,
    clip_eye,
    embed_captions,
    inception_eye,
    load_seen,
    look,
    look_once,
)
from unclip_jax.evaluate.inception import DIM as INCEPTION_DIM
from unclip_jax.evaluate.inception import load_inception
from unclip_jax.evaluate.pairs import HELD_OUT, TRAINED, Pairs, read_pairs
from unclip_jax.evaluate.quality import METRICS, SWEPT, Metric, Ruler, check_rank, floor_figures
from unclip_jax.evaluate.recommend import Advice, recommended
from unclip_jax.evaluate.report import Figures, contact_sheet, table, versions
from unclip_jax.evaluate.sweep import Row, Task, describe, read_scores, run_sweep, scores_path, settings_of, varied
from unclip_jax.inputs import Options, options_of
from unclip_jax.sharding import make_mesh

STRIPS = 40  # settings whose pictures the page shows


class Measured(NamedTuple):
    """Everything that a report is made of."""

    rows: list[Row]
    own: Setting
    ruler: Ruler
    floor: dict[str, float]
    facts: dict[str, Any]


def eval_to_folder(options: Namespace) -> None:
    """Measures, prints a table, and leaves rows.jsonl, report.html, report.json and plots/ in the folder --out.

    The same command goes on where it was interrupted. Raises ValueError, DataError or CheckpointError in one sentence.
    """
    for name in ("n", "batch", "training_count"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    compile_cache.enable()
    weights = ",".join(options.weights) or SHIPPED
    cascade = load_cascade(weights, options.dtype, offload=options.offload)
    cascade.require_image_tower()
    chosen = options_of(vars(options) | {"size": options.size or cascade.sizes[0]})
    settings = settings_of(cascade, chosen, options.sweep or [])
    pairs = read_pairs(cascade, options.source, options.n, settings[0]["size"], objects=options.objects)
    if len({setting["size"] for setting in settings}) > 1:
        raise ValueError("pictures of several sizes have no real pictures in common: sweep each --size by itself")
    metrics = metrics_of(options, pairs, cascade)
    ruler = ruler_of(cascade, pairs, options, metrics)
    task = Task(metrics, options.out, options.seed, options.batch, options.budget)
    facts = {
        "command": command_line(options),
        "cascade": f"{weights if options.weights else 'the shipped one'} ({cascade.digest})",
        "pictures": f"{len(pairs.captions)} of {pairs.size} px from {pairs.name}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    facts = {name: without_folders(fact) for name, fact in facts.items()}
    floor = _floor(cascade, ruler, options)
    own = setting_of(cascade, Options(size=settings[0]["size"], prior=options.prior))
    rows: list[Row] = []
    for row in run_sweep(cascade, ruler, task, settings):
        rows.append(row)
    facts["device"] = ", ".join(dict.fromkeys(row.get("device", "one that is not noted") for row in rows))
    if not rows:
        raise ValueError("no setting was measured in the time of --budget: raise it")
    sheets, tables = _memorised(cascade, ruler, task, options, rows[0]) if "memorisation" in metrics else ({}, {})
    write_report(Measured(rows, own, ruler, floor, facts), options.out, sheets, tables)


def metrics_of(options: Namespace, pairs: Pairs, cascade: Cascade) -> tuple[Metric, ...]:
    """What is measured: what was asked for, or everything that can be; ValueError where something cannot."""
    dim = cascade.clip.config.network.embedding_dim  # type: ignore[union-attr]
    count = len(pairs.captions)
    reasons = {
        "faithfulness": "" if pairs.scenes else "only emoji scenes say what a picture must show",
        "fid": "it needs InceptionV3's weights: name the file with --inception"
        if not options.inception
        else ""
        if options.statistics or count > INCEPTION_DIM
        else f"its covariance needs more than {INCEPTION_DIM} pictures, not {count}: raise --n",
        "fd": "" if count > dim else f"its covariance needs more than {dim} pictures, not {count}: raise --n",
        "precision": "" if count > 3 else "it needs more than 3 pictures: raise --n",
        "memorisation": "" if _training(options) else "name what the cascade was trained on with --training",
    }
    if asked := options.metrics:
        for name in asked:
            if reasons.get(name):
                raise ValueError(f"the metric {name} cannot be measured: {reasons[name]}")
        return tuple(name for name in METRICS if name in asked)
    usual = (*SWEPT, "fid") if options.sweep else METRICS
    return tuple(name for name in METRICS if name in usual and not reasons.get(name))


def ruler_of(cascade: Cascade, pairs: Pairs, options: Namespace, metrics: tuple[Metric, ...]) -> Ruler:
    """The real pictures through every eye that the metrics need; their statistics are kept by digest."""
    mesh = make_mesh(options.strategy or "dp")
    eye, batch = clip_eye(cascade.clip, mesh), max(options.batch, 64)
    real = look_once(eye, pairs.pictures, pairs.digest, batch)
    text = embed_captions(cascade.clip, pairs.captions, cascade.tokenizer)
    ruler = Ruler(pairs, eye, text, real, judge_of(cascade) if pairs.scenes else None)
    if "fid" not in metrics:
        return ruler
    inception = inception_eye(load_inception(options.inception), mesh)
    if options.statistics is None:
        seen = look_once(inception, pairs.pictures, pairs.digest, batch)
    else:
        seen = load_seen(options.statistics)
        check_comparable(seen, look(inception, pairs.pictures[:1], 1))
    check_rank(seen.moments, f"'{options.statistics}'" if options.statistics else "FID")
    if len(pairs.captions) <= inception.dim:
        print(
            f"unclip: warning: an FID of {len(pairs.captions)} pictures is biased upwards: compare it with others of as"
            " many alone, or use CMMD",
            file=sys.stderr,
        )
    return ruler._replace(inception=inception, real_inception=seen)


def command_line(options: Namespace) -> str:
    """The command that these options came from."""
    words = ["unclip", "eval", *options.weights]
    quiet = {"run", "rest", "debug", "command", "weights", "sweep", "usual"}
    for name, value in vars(options).items():
        if name not in quiet and value is not None and value is not False and value != options.usual.get(name):
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    for sweep in options.sweep or []:
        words += ["--sweep", *sweep]
    return shlex.join(words)


def without_folders(text: str) -> str:
    """A text whose absolute paths are their last parts alone: where somebody keeps a file is nobody's business."""
    return re.sub(r"(?<![\w.~/])(?:~|[A-Za-z]:)?[\\/](?:[^\\/\s,'\"]+[\\/])*(?=[^\\/\s,'\"])", "", text)


def write_report(
    measured: Measured, folder: Path, sheets: Mapping[str, np.ndarray], tables: Mapping[str, Figures]
) -> Advice | None:
    """report.html, report.json, plots/ and sheets/ in a folder, and the table on the screen."""
    rows, own, ruler, floor, facts = measured
    advice = recommended(rows, own, folder, ruler.real.features) if len(rows) > 1 else None
    drawn = plots.plots_of(rows, own, floor) if len(rows) > 1 else {}
    shown = sorted(rows, key=lambda row: (advice is None or row is not advice.row, row["setting"] != own))[:STRIPS]
    strips = {row["key"]: _strip(folder, row) for row in rows if row in shown}
    strips["real"] = ruler.pairs.pictures[: len(next(iter(strips.values())))]
    title = "How good is it?" if len(rows) == 1 else f"{len(rows)} settings, measured"
    captions = ruler.pairs.captions[: len(strips["real"])]
    text = html.page(
        title,
        facts,
        rows,
        own,
        floor=floor,
        advice=advice,
        plots=drawn,
        captions=captions,
        strips=strips,
        sheets=sheets,
        tables=tables,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    said = {"facts": facts, "own": own, "real pictures": floor, "tables": tables, "rows": rows}
    if advice is not None:
        said |= {"recommended": advice.row["setting"], "supported": advice.supported, "says": advice.sentences}
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for title, panels in drawn.items():
        for name, panel in panels.items():
            _file(folder / "plots", f"{title} {name}").write_bytes(panel)
    for name, sheet in sheets.items():
        Image.fromarray(sheet).save(_file(folder / "sheets", name), "PNG")
    if len(rows) > 1 and not drawn:
        print("unclip: no plots: pip install 'unclip-jax[bench]' (matplotlib)", file=sys.stderr)
    print(table(_named(rows, floor)))
    for sentence in advice.sentences if advice is not None else ():
        print(sentence)
    for name, figured in tables.items():
        print(f"{name}\n{table(figured)}")
    print(f"{folder / 'report.html'}")
    return advice


def _named(rows: list[Row], floor: dict[str, float]) -> Figures:
    if len(rows) == 1:
        row, errors = rows[0]["figures"], rows[0]["errors"]
        found = {name: {"value": value} for name, value in row.items()}
        for name, columns in found.items():
            columns |= {"+-": 1.96 * errors[name]} if name in errors else {}
            columns |= {"real pictures": floor[name]} if name in floor else {}
        return found
    names = varied(rows)
    told = [{name: row["setting"][name] for name in names if name in row["setting"]} for row in rows]
    found = {describe(words): dict(row["figures"]) for words, row in zip(told, rows, strict=True)}
    return found | ({"real pictures (distances: of other captions)": floor} if floor else {})


def _floor(cascade: Cascade, ruler: Ruler, options: Namespace) -> dict[str, float]:
    """What the real pictures score beside as many others; {} where the source has no more."""
    count = len(ruler.pairs.captions)
    try:
        others = read_pairs(cascade, options.source, count, ruler.pairs.size, count, options.objects)
    except ValueError:
        return {}
    if len(others.captions) < count:
        return {}
    return floor_figures(ruler, look_once(ruler.clip, others.pictures, others.digest, max(options.batch, 64)))


def _training(options: Namespace) -> str | None:
    """The source of training pictures, where it is known."""
    return options.training or (TRAINED if options.source == HELD_OUT else None)


def _memorised(
    cascade: Cascade, ruler: Ruler, task: Task, options: Namespace, row: Row
) -> tuple[dict[str, np.ndarray], dict[str, Figures]]:
    """The sheet and the table of the first setting's samples and their nearest training pictures."""
    count, source = len(ruler.pairs.captions), _training(options)
    assert source is not None
    seeds, kept = range(task.seed, task.seed + count), task.folder / "samples"
    drawn = draw(cascade, ruler.pairs.captions, seeds, row["setting"], task.batch, kept)
    features, _ = read_scores(task.folder, row["key"])
    report = memorisation_report(cascade, ruler, drawn.pictures, features, source, options.training_count)
    columns = [np.concatenate([row[i : i + 1] for row in report.rows]) for i in range(3)]
    name = "Samples, and below each the nearest training pictures: in pixels, and to CLIP"
    return {name: contact_sheet(columns)}, {name: report.figures}


def _strip(folder: Path, row: Row) -> np.ndarray:
    with np.load(scores_path(folder, row["key"]), allow_pickle=False) as file:
        return file["pictures"]


def _file(folder: Path, title: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in title.lower()).split())[:60]}.png"
