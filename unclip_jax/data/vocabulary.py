"""The shipped vocabulary of emoji scenes: which words name which OpenMoji drawing, and the colours behind them."""

import csv
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple


class Concept(NamedTuple):
    """A drawable thing: its usual word, OpenMoji's code for it, and every phrase that captions may use for it."""

    name: str
    hexcode: str
    phrases: tuple[str, ...]


# Visually distinct drawings; the words in brackets are OpenMoji's annotations where they differ.
SHIPPED: dict[str, tuple[str, ...]] = {
    "cat": ("1F431", "cat", "cat face"),
    "dog": ("1F436", "dog", "dog face"),
    "apple": ("1F34E", "apple", "red apple"),
    "banana": ("1F34C", "banana"),
    "car": ("1F697", "car", "red car"),
    "house": ("1F3E0", "house"),
    "tree": ("1F333", "tree"),
    "sun": ("2600", "sun"),
    "star": ("2B50", "star"),
    "heart": ("2764", "heart", "red heart"),
    "fish": ("1F41F", "fish"),
    "rocket": ("1F680", "rocket"),
    "butterfly": ("1F98B", "butterfly"),
    "mushroom": ("1F344", "mushroom"),
    "frog": ("1F438", "frog"),
    "pig": ("1F437", "pig", "pig face"),
    "cow": ("1F42E", "cow", "cow face"),
    "penguin": ("1F427", "penguin"),
    "umbrella": ("2602", "umbrella"),
    "grapes": ("1F347", "bunch of grapes"),
    "pizza": ("1F355", "pizza", "slice of pizza"),
    "present": ("1F381", "present", "gift"),
    "turtle": ("1F422", "turtle"),
    "panda": ("1F43C", "panda"),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "blue": (110, 165, 245),
    "pink": (255, 176, 200),
    "white": (255, 255, 255),
    "green": (130, 214, 140),
    "yellow": (250, 228, 110),
    "orange": (250, 170, 90),
    "purple": (186, 150, 235),
    "gray": (170, 170, 170),
}


@cache
def openmoji_table() -> dict[str, str]:
    """OpenMoji's annotation of every drawing without skin tone, by hexcode."""
    table = (files("unclip_jax.data") / "openmoji.csv").read_text(encoding="utf-8").splitlines()
    return {row["hexcode"]: row["annotation"] for row in csv.DictReader(table) if not row["skintone"]}


def concept(name: str) -> Concept:
    """The concept of a shipped word, an OpenMoji annotation or a hexcode.

    Raises ValueError naming the nearest known words.
    """
    if name in SHIPPED:
        hexcode, *phrases = SHIPPED[name]
        return Concept(name, hexcode, tuple(phrases))
    table = openmoji_table()
    if name in table:
        return Concept(table[name], name, (table[name],))
    for hexcode, annotation in table.items():
        if annotation == name:
            return Concept(name, hexcode, (name,))
    from difflib import get_close_matches

    near = get_close_matches(name, [*SHIPPED, *table.values()], n=3)
    raise ValueError(f"no drawing is called {name!r}; the nearest are {', '.join(near) or 'none'}")


@cache
def distinct_concepts(hexcodes: tuple[str, ...] = ()) -> tuple[Concept, ...]:
    """The drawings, by default all without skin tone, less those that look at 64 px exactly like one before them.

    Their hexcodes are unique, their names are not. Rasterises each of them once per process: some 10 s for all.
    """
    from unclip_jax.data.emoji import artwork, rasterise  # scenes are made of this module's concepts

    first: dict[bytes, str] = {}
    for hexcode in hexcodes or openmoji_table():
        picture = rasterise(artwork(hexcode), 64)
        visible = picture * (picture[..., 3:] > 0)  # what is transparent has no colour
        first.setdefault(sha256(visible.tobytes()).digest(), hexcode)
    return tuple(concept(hexcode) for hexcode in first.values())


def concepts(names: tuple[str, ...] = ()) -> tuple[Concept, ...]:
    """The concepts of some names, or the shipped vocabulary where none are given."""
    return tuple(concept(name) for name in (names or SHIPPED))
