"""Runs the notebooks with the code of this checkout, keeps their outputs, and makes the README's strips of them.

    python tests/notebooks/execute.py --out runs/notebooks
    UNCLIP_FAST=1 python tests/notebooks/execute.py 01_sample 02_edit --out runs/notebooks
    python tests/notebooks/execute.py --out runs/notebooks --pictures .github/pictures

A cell that fails ends it, with the notebook's own message. With UNCLIP_FAST=1 all four take a few minutes on two cores.
"""

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parents[2]
SHOWN = {  # the cells whose pictures make a notebook's strip
    "01_sample": ("stages", "guidance", "steps"),
    "02_edit": ("inpaint", "diff", "interpolate"),
    "03_train": ("curves", "sample"),
    "04_sharding": ("memory", "collectives"),
}
WIDTH, LIMIT = 1000, 150_000  # of a strip: px, bytes
SECONDS = 3600  # that a cell may take


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder`; raises CellExecutionError where a cell fails."""
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def pictures(book: nbformat.NotebookNode, cells: tuple[str, ...]) -> list[Image.Image]:
    """What some cells showed, in their order."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", []) if cell.id in cells else []:
            if png := output.get("data", {}).get("image/png"):
                found.append(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    return found


def strip(shown: list[Image.Image]) -> bytes:
    """Pictures one below the other, as a JPEG of at most LIMIT bytes."""
    shown = [one.resize((WIDTH, round(one.height * WIDTH / one.width)), Image.Resampling.LANCZOS) for one in shown]
    whole = Image.new("RGB", (WIDTH, sum(one.height for one in shown)), "white")
    top = 0
    for one in shown:
        whole.paste(one, (0, top))
        top += one.height
    for quality in range(90, 20, -5):
        file = io.BytesIO()
        whole.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= LIMIT:
            break
    return file.getvalue()


def main() -> int:
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"{', '.join(names)} (all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the notebooks with their outputs")
    parser.add_argument("--pictures", type=Path, help="folder for the strips")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # what a notebook compiles it runs for long
    for name in options.names or names:
        begun = time.monotonic()
        try:
            book = execute(ROOT / "notebooks" / f"{name}.ipynb", options.out)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        nbformat.write(book, options.out / f"{name}.ipynb")
        if options.pictures is not None:
            data = strip(pictures(book, SHOWN[name]))
            (options.pictures / f"notebook_{name}.jpg").write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
