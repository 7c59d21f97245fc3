"""The rows of a bench as text and as a plot."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from unclip_jax.config import Remat

Row = dict[str, Any]
FACTS = ("devices", "strategy", "batch", "remat")
HEAD = (
    *FACTS,
    "compile",
    "step",
    "p10 to p90",
    "images/s",
    "efficiency",
    "memory",
    "state",
    "plan step",
    "plan memory",
)


def efficiency(row: Row, rows: Sequence[Row]) -> tuple[float, int]:
    """Images/s per device beside those of the fewest devices with this batch and remat (their fastest row), and how
    many these are."""
    alike = [one for one in rows if "refused" not in one and all(one[f] == row[f] for f in ("batch", "remat"))]
    base = min(alike, key=lambda one: (one["devices"], -one["images_per_second"]))
    speed = row["images_per_second"] / row["devices"]
    return speed / (base["images_per_second"] / base["devices"]), base["devices"]


def line(row: Row) -> str:
    """A row by itself."""
    name = f"{row['devices']} x {row['strategy']}, batch {row['batch']}, remat {row['remat']}"
    if "refused" in row:
        return f"{name}: {row['refused']}"
    spread = f"({_ms(row['step_p10'])} to {_ms(row['step_p90'])})"
    speed = f"{row['images_per_second']:,.4g} images/s"
    return f"{name}: {_ms(row['step_median'])} ms {spread}, {speed}, {_size(row['memory_bytes'])} per device"


def table(rows: Sequence[Row], platform: str) -> str:
    """All rows, the reasons of those that were refused, and the fastest and the smallest."""
    rows = ordered(rows)
    if not rows:
        return "nothing was asked for"
    measured = [row for row in rows if "refused" not in row]
    lines = [list(HEAD), *([str(row[fact]) for fact in FACTS] + _cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(_aligned, cells, widths, range(len(widths)))).rstrip() for cells in lines]
    text += [f"refused: {line(row)}" for row in rows if "refused" in row]
    if measured:
        text.append(f"fastest: {line(max(measured, key=lambda row: row['images_per_second']))}")
        text.append(f"least memory: {line(min(measured, key=lambda row: row['memory_bytes']))}")
        text.append(f"memory is per device, {_source(measured)}; times in ms; reading data is left out")
    most = max(row["devices"] for row in rows)
    if platform == "cpu" and most > 1:
        text.append(
            f"these {most} devices share one processor: their efficiency says nothing of real ones, compare strategies "
            "with one another"
        )
    return "\n".join(text)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By devices, batch and remat, strategies as they were asked for."""
    return sorted(rows, key=lambda row: (row["devices"], row["batch"], get_args(Remat).index(row["remat"])))


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What was measured of a row, and what plan says."""
    plan = [_ms(row.get("plan_step")), _size(row.get("plan_memory_bytes"))]
    if "refused" in row:
        return ["", "refused", "", "", "", "", "", *plan]
    share, _ = efficiency(row, rows)
    return [
        f"{row['compile_seconds']:.1f} s", _ms(row["step_median"]), f"{_ms(row['step_p10'])} to {_ms(row['step_p90'])}",
        f"{row['images_per_second']:,.4g}", _percent(share), _size(row["memory_bytes"]), _size(row["state_bytes"]),
        *plan,
    ]  # fmt: skip


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (1, 3) else cell.rjust(width)


def _source(rows: Sequence[Row]) -> str:
    kinds = {row["memory_from"] for row in rows}
    told = {"device": "the device's own peak", "compiler": "as the compiler says"}
    return " or ".join(told[kind] for kind in sorted(kinds))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f}%"


def _size(count: int | float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Images/s with their spread, and memory per device, of all rows as a PNG; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("  no plot: pip install 'unclip-jax[bench]' (matplotlib)", file=sys.stderr)
        return False
    rows = ordered(rows)
    varies = [fact for fact in FACTS if len({row[fact] for row in rows}) > 1]
    fixed = ", ".join(_name(row, [fact for fact in FACTS if fact not in varies]) for row in rows[:1])
    strategies = list(dict.fromkeys(row["strategy"] for row in rows if row["devices"] > 1))
    colours = [f"C{strategies.index(row['strategy'])}" if row["devices"] > 1 else "0.5" for row in rows]
    unit, size = ("GiB", 2**30) if max(row.get("memory_bytes", 0) for row in rows) >= 2**30 else ("MiB", 2**20)
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(rows)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))
    for place, row, colour in zip(places, rows, colours, strict=True):
        if "refused" in row:
            said: Any = {
                "textcoords": "offset points",
                "va": "center",
                "fontsize": 7,
                "style": "italic",
                "color": "0.4",
            }
            speed.annotate(_cut(f"refused: {row['refused']}"), (0, place), (4, 0), **said)
        else:
            _bars(speed, memory, place, row, rows, colour, size)
        if row.get("plan_step"):
            speed.plot(row["batch"] / row["plan_step"], place, "D", mfc="none", mec="black")
        if row.get("plan_memory_bytes"):
            memory.plot(row["plan_memory_bytes"] / size, place, "D", mfc="none", mec="black")
    speed.set_yticks(places, [_name(row, varies) for row in rows], fontsize=8)
    speed.set(xlabel="images/s, p10 to p90, and scaling efficiency")
    speed.invert_yaxis()
    memory.set(xlabel=f"{unit} per device: training state (dark) and the rest")
    planned = "; diamonds: as planned" if any(row.get("plan_step") for row in rows) else ""
    figure.suptitle(f"{rows[0]['config']} on {rows[0]['kind']}{', ' if fixed else ''}{fixed}{planned}", fontsize=10)
    for axes in (speed, memory):
        axes.set_xlim(left=0, right=1.2 * max(axes.dataLim.x1, 1e-9))
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), dpi=120)
    return True


def _bars(speed: Any, memory: Any, place: int, row: Row, rows: Sequence[Row], colour: str, size: int) -> None:
    rate, slow, fast = (row["batch"] / row[f"step_{part}"] for part in ("median", "p90", "p10"))
    speed.barh(place, rate, color=colour, xerr=[[rate - slow], [fast - rate]], error_kw={"lw": 1, "capsize": 2})
    share, _ = efficiency(row, rows)
    speed.annotate(_percent(share), (fast, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    state, held = row["state_bytes"] / size, row["memory_bytes"] / size
    memory.barh(place, held, color=colour, alpha=0.4)
    memory.barh(place, min(state, held), color=colour)


def _name(row: Row, facts: Sequence[str]) -> str:
    """Some of what tells a row from others."""
    words = {"devices": "{} devices", "strategy": "{}", "batch": "batch {}", "remat": "remat {}"}
    single = row["devices"] == 1
    told = [words[fact].format(row[fact]) for fact in facts if not (single and fact in ("devices", "strategy"))]
    return ", ".join((["1 device"] if single and "devices" in facts else []) + told)


def _cut(text: str, most: int = 70) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
