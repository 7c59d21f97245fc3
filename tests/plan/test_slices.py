"""Slices by name, and what is said of names, meshes and batches that do not work."""

import re

import pytest

from unclip_jax.cli import main
from unclip_jax.plan.slices import GENERATIONS, all_slices, parse_slice


@pytest.mark.parametrize(
    ("name", "chips", "sides"),
    [
        ("v5p-128", 64, (4, 4, 4)),
        ("v4-256", 128, (4, 4, 8)),
        ("v4-8", 4, (2, 2, 1)),
        ("v5e-64", 64, (8, 8)),
        ("v5litepod-256", 256, (16, 16)),
        ("v6e-8", 8, (2, 4)),
        ("2xv5e-256", 512, (16, 16)),
    ],
)
def test_names_count_cores_or_chips(name, chips, sides):
    found = parse_slice(name)
    assert (found.chips, found.sides) == (chips, sides)
    assert parse_slice(found.name) == found


def test_every_slice_has_a_name_that_finds_it():
    for generation in GENERATIONS.values():
        for one in all_slices(generation):
            assert parse_slice(one.name) == one
            assert one.request()["topology_name"].startswith(generation.name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("v5p-100", "v5p-128"), ("v5e-100", "v5e-128"), ("v5p128", "v5p-128"), ("v9-8", "v6e-8"), ("0xv4-8", "v4-8")],
)
def test_unknown_slices_list_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        parse_slice(name)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--tpu", "v5p-127"], "v5p-128"),
        (["--tpu", "v5p-128", "--strategy", "fsdp=48"], "48.*64.*nearest"),
        (["--tpu", "v5p-128", "--strategy", "fsdpp"], "did you mean fsdp"),
        (["--tpu", "v5p-128", "--batch", "100"], "batch of 100 .* 64 devices .* use 64 or 128"),
        (["--tpu", "v5e-8", "--remat", "all"], "none, products, block"),
        (["--tpu", "v5e-8", "--executable", "x"], "--depth full"),
        (["--tpu", "v5e-8", "--clip", "emoji_decoder"], "no CLIP"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence_before_compiling(options, numbers, capsys):
    assert main(["plan", "--config", "emoji_decoder", *options]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(numbers, said), said
