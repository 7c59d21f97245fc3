"""Settings along axes such as guidance and steps, drawn and measured one after another: a row each, as they come."""

import json
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.monitoring
import numpy as np
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.checkpoint.writing import replacing
from unclip_jax.data.embeddings import unit
from unclip_jax.data.listing import digest_of
from unclip_jax.evaluate.drawing import Drawn, Setting, draw, setting_of
from unclip_jax.evaluate.extras import reconstruction_figures
from unclip_jax.evaluate.features import look
from unclip_jax.evaluate.quality import GROUP, Metric, Ruler, Scored, diversity, prior_figures, scored
from unclip_jax.generate import check_seeds
from unclip_jax.inputs import Options

AXES = tuple(name for name in Options._fields if name != "resamples")
BOUND = ("prior_steps", "candidates", "prior_temperature", "prior_guidance")  # change with the prior
SHOWN = 8  # pictures of each setting that reports show
NOTICED = 0.05  # seconds of compiling
VERSION = 2  # of what a row means

Row = dict[str, Any]


class Task(NamedTuple):
    """How every setting is measured. seed: of the first picture. batch: pictures drawn at a time. folder: takes rows,
    and pictures, so that the same command goes on. budget: seconds after which no further setting is begun."""

    metrics: tuple[Metric, ...]
    folder: Path
    seed: int = 0
    batch: int = 16
    budget: float | None = None


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """An axis such as guidance=1,1.5,2; ValueError in one sentence where it is none."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in AXES:
        known = ", ".join(axis.replace("_", "-") for axis in AXES)
        raise ValueError(f"a sweep goes along {known}, as guidance=1,1.5,2, and not along '{text}'")
    kind = str(get_type_hints(Options)[name])
    convert = float if "float" in kind else int if "int" in kind else str
    try:
        found = tuple(convert(value.strip()) for value in values.split(",") if value.strip())
    except ValueError:
        raise ValueError(f"'{text}' has a value that is no {convert.__name__}: write {name}=1,2") from None
    if not equals or not found:
        raise ValueError(f"'{text}' has no values: write {name}=1,2")
    allowed = {"sampler": ("ddpm", "ddim", "dpm"), "prior": ("diffusion", "ar")}
    if name in allowed and (wrong := [value for value in found if value not in allowed[name]]):
        raise ValueError(f"there is no {name} '{wrong[0]}': there are {', '.join(allowed[name])}")
    return name, found


def settings_of(cascade: Cascade, options: Options, sweeps: Sequence[Sequence[str]]) -> list[Setting]:
    """The settings of a sweep, the recommended one first, none of them twice.

    sweeps: each a list of axes, all of whose values are combined; what is on no axis stays as in `options`.
    Raises ValueError in one sentence where an axis is none, or a setting makes no sense for the cascade.
    """
    found = [setting_of(cascade, options)]
    for sweep in sweeps:
        axes = dict(parse_axis(text) for text in sweep)
        for values in product(*axes.values()):
            changed = dict(zip(axes, values, strict=True))
            if changed.get("prior", options.prior) == "ar":
                changed |= {"prior_steps": None, "candidates": None}
            setting = setting_of(cascade, options._replace(**changed))
            if setting not in found:
                found.append(setting)
    return found


def run_sweep(cascade: Cascade, ruler: Ruler, task: Task, settings: Sequence[Setting]) -> Iterator[Row]:
    """Measures every setting and yields its row, which is then in rows.jsonl; rows that are there are read.

    Beside the rows lie scores/, features and per-picture scores of each setting, and strips/, its first pictures.
    """
    count = len(ruler.pairs.captions)
    check_seeds(task.seed, task.seed + 2 * count + GROUP)
    known = {row["key"]: row for row in read_rows(task.folder)}
    start, slowest, compiling = time.monotonic(), 0.0, _Compiling()
    bar = tqdm(settings, desc="settings", unit="setting", dynamic_ncols=True)
    for setting in bar:
        key = row_key(cascade, ruler, task, setting)
        if key in known and scores_path(task.folder, key).is_file():
            yield known[key]
            continue
        spent = time.monotonic() - start
        if task.budget is not None and spent + slowest * _steps(setting) > task.budget:
            tqdm.write(f"left out for want of time: {describe(setting)}")
            continue
        row, seconds = _measured(cascade, ruler, task, setting, key, compiling)
        if not row["compiled"]:
            slowest = max(slowest, seconds / _steps(setting))
        _append(task.folder, row)
        bar.set_postfix_str(describe(setting))
        yield row
    compiling.close()


def row_key(cascade: Cascade, ruler: Ruler, task: Task, setting: Setting) -> str:
    """Identifies a row: weights, setting, real pictures, seed and metrics."""
    facts = cascade.digest, sorted(setting.items()), ruler.pairs.digest, task.seed, task.metrics
    eyes = ruler.clip.name, ruler.inception and ruler.inception.name
    return digest_of(VERSION, *facts, *eyes)


def describe(setting: Setting, beside: Setting | None = None) -> str:
    """A setting in words; where another is given, only what differs."""
    told = {name: value for name, value in setting.items() if beside is None or beside.get(name) != value}
    quiet = {"rank_from": 1, "clip_guidance": 0.0}
    words = [
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in told.items()
        if beside is not None or quiet.get(name) != value
    ]
    return ", ".join(words) or "the same"


def varied(rows: Sequence[Row]) -> list[str]:
    """The names of settings that differ between rows, in the order of a setting."""
    names = list(dict.fromkeys(name for row in rows for name in row["setting"]))
    priors = {row["setting"]["prior"] for row in rows}
    found = []
    for name in names:
        parts = [[row for row in rows if row["setting"]["prior"] == prior] for prior in priors]
        groups = parts if name in BOUND else [list(rows)]
        if any(len({repr(row["setting"].get(name)) for row in part}) > 1 for part in groups):
            found.append(name)
    return found


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder, without the torn end of an interrupted one."""
    rows, path = [], folder / "rows.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"key", "setting", "figures", "errors"} <= set(row):
            rows.append(row)
    return rows


def read_scores(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """features [n d] and per-picture scores [n] of a row."""
    with np.load(scores_path(folder, key), allow_pickle=False) as file:
        return file["features"], file["each"]


def scores_path(folder: Path, key: str) -> Path:
    """Where the features and scores of a row lie."""
    return folder / "scores" / f"{key}.npz"


def _measured(
    cascade: Cascade, ruler: Ruler, task: Task, setting: Setting, key: str, compiling: "_Compiling"
) -> tuple[Row, float]:
    captions, count = ruler.pairs.captions, len(ruler.pairs.captions)
    begin, work = time.perf_counter(), task.folder / "samples"
    compiling.begin()
    drawn = draw(cascade, captions, range(task.seed, task.seed + count), setting, task.batch, work)
    seconds, compiled = time.perf_counter() - begin, compiling.happened
    found = scored(ruler, drawn.pictures, task.metrics, max(task.batch, 64))
    found.figures.update(_further(cascade, ruler, task, setting, drawn, found))
    path = scores_path(task.folder, key)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, features=found.features, each=found.each, pictures=drawn.pictures[:SHOWN])
    row: Row = {
        "key": key,
        "setting": setting,
        "n": count,
        "figures": {name: round(value, 6) for name, value in found.figures.items()},
        "errors": {name: round(value, 6) for name, value in found.errors.items()},
        "seconds": round(seconds, 3) if drawn.fresh else None,
        "compiled": compiled,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    return row, time.perf_counter() - begin


def _further(
    cascade: Cascade, ruler: Ruler, task: Task, setting: Setting, drawn: Drawn, found: Scored
) -> dict[str, float]:
    """Metrics that need more pictures than one of each caption, or other arrays."""
    figures, captions = {}, ruler.pairs.captions
    if "diversity" in task.metrics:
        groups = max(len(captions) // GROUP, 1)
        repeated = [caption for caption in captions[:groups] for _ in range(GROUP)]
        first = task.seed + len(captions)
        seeds = range(first, first + len(repeated))
        several = draw(cascade, repeated, seeds, setting, task.batch, task.folder / "samples").pictures
        apart = diversity(look(ruler.clip, several, max(task.batch, 64)).features)
        figures["diversity"] = float(apart.mean())
        found.errors["diversity"] = float(apart.std(ddof=1) / np.sqrt(groups)) if groups > 1 else 0.0
    if "prior" in task.metrics:
        few = len(ruler.real.features)
        figures |= prior_figures(unit(drawn.embeddings[:few]), ruler.text[:few], ruler.real.features)
    if "reconstruction" in task.metrics:
        figures |= reconstruction_figures(cascade, ruler, Options(**setting))
    return figures


def _append(folder: Path, row: Row) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row, ensure_ascii=False) + "\n")


def _steps(setting: Setting) -> int:
    """What a setting's time grows with."""
    return setting["rank_from"] * (setting["steps"] + 10)


class _Compiling:
    """Whether a program was compiled, or read from the cache, since `begin`: such a time is no sampler's."""

    def __init__(self) -> None:
        self.happened, self._open = False, True
        jax.monitoring.register_event_duration_secs_listener(self._note)  # which jax keeps for good

    def begin(self) -> None:
        """Forgets what happened before."""
        self.happened = False

    def close(self) -> None:
        """Listens no longer."""
        self._open = False

    def _note(self, event: str, duration_secs: float | int, **_: Any) -> None:
        if self._open and "backend_compile" in event and duration_secs > NOTICED:
            self.happened = True
