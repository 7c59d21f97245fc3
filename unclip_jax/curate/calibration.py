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
    from scipy.optimize import isotonic_regression

    values, places = np.unique(scores, return_inverse=True)
    total = np.bincount(places, weights)
    found = isotonic_regression(np.bincount(places, weights * positive) / total, weights=total)
    firsts = found.blocks[1:-1]
    begins = np.concatenate([[-np.inf], (values[firsts - 1].astype(np.float64) + values[firsts]) / 2])
    return np.stack([begins, found.x[found.blocks[:-1]]])


def shares(steps: Float[np.ndarray, "2 s"], scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Shares of positives at some scores."""
    return steps[1][np.searchsorted(steps[0], scores, side="right") - 1]
