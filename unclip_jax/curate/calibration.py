"""Scores as probabilities: isotonic regression of held-out scores, which is right on average in every step it makes.

A step of n records of which r were removed gives each of the others the weight n / (n - r): together they count what
all n did, whatever the classifier's logits were worth. (Ayer et al., An empirical distribution function for sampling
with incomplete information, 1955; Zadrozny and Elkan, Transforming classifier scores into probability estimates, 2002.)
"""

import numpy as np
from jaxtyping import Bool, Float


def isotonic(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "2 s"]:
    """The share of positives as a function of the score that never falls, of the least weighted squared error.

    Row 0 holds the score at which each step begins, the first at minus infinity, and row 1 its share.
    """
    values, places = np.unique(scores, return_inverse=True)
    found = np.bincount(places, weights * positive), np.bincount(places, weights)
    steps: list[tuple[float, float, int]] = []  # positives, all, and the first value of each
    for first, (positives, total) in enumerate(zip(*found, strict=True)):
        steps.append((positives, total, first))
        while len(steps) > 1 and steps[-2][0] * steps[-1][1] >= steps[-1][0] * steps[-2][1]:
            (p, t, _), (q, u, start) = steps.pop(), steps.pop()
            steps.append((p + q, t + u, start))
    firsts = np.asarray([first for *_, first in steps[1:]], int)
    begins = np.concatenate([[-np.inf], (values[firsts - 1].astype(np.float64) + values[firsts]) / 2])
    return np.stack([begins, [positives / total for positives, total, _ in steps]])


def shares(steps: Float[np.ndarray, "2 s"], scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Shares of positives at some scores."""
    return steps[1][np.searchsorted(steps[0], scores, side="right") - 1]
