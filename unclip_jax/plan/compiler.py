"""Compiles a request in a child process and reads the compiler's own account of it, stopping it when that is complete.

Generating code for a large step takes tens of minutes; memory, collectives and FLOPs are known after buffer assignment,
about a minute in. A child is stopped by its process id. Results are kept as JSON, so that a plan is computed once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from unclip_jax.compile_cache import user_cache
from unclip_jax.plan.dump import Collective, Memory, Program, read_memory, read_program, read_total
from unclip_jax.plan.request import Request
from unclip_jax.plan.worker import TPU_ENVIRONMENT

LIMIT = 1800.0  # seconds for a compilation that stops after buffer assignment
NEAR = 0.02  # of the limit of memory
FULL_LIMIT = 4 * 3600.0


class Compiled(NamedTuple):
    """What is known of a compiled step.

    facts: what the worker said before compiling. memory: None where the compiler refused, and `refused` holds its
    words, needs the bytes of HBM that it asked for. program: None where the step does not fit. seconds, peak_memory: of
    the planning itself, the latter in bytes.
    """

    facts: dict[str, Any]
    memory: Memory | None
    program: Program | None
    refused: str | None
    needs: float | None
    seconds: float
    peak_memory: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = self._asdict()
        values["memory"] = self.memory and self.memory._asdict()
        values["program"] = self.program and {
            **self.program._asdict(),
            "collectives": [one._asdict() for one in self.program.collectives],
        }
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Compiled":
        """What to_json gave."""
        values = dict(values)
        if values["memory"]:
            values["memory"] = Memory(**{**values["memory"], "largest": tuple(values["memory"]["largest"])})
        if values["program"]:
            found = [Collective(**{**one, "first": tuple(one["first"])}) for one in values["program"]["collectives"]]
            values["program"] = Program(values["program"]["flops"], values["program"]["traffic"], tuple(found))
        return Compiled(**values)


def compile_request(request: Request, cache: Path | None = None, executable: Path | None = None) -> Compiled:
    """The compiled facts of a request, from the cache where they are known.

    executable: where to keep the program of a full compilation, for a pod to load. Raises ValueError in one sentence
    where the request makes no sense, ModuleNotFoundError where the TPU compiler is not installed, TimeoutError.
    """
    folder = cache or user_cache() / "plans"
    path = folder / f"{request.digest()}.json"
    # What is planned for the devices that are here says nothing of those of the next start.
    if request.slice is not None and path.exists() and not (executable and not executable.exists()):
        return Compiled.from_json(json.loads(path.read_text(encoding="utf-8")))
    if request.slice is not None and find_spec("libtpu") is None:
        raise ModuleNotFoundError("planning for TPUs needs their compiler: pip install 'unclip-jax[plan]' (libtpu)")
    compiled = _run(request, executable)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(compiled.to_json()), encoding="utf-8")
    part.replace(path)
    return compiled


def count_request(request: Request) -> dict[str, Any]:
    """What tracing alone says of a request: FLOPs by module, trips, bytes of the state; errors as compile_request."""
    with _worked(request._replace(depth="trace")) as (folder, _):
        return _facts(folder)


def _run(request: Request, executable: Path | None) -> Compiled:
    start = time.monotonic()
    with _worked(request) as (folder, peak):
        compiled = _read(folder, request, time.monotonic() - start, peak)
        if executable is not None and (folder / "executable").exists():
            executable.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "executable", executable)
    return compiled


@contextmanager
def _worked(request: Request) -> Iterator[tuple[Path, float]]:
    """The folder in which the child has done its work, for as long as it is read, and the child's peak memory."""
    start = time.monotonic()
    limit = FULL_LIMIT if request.depth == "full" else LIMIT
    with tempfile.TemporaryDirectory(prefix="unclip-plan-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request.to_json()))
        environment = {**os.environ, **(TPU_ENVIRONMENT if request.slice else {})}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        with (folder / "log.txt").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "unclip_jax.plan.worker", str(folder)], env=environment, stdout=log, stderr=log
            )
            try:
                peak = _wait(child, folder, request, start + limit)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
        yield folder, peak


def _wait(child: subprocess.Popen[bytes], folder: Path, request: Request, deadline: float) -> float:
    """Until the child has ended or its dump is complete; its peak memory in bytes."""
    peak, last = 0.0, -1
    while child.poll() is None:
        peak = max(peak, _resident(child.pid))
        if time.monotonic() > deadline:
            raise TimeoutError(f"the compiler has not come to buffer assignment in {LIMIT / 60:.0f} minutes")
        if request.slice is not None and request.depth == "memory":
            size = _complete(folder / "dump", request.slice.generation.usable)
            if size > 0 and size == last:
                break
            last = size
        time.sleep(0.1)  # its memory grows on as soon as it has said what is read
    return peak


def _complete(dump: Path, usable: float) -> int:
    """Bytes of the last file that is read, 0 before it is there: the report of memory, which says whether it fits.

    Near the limit the compiler has the last word: it either refuses, and ends, or goes on to the next file.
    """
    report = next(dump.glob("*memory-usage-report.txt"), None)
    if report is not None and abs(read_total(report) / usable - 1) < NEAR:
        report = next(dump.glob("*after_optimizations_after_buffer_assignment.txt"), None)
    return report.stat().st_size if report is not None else 0


def _resident(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024.0 * int(match[1]) if match else 0.0


def _read(folder: Path, request: Request, seconds: float, peak: float) -> Compiled:
    facts, failed = _facts(folder), folder / "failed.txt"
    if failed.exists():
        return Compiled(facts, None, None, *_refusal(failed.read_text()), seconds, peak)
    if request.slice is None:
        done = json.loads((folder / "done.json").read_text())
        total = float(done["argument"] + done["temp"] + done["output"] - done["alias"])
        arguments: dict[str, float] = defaultdict(float)
        for name, size in zip(facts["arguments"], facts["argument_bytes"], strict=True):
            arguments[name] += size
        memory = Memory(total, dict(arguments), 0.0, ())
        with (folder / "program.txt").open() as lines:
            return Compiled(facts, memory, read_program(lines, facts["trips"]), None, None, seconds, peak)
    dump = folder / "dump"
    memory = read_memory(dump, facts["arguments"])
    if memory.total > request.slice.generation.usable:  # a program that was taken to pieces to make it fit
        return Compiled(facts, memory, None, None, None, seconds, peak)
    with next(dump.glob("*after_optimizations.txt")).open() as lines:
        program = read_program(lines, facts["trips"])
    return Compiled(facts, memory, program, None, None, seconds, peak)


def _facts(folder: Path) -> dict[str, Any]:
    """What the worker said before compiling; its failure, where it did not come so far."""
    traced, failed = folder / "traced.json", folder / "failed.txt"
    if traced.exists():
        return json.loads(traced.read_text())
    if not failed.exists():
        log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"the planner's child process ended early: {log[-1] if log else 'it said nothing'}")
    kind, _, message = failed.read_text().partition("\n")
    raise ValueError(message if kind in ("ValueError", "UsageError") else f"{kind}: {message}")


def _refusal(failure: str) -> tuple[str, float | None]:
    """The compiler's sentence about memory, and the bytes that it asks for; RuntimeError for any other failure."""
    if not re.search(r"RESOURCE_EXHAUSTED|Ran out of memory|CompileTimeHbmOom", failure):
        raise RuntimeError(f"the compiler failed: {' '.join(failure.split())[:400]}")
    sentence = re.search(r"Ran out of memory[^\n]*?(?:\.(?=\s)|\n|$)", failure)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.search(r"(?:required|Used|total)[^()\d]*\(?([\d.]+)([KMGT])", failure)
    needs = float(sizes[1]) * units[sizes[2]] if sizes else None
    return (sentence[0].strip() if sentence else " ".join(failure.split())[:300]), needs
