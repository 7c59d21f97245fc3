"""Runs case after case, each in a process of its own, and appends what came of it to a file of JSON lines.

Device memory is measured of a process of its own, and that alone dies where it runs out: a row like any other. A file
is gone on with: what it holds is not run again.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip_jax.bench.cases import Case, Here, refusal
from unclip_jax.bench.report import efficiency, line
from unclip_jax.checkpoint.schema import to_json
from unclip_jax.config import ClipConfig, TrainConfig

Row = dict[str, Any]
NOTHING = {"config": None, "clip": None, "case": None, "steps": 0, "warmup": 0}


def find(cpu_devices: int | None, limit: float = 300.0) -> Here:
    """The devices at hand, asked of a child: a TPU belongs to one process, which has to be that of a case."""
    if cpu_devices:
        return Here(cpu_devices, "cpu", "cpu")
    answer = ask({**NOTHING, "cpu_devices": None}, limit)
    if "refused" in answer:
        raise RuntimeError(f"no devices: {answer['refused']}")
    return Here(**answer)


def bench(
    config: TrainConfig,
    clip: ClipConfig | None,
    cases: Sequence[Case],
    here: Here,
    path: Path,
    *,
    steps: int,
    warmup: int,
    limit: float,
    cpu_devices: int | None = None,
    predict: Callable[[Case], Row] | None = None,
) -> list[Row]:
    """Measures the cases that the file does not hold, and returns every row of this config, kind of device and steps.

    limit: seconds that a case may take. predict: what a plan adds to a row.
    """
    setup = setup_of(config, clip, here, steps)
    # What only ran out of time, or was ended from outside, deserves another try.
    again = "took longer", "the process ended"
    rows = [row for row in read(path) if row["setup"] == setup and not str(row.get("refused", "")).startswith(again)]
    known = {tuple(row[field] for field in Case._fields) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    request = {"config": to_json(config), "clip": clip and to_json(clip), "steps": steps, "warmup": warmup}
    request["cpu_devices"] = cpu_devices
    with tqdm(cases, desc=config.name, unit="case", dynamic_ncols=True) as bar:
        for case in bar:
            if tuple(case) in known:
                continue
            bar.set_postfix_str(f"{case.devices} x {case.strategy}, batch {case.batch}, remat {case.remat}")
            reason = refusal(case, config, here)
            answer: Row = {"refused": reason} if reason else ask({**request, "case": case._asdict()}, limit)
            if predict is not None and reason is None:
                answer |= predict(case)
            row = {"setup": setup, "config": config.name, "kind": here.kind, **case._asdict(), "steps": steps, **answer}
            rows.append(row)
            if "refused" not in row:
                row["efficiency"], row["against"] = efficiency(row, rows)
            append(path, row)
            bar.write(line(row), file=sys.stderr)
    return rows


def setup_of(config: TrainConfig, clip: ClipConfig | None, here: Here, steps: int) -> str:
    """A name for what rows share that may be compared: a config but for what cases vary, devices, versions, steps."""
    data = replace(config.data, batch_size=0)
    plain = replace(config, data=data, strategy="", steps=0, log_every=1, preview_every=1, save_every=1, tags={})
    facts = [to_json(plain), clip and to_json(clip), here.kind, version("jax"), version("jaxlib"), steps]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> list[Row]:
    """The rows of a file; a line that was torn when a bench was stopped is left out."""
    rows = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and {"setup", *Case._fields} <= row.keys():
            rows.append(row)
    return rows


def append(path: Path, row: Row) -> None:
    """Adds a row, on a line of its own even after a torn one."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(row).encode() + b"\n")


def ask(request: Row, limit: float) -> Row:
    """What a worker answers, or {"refused": why} in one sentence: its error, its death, or that it took too long."""
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2")}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "unclip_jax.bench.worker", str(folder)]
        with (
            (folder / "log.txt").open("wb") as log,
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log) as child,
        ):
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                return {"refused": f"took longer than {limit:.0f} s: --limit allows more"}
            finally:
                if child.poll() is None:
                    child.kill()
        answer, refused = folder / "answer.json", folder / "refused.txt"
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
        if refused.exists():
            return {"refused": _sentence(*refused.read_text(encoding="utf-8").partition("\n")[::2])}
        last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return {"refused": _death(code, last)}


def _sentence(kind: str, message: str) -> str:
    """An error's first words, which say what was wrong; a compiler's go on for pages."""
    text = " ".join(message.split())
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return f"out of memory: {text[:200]}"
    return text[:400] if kind in ("ValueError", "UsageError") else f"{kind}: {text[:300]}"


def _death(code: int, last: list[str]) -> str:
    if code == -9:
        return "out of memory: the system ended the process (signal 9)"
    why = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the process ended early ({why}): {last[0][:300] if last else 'it said nothing'}"
