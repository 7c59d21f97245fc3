"""Which setting a sweep supports: the cheapest that no other beats by more than the noise of so few pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from unclip_jax.evaluate.drawing import Setting
from unclip_jax.evaluate.quality import bootstrapped_cmmd
from unclip_jax.evaluate.sweep import Row, describe, read_scores, varied

Z = 1.96  # standard errors of a difference that count as noise


class Advice(NamedTuple):
    """The chosen row, whether the cascade's own setting is as good, and both in sentences.

    as_good: of every row, in their order.
    """

    row: Row
    as_good: tuple[bool, ...]
    supported: bool
    sentences: tuple[str, ...]


def recommended(rows: Sequence[Row], own: Setting, folder: Path, real: Float[np.ndarray, "n d"]) -> Advice:
    """What the rows support; rows share captions and seeds, so that differences are taken picture by picture.

    First stay the settings whose faithfulness (without scenes: CLIP score) is not below the highest by more than Z
    standard errors of the paired difference; then those of them whose CMMD is not above their lowest by more than that
    (a paired bootstrap); of these, the one with the fewest steps, then the cascade's own, then the lowest CMMD.
    own: the cascade's recommendation. real: features of the real pictures. ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to choose from: raise --budget")
    scores = [read_scores(folder, row["key"]) for row in rows]
    each = np.stack([score for _, score in scores]).astype(np.float64)
    faithful = _within(-each)
    draws = np.stack([bootstrapped_cmmd(real, features) for features, _ in scores])
    values = np.array([row["figures"].get("CMMD", float(draw.mean())) for row, draw in zip(rows, draws, strict=True)])
    close = _near(values, draws, faithful)
    good: list[int] = np.flatnonzero(faithful & close).tolist()
    order = sorted(good, key=lambda i: (rows[i]["setting"]["steps"], rows[i]["setting"] != own, values[i]))
    chosen = rows[order[0]]
    place = next((i for i, row in enumerate(rows) if row["setting"] == own), None)
    supported = place is not None and place in good
    best = rows[int(each.mean(1).argmax())]
    name = "faithfulness" if "faithfulness" in best["figures"] else "CLIP score"
    names = varied(rows)

    def told(setting: Setting) -> str:
        return describe({word: setting[word] for word in names if word in setting})

    sentences = [
        f"The highest {name}, {each.mean(1).max():.3f}, is that of: {told(best['setting'])}.",
        f"{int(faithful.sum())} of {len(rows)} settings are within its noise, and {len(good)} of these within the "
        f"noise of the lowest CMMD among them, {values[faithful].min():.3f}.",
        f"Of those the one with the fewest steps is recommended: {told(chosen['setting'])}.",
    ]
    if place is not None:
        verdict = (
            "is among them" if supported else _lacking(bool(faithful[place]), name, *values[[place, order[0]]].tolist())
        )
        sentences.append(f"What the cascade recommends itself ({told(own)}) {verdict}.")
    return Advice(chosen, tuple(i in good for i in range(len(rows))), supported, tuple(sentences))


def _lacking(faithful: bool, name: str, own: float, chosen: float) -> str:
    if not faithful:
        return f"is not: its {name} is lower by more than noise"
    return f"is not: its CMMD, {own:.3f}, is above the recommended setting's, {chosen:.3f}, by more than noise"


def _within(costs: Float[np.ndarray, "s n"]) -> Bool[np.ndarray, " s"]:
    """Which rows do not exceed the row of the lowest mean by more than Z standard errors of the paired difference."""
    apart = costs - costs[costs.mean(1).argmin()]
    error = apart.std(1, ddof=1) / np.sqrt(costs.shape[1]) if costs.shape[1] > 1 else np.zeros(len(costs))
    return apart.mean(1) <= Z * error


def _near(
    values: Float[np.ndarray, " s"], draws: Float[np.ndarray, "s k"], among: Bool[np.ndarray, " s"]
) -> Bool[np.ndarray, " s"]:
    """Which values do not exceed the lowest of `among` by more than Z deviations of the paired bootstrap."""
    best = int(np.where(among, values, np.inf).argmin())
    return values - values[best] <= Z * (draws - draws[best]).std(1)
