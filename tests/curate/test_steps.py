import csv
import json

import numpy as np
import pytest
from PIL import Image

from unclip_jax.checkpoint.writing import save_file
from unclip_jax.cli import main
from unclip_jax.curate import manifest
from unclip_jax.curate.calibration import isotonic, shares
from unclip_jax.curate.features import features_of
from unclip_jax.curate.filters import read_labels, write_proposals
from unclip_jax.curate.manifest import CurationError, load_weights
from unclip_jax.curate.probe import load_probe, save_probe, threshold_for, train
from unclip_jax.data.embeddings import unit

ROWS, DIM, KINDS = 4000, 8, 5


@pytest.fixture(scope="module")
def kinds():
    return np.random.default_rng(1).integers(0, KINDS, ROWS)


@pytest.fixture(scope="module")
def embeddings(store, tmp_path_factory, kinds):
    """Rows around the centres of six kinds of things; one is broken, and the last kind's captions are off."""
    rng = np.random.default_rng(0)
    image = unit(np.eye(KINDS, DIM)[kinds] + 0.15 * rng.standard_normal((ROWS, DIM)))
    text = unit(image + np.where(kinds == KINDS - 1, 1.0, 0.05)[:, None] * rng.standard_normal((ROWS, DIM)))
    valid = np.arange(ROWS) != 17
    return store(tmp_path_factory.mktemp("embeddings"), image, 1024, text=text, valid=valid)


def write_labels(path, rows, remove) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "label"))
        writer.writerows((f"key {row:05d}", int(gone)) for row, gone in zip(rows, remove, strict=True))


def curate(*arguments) -> int:
    return main(["data", "curate", *map(str, arguments)])


@pytest.fixture(scope="module")
def labels(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    rows = np.random.default_rng(2).choice(np.arange(100, ROWS), 150, replace=False)
    write_labels(path, rows, kinds[rows] == 0)
    return path


@pytest.fixture(scope="module")
def filtered(embeddings, labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("steps") / "filter"
    assert curate("filter", embeddings.folder, "--labels", labels, "--out", out, "--propose", "20") == 0
    return out


def test_filter_finds_the_kind_of_the_labels(filtered, kinds, embeddings):
    gone = np.load(filtered / manifest.REMOVED)
    true = (kinds == 0) & embeddings.valid
    assert (kinds[gone] == 0).mean() > 0.95 and np.isin(np.flatnonzero(true), gone).mean() > 0.85
    summary = manifest.read_summary(filtered)
    assert summary["held_out_recall"] >= 0.95 and summary["looked_at"] == ROWS - 1
    lines = list(manifest.lines_of([filtered / manifest.MANIFEST]))
    assert [line["row"] for line in lines] == gone.tolist()
    assert all(line["key"] == f"key {line['row']:05d}" and line["score"] >= summary["threshold"] for line in lines)


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.95])
def test_threshold_meets_its_recall_on_new_rows_and_not_much_more(recall):
    rng, found = np.random.default_rng(4), []
    for _ in range(300):
        labels = np.arange(200) < 40
        threshold = threshold_for(rng.standard_normal(200) + labels, labels, recall)
        found.append((rng.standard_normal(500) + 1 >= threshold).mean())
    assert recall - 0.005 <= np.mean(found) <= recall + 0.03


def test_what_is_left_of_every_step_counts_what_all_of_it_did():
    rng = np.random.default_rng(7)
    scores, weights = rng.integers(0, 300, 2000) / 10, rng.uniform(0.5, 2, 2000)
    removed = rng.random(2000) < 0.9 / (1 + np.exp(-3 * (scores - 20)))  # log odds that are worth three times as much
    steps = isotonic(scores.astype(np.float32), removed, weights)
    assert (np.diff(steps[1]) > 0).all() and (np.diff(steps[0]) > 0).all()
    found = shares(steps, scores.astype(np.float32))
    for share in steps[1]:
        own = found == share
        assert (weights * removed)[own].sum() == pytest.approx(share * weights[own].sum())
    assert np.abs(found - 0.9 / (1 + np.exp(-3 * (scores - 20)))).mean() < 0.03


def test_a_hidden_layer_learns_what_a_line_cannot(tmp_path):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((200, 2)).astype(np.float32)
    labels = x[:, 0] * x[:, 1] > 0
    linear, bent = (train(x, labels, hidden) for hidden in (0, 8))
    assert ((linear.held_out > 0) == labels).mean() < 0.7
    assert ((bent.held_out > 0) == labels).mean() > 0.85
    save_probe(tmp_path / "probe.safetensors", bent.probe, "clip")
    again = load_probe(tmp_path / "probe.safetensors", "clip")
    np.testing.assert_allclose(again.logits(x), bent.probe.logits(x), atol=1e-5)


def test_proposals_are_new_and_of_what_would_be_removed(filtered, labels, embeddings):
    with (filtered / "propose.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = np.asarray([int(line["key"].split()[1]) for line in lines])
    assert len(set(rows)) == 20 and not {line["label"] for line in lines} - {""}
    assert not np.isin(rows, read_labels(labels, embeddings).rows).any()
    probe = load_probe(filtered / "probe.safetensors")
    logits = probe.logits(features_of(embeddings, np.arange(ROWS), probe.features))
    assert probe.features == "both" and logits[rows].min() >= probe.threshold
    said = np.sort(logits[logits >= probe.threshold])
    assert said[0] <= logits[rows].min() < np.median(said) < logits[rows].max()  # some of all that it would remove
    assert read_labels(filtered / "propose.csv", embeddings).rows.size == 0  # nothing is filled in yet


@pytest.fixture(scope="module")
def thinned(embeddings, kinds, tmp_path_factory):
    """A finished step that removed 70% of kind 2."""
    out = tmp_path_factory.mktemp("thinned") / "thinned"
    gone = np.flatnonzero((kinds == 2) & (np.random.default_rng(6).random(ROWS) < 0.7))
    manifest.begin(out, "score", embeddings, {}, ())
    manifest.finish(out, [{"row": int(row), "key": "", "why": "score"} for row in gone], {})
    return out


@pytest.fixture(scope="module")
def weighed(embeddings, thinned, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "weights"
    assert curate("reweight", embeddings.folder, "--after", thinned, "--out", out, "--features", "image") == 0
    return out


def test_reweighting_restores_frequencies(weighed, thinned, embeddings, kinds):
    weights = load_weights(weighed / manifest.WEIGHTS, "digest")
    kept = manifest.alive(embeddings, [thinned])
    assert (weights[~kept] == 0).all() and weights[kept].mean() == pytest.approx(1, abs=1e-4)
    before, filtered, after = (np.bincount(kinds, w, KINDS) / w.sum() for w in (embeddings.valid, kept, weights))
    assert np.abs(filtered / before - 1).max() > 0.5
    assert np.abs(after / before - 1).max() < 0.1


def test_score_cuts_what_captions_do_not_fit(embeddings, kinds, tmp_path):
    assert curate("score", embeddings.folder, "--least", "0.7", "--out", tmp_path / "clip") == 0
    gone = np.load(tmp_path / "clip" / manifest.REMOVED)
    assert (kinds[gone] == KINDS - 1).mean() > 0.9 and len(gone) > 0.8 * (kinds == KINDS - 1).sum()
    head = tmp_path / "head.safetensors"
    save_file({"weight": np.eye(1, DIM, 3, np.float32), "bias": np.ones(1, np.float32)}, head)
    assert curate("score", embeddings.folder, "--head", head, "--keep", "0.25", "--out", tmp_path / "head") == 0
    left = np.setdiff1d(np.arange(ROWS), np.load(tmp_path / "head" / manifest.REMOVED))
    assert len(left) - 1 == pytest.approx(0.25 * (ROWS - 1), abs=2)  # the broken record is nobody's to remove
    column = embeddings.unit("image", np.arange(ROWS))[:, 3]
    assert column[left[left != 17]].min() >= np.quantile(column, 0.749) - 1e-6


def test_parts_merge_into_the_same(embeddings, labels, filtered, weighed, thinned, tmp_path):
    steps = {
        "filter": (filtered, ("--labels", labels)),
        "reweight": (weighed, ("--after", thinned, "--features", "image")),
    }
    for name, (whole, options) in steps.items():
        out = tmp_path / name
        for index in (1, 0):
            assert curate(name, embeddings.folder, "--out", out, "--part", f"{index}/2", *options) == 0
        assert curate("merge", embeddings.folder, out) == 0
        files = (manifest.MANIFEST, manifest.SUMMARY, *([manifest.WEIGHTS] if name == "reweight" else []))
        for file in files:
            assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def test_steps_compose_into_a_skip_list_and_weights(embeddings, filtered, thinned, weighed, tmp_path):
    assert curate("merge", embeddings.folder, filtered, thinned, weighed, "--out", tmp_path) == 0
    left = manifest.alive(embeddings, [filtered, thinned])
    weights = load_weights(tmp_path / manifest.WEIGHTS, "digest")
    np.testing.assert_array_equal(weights > 0, left)
    assert weights[left].mean() == pytest.approx(1, abs=1e-4)
    own = load_weights(weighed / manifest.WEIGHTS)
    np.testing.assert_allclose(weights[left] / weights[left][0], own[left] / own[left][0], rtol=1e-4)
    skipped = [line.split("\t") for line in (tmp_path / manifest.SKIP).read_text().splitlines()]
    assert [key for key, _ in skipped] == embeddings.keys(np.flatnonzero(~left))
    assert ["key 00017", "broken"] in skipped
    counts = json.loads((tmp_path / manifest.SUMMARY).read_text())["removed_by"]
    assert sum(counts.values()) == (~left).sum() and counts["broken"] == 1


def test_a_step_does_not_look_at_what_an_earlier_one_removed(embeddings, labels, filtered, thinned, kinds, tmp_path):
    assert curate("filter", embeddings.folder, "--labels", labels, "--out", tmp_path, "--after", filtered) == 0
    assert manifest.read_summary(tmp_path)["removed"] == 0


def test_contact_sheet(embeddings, tmp_path):
    sheet = tmp_path / "propose.csv"
    write_proposals(sheet, embeddings, np.asarray([3, 5]), np.zeros(2), lambda row: np.full((8, 8, 3), row, np.uint8))
    assert np.asarray(Image.open(sheet.with_suffix(".png")))[0, [0, 8], 0].tolist() == [3, 5]


def test_bad_input_is_one_sentence(embeddings, labels, filtered, thinned, store, tmp_path, capsys):
    def said(*arguments) -> str:
        assert curate(*arguments) == 1
        (sentence,) = capsys.readouterr().err.splitlines()[-1:]
        return sentence

    bad = tmp_path / "bad.csv"
    step = ("filter", embeddings.folder, "--out", tmp_path / "out", "--labels", bad)
    write_labels(bad, (1, 2, 99999), (0, 1, 1))
    assert "1 of 3 labelled keys are not in" in said(*step) and not (tmp_path / "out").exists()
    write_labels(bad, (1, 2, 3), (1, 1, 1))
    assert "3 to remove and 0 to keep: label at least two of each" in said(*step)
    bad.write_text("key,label\nkey 00001,perhaps\n")
    assert "say 'perhaps' of key 00001" in said(*step)
    bad.write_text("name\nx\n")
    assert "columns key and label" in said(*step)
    bad.write_bytes(b"key,label\n\xff,1\n")
    assert "cannot be read" in said(*step)
    assert "holds no embeddings" in said("score", tmp_path, "--least", "0", "--out", tmp_path / "out")
    assert "one of them" in said("score", embeddings.folder, "--out", tmp_path / "out")
    assert "name the filter with --after" in said("reweight", embeddings.folder, "--out", tmp_path / "out")
    assert "counted from 0" in said("score", embeddings.folder, "--least", "0", "--out", tmp_path, "--part", "2/2")
    other = store(tmp_path / "other", np.eye(DIM), clip="other")
    assert "of other embeddings" in said("reweight", other.folder, "--after", thinned, "--out", tmp_path / "out")
    head = ("--head", filtered / "probe.safetensors", "--least", "0", "--out", tmp_path / "out")
    assert "of the CLIP clip, not of other" in said("score", other.folder, *head)
    narrow = store(tmp_path / "narrow", np.eye(4))
    assert "reads 16 features and these have 8" in said("score", narrow.folder, *head)
    assert "no finished step" in said("merge", embeddings.folder, tmp_path / "nothing", "--out", tmp_path / "out")
    with pytest.raises(CurationError, match="another source"):
        load_weights(manifest_of(embeddings, tmp_path), "changed")


def manifest_of(embeddings, folder):
    manifest.save_weights(folder / manifest.WEIGHTS, embeddings, np.ones(ROWS, np.float32))
    return folder / manifest.WEIGHTS
