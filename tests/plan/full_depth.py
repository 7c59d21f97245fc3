"""Plans of small networks stopped after buffer assignment, beside the same compiled to the end: both must say the same.

    python tests/plan/full_depth.py [CONFIG:SLICE ...] --out tests/results/plan_full_depth.json

What the suite has no time for: minutes for each. What is in the file and matches its versions is not done again.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unclip_jax.overrides import load_config
from unclip_jax.plan.command import request_of
from unclip_jax.plan.compiler import Compiled, _read, _worked
from unclip_jax.plan.slices import parse_slice

CASES = [f"{name}:{place}" for name in ("quick_decoder", "emoji_prior", "quick_clip") for place in ("v5e-8", "v5p-8")]


@dataclass(frozen=True)
class Row:
    """One step at both depths: memory and FLOPs per chip, seconds and GiB of planning.

    finished: arguments, temporaries, outputs, and those of them that lie in arguments, as jax's `memory_analysis` has
    them of the finished program. Not compared: its temporaries are more than all memory of one, and 0 of another.
    """

    config: str
    slice: str
    batch: int
    memory: float
    full_memory: float
    finished: dict[str, float]
    flops: float
    full_flops: float
    same_memory: bool
    same_program: bool
    executable_bytes: int
    seconds: float
    full_seconds: float
    gib: float
    full_gib: float


def compare(name: str, place: str) -> Row:
    """Compiles one training step twice."""
    found: dict[str, Compiled] = {}
    done: dict[str, Any] = {}
    size, batch = 0, 0
    for depth in ("memory", "full"):
        options = argparse.Namespace(what="train", batch=None, clip=None, depth=depth)
        request = request_of(options, load_config(name), parse_slice(place), "fsdp", None)
        start = time.monotonic()
        with _worked(request) as (folder, peak):
            found[depth] = _read(folder, request, time.monotonic() - start, peak)
            if depth == "full":
                done, size = json.loads((folder / "done.json").read_text()), (folder / "executable").stat().st_size
        batch = request.batch
    short, full = found["memory"], found["full"]
    assert short.memory and full.memory and short.program and full.program
    finished = {part: float(done[part]) for part in ("argument", "temp", "output", "alias")}
    return Row(
        name, place, batch, short.memory.total, full.memory.total, finished, short.program.flops, full.program.flops,
        short.memory == full.memory, short.program == full.program, size,
        short.seconds, full.seconds, short.peak_memory / 2**30, full.peak_memory / 2**30,
    )  # fmt: skip


def main() -> None:
    """Completes the file and fails where a row's two depths differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CONFIG:SLICE", help=f"(default {' '.join(CASES)})")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = kept["rows"] if kept.get("versions") == versions else []
    for case in options.cases:
        name, _, place = case.partition(":")
        if not any((row["config"], row["slice"]) == (name, place) for row in rows):
            rows.append(asdict(compare(name, place)))
            print(json.dumps(rows[-1]), flush=True)
        command = f"python tests/plan/full_depth.py --out {options.out}"
        options.out.write_text(json.dumps({"command": command, "versions": versions, "rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if not (row["same_memory"] and row["same_program"] and row["executable_bytes"])]
    sys.exit(f"the depths differ: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
