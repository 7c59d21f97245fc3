"""A sweep's rows as plots: every metric along an axis, two axes as a map, and what one metric costs in another."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.evaluate.drawing import Setting
from unclip_jax.evaluate.quality import ABOUT
from unclip_jax.evaluate.sweep import BOUND, Row, describe, varied

SHOWN = ("faithfulness", "CLIP score", "CMMD", "FD", "FID", "diversity", "precision", "recall")
LINES = 6  # in one plot
DPI = 160
COLOURS = ("#0b5fa5", "#d1495b", "#2a9d8f", "#e9a03b", "#6a4c93", "#7f7f7f")
PAIRS = (("CMMD", "CLIP score"), ("diversity", "CLIP score"), ("diversity", "faithfulness"))
FIXED = ("faithfulness", "CLIP score")  # shown though no setting changes it


def plots_of(rows: Sequence[Row], own: Setting, floor: Mapping[str, float]) -> dict[str, dict[str, bytes]]:
    """PNG files by title and panel, of DPI pixels per inch; {} where matplotlib is not installed.

    own: the cascade's recommended setting, ringed. floor: what real pictures score, dashed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        return {}
    found = {}
    for axis in varied(rows):
        if lines := _lines(rows, axis):
            found[f"Along {axis.replace('_', ' ')}"] = _along(lines, axis, own, floor)
    names = [axis for axis in varied(rows) if _numeric(rows, axis)]
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            if grid := _grid(rows, first, second):
                found[f"{_title(first)} and {second.replace('_', ' ')}"] = _map(grid, first, second)
    if len(rows) > 2 and (panels := _trade(rows, own)):
        found["What one thing costs in another"] = panels
    return {title: {name: _png(panel) for name, panel in panels.items()} for title, panels in found.items()}


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()


def _names(rows: Sequence[Row]) -> list[str]:
    """The figures that these rows have in common and differ in."""
    found = {name: {row["figures"].get(name) for row in rows} for name in SHOWN}
    return [name for name, values in found.items() if None not in values and (len(values) > 1 or name in FIXED)]


def _numeric(rows: Sequence[Row], axis: str) -> bool:
    return all(isinstance(row["setting"].get(axis, 0), int | float) for row in rows)


def _title(name: str) -> str:
    text = name.replace("_", " ")
    return text[0].upper() + text[1:]


def _lines(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Rows that differ in one axis alone, named by what tells their lines apart; the first row's line first, then by
    length."""
    aside, names = {axis, *(BOUND if axis == "prior" else ())}, varied(rows)
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        if axis in row["setting"]:
            held = ((name, row["setting"].get(name)) for name in names if name not in aside)
            groups.setdefault(tuple(held), []).append(row)
    long = {common: group for common, group in groups.items() if len(group) > 1}
    chosen = sorted(long, key=lambda common: (rows[0] not in long[common], -len(long[common])))[:LINES]
    differ = [len(set(values)) > 1 for values in zip(*chosen, strict=True)]

    def label(common: tuple[tuple[str, Any], ...]) -> str:
        told = (pair for pair, differs in zip(common, differ, strict=True) if differs)
        return describe({name: value for name, value in told if value is not None})

    return {label(common): sorted(long[common], key=lambda row: row["setting"][axis]) for common in chosen}


def _panel(title: str = "", wide: float = 3.8, high: float = 2.8) -> tuple[Any, Any]:
    """A figure and its axes, inches wide and high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10)
    return figure, axes


def _along(lines: Mapping[str, Sequence[Row]], axis: str, own: Setting, floor: Mapping[str, float]) -> dict[str, Any]:
    """A panel for each metric, and one that names the lines."""
    found = {"lines": _legend(list(lines))} if len(lines) > 1 else {}
    for name in _names([row for group in lines.values() for row in group]):
        found[name], axes = _panel(name)
        for colour, group in zip(COLOURS, lines.values(), strict=False):
            held = [row for row in group if name in row["figures"]]
            _line(axes, held, axis, name, colour)
            axes.plot(*_ring(held, axis, own, name), "o", ms=10, mfc="none", mec="black", mew=1)
        if name == "CLIP score" and name in floor:
            axes.axhline(floor[name], color="0.4", lw=0.9, ls="--")
        _scale(axes, [row["setting"][axis] for group in lines.values() for row in group])
        axes.set_xlabel(axis.replace("_", " "), fontsize=9)
    return found


def _legend(names: Sequence[str]) -> Any:
    """What the lines' colours say."""
    columns = 3 if max(map(len, names)) < 12 else 1
    figure, axes = _panel(high=0.25 * -(-len(names) // columns) + 0.15)
    axes.set_axis_off()
    handles = [
        axes.plot([], [], "o-", ms=4, lw=1.4, color=colour)[0] for colour, _ in zip(COLOURS, names, strict=False)
    ]
    figure.legend(handles, names, fontsize=9, frameon=False, loc="center left", ncols=columns, columnspacing=1)
    return figure


def _line(axes: Any, rows: Sequence[Row], axis: str, name: str, colour: str) -> None:
    """One metric along an axis: a band of its noise, or bars where the axis has no numbers."""
    x = [row["setting"][axis] for row in rows]
    y = [row["figures"][name] for row in rows]
    error = [1.96 * row["errors"].get(name, 0.0) for row in rows]
    if x and isinstance(x[0], str):
        axes.errorbar(x, y, error, fmt="o", ms=4, capsize=2, elinewidth=0.8, color=colour)
        return
    axes.plot(x, y, "o-", ms=4, lw=1.4, color=colour)
    low, high = ([value + sign * e for value, e in zip(y, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.07, linewidth=0)


def _ring(rows: Sequence[Row], axis: str, own: Setting, name: str) -> tuple[list[Any], list[float]]:
    """Where the cascade's own setting is."""
    at = [row for row in rows if row["setting"] == own]
    return [row["setting"][axis] for row in at], [row["figures"][name] for row in at]


def _scale(axes: Any, values: Sequence[Any]) -> None:
    """Marks every value; on a logarithmic axis where they spread over more than a factor of ten."""
    marks = sorted(set(values))
    if isinstance(marks[0], str):
        axes.margins(x=0.3)
        return
    if marks[0] > 0 and marks[-1] / marks[0] >= 8:
        axes.set_xscale("log")
    axes.set_xticks(marks, [f"{value:g}" for value in marks])
    axes.minorticks_off()


def _grid(rows: Sequence[Row], first: str, second: str) -> dict[tuple[Any, Any], Row]:
    """The rows that differ from the first in these two alone, by their values; {} where no row differs in both."""
    base = rows[0]["setting"]
    common = {name: value for name, value in base.items() if name not in (first, second)}
    grid = {
        (row["setting"].get(first), row["setting"].get(second)): row
        for row in rows
        if common == {name: value for name, value in row["setting"].items() if name not in (first, second)}
    }
    crossed = any(x != base.get(first) and y != base.get(second) for x, y in grid)
    return grid if crossed and None not in {value for pair in grid for value in pair} else {}


def _map(grid: Mapping[tuple[Any, Any], Row], first: str, second: str) -> dict[str, Any]:
    """A panel for each metric: bright is better."""
    xs, ys = sorted({x for x, _ in grid}), sorted({y for _, y in grid})
    found = {}
    for name in _names(list(grid.values())):
        found[name], axes = _panel(name, 0.8 + 0.5 * max(len(ys), 4), 0.8 + 0.32 * max(len(xs), 4))
        values = [[grid[x, y]["figures"][name] if (x, y) in grid else float("nan") for y in ys] for x in xs]
        axes.grid(visible=False)
        worse = ABOUT[name][0] == "down"
        axes.imshow(values, aspect="auto", origin="lower", cmap="viridis_r" if worse else "viridis")
        known = [value for line in values for value in line if value == value]
        middle = (min(known) + max(known)) / 2
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    colour = "white" if (value > middle if worse else value <= middle) else "black"
                    axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(ys)), [f"{value:g}" for value in ys])
        axes.set_yticks(range(len(xs)), [f"{value:g}" for value in xs])
        axes.set_xlabel(second.replace("_", " "), fontsize=9)
        axes.set_ylabel(first.replace("_", " "), fontsize=9)
    return found


def _trade(rows: Sequence[Row], own: Setting) -> dict[str, Any]:
    """Every setting as a point, coloured by guidance, its size by steps."""
    from matplotlib.ticker import MaxNLocator

    found = {}
    for x, y in PAIRS:
        if not all(name in row["figures"] for name in (x, y) for row in rows):
            continue
        figure, axes = found[f"{x} and {y}"], _ = _panel(wide=4.4, high=3.3)
        points = axes.scatter(
            [row["figures"][x] for row in rows],
            [row["figures"][y] for row in rows],
            c=[row["setting"]["guidance"] for row in rows],
            s=[8 + 12 * row["setting"]["steps"] ** 0.5 for row in rows],
            cmap="plasma", alpha=0.75, linewidths=0.4, edgecolors="0.4",
        )  # fmt: skip
        at = [row for row in rows if row["setting"] == own]
        axes.plot([r["figures"][x] for r in at], [r["figures"][y] for r in at], "o", ms=12, mfc="none", mec="black")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        bar = figure.colorbar(points, ax=axes)
        bar.set_label("guidance", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return found
