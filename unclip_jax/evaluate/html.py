"""One page that explains an evaluation: self-contained, pictures inside, fit to send to somebody."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.evaluate.drawing import Setting
from unclip_jax.evaluate.quality import ABOUT
from unclip_jax.evaluate.recommend import Advice
from unclip_jax.evaluate.sweep import Row, describe, varied

SIDE = 96  # px, of a picture on the page
ARROWS = {"up": "&uarr;", "down": "&darr;", "": ""}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;max-width:1180px;margin:2em auto;padding:0 1.2em}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #d8dee6}
table{border-collapse:collapse;font-size:13px}th,td{padding:3px 9px;text-align:right;white-space:nowrap}
th{border-bottom:1px solid #8a97a6;position:sticky;top:0;background:#fff;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:13em}
tr.own td{background:#f3f6fa}tr.best td{background:#e5f4ea}tr:hover td{background:#fff8e0}
.noise{color:#7b8896;font-size:11px}.scroll{overflow-x:auto}img{max-width:100%}
.strip{display:flex;align-items:center;gap:1em;margin:.25em 0}.strip span{width:17em;font-size:13px;flex:none}
.advice{background:#e5f4ea;border-left:4px solid #2a9d8f;padding:.6em 1em}dt{font-weight:600}dd{margin:0 0 .3em 1.5em}
.facts{color:#566473;font-size:13px}details{margin:.4em 0}
"""


def page(
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    own: Setting,
    *,
    floor: Mapping[str, float],
    advice: Advice | None,
    plots: Mapping[str, bytes],
    strips: Mapping[str, UInt8[np.ndarray, "_ _ _ 3"]],
    sheets: Mapping[str, UInt8[np.ndarray, "_ _ 3"]],
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> str:
    """The page's HTML.

    facts: what was measured, on what. plots: PNG files by title. strips: pictures by a row's key, and "real".
    sheets, tables: further contact sheets and figures by title.
    """
    parts = [f"<h1>{escape(title)}</h1>", _facts(facts)]
    if advice is not None:
        parts.append("<h2>In short</h2>" + _advice(advice))
    for name, plot in plots.items():
        parts.append(f"<h2>{escape(name)}</h2>{image_tag(plot, name)}")
    if plots:
        parts.append(
            "<p>Bars and intervals are 1.96 standard errors over captions. All settings draw the same captions from "
            "the same seeds, so that their differences are surer than the bars. A ring marks what the cascade "
            "recommends, a dashed line the real pictures. Maps are bright where it is better, points large where there "
            "are many steps.</p>"
        )
    parts.append(f"<h2>Every setting</h2>{_table(rows, own, floor, advice)}")
    if strips:
        parts.append(f"<h2>The same captions under every setting</h2>{_strips(rows, own, strips)}")
    for name, sheet in sheets.items():
        parts.append(f"<h2>{escape(name)}</h2>{_small(tables.get(name))}{image_tag(png(sheet), name)}")
    parts += [f"<h2>{escape(name)}</h2>{_small(table)}" for name, table in tables.items() if name not in sheets]
    parts.append(f"<h2>What the columns say</h2>{_glossary(rows)}")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def image_tag(data: bytes, name: str) -> str:
    """An <img> that holds its PNG."""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [f"<b>{escape(name)}</b> {escape(str(value))}" for name, value in facts.items()]
    return f'<p class="facts">{"<br>".join(lines)}</p>'


def _advice(advice: Advice) -> str:
    return f'<div class="advice">{" ".join(escape(sentence) for sentence in advice.sentences)}</div>'


def _columns(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["figures"])
    return [name for name in ABOUT if name in found] + [name for name in found if name not in ABOUT]


def _table(rows: Sequence[Row], own: Setting, floor: Mapping[str, float], advice: Advice | None) -> str:
    names, columns = varied(rows) or ["guidance", "steps", "sampler", "prior"], _columns(rows)
    head = [*(name.replace("_", " ") for name in names), *(f"{c} {ARROWS[ABOUT.get(c, ('', ''))[0]]}" for c in columns)]
    lines = ["".join(f"<th>{cell}</th>" for cell in [*head, "pictures/s"])]
    for number, row in enumerate(rows):
        best = advice is not None and row is advice.row
        kind = "best" if best else "own" if row["setting"] == own else ""
        cells = [_value(row["setting"].get(name, "")) for name in names]
        if advice is not None and advice.as_good[number]:
            cells[0] += " &#10003;"
        cells += [_cell(row, column) for column in columns]
        timed = row.get("seconds") and not row.get("compiled")
        cells.append(f"{row['n'] / row['seconds']:.3g}" if timed else "")
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
        lines[-1] = f'<tr class="{kind}">{lines[-1]}</tr>'
    if floor:
        cells = ["real pictures (distances: of other captions)", *[""] * (len(names) - 1)]
        cells += [f"{floor[column]:.3f}" if column in floor else "" for column in columns]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, ""]) + "</tr>")
    note = "<p class=facts>Grey rows: the cascade's own recommendation"
    note += "; green: recommended here; &#10003;: as good within noise.</p>" if advice is not None else ".</p>"
    return f'<div class="scroll"><table><tr>{lines[0]}</tr>{"".join(lines[1:])}</table></div>{note}'


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _cell(row: Row, column: str) -> str:
    if column not in row["figures"]:
        return ""
    error = row["errors"].get(column)
    noise = f' <span class="noise">&plusmn;{1.96 * error:.3f}</span>' if error else ""
    return f"{row['figures'][column]:.3f}{noise}"


def _strips(rows: Sequence[Row], own: Setting, strips: Mapping[str, np.ndarray]) -> str:
    names = varied(rows) or list(own)
    named = [("the real pictures", strips["real"])] if "real" in strips else []
    for row in rows:
        if row["key"] in strips:
            words = describe({name: row["setting"][name] for name in names if name in row["setting"]})
            named.append((words + (" (as recommended)" if row["setting"] == own else ""), strips[row["key"]]))
    lines = []
    for name, pictures in named:
        joined = np.concatenate([_resized(picture) for picture in pictures], axis=1)
        lines.append(f'<div class="strip"><span>{escape(name)}</span>{image_tag(png(joined), name)}</div>')
    return "".join(lines)


def _resized(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "96 96 3"]:
    way = Image.Resampling.NEAREST if picture.shape[0] < SIDE else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), way))


def _small(figures: Mapping[str, Mapping[str, float]] | None) -> str:
    if not figures:
        return ""
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in ["", *columns])
    lines = [
        f"<td>{escape(name)}</td>" + "".join(f"<td>{row[c]:.3f}</td>" if c in row else "<td></td>" for c in columns)
        for name, row in figures.items()
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _glossary(rows: Sequence[Row]) -> str:
    told = [(name, *ABOUT[name]) for name in _columns(rows) if name in ABOUT]
    words = {"up": " More is better.", "down": " Less is better.", "": ""}
    return "<dl>" + "".join(f"<dt>{n}</dt><dd>{escape(text)}.{words[way]}</dd>" for n, way, text in told) + "</dl>"
