import numpy as np
import pytest

from unclip_jax.curate import manifest, pixels
from unclip_jax.curate.clusters import assign, fit
from unclip_jax.curate.duplicates import Settings, forest, groups_of, search
from unclip_jax.curate.manifest import CurationError
from unclip_jax.curate.steps import merge_step
from unclip_jax.data.embeddings import Part, unit

ROWS, COPIES, DIM = 1200, 120, 24
SETTINGS = Settings(threshold=0.95, clusterings=4, clusters=12, mirror=True)


@pytest.fixture(scope="module")
def planted(store, tmp_path_factory):
    """Random rows; behind them copies of the first ones, every other of which is mirrored; and ten equal rows."""
    rng = np.random.default_rng(0)
    image, mirror = (unit(rng.standard_normal((ROWS + COPIES, DIM))) for _ in range(2))
    for row in range(COPIES):
        noise = unit(rng.standard_normal((2, DIM))) * 0.1
        here, there = (image, mirror) if row % 2 else (mirror, image)
        image[ROWS + row], mirror[ROWS + row] = unit(here[row] + noise[0]), unit(there[row] + noise[1])
    image[1000:1010], mirror[1000:1010] = image[1000], mirror[1000]
    size = np.full((ROWS + COPIES, 2), 64, np.int32)
    size[ROWS + 7] = 128
    folder = tmp_path_factory.mktemp("planted")
    return store(folder, image, mirror=mirror, size=size)


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    search(planted, SETTINGS, out)
    return out, merge_step(planted, out)


def lines(out):
    return list(manifest.lines_of([out / manifest.MANIFEST]))


def exact(embeddings, settings) -> set[tuple[int, int]]:
    image, mirror = (embeddings.unit(name, np.arange(len(embeddings))) for name in ("image", "mirror"))
    close = (image @ image.T >= settings.least) | (image @ mirror.T >= settings.least)
    close |= close.T
    return {(int(a), int(b)) for a, b in np.argwhere(close) if a < b}


def test_planted_copies_go_and_nothing_else(whole):
    out, summary = whole
    gone = {line["row"]: line["of"] for line in lines(out)}
    expected = {ROWS + row: f"key {row:05d}" for row in range(COPIES)} | {1000 + n: "key 01000" for n in range(1, 10)}
    del expected[ROWS + 7]  # it is larger than what it was copied from
    expected[7] = f"key {ROWS + 7:05d}"
    assert gone == expected
    assert summary["removed"] == len(gone) and summary["groups"] == COPIES + 1 and summary["sampled_recall"] == 1.0
    assert np.load(out / manifest.REMOVED).tolist() == sorted(gone)


def test_equals_exact_search(planted, whole):
    out, summary = whole
    pairs, gone = exact(planted, SETTINGS), set(np.load(out / manifest.REMOVED).tolist())
    assert len(pairs) > COPIES
    assert all(a in gone or b in gone for a, b in pairs)
    known = {key: row for row, key in enumerate(planted.keys(np.arange(len(planted))))}
    assert all(tuple(sorted((line["row"], known[line["of"]]))) in pairs for line in lines(out))
    assert summary["sampled_pairs"] > 0


def test_parts_merge_into_the_same(planted, whole, tmp_path):
    for index in (2, 0, 1):
        search(planted, SETTINGS, tmp_path, part=Part(index, 3))
    merge_step(planted, tmp_path)
    for name in (manifest.MANIFEST, manifest.SUMMARY):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_goes_on_after_a_kill(planted, whole, tmp_path, monkeypatch):
    saved, left = manifest.save_array, [20]

    def until(path, array):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        saved(path, array)

    monkeypatch.setattr(manifest, "save_array", until)
    with pytest.raises(KeyboardInterrupt):
        search(planted, SETTINGS, tmp_path)
    with pytest.raises(CurationError, match="no parts"):
        merge_step(planted, tmp_path)
    monkeypatch.undo()
    search(planted, SETTINGS, tmp_path)
    merge_step(planted, tmp_path)
    assert (tmp_path / manifest.MANIFEST).read_bytes() == (whole[0] / manifest.MANIFEST).read_bytes()


def test_a_chain_removes_nothing_that_differs_from_what_stays(store, tmp_path):
    angles = np.arange(9) * np.arccos(0.97)
    embeddings = store(tmp_path / "chain", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    settings = Settings(threshold=0.95, clusterings=1)
    search(embeddings, settings, tmp_path / "out")
    merge_step(embeddings, tmp_path / "out")
    x = embeddings.unit("image", np.arange(9))
    kept = np.setdiff1d(np.arange(9), np.load(tmp_path / "out" / manifest.REMOVED))
    assert 1 < len(kept) < 9
    assert (x @ x[kept].T).max(1).min() >= 0.95


def test_forest_keeps_groups():
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 300, (200, 2))
    few = forest(pairs[pairs[:, 0] != pairs[:, 1]])
    rows, groups = groups_of(pairs[pairs[:, 0] != pairs[:, 1]])
    again, same = groups_of(few)
    np.testing.assert_array_equal(rows, again)
    assert len({*zip(groups.tolist(), same.tolist(), strict=True)}) == len(set(groups)) == len(rows) - len(few)


def test_k_means_finds_well_separated_centres():
    rng = np.random.default_rng(0)
    centres = np.eye(DIM, dtype=np.float32)[:6]
    x = unit(np.repeat(centres, 50, axis=0) + 0.05 * rng.standard_normal((300, DIM)))
    best = max((fit(x, 6, seed) for seed in range(8)), key=lambda found: (x @ found.T).max(1).mean())
    np.testing.assert_allclose(np.linalg.norm(best, axis=1), 1, atol=1e-5)
    own = assign(x, best).reshape(6, 50)
    assert (own == own[:, :1]).all() and len(set(own[:, 0])) == 6


def test_pixels_tell_copies_from_others():
    rng = np.random.default_rng(0)
    big = np.kron(rng.integers(0, 256, (6, 8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # 128 px

    def small(x: np.ndarray) -> np.ndarray:
        from PIL import Image

        return np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BOX)) for p in x])

    a, cropped = small(big), small(big[:, 3:125, 6:])
    altered = a.copy()
    altered[:, 10:16, 10:16] = 255 - altered[:, 10:16, 10:16]
    assert pixels.same(a, cropped, 2.8, False).all()
    assert pixels.same(a, cropped[:, :, ::-1], 2.8, True).all()
    assert not pixels.same(a, np.roll(a, 1, axis=0), 2.8, False).any()
    assert not pixels.same(a, altered, 2.8, False).any()


def test_bad_input_is_one_sentence(planted, whole, store, tmp_path):
    plain = store(tmp_path / "plain", np.eye(8))
    with pytest.raises(CurationError, match="embed the source with --mirror"):
        search(plain, SETTINGS, tmp_path / "a")
    with pytest.raises(CurationError, match="--thumbnails 32"):
        search(plain, Settings(pixels=3.0), tmp_path / "b")
    with pytest.raises(CurationError, match="other embeddings"):
        search(plain, Settings(), tmp_path / "c", after=[whole[0]])
    with pytest.raises(CurationError, match="other parameters"):
        search(planted, SETTINGS._replace(threshold=0.9), whole[0])
    with pytest.raises(CurationError, match="no finished step"):
        search(plain, Settings(), tmp_path / "d", after=[tmp_path])
