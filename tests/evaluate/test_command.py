from typing import Any

import jax
import numpy as np
import pytest

from unclip_jax.cli import main
from unclip_jax.evaluate import ranking, retrieval, upsampling
from unclip_jax.evaluate.report import Report


@pytest.mark.parametrize(
    ("what", "module", "function", "networks"),
    [
        ("clip", retrieval, "clip_report", lambda clip, *_: [clip]),
        ("prior", retrieval, "prior_report", lambda clip, prior, *_: [clip, prior]),
        ("upsamplers", upsampling, "upsampler_report", lambda upsampler, *_: [upsampler]),
        ("ranking", ranking, "ranking_report", lambda cascade, _: cascade.networks),
    ],
)
def test_what_is_measured_computes_in_the_dtype(tiny_cascade_folder, monkeypatch, what, module, function, networks):
    given: list[Any] = []
    monkeypatch.setattr(module, function, lambda *all_: given.extend(networks(*all_)) or Report({"it": {"is": 1.0}}))
    assert main(["evaluate", what, "--weights", str(tiny_cascade_folder), "--dtype", "float16"]) == 0
    assert given
    for network in given:
        assert {leaf.dtype for leaf in jax.tree.leaves(network.params)} == {np.dtype(np.float16)}
        assert "float16" in repr(network.config.network) and "bfloat16" not in repr(network.config.network)
