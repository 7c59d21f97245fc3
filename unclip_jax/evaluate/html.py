"""One page that explains an evaluation: self-contained, pictures inside, fit to send to somebody."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.evaluate.drawing import Setting
from unclip_jax.evaluate.plots import DPI
from unclip_jax.evaluate.quality import ABOUT
from unclip_jax.evaluate.recommend import Advice
from unclip_jax.evaluate.sweep import Row, describe, varied

SIDE = 96  # px, of a picture on the page
UNFOLDED = 10  # strips that are shown at once
WAYS = {"up": " More is better.", "down": " Less is better.", "": ""}
ARROWS = {"up": "&uarr;", "down": "&darr;", "": ""}
STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--soft:#566473;--paper:#fff;--line:#ccd4de;--own:#e6edf6;--best:#d8f0e0}
@media(prefers-color-scheme:dark){
:root{--ink:#e4e9ef;--soft:#a3b0be;--paper:#14181d;--line:#3a444f;--own:#26313e;--best:#1b4030}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1200px;margin:2em auto;
padding:0 1em;overflow-wrap:anywhere}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid var(--line)}
img{max-width:100%;height:auto;background:#fff}.scroll{overflow:auto;max-height:90vh}img.sheet{min-width:600px}
.panels{display:flex;flex-wrap:wrap;gap:.8em;align-items:flex-start}.panels img{border-radius:4px}
table{border-collapse:separate;border-spacing:0;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:3px 8px;text-align:right;white-space:nowrap;background:var(--paper)}
th{white-space:normal;overflow-wrap:normal;position:sticky;top:0;z-index:1;
border-bottom:1px solid var(--soft);vertical-align:bottom}
td:first-child,th:first-child{text-align:left;white-space:normal;overflow-wrap:normal;position:sticky;left:0}
td:first-child{min-width:min(13em,32vw)}td.text{text-align:left;white-space:normal;min-width:16em}
tr.own td{background:var(--own)}tr.best td{background:var(--best)}tr:hover td{text-decoration:underline}
.noise{color:var(--soft);font-size:11px}.facts{color:var(--soft);font-size:13px}
.strip{display:flex;flex-wrap:wrap;align-items:center;gap:.2em 1em;margin:.35em 0}
.strip span{flex:0 0 17em;font-size:13px}summary{cursor:pointer;margin:.6em 0}
.advice{background:var(--best);border-left:4px solid #2a9d8f;padding:.6em 1em}
dt{font-weight:600}dd{margin:0 0 .3em 1.5em}
"""


def page(
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    own: Setting,
    *,
    floor: Mapping[str, float],
    advice: Advice | None,
    plots: Mapping[str, Mapping[str, bytes]],
    captions: Sequence[str],
    strips: Mapping[str, UInt8[np.ndarray, "_ _ _ 3"]],
    sheets: Mapping[str, UInt8[np.ndarray, "_ _ 3"]],
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> str:
    """The page's HTML, which reads on a phone and in the dark.

    facts: what was measured, on what. plots: PNG files by title and panel. captions: of the pictures of strips, which
    come by a row's key, and "real". sheets, tables: further contact sheets and figures by title.
    """
    parts = [f"<h1>{escape(title)}</h1>", _facts(facts)]
    if advice is not None:
        parts.append("<h2>In short</h2>" + _advice(advice))
    for name, panels in plots.items():
        tags = "".join(image_tag(panel, f"{name}: {what}", 96 / DPI) for what, panel in panels.items())
        parts.append(f'<h2>{escape(name)}</h2><div class="panels">{tags}</div>')
    if plots:
        parts.append(
            "<p>Bands, bars and intervals are 1.96 standard errors over captions. All settings draw the same captions "
            "from the same seeds, so that their differences are surer than those. A ring marks what the cascade "
            "recommends, a dashed line the real pictures. Maps are bright where it is better, points large where there "
            "are many steps. The table has the numbers.</p>"
        )
    if len(rows) == 1:
        parts.append(f"<h2>{escape(describe(rows[0]['setting']))}</h2>{_single(rows[0], floor)}")
    else:
        parts.append(f"<h2>Every setting</h2>{_table(rows, own, floor, advice)}")
    if strips:
        told = "; ".join(escape(caption) for caption in captions)
        name = "The same captions under every setting" if len(rows) > 1 else "The first pictures"
        parts.append(f'<h2>{name}</h2><p class="facts">From the left: {told}.</p>')
        parts.append(_strips(rows, own, strips))
    for name, sheet in sheets.items():
        tag = f'<div class="scroll">{image_tag(png(sheet), name, kind="sheet")}</div>'
        parts.append(f"<h2>{escape(name)}</h2>{_small(tables.get(name))}{tag}")
    parts += [f"<h2>{escape(name)}</h2>{_small(table)}" for name, table in tables.items() if name not in sheets]
    names = [column for table in tables.values() for row in table.values() for column in row]
    if told := _glossary(dict.fromkeys([*(_columns(rows) if len(rows) > 1 else []), *names])):
        parts.append(f"<h2>What the columns say</h2>{told}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def image_tag(data: bytes, name: str, scale: float = 1.0, kind: str = "") -> str:
    """An <img> that holds its PNG, shown `scale` times as large as it has pixels."""
    width, height = (round(scale * int.from_bytes(data[at : at + 4], "big")) for at in (16, 20))
    held = base64.b64encode(data).decode()
    sides = f'class="{kind}" width={width} height={height}'
    return f'<img alt="{escape(name)}" {sides} src="data:image/png;base64,{held}">'


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [f"<b>{escape(name)}</b> {escape(str(value))}" for name, value in facts.items()]
    return f'<p class="facts">{"<br>".join(lines)}</p>'


def _advice(advice: Advice) -> str:
    return f'<div class="advice">{" ".join(escape(sentence) for sentence in advice.sentences)}</div>'


def _columns(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["figures"])
    return [name for name in ABOUT if name in found] + [name for name in found if name not in ABOUT]


def _single(row: Row, floor: Mapping[str, float]) -> str:
    """The one row of a page, a line for each metric, with what it says."""
    lines = ["<th></th><th>value</th><th>real pictures</th><th></th>"]
    for name in _columns([row]):
        way, text = ABOUT.get(name, ("", ""))
        real = f"{floor[name]:.3f}" if name in floor else ""
        said = f'<td class="text">{escape(text)}.{WAYS[way]}</td>'
        lines.append(f"<td>{escape(name)} {ARROWS[way]}</td><td>{_cell(row, name)}</td><td>{real}</td>{said}")
    note = "<p class=facts>Distances between real pictures are to those of other captions.</p>" if floor else ""
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>{note}'


def _table(rows: Sequence[Row], own: Setting, floor: Mapping[str, float], advice: Advice | None) -> str:
    names, columns = _named(rows, own), _columns(rows)
    head = ["setting", *(f"{escape(column)} {ARROWS[ABOUT.get(column, ('', ''))[0]]}" for column in columns)]
    lines = ["".join(f"<th>{cell}</th>" for cell in [*head, "pictures/s"])]
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        best = advice is not None and row is advice.row
        kind = "best" if best else "own" if row["setting"] == own else ""
        good = "&nbsp;&#10003;" if advice is not None and advice.as_good[number] else ""
        timed = row.get("seconds") and not row.get("compiled")
        cells = [escape(name) + good, *(_cell(row, column) for column in columns)]
        cells.append(f"{row['n'] / row['seconds']:.3g}" if timed else "")
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
        lines[-1] = f'<tr class="{kind}">{lines[-1]}</tr>'
    if floor:
        cells = ["real pictures (distances: of other captions)"]
        cells += [f"{floor[column]:.3f}" if column in floor else "" for column in columns]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, ""]) + "</tr>")
    note = "<p class=facts>Grey: as the cascade recommends"
    note += "; green: recommended here; &#10003;: as good within noise.</p>" if advice is not None else ".</p>"
    return f'<div class="scroll"><table><tr>{lines[0]}</tr>{"".join(lines[1:])}</table></div>{note}'


def _named(rows: Sequence[Row], own: Setting) -> list[str]:
    """Every row in words: what differs between them."""
    names = varied(rows) or list(own)
    told = [describe({name: row["setting"][name] for name in names if name in row["setting"]}) for row in rows]
    return [
        words + (" (as recommended)" if row["setting"] == own else "") for words, row in zip(told, rows, strict=True)
    ]


def _cell(row: Row, column: str) -> str:
    if column not in row["figures"]:
        return ""
    error = row["errors"].get(column)
    noise = f' <span class="noise">&plusmn;{1.96 * error:.3f}</span>' if error else ""
    return f"{row['figures'][column]:.3f}{noise}"


def _strips(rows: Sequence[Row], own: Setting, strips: Mapping[str, np.ndarray]) -> str:
    named = [("the real pictures", strips["real"])] if "real" in strips else []
    named += [
        (name, strips[row["key"]]) for row, name in zip(rows, _named(rows, own), strict=True) if row["key"] in strips
    ]
    lines = []
    for name, pictures in named:
        joined = np.concatenate([_resized(picture) for picture in pictures], axis=1)
        lines.append(f'<div class="strip"><span>{escape(name)}</span>{image_tag(png(joined), name)}</div>')
    shown, folded = lines[:UNFOLDED], lines[UNFOLDED:]
    if folded:
        shown.append(f"<details><summary>{len(folded)} further settings</summary>{''.join(folded)}</details>")
    return "".join(shown)


def _resized(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "96 96 3"]:
    way = Image.Resampling.NEAREST if picture.shape[0] < SIDE else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), way))


def _small(figures: Mapping[str, Mapping[str, float]] | None) -> str:
    """A table whose columns `x low` and `x high` are the interval of x."""
    if not figures:
        return ""
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    ends = {f"{column} {end}" for column in columns for end in ("low", "high")}
    columns = [column for column in columns if column not in ends]

    def cell(row: Mapping[str, float], column: str) -> str:
        value = f"{row[column]:.3f}" if column in row else ""
        if f"{column} low" in row:
            value += f' <span class="noise">{row[f"{column} low"]:.3f} to {row[f"{column} high"]:.3f}</span>'
        return f"<td>{value}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    lines = [f"<td>{escape(name)}</td>{''.join(cell(row, c) for c in columns)}" for name, row in figures.items()]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _glossary(names: Iterable[str]) -> str:
    told = [(name, *ABOUT[name]) for name in names if name in ABOUT]
    lines = "".join(f"<dt>{escape(n)}</dt><dd>{escape(text)}.{WAYS[way]}</dd>" for n, way, text in told)
    return f"<dl>{lines}</dl>" if told else ""
