import io
import json

import numpy as np
import pytest
from PIL import Image

from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.cli import main
from unclip_jax.inputs import Options
from unclip_jax.mural import BAND, Canvas, Plan, Region, finished_frames, mural, write_png
from unclip_jax.outpaint import Frame, frames

SMALL = Options(size=64, steps=2, resamples=1)
PLAN = Plan(140, 100, "a cat", (Region(60, 0, 80, 100, "a red dog"),), 3, SMALL)


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder) -> Cascade:
    return load_cascade(tiny_cascade_folder)


def pixels(canvas: Canvas) -> np.ndarray:
    return np.frombuffer(b"".join(canvas.rows()), np.uint8).reshape(canvas.height, canvas.width, 3)


@pytest.fixture(scope="module")
def whole(cascade, tmp_path_factory) -> np.ndarray:
    """The uninterrupted mural."""
    return pixels(mural(cascade, PLAN, tmp_path_factory.mktemp("mural")))


@pytest.mark.parametrize(
    ("width", "height", "side"), [(64, 64, 64), (65, 64, 64), (2048, 1024, 1024), (300, 200, 64), (40, 500, 64)]
)
def test_frames_cover_the_canvas_and_overlap_by_a_quarter(width, height, side):
    found = frames(width, height, side)
    covered = np.zeros((height, width), bool)
    for number, frame in enumerate(found):
        part = covered[frame.slices]
        assert part.shape == (min(side, width, height),) * 2
        assert number == 0 or part.mean() >= 0.25
        part[:] = True
    assert covered.all()
    assert len(found) <= -(-2 * width // side) * -(-2 * height // side) or min(width, height) < side


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (100_001, 64)])
def test_a_canvas_without_sense_is_refused(size):
    with pytest.raises(ValueError, match="a canvas measures 1 to 100000 px"):
        frames(*size, 64)


def test_an_interruption_changes_no_pixel(cascade, whole, tmp_path):
    calls = []

    def interrupt(stage: str) -> None:
        calls.append(stage)
        if len(calls) in (6, 14):
            raise KeyboardInterrupt

    for expected in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            mural(cascade, PLAN, tmp_path, interrupt)
        assert finished_frames(cascade, PLAN, tmp_path) == expected
    # As if the last frame had been half written when the power failed.
    canvas = Canvas(tmp_path / "canvas.rgb", 140, 100)
    broken = canvas.read(Frame(76, 36, 64))
    broken[40:, 40:] = 7
    canvas.write(Frame(76, 36, 64), broken)
    np.testing.assert_array_equal(pixels(mural(cascade, PLAN, tmp_path)), whole)
    assert len(calls) == 14


def test_a_canvas_that_was_half_written_is_mended(cascade, whole, tmp_path, monkeypatch):
    write = Canvas.write

    def fail(canvas, frame, pixels):
        if frame.x == 38:
            write(canvas, frame, np.where(np.arange(64)[:, None, None] < 40, pixels, canvas.read(frame)))
            raise KeyboardInterrupt
        write(canvas, frame, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            mural(cascade, PLAN, tmp_path)
    np.testing.assert_array_equal(pixels(mural(cascade, PLAN, tmp_path)), whole)


def test_a_frame_fades_into_what_it_knows_and_leaves_the_rest(cascade, whole, tmp_path):
    plan = PLAN._replace(height=64, width=112)
    first = pixels(mural(cascade, plan._replace(width=64, regions=()), tmp_path / "first"))
    both = pixels(mural(cascade, plan, tmp_path / "both"))
    kept = 64 - round(BAND * 64)
    np.testing.assert_array_equal(both[:, :kept], first[:, :kept])
    assert (both[:, 64:] != 0).any(axis=-1).mean() > 0.9


@pytest.mark.parametrize("change", [{"prompt": "a dog"}, {"seed": 4}, {"regions": ()}, {"options": Options(size=64)}])
def test_another_mural_does_not_go_on_in_this_folder(cascade, tmp_path, change):
    def stop(stage: str) -> None:
        raise KeyboardInterrupt

    (tmp_path / "plan.json").write_text(json.dumps({"plan": PLAN, "weights": cascade.digest, "finished": 1}))
    Canvas(tmp_path / "canvas.rgb", 140, 100).create()
    assert finished_frames(cascade, PLAN, tmp_path) == 1
    with pytest.raises(ValueError, match="unfinished mural of other arguments"):
        mural(cascade, PLAN._replace(**change), tmp_path, stop)


@pytest.mark.parametrize("content", ["", "[1]", '{"finished": null}', '{"plan": 1}'])
def test_a_damaged_state_is_refused(cascade, tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="holds no mural that could go on"):
        mural(cascade, PLAN, tmp_path)


def test_a_frame_has_the_prompt_of_the_region_that_holds_it():
    regions = Region(100, 0, 100, 200, "right"), Region(0, 100, 120, 100, "below"), Region(0, 0, 4, 4, "speck")
    plan = Plan(200, 200, "everywhere", regions)
    said = [plan.prompt_of(Frame(x, y, 50)) for x, y in ((0, 0), (150, 0), (0, 150), (90, 150), (60, 40))]
    assert said == ["everywhere", "right", "below", "right", "everywhere"]


def test_a_region_must_begin_on_the_canvas(cascade, tmp_path):
    with pytest.raises(ValueError, match="region 140,0,9,9 does not begin on the canvas of 140 x 100 px"):
        mural(cascade, PLAN._replace(regions=(Region(140, 0, 9, 9, "a cat"),)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_rows_become_the_png_of_the_canvas(tmp_path):
    canvas = Canvas(tmp_path / "canvas.rgb", 70, 64)
    canvas.create()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    canvas.write(Frame(6, 0, 64), picture)
    file = io.BytesIO()
    write_png(file, canvas, {"prompt": "חתול"})
    with Image.open(file) as read:
        assert (read.size, read.mode, read.text["prompt"]) == ((70, 64), "RGB", "חתול")
        np.testing.assert_array_equal(np.asarray(read)[:, 6:], picture)
        assert not np.asarray(read)[:, :6].any()


@pytest.fixture
def unclip(tiny_cascade_folder, tmp_path, capsys, monkeypatch):
    """Runs `unclip mural` in an empty folder; gives exit code, lines of output and lines of errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        code = main(["mural", "--prompt", "a cat", *arguments, "--weights", str(tiny_cascade_folder)])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


def test_the_command_paints_and_cleans_up(unclip, tmp_path, whole):
    arguments = ["--width", "140", "--height", "100", "--size", "64", "--seed", "3", "--out", "wall.png"]
    arguments += ["--steps", "2", "--resamples", "1"]
    code, out, err = unclip(*arguments, "--region", "60,0,80,100=a red dog")
    assert (code, out, [path.name for path in tmp_path.iterdir()]) == (0, ["wall.png"], ["wall.png"])
    assert err[-1].startswith("unclip: 6 frames of 64 px; text") and "peak memory" in err[-1]
    with Image.open("wall.png") as picture:
        assert picture.text["seed"] == "3 to 8"
        np.testing.assert_array_equal(np.asarray(picture), whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--width", "0", "--height", "64"], "a canvas measures"),
        (["--width", "64", "--height", "64", "--region", "1,2=cat"], "four whole numbers"),
        (["--width", "64", "--height", "64", "--region", "0,0,9,9"], "a region is x,y,width,height=prompt"),
        (["--width", "64", "--height", "64", "--region", "99,0,9,9=cat"], "does not begin on the canvas"),
        (["--width", "64", "--height", "64", "--out", "wall.jpg"], "must end in .png"),
        (["--width", "64", "--height", "64", "--seed", "-1"], "seeds must lie"),
    ],
)
def test_refused_in_one_sentence(unclip, tmp_path, arguments, said):
    code, out, err = unclip(*arguments)
    assert (code, out, list(tmp_path.iterdir())) == (1, [], [])
    assert err[-1].startswith("unclip: ") and said in err[-1]
