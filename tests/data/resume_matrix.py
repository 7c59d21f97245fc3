"""Training that is killed at random points, or read by several processes, sees exactly the same records.

    python tests/data/resume_matrix.py --out tests/results/resume_order.json

A small CLIP is trained by the real command from a folder of pictures. Every run's reader writes which captions a step
saw, from inside the training process; it is killed by SIGKILL at 20 random moments and started again each time. What
the last attempt at every step read has to equal an uninterrupted run, byte for byte, and so have the final weights.
Then 1, 2 and 4 processes each read their own rows of every batch; together they have to be the same.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = """
from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig, TransformerConfig

def get_config() -> TrainConfig:
    tower = TransformerConfig(width=16, layers=1, heads=2)
    text = TransformerConfig(width=16, layers=1, heads=2, causal=True)
    network = ClipConfig(8, 16, 8, tower, text, context_length=8)
    data = DataConfig(source="folder:{folder}", size=16, batch_size=8, context_length=8, workers={workers})
    return TrainConfig("killed", network, data=data, optim=OptimConfig(warmup=2), steps={steps}, save_every=5,
        log_every=1, preview_every=10**6)
"""
# The training process, with every batch that it is given written down before it is used.
RUN = """
import hashlib, sys, time
import unclip_jax.run as run
from unclip_jax.cli import main

if __name__ == "__main__":
    place, seconds = sys.argv[1], float(sys.argv[2])
    batches = run.batches

    def told(*arguments, start=0, **options):
        with open(place, "a") as file:
            for step, batch in enumerate(batches(*arguments, start=start, **options), start):
                digest = hashlib.sha256(batch.image.tobytes() + batch.tokens.tobytes()).hexdigest()[:16]
                file.write(f"{step} {digest}\\n")
                file.flush()
                time.sleep(seconds)  # so that moments lie in steps
                yield batch

    run.batches = told
    sys.exit(main(sys.argv[3:]))
"""


# One of several processes, which reads its rows of every batch and writes down what each shows.
READ = """
import hashlib, sys
from itertools import islice
import numpy as np
from unclip_jax.config import DataConfig
from unclip_jax.data.loader import batches

if __name__ == "__main__":
    folder, place, index, count, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    config = DataConfig(source=f"folder:{folder}", size=16, batch_size=8, context_length=8, workers=index % 2)
    rows = np.arange(8)[index * 8 // count : (index + 1) * 8 // count]
    with open(place, "w") as file:
        for step, batch in enumerate(islice(batches(config, rows=rows), steps)):
            for row, image, tokens in zip(rows, batch.image, batch.tokens):
                digest = hashlib.sha256(image.tobytes() + tokens.tobytes()).hexdigest()[:16]
                file.write(f"{step * 8 + row} {digest}\\n")
"""


def order_of(place: Path, count: int, steps: int) -> str:
    """Digest of what every row showed, read by so many processes at once."""
    (place / "read.py").write_text(READ)
    environment = os.environ | {"UNCLIP_CACHE_DIR": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
    paths = [place / f"rows-{index}-of-{count}" for index in range(count)]
    command = [sys.executable, str(place / "read.py"), str(place / "pictures")]
    readers = [
        subprocess.Popen([*command, *map(str, (path, index, count, steps))], env=environment)
        for index, path in enumerate(paths)
    ]
    if any([reader.wait() for reader in readers]):
        raise SystemExit("a process that reads failed")
    lines = sorted((line for path in paths for line in path.read_text().splitlines()), key=lambda x: int(x.split()[0]))
    if [int(line.split()[0]) for line in lines] != list(range(8 * steps)):
        raise SystemExit(f"{count} processes did not read every row once")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_pictures(folder: Path, count: int = 100) -> None:
    """Pictures of noise with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"noise {number}\nnumber {number}")


def start(place: Path, name: str, seconds: float) -> subprocess.Popen:
    """Starts, or goes on with, a run."""
    command = [sys.executable, str(place / "run.py"), str(place / f"{name}.log"), str(seconds), "train"]
    command += ["--config", str(place / "config.py"), "--out", str(place / name)]
    environment = os.environ | {"UNCLIP_CACHE_DIR": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
    quiet = (place / f"{name}.err").open("a")
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def seen(place: Path, name: str) -> dict[int, str]:
    """What the last attempt at every step read."""
    lines = (place / f"{name}.log").read_text().splitlines() if (place / f"{name}.log").exists() else []
    pairs = [line.split() for line in lines]
    return {int(pair[0]): pair[1] for pair in pairs if len(pair) == 2 and len(pair[1]) == 16}


def written(place: Path, name: str) -> int:
    """Bytes that a run's reader wrote."""
    path = place / f"{name}.log"
    return path.stat().st_size if path.exists() else 0


def weights(place: Path, name: str) -> str:
    """Digest of the arrays of the weights that a run left, without the header, which tells versions."""
    data = (place / name / "clip.safetensors").read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:16]


def children_of(session: int) -> int:
    """How many processes of a killed run still live."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += int(fields[3]) == session and fields[0] != "Z"
    return found


def main() -> None:
    """Runs both, prints one JSON line, and fails where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.05, help="that a batch takes at least")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance, killed, left = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_pictures(place / "pictures")
        settings = {"folder": place / "pictures", "workers": options.workers, "steps": options.steps}
        (place / "config.py").write_text(CONFIG.format(**settings))
        (place / "run.py").write_text(RUN)
        if start(place, "whole", 0).wait():
            raise SystemExit((place / "whole.err").read_text()[-2000:])
        for target in sorted(chance.sample(range(1, options.steps - 5), options.kills)):
            already, run = written(place, "killed"), start(place, "killed", options.seconds)
            while run.poll() is None and (
                written(place, "killed") == already or max(seen(place, "killed"), default=0) < target
            ):
                time.sleep(0.01)
            time.sleep(chance.random() * 0.2)
            if run.poll() is not None:
                break
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            killed.append(max(seen(place, "killed"), default=0))
            time.sleep(0.5)
            left += children_of(run.pid)
        if start(place, "killed", 0).wait():
            raise SystemExit((place / "killed.err").read_text()[-2000:])
        same = seen(place, "killed") == seen(place, "whole") and len(seen(place, "whole")) >= options.steps
        row = {
            "kills": len(killed),
            "at": killed,
            "steps": options.steps,
            "workers": options.workers,
            "same_records": same,
            "processes_left": left,
        }
        row |= {"same_weights": weights(place, "killed") == weights(place, "whole")}
        row |= {"orders": {count: order_of(place, count, options.steps) for count in (1, 2, 4)}}
    print(json.dumps(row))
    if options.out:
        options.out.write_text(json.dumps(row) + "\n")
    if left or not (row["same_records"] and row["same_weights"]):
        raise SystemExit("a run that was killed left processes, or read or learned something else")
    if len(set(row["orders"].values())) > 1:
        raise SystemExit("another number of processes read another order")


if __name__ == "__main__":
    main()
