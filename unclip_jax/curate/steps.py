"""What the commands of curation do with their options, and which steps there are."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclip_jax.curate import groups, manifest, reweight
from unclip_jax.curate.duplicates import Settings, search
from unclip_jax.curate.filters import filter_rows, propose, read_labels, write_proposals
from unclip_jax.curate.score import cut_below
from unclip_jax.data.decode import at_size
from unclip_jax.data.embeddings import Embeddings, Part, open_embeddings
from unclip_jax.data.records import open_source


def run(options: argparse.Namespace) -> None:
    """One step, or a merge; ValueError in one sentence where it cannot be done."""
    match options.step:
        case "filter":
            _filter(options)
        case "duplicates":
            _duplicates(options)
        case "reweight":
            _reweight(options)
        case "score":
            _score(options)
        case _:
            _merge(options)


def _opened(options: argparse.Namespace) -> tuple[Embeddings, Part]:
    return open_embeddings(options.embeddings), Part.parse(options.part)


def _filter(options: argparse.Namespace) -> None:
    embeddings, part = _opened(options)
    labels = read_labels(options.labels, embeddings)
    settings = {name: vars(options)[name] for name in ("recall", "features", "hidden", "seed")}
    trained = filter_rows(embeddings, labels, options.out, **settings, after=options.after, part=part)
    if options.propose and part.index == 0:
        rows, logits = propose(embeddings, trained, labels, options.propose, options.after, options.seed)
        path = options.out / "propose.csv"
        write_proposals(path, embeddings, rows, logits, _pictures(options.source) if options.source else None)
        print(path)
    _finish(embeddings, part, options.out)


def _pictures(spec: str) -> Callable[[int], Any]:
    """A source's pictures as a contact sheet shows them."""
    source = open_source(spec)
    return lambda row: at_size(source[row].image, 128, source.key(row))


def _duplicates(options: argparse.Namespace) -> None:
    embeddings, part = _opened(options)
    mirror = embeddings.about.mirror and not options.no_mirror
    limits = options.threshold, options.clusterings, options.clusters
    search(embeddings, Settings(*limits, mirror, options.pixels, options.seed), options.out, options.after, part)
    _finish(embeddings, part, options.out)


def _reweight(options: argparse.Namespace) -> None:
    embeddings, part = _opened(options)
    settings = {name: vars(options)[name] for name in ("base", "features", "hidden", "most", "seed")}
    reweight.reweight(embeddings, options.out, options.after, **settings, part=part)
    _finish(embeddings, part, options.out)


def _score(options: argparse.Namespace) -> None:
    embeddings, part = _opened(options)
    settings = {name: vars(options)[name] for name in ("head", "least", "keep", "after")}
    cut_below(embeddings, options.out, **settings, part=part)
    _finish(embeddings, part, options.out)


def _finish(embeddings: Embeddings, part: Part, out: Path) -> None:
    """Merges a step that was done in one part, and says what comes next of others."""
    if part.count == 1:
        print(json.dumps(merge_step(embeddings, out), indent=2))
    else:
        print(f"{out}: part {part.index} of {part.count} is done; after all of them: unclip data curate merge")


def _merge(options: argparse.Namespace) -> None:
    embeddings = open_embeddings(options.embeddings)
    for folder in options.steps:
        if (folder / manifest.PLAN).is_file() and not (folder / manifest.SUMMARY).is_file():
            print(json.dumps(merge_step(embeddings, folder), indent=2))
    if options.out:
        print(json.dumps(manifest.compose(embeddings, options.steps, options.out), indent=2))


def merge_step(embeddings: Embeddings, folder: Path) -> dict[str, Any]:
    """Joins the parts of a step, whichever it is; returns its summary."""
    plan = manifest.read_plan(folder)
    manifest.check_same(plan, embeddings.identity, folder)
    match plan["step"]:
        case "duplicates":
            return groups.merge(embeddings, Settings(**plan["parameters"]), folder)
        case "reweight":
            return reweight.merge(embeddings, folder)
        case "filter" | "score":
            lines = manifest.lines_of(manifest.parts_of(folder, "jsonl"))
            return manifest.finish(folder, lines, manifest.summed(manifest.parts_of(folder)))
        case other:
            raise manifest.CurationError(f"'{folder}' holds a step '{other}', which this version does not know")
