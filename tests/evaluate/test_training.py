import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.cascade import load_cascade
from unclip_jax.checkpoint.store import Store, _NewestAndBest
from unclip_jax.config import ClipConfig, DataConfig, OptimConfig, TrainConfig
from unclip_jax.evaluate.training import check_of
from unclip_jax.sharding import make_mesh
from unclip_jax.train import fit
from unclip_jax.types import Batch, Stage


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder):
    return load_cascade(tiny_cascade_folder)


def with_data(config: TrainConfig, size: int = 64) -> TrainConfig:
    data = DataConfig(concepts=("cat", "dog", "apple"), single_fraction=1.0, size=size)
    return replace(config, data=data, eval_every=1, eval_pictures=3)


def test_every_network_has_a_score_that_its_parameters_decide(cascade):
    clip, tokenizer = cascade.clip, cascade.tokenizer
    expected = {
        "clip": {"score"},
        "prior": {"score", "prior, cosine shuffled"},
        "decoder": {"score", "CMMD", "objects"},
    }
    for name, known in expected.items():
        network = getattr(cascade, name)
        frozen = None if name == "clip" else clip
        check = check_of(with_data(network.config), frozen, tokenizer, network.constants)
        found = check(network.params)
        assert known <= set(found) and -1 <= found["score"] <= 1
        assert check(network.params) == found
        if name == "prior":
            moved = check(jax.tree.map(lambda x: x + 0.3, network.params))
            assert moved["score"] != found["score"]
            assert moved["prior, cosine of text"] == found["prior, cosine of text"]


def test_pictures_come_from_held_out_scenes_or_a_source(cascade, tmp_path):
    config = with_data(cascade.clip.config)
    elsewhere = replace(config, data=replace(config.data, source="folder:/nowhere"))
    with pytest.raises(ValueError, match="--eval-source"):
        check_of(elsewhere, None, cascade.tokenizer, {})
    check = check_of(replace(elsewhere, eval_source="emoji?count=3"), None, cascade.tokenizer, {})
    assert 0 <= check(cascade.clip.params)["score"] <= 1


def test_evaluations_are_logged_and_the_best_checkpoint_stays(tmp_path):
    def init(key):
        return {"layer": {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}}

    def loss(params, context, batch: Batch, key):
        return jnp.square(params["layer"]["bias"][0] - 1) + 0 * params["layer"]["kernel"].sum(), {}

    blank = Batch(np.zeros((8, 4, 4, 3), np.uint8), np.ones((8, 3), np.int32), np.ones((8, 3), bool))  # type: ignore
    data, optim = DataConfig(batch_size=8), OptimConfig(learning_rate=1e-2, warmup=1)
    config = TrainConfig(
        "toy", ClipConfig(), data=data, optim=optim, steps=8, save_every=2, eval_every=2, log_every=4, keep=1,
        keep_by="score",
    )  # fmt: skip
    scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}

    def evaluate(state: Any) -> dict[str, float]:
        return {"score": scores[int(state.step)], "other": 1.0}

    def batches(step: int):
        return (blank for _ in count())

    fit(config, Stage(init, loss), {}, batches, make_mesh("dp"), tmp_path, evaluate=evaluate)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["eval/score"] for line in lines if "eval/score" in line} == scores
    with Store(tmp_path / "checkpoints", 1, 1) as store:
        assert store.latest() == 8
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()) == [4, 8]


def test_the_best_is_of_the_highest_score_else_of_the_lowest_loss():
    def kept(*metrics: dict[str, float]) -> list[bool]:
        infos = [SimpleNamespace(step=step, metrics=each) for step, each in enumerate(metrics)]
        return _NewestAndBest(1, 1).should_preserve(infos, context=None)

    assert kept({"loss": 2.0}, {"loss": 1.0}, {"loss": 3.0}) == [False, True, True]
    assert kept({"score": 2.0}, {"score": 1.0}, {}) == [True, False, True]
