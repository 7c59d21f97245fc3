"""Edits without a mask: inversion against a known denoiser, and on tiny networks what must hold for any network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax import edit
from unclip_jax.cascade import load_cascade
from unclip_jax.cli import main
from unclip_jax.config import DiffusionConfig
from unclip_jax.data.emoji import Scenes
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.guidance import limit_noise
from unclip_jax.diffusion.schedule import make_schedule, reverse_table, step_table, strided_timesteps
from unclip_jax.edit import Basis, draw, interpolate, invert_pictures, probe, slerp, text_diff, variations
from unclip_jax.evaluate.edits import EditTask, changed, edits_report, plain_caption, psnr
from unclip_jax.inputs import Options, picture_keys
from unclip_jax.priors import sample_prior

SMALL = Options(size=64, steps=4)
SCHEDULE = make_schedule(DiffusionConfig())


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder):
    return load_cascade(tiny_cascade_folder)


@pytest.fixture(scope="module")
def pictures():
    """Two smooth ones."""
    y, x = np.mgrid[:64, :64] / 63
    one, other = np.stack([x, y, x * y], -1), np.stack([1 - x, x * x, 0.5 + 0 * x], -1)
    return [np.round(255 * picture).astype(np.uint8) for picture in (one, other)]


@pytest.fixture(scope="module")
def rebuilt(cascade, pictures):
    """Both reconstructions, with the key that frames have."""
    latent = invert_pictures(cascade, pictures, ["", ""], SMALL)
    return draw(cascade, picture_keys(0, 1)[np.zeros(2, int)], latent, SMALL)


def levels_apart(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_slerp_keeps_ends_norms_and_angles():
    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 12)))
    np.testing.assert_allclose(slerp(a, b, np.zeros(5)), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, np.ones(5)), b, atol=1e-6)
    third = slerp(3 * a, 3 * b, np.full(5, 1 / 3))
    np.testing.assert_allclose(np.linalg.norm(third, axis=1), 3, rtol=1e-6)
    np.testing.assert_allclose(np.arccos((third * a).sum(1) / 3), np.arccos((a * b).sum(1)) / 3, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, a, np.full(5, 0.3)), a, atol=1e-6)
    assert np.isfinite(slerp(a, -a, np.full(5, 0.5))).all()


EXACT = np.zeros((1, 400), np.float32)


@jax.jit
def there_and_back(x, up, down, error, share):
    """Inversion and DDIM with the exact denoiser of a Gaussian, which errs by `error` at all noise levels alike."""

    def network(x, t):
        abar = SCHEDULE.abar(t)[:, None]
        return 0.4 + jnp.sqrt(abar) * 0.25 / (abar * 0.25 + 1 - abar) * (x - jnp.sqrt(abar) * 0.4) + error

    exact = gaussian.denoiser(DiffusionConfig(prediction="x0"), SCHEDULE, network)
    denoise, keys = limit_noise(SCHEDULE, exact, share), picture_keys(0, 1)
    noise = samplers.invert(SCHEDULE, denoise, keys, x, up)
    return noise, samplers.run(samplers.ddim(SCHEDULE), denoise, keys, noise, down)


def round_trip(steps, error=EXACT, share=1.0):
    x = jnp.asarray(np.random.default_rng(1).normal(0.4, 0.5, (1, 400)).astype(np.float32))
    timesteps = strided_timesteps(steps)
    noise, back = there_and_back(x, reverse_table(timesteps, 256), step_table(timesteps, 256), error, share)
    return float(noise.std()), float(jnp.sqrt(jnp.mean((back - x) ** 2)))


def test_inversion_of_a_gaussian_comes_back_ever_closer_and_finds_unit_noise():
    deviations, errors = zip(*(round_trip(steps) for steps in (25, 50, 100, 250)), strict=True)
    assert list(errors) == sorted(errors, reverse=True) and errors[-1] < 0.01
    assert abs(deviations[-1] - 1) < 0.1


def test_what_a_network_misses_does_not_become_noise_of_many_deviations():
    pattern = 0.1 * np.sign(np.random.default_rng(2).normal(size=(1, 400))).astype(np.float32)
    without, with_limit = round_trip(25, pattern, 0.0), round_trip(25, pattern, 1.0)
    assert without[0] > 2.5 and with_limit[0] < 1.2
    assert with_limit[1] < without[1] / 3, (without, with_limit)


def test_eta_0_reconstructs_and_eta_1_does_not(cascade, pictures):
    many = SMALL._replace(steps=100)
    same = variations(cascade, pictures[0], 2, 0.0, options=many)
    free = variations(cascade, pictures[0], 2, 1.0, options=many)
    assert psnr(same, np.stack([pictures[0]] * 2)).min() > 35
    assert levels_apart(same[0], same[1]) <= 1 and levels_apart(free[0], free[1]) > 20
    assert levels_apart(variations(cascade, pictures[0], 1, 1.0, seed=1, options=many)[0], free[1]) <= 1


def test_ends_of_an_interpolation_are_the_reconstructions(cascade, pictures, rebuilt):
    frames = interpolate(cascade, pictures, 5, options=SMALL)
    assert frames.shape == (5, 64, 64, 3)
    assert levels_apart(frames[[0, -1]], rebuilt) <= 1
    assert min(levels_apart(a, b) for a, b in zip(frames, frames[1:], strict=False)) > 0
    # Four steps through a random network amplify the rounding in which batches of other sizes differ: one inversion.
    three = [*pictures, pictures[0]]
    latent = invert_pictures(cascade, three, [""] * 3, SMALL)
    through = interpolate(cascade, three, 5, options=SMALL)
    again = draw(cascade, picture_keys(0, 1)[np.zeros(3, int)], latent, SMALL)
    assert levels_apart(through[[0, 2, 4]], again) <= 1 and levels_apart(again, rebuilt[[0, 1, 0]]) < 5


def test_prompts_interpolate_at_one_noise(cascade):
    frames = interpolate(cascade, ["a cat", "a red apple"], 3, options=SMALL)
    alone = interpolate(cascade, ["a red apple", "a cat"], 3, options=SMALL)
    assert levels_apart(frames, alone[::-1]) <= 1 and levels_apart(frames[0], frames[2]) > 5


def test_a_text_diff_starts_at_the_picture_and_moves(cascade, pictures, rebuilt):
    frames = text_diff(cascade, pictures[0], "a cat", "a dog", 0.8, 4, options=SMALL)
    told = invert_pictures(cascade, pictures[:1], ["a cat"], SMALL)
    assert levels_apart(frames[0], draw(cascade, picture_keys(0, 1), told, SMALL)[0]) <= 1
    moved = [np.abs(frame.astype(int) - frames[0]).mean() for frame in frames]
    assert moved == sorted(moved) and moved[-1] > 0.5
    still = text_diff(cascade, pictures[0], "a cat", "a dog", 0.0, 1, options=SMALL)
    assert levels_apart(still[0], frames[0]) <= 1
    dropped = text_diff(cascade, pictures[0], "", "a dog", 0.0, 4, options=SMALL)
    assert levels_apart(dropped, rebuilt[[0] * 4]) <= 1
    alone = text_diff(cascade, pictures[0], "a cat", "a dog", 0.8, 1, options=SMALL)
    assert levels_apart(alone[0], frames[-1]) <= 1
    back = text_diff(cascade, pictures[0], "a dog", "a cat", 0.8, 4, options=SMALL)
    assert levels_apart(frames[-1], back[-1]) > 2


def test_a_probe_of_all_components_draws_the_whole_embedding(cascade, pictures):
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    one, other = (
        Basis(rng.normal(size=16).astype(np.float32), axes[:, order]) for order in (range(16), range(15, -1, -1))
    )
    frames = probe(cascade, pictures[0], [1, 8, 16], one, options=SMALL)
    again = probe(cascade, pictures[0], [16], other, options=SMALL)
    assert frames.shape == (3, 64, 64, 3) and levels_apart(frames[2], again[0]) <= 1
    assert levels_apart(frames[0], frames[2]) > 2
    with pytest.raises(ValueError, match="between 1 and 16"):
        probe(cascade, pictures[0], [17], one, options=SMALL)


def test_no_edit_recompiles_for_what_a_user_changes(cascade, pictures, rebuilt):
    text_diff(cascade, pictures[0], "a cat", "a dog", 0.5, 2, options=SMALL)
    variations(cascade, pictures[0], 2, 0.5, options=SMALL)
    functions = (edit.invert, edit.redraw, sample_prior)
    before = [function._cache_size() for function in functions]
    other = SMALL._replace(steps=7)
    text_diff(cascade, pictures[1][:50], "a red apple", "a house", 0.3, 2, 5, other)
    variations(cascade, np.repeat(pictures[1], 3, 0), 2, 0.1, "a dog", 3, other)
    interpolate(cascade, pictures[::-1], 2, options=other)
    assert [function._cache_size() for function in functions] == before


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda c, p: variations(c, p[0], 0), "between 1 and 256 pictures, not 0"),
        (lambda c, p: variations(c, p[0], 1, float("nan")), "eta must lie"),
        (lambda c, p: variations(c, p[0], 1, seed=-1), "seeds must lie"),
        (lambda c, p: variations(c, p[0], 1, options=Options(size=65)), "not 65"),
        (lambda c, p: variations(c, p[0], 1, options=Options(steps=0)), "steps must lie"),
        (lambda c, p: interpolate(c, p[:1]), "two or more"),
        (lambda c, p: interpolate(c, p, 1), "cannot pass through 2"),
        (lambda c, p: text_diff(c, p[0], "a cat", "a dog", 1.5), "theta must lie"),
        (lambda c, p: text_diff(c, p[0], "a cat", "a cat"), "the same to CLIP"),
    ],
)
def test_edits_without_sense_are_refused(cascade, pictures, act, said):
    with pytest.raises(ValueError, match=said):
        act(cascade, pictures)


def test_captions_of_a_changed_scene_differ_in_one_word():
    scenes = Scenes(("cat", "dog", "apple", "house"), single_fraction=0.0, split="held_out")
    for number in range(8):
        change = changed(scenes[number], number, scenes.concepts)
        assert change.old == plain_caption(scenes[number]) and change.new == change.target.caption
        apart = [pair for pair in zip(change.old.split(), change.new.split(), strict=True) if pair[0] != pair[1]]
        assert 1 <= len([pair for pair in apart if pair[0] not in ("a", "an")]) == 1
        assert (change.place is None) == (number % 2 == 0)


def test_the_report_names_what_was_measured(cascade):
    task = EditTask(2, options=SMALL._replace(prior_steps=2, candidates=1), steps=(4,), thetas=(0.5,))
    report = edits_report(cascade, task)
    found = report.figures
    assert found["reconstruction, 4 steps"]["least"] <= found["reconstruction, 4 steps"]["PSNR"]
    assert found["interpolation's ends, levels of 255"]["difference"] < 0.5
    for name in ("text diff, theta 0.5", "text diff, captions dropped, theta 0.5", "sampled afresh"):
        assert 0 <= found[name]["low"] <= found[name]["right"] <= found[name]["changed"] <= 1
        assert {f"{name}, background", f"{name}, object"} <= found.keys()
    assert [row.shape for row in report.rows] == [(2, 64, 64, 3)] * 8


@pytest.fixture
def unclip(tiny_cascade_folder, tmp_path, capsys, monkeypatch, pictures):
    """Runs a command in a folder with a picture; gives exit code, lines of output and lines of errors."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures[0]).save("a.png")
    Image.fromarray(pictures[1]).save("b.png")
    (tmp_path / "text.png").write_text("a cat")

    def run(*arguments: str):
        code = main([*arguments, "--weights", str(tiny_cascade_folder), "--size", "64", "--steps", "4"])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "count", "wide"),
    [
        (["variations", "a.png", "--n", "2", "--eta", "0"], 2, 3),
        (["interpolate", "a.png", "b.png", "--frames", "2"], 2, 2),
        (["interpolate", "--prompts", "a cat", "a dog", "--frames", "2"], 2, 2),
        (["diff", "a.png", "a cat", "a dog", "--frames", "2", "--theta", "0.4"], 2, 2),
    ],
)
def test_a_command_saves_frames_and_a_strip(unclip, arguments, count, wide):
    code, out, err = unclip(*arguments, "--out", "new/x.png")
    assert code == 0, err
    assert out == ["new/x.png", *(f"new/x-{i}.png" for i in range(1, count)), "new/x-strip.png"]
    assert err[-1].startswith("unclip: ") and "decoder 64 px" in err[-1]
    strip = np.asarray(Image.open("new/x-strip.png"))
    assert strip.shape == (64, 64 * wide, 3)
    np.testing.assert_array_equal(strip[:, -64:], np.asarray(Image.open(out[count - 1])))
    about = Image.open("new/x.png").text
    assert about["edit"] == arguments[0] and json.loads(about["settings"])["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["variations", "text.png"], "is not a picture"),
        (["variations", "nowhere.png"], "there is no picture"),
        (["variations", "a.png", "--n", "0"], "between 1 and 256"),
        (["interpolate", "a.png"], "two or more"),
        (["interpolate", "a.png", "b.png", "--frames", "1"], "cannot pass"),
        (["diff", "a.png", "a cat", "a dog", "--theta", "-1"], "theta must lie"),
        (["probe", "a.png", "--components", "0"], "components must lie"),
        (["variations", "a.png", "--out", "x.jpg"], "must end in .png"),
    ],
)
def test_commands_refuse_in_one_sentence(unclip, tmp_path, monkeypatch, arguments, said):
    basis = Basis(np.zeros(16, np.float32), np.eye(16, dtype=np.float32))
    monkeypatch.setattr("unclip_jax.edit_files.embedding_basis", lambda cascade: basis)
    code, out, err = unclip(*arguments)
    assert (code, out) == (1, []) and said in err[-1]
    assert len([line for line in err if "warning" not in line and not line.endswith("...")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "text.png"]
