import json
import shutil

import numpy as np
import pytest
from PIL import Image

from unclip_jax.cascade import load_cascade
from unclip_jax.cli import main
from unclip_jax.config import ClipConfig
from unclip_jax.eval_command import METRICS as OFFERED
from unclip_jax.evaluate import plots
from unclip_jax.evaluate.drawing import draw, setting_of
from unclip_jax.evaluate.extras import memorisation_report
from unclip_jax.evaluate.features import Eye, look
from unclip_jax.evaluate.pairs import HELD_OUT, TRAINED, read_pairs
from unclip_jax.evaluate.quality import ABOUT, METRICS, Ruler
from unclip_jax.evaluate.recommend import recommended
from unclip_jax.evaluate.similarity import patch_distance
from unclip_jax.evaluate.sweep import parse_axis, read_rows, settings_of
from unclip_jax.inputs import RECOMMENDED, Options


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder):
    return load_cascade(tiny_cascade_folder)


def run(capsys, *words):
    code = main(["eval", *map(str, words)])
    return code, capsys.readouterr()


def test_a_sweep_restarts_and_reports_every_setting(tiny_cascade_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE_DIR", str(tmp_path / "cache"))
    metrics = ("--metrics", "faithfulness", "clip", "cmmd", "precision", "diversity")
    common = (tiny_cascade_folder, "--n", 8, "--batch", 4, "--out", tmp_path / "a", *metrics, "--steps", 1)
    sweep = ("--sweep", "guidance=1,2", "steps=1,2", "--sweep", "guidance=0.5")
    code, said = run(capsys, *common, *sweep)
    assert code == 0, said.err
    rows = read_rows(tmp_path / "a")
    pairs = {(row["setting"]["guidance"], row["setting"]["steps"]) for row in rows}
    assert pairs == {(g, s) for g in (1, 2) for s in (1, 2)} | {(0.5, 1)}
    for row in rows:
        assert 0 <= row["figures"]["faithfulness"] <= 1 and row["figures"]["CMMD"] >= 0
        assert set(row["figures"]) <= set(ABOUT)
    page = (tmp_path / "a/report.html").read_text()
    assert all(
        f"<td>{words}" in page for words in ("steps 1, guidance 0.5", "steps 1, guidance 1", "steps 2, guidance 2")
    )
    assert page.count('class="strip"') == len(rows) + 1 and "is recommended" in page
    assert "http" not in page and {path.suffix for path in (tmp_path / "a/plots").iterdir()} == {".png"}
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert report["recommended"] in [row["setting"] for row in rows]

    lines = (tmp_path / "a/rows.jsonl").read_text().splitlines(True)
    (tmp_path / "a/rows.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/samples").rglob("*.npz")}
    monkeypatch.setattr(plots, "plots_of", lambda *_: {})  # which takes long
    code, said = run(capsys, *common, *sweep)
    again = read_rows(tmp_path / "a")
    assert code == 0 and {path: path.stat().st_mtime_ns for path in (tmp_path / "a/samples").rglob("*.npz")} == kept
    assert [row["figures"] for row in again] == [row["figures"] for row in rows]
    assert [row["seconds"] for row in again[3:]] == [None] * 2

    code, said = run(capsys, *common, *sweep, "--seed", 5, "--budget", 0)
    assert code == 1 and "raise" in said.err and "left out" in said.out + said.err


def test_everything_at_one_setting(tiny_cascade_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE_DIR", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (70, 80, 3)).astype(np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a cat on a blue background")
    (pictures / "6.png").write_bytes(b"torn")
    (pictures / "6.txt").write_text("a dog")
    shutil.copy(pictures / "0.png", pictures / "7.png")  # without a caption
    words = tiny_cascade_folder, "--source", f"folder:{pictures}", "--training", f"folder:{pictures}", "--n", 8
    code, said = run(capsys, *words, "--batch", 4, "--steps", 1, "--out", tmp_path / "b")
    assert code == 0, said.err
    (row,) = read_rows(tmp_path / "b")
    assert row["n"] == 6 and "faithfulness" not in row["figures"] and "FD" not in row["figures"]
    assert {"prior, cosine to true", "reconstruction, SSIM", "recall", "CLIP score"} <= set(row["figures"])
    (table,) = json.loads((tmp_path / "b/report.json").read_text())["tables"].values()
    assert table["nearest training picture of held-out pictures"]["copies"] == 1


def test_large_samples_meet_training_pictures_at_the_decoders_side(cascade):
    def see(pictures):
        means = pictures.reshape(len(pictures), 2, pictures.shape[1] // 2, 2, -1, 3).mean((2, 4)).reshape(-1, 12)
        return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)

    eye = Eye("quarters", 12, see)
    held_out, trained = (read_pairs(cascade, source, 4, 256) for source in (HELD_OUT, TRAINED))
    ruler = Ruler(held_out, eye, np.zeros((4, 12), np.float32), look(eye, held_out.pictures))
    report = memorisation_report(cascade, ruler, trained.pictures, look(eye, trained.pictures).features, TRAINED, 8)
    assert [row["copies"] for row in report.figures.values()] == [1, 0]
    assert {row.shape for row in report.rows} == {(3, 64, 64, 3)}


def test_a_picture_does_not_depend_on_its_neighbours(cascade):
    captions = ["a cat", "a dog on a red background", "a house", "a car", "an apple", "a banana"]
    setting, seeds = setting_of(cascade, Options(size=64, steps=1)), [3, 4, 5, 6, 7, 8]
    one, other = draw(cascade, captions, seeds, setting, 4), draw(cascade, captions[::-1], seeds[::-1], setting, 4)
    assert np.abs(one.pictures.astype(int) - other.pictures[::-1]).max() <= 1
    np.testing.assert_allclose(one.embeddings, other.embeddings[::-1], atol=1e-5)


def test_axes(cascade):
    assert parse_axis("prior-guidance=1, 2.5") == ("prior_guidance", (1.0, 2.5))
    found = settings_of(cascade, RECOMMENDED, [["guidance=2,3"], ["prior=ar,diffusion"]])
    assert [(s["guidance"], s["prior"]) for s in found] == [(2.0, "diffusion"), (3.0, "diffusion"), (2.0, "ar")]
    for text, says in (
        ("colour=1", "goes along"),
        ("steps=a", "no int"),
        ("steps=", "no values"),
        ("sampler=euler", "no sampler 'euler'"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_axis(text)
    with pytest.raises(ValueError, match="steps must lie between 1 and 1000"):
        settings_of(cascade, RECOMMENDED, [["steps=5000"]])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--metrics", "fd", "--n", "4"), "covariance needs more than 16 pictures, not 4"),
        (("--metrics", "fid"), "--inception"),
        (("--source", "folder:/nowhere"), "/nowhere"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--sweep", "size=64,256"), "several sizes"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(tiny_cascade_folder, tmp_path, capsys, words, says):
    code, said = run(capsys, tiny_cascade_folder, "--out", tmp_path, *words)
    assert code == 1 and says in said.err.splitlines()[-1]


def test_names_of_metrics_are_the_commands():
    assert OFFERED == METRICS


def test_the_cheapest_setting_within_noise_is_recommended(tmp_path):
    rng, count = np.random.default_rng(0), 200
    real = rng.normal(size=(count, 4)).astype(np.float32)
    each = rng.random(count)
    (tmp_path / "scores").mkdir()
    rows = []
    for name, steps, worse, apart in (("a", 5, 0.2, 0), ("b", 10, 0, 0), ("c", 50, -0.001, 0), ("d", 8, 0, 5)):
        features = real + rng.normal(0, 0.1, real.shape) + apart
        score = each - worse + rng.normal(0, 0.05, count)
        np.savez(tmp_path / f"scores/{name}.npz", features=features.astype(np.float32), each=score)
        rows.append({"key": name, "setting": {"steps": steps, "prior": "ar"}, "figures": {}, "errors": {}})
    advice = recommended(rows, {"steps": 50, "prior": "ar"}, tmp_path, real)
    assert advice.row["key"] == "b" and advice.as_good == (False, True, True, False) and advice.supported
    assert not recommended(rows, {"steps": 5, "prior": "ar"}, tmp_path, real).supported


def test_distance_of_inner_features_grows(cascade):
    config = cascade.clip.config.network
    assert isinstance(config, ClipConfig)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    noisy = [np.clip(picture + rng.normal(0, level, picture.shape), 0, 255).astype(np.uint8) for level in (0, 20, 80)]
    none, some, much = (np.asarray(patch_distance(config, cascade.clip.params, picture, other)) for other in noisy)
    assert (none < 1e-6).all() and (some > none).all() and (much > some).all()
