"""Pictures per second of our loader beside webdataset with PyTorch's DataLoader: same JPEG tars, same work, same run.

    python tests/data/throughput.py --out tests/results/throughput.json     # some 10 minutes, on a machine at rest

Both decode a whole JPEG or, with --reduced, at the smallest of its scales that keeps twice the target side (libjpeg's
DCT scaling), resize its middle with antialiasing, encode the caption with CLIP's tokenizer and stack batches of 64;
both shuffle; both are timed after their first batches came, alternating between the two.
Then ours reads, as fast as it can, as many pictures as training takes in an hour at its own speed (that of a curve of
training on two cores), and the memory of all its processes is looked at on the way.
"""

import argparse
import io
import json
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.config import DataConfig
from unclip_jax.data.loader import batches
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.pictures import square

BATCH, CONTEXT = 64, 77


def write_tars(folder: Path, pictures: int, side: int = 384, per_tar: int = 500) -> None:
    """Smooth noisy JPEGs of side x side * 4 / 3 pixels, some 40 kB each, as a camera's would compress."""
    rng = np.random.default_rng(0)
    for first in range(0, pictures, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, pictures)):
                small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
                large = np.asarray(small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)).astype(np.int16)
                large = np.clip(large + rng.integers(-12, 13, large.shape, np.int16), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(large).save(buffer, "JPEG", quality=85)
                for ending, data in (("jpg", buffer.getvalue()), ("txt", f"noise number {number}, in colour".encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Work:
    """What is done to a sample, for webdataset: the same calls as ours."""

    def __init__(self, side: int, reduced: bool) -> None:
        self.side, self.reduced, self.tokenizer = side, reduced, ClipTokenizer(CONTEXT)

    def __call__(self, sample: tuple[bytes, bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        data, caption = sample
        image = Image.open(io.BytesIO(data))
        if self.reduced:
            image.draft(None, (2 * self.side, 2 * self.side))  # type: ignore[arg-type]
        tokens = self.tokenizer.encode([caption.decode()])
        return square(np.asarray(image.convert("RGB")), self.side), tokens.ids[0], tokens.mask[0]


def stack(rows: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Rows as arrays of a batch."""
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def theirs(folder: Path, side: int, workers: int, reduced: bool) -> Iterator[Any]:
    """Endless batches of webdataset."""
    import torch
    import webdataset

    torch.set_num_threads(1)
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=100, resampled=True, seed=0).shuffle(1000).to_tuple("jpg", "txt")
    data = data.map(Work(side, reduced)).batched(BATCH, collation_fn=stack)
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=2))


def ours(folder: Path, side: int, workers: int, reduced: bool) -> Iterator[Any]:
    """Endless batches of this package."""
    if not reduced:
        raise SystemExit(
            "ours always reads at the smallest scale that suffices; --whole times webdataset's plain decode"
        )
    config = DataConfig(
        source=f"tar:{folder}/*.tar", size=side, batch_size=BATCH, context_length=CONTEXT, workers=workers
    )
    return batches(config)


def rate(reader: Iterator[Any], seconds: float) -> float:
    """Pictures per second over some seconds."""
    for _ in islice(reader, 4):
        pass
    count, since = 0, time.perf_counter()
    while time.perf_counter() - since < seconds:
        next(reader)
        count += BATCH
    return count / (time.perf_counter() - since)


def resident() -> float:
    """MiB in memory of this process and all that it started, what they share counted once (proportional set size)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    own = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in own} - own:
        own |= more
    total = 0
    for number in own:
        with suppress(OSError):
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**10


def pictures_an_hour() -> int:
    """Pictures that training of the quick decoder sees in an hour on two cores."""
    lines = (resources.files("unclip_jax") / "weights/results/quick_decoder_curve.jsonl").read_text().splitlines()
    return int(3600 * np.median([json.loads(line)["images_per_second"] for line in lines]))


def memory(folder: Path, side: int, workers: int, pictures: int) -> dict[str, Any]:
    """Memory at 40 places while so many pictures are read, and how the second half differs from the first."""
    reader, batches_, found = ours(folder, side, workers, True), -(-pictures // BATCH), []
    since = time.perf_counter()
    for number, _ in enumerate(islice(reader, batches_)):
        if number % max(1, batches_ // 40) == 0:
            found.append(resident())
    seconds = time.perf_counter() - since
    middle, last = np.median(found[len(found) // 4 : len(found) // 2]), np.median(found[-len(found) // 4 :])
    return {
        "side": side,
        "pictures": batches_ * BATCH,
        "steps": batches_,
        "seconds": round(seconds),
        "mib": [round(value) for value in found],
        "second_quarter_mib": round(float(middle), 1),
        "last_quarter_mib": round(float(last), 1),
        "growth": round(float(last / middle - 1), 4),
    }


def main() -> None:
    """Times both at every side and prints one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--whole", action="store_true", help="webdataset decodes whole JPEGs, as its decode('pil') does"
    )
    parser.add_argument("--hour", type=int, help="pictures read for the look at memory (default: an hour's), 0: none")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["UNCLIP_CACHE_DIR"] = str(folder / "cache")
        write_tars(folder, options.pictures)
        rows = []
        for side in options.sides:
            found: dict[str, list[float]] = {"ours": [], "webdataset": []}
            for _ in range(options.rounds):
                for name, make in (("ours", ours), ("webdataset", theirs)):
                    reader = make(folder, side, options.workers, not options.whole or name == "ours")
                    found[name].append(rate(reader, options.seconds))
                    del reader
            row = {"side": side, "workers": options.workers, "cpu": platform.processor() or platform.machine()}
            row |= {name: [round(value, 1) for value in values] for name, values in found.items()}
            row |= {"ratio": round(float(np.median(found["ours"]) / np.median(found["webdataset"])), 3)}
            row |= {"whole": options.whole}
            print(json.dumps(row), flush=True)
            rows.append(row)
        result: dict[str, Any] = {"cores": os.cpu_count(), "batch": BATCH, "pictures": options.pictures, "rates": rows}
        hour = pictures_an_hour() if options.hour is None else options.hour
        if hour:
            result["memory"] = memory(folder, options.sides[0], options.workers, hour)
            print(json.dumps(result["memory"]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
