import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.checkpoint import save_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.cli import main
from unclip_jax.generate import decode, upsample
from unclip_jax.inpaint import inpaint, painter
from unclip_jax.inputs import Options
from unclip_jax.masks import box_mask, read_mask, resize_mask, resize_picture
from unclip_jax.outpaint import outpaint
from unclip_jax.run import weights_name, widen_stem
from unclip_jax.stages import build
from unclip_jax.types import Batch

PROMPT = "a cat on a blue background"
SMALL = Options(size=64)
METHODS = ("resample", "finetuned")


def random_picture(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def corner_mask(side: int) -> np.ndarray:
    """A quarter of the picture that no stage's grid divides."""
    mask = np.zeros((side, side), bool)
    mask[: side // 2 - 5, side // 2 + 3 :] = True
    return mask


def inpainting(decoder):
    """The plain decoder with zeros for the mask channels."""
    plain = decoder.config.network
    network = replace(plain, unet=replace(plain.unet, in_channels=7))
    params = widen_stem(decoder.params, plain.unet, network.unet)
    return decoder._replace(config=replace(decoder.config, name="tiny_inpaint", network=network), params=params)


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder) -> Cascade:
    """The tiny cascade with a decoder that listens to its mask channels."""
    cascade = load_cascade(tiny_cascade_folder)
    network = inpainting(cascade.decoder)
    kernel = network.params["unet"]["stem"]["kernel"]
    stem = {**network.params["unet"]["stem"], "kernel": kernel + 0.1}
    return cascade._replace(
        inpaint=network._replace(params={**network.params, "unet": {**network.params["unet"], "stem": stem}})
    )


@pytest.mark.parametrize(("size", "method"), [(64, "resample"), (64, "finetuned"), (256, None), (1024, None)])
def test_kept_pixels_come_back_bit_by_bit(cascade, size, method):
    picture, mask = random_picture(size), corner_mask(size)
    painted = inpaint(cascade, picture, mask, PROMPT, 3, Options(size=size), method)
    assert painted.shape == (1, size, size, 3) and painted.dtype == np.uint8
    np.testing.assert_array_equal(painted[0][~mask], picture[~mask])
    assert (painted[0][mask] != picture[mask]).any(axis=-1).mean() > 0.9


def test_a_picture_of_another_size_is_brought_to_the_output(cascade):
    picture, mask = random_picture(100), corner_mask(100)
    painted = inpaint(cascade, picture, mask, PROMPT, 0, SMALL)[0]
    kept = ~resize_mask(mask, 64)
    np.testing.assert_array_equal(painted[kept], resize_picture(picture, 64)[kept])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_painted_follows_prompt_seed_and_surroundings_alone(cascade, method):
    mask = corner_mask(64)
    picture = random_picture(64)
    behind = np.where(mask[..., None], random_picture(64, 1), picture)
    around = np.where(mask[..., None], picture, random_picture(64, 1))

    def paint(picture, prompt=PROMPT, seed=0):
        return inpaint(cascade, picture, mask, prompt, seed, SMALL, method)[0][mask]

    plain = paint(picture)
    np.testing.assert_array_equal(paint(behind), plain)
    for other in (paint(around), paint(picture, "a red dog"), paint(picture, seed=1)):
        assert not np.array_equal(other, plain)


def test_pictures_of_a_batch_are_those_of_single_calls(cascade):
    picture, mask = random_picture(64), corner_mask(64)
    three = inpaint(cascade, picture, mask, [PROMPT] * 3, 5, SMALL)
    alone = inpaint(cascade, picture, mask, PROMPT, 7, SMALL)
    assert np.abs(three[2].astype(int) - alone[0]).max() <= 1


def test_mask_picture_prompt_and_steps_never_recompile(cascade):
    options = Options(size=256)
    inpaint(cascade, random_picture(256), corner_mask(256), PROMPT, 0, options)
    before = decode._cache_size(), upsample._cache_size()
    other = options._replace(steps=4, guidance=1.0)
    inpaint(cascade, random_picture(300, 4), corner_mask(300)[::-1], "a red dog", 9, other)
    assert (decode._cache_size(), upsample._cache_size()) == before


def test_the_finetuned_decoder_is_used_where_there_is_one(cascade):
    assert painter(cascade, SMALL, None)[0].decoder is cascade.inpaint
    assert painter(cascade, SMALL, "resample")[0].decoder is cascade.decoder
    assert painter(cascade._replace(inpaint=None), SMALL, None)[0].decoder is cascade.decoder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"picture": random_picture(64)[:40]}, "square pictures, not 64 x 40"),
        ({"mask": corner_mask(32)}, "the mask has 32 x 32 px, its picture 64 x 64"),
        ({"mask": np.zeros((64, 64), bool)}, "marks nothing to paint"),
        ({"mask": np.ones((64, 64), bool)}, "marks the whole picture"),
        ({"options": Options(size=100)}, "64, 256, 1024 px, not 100"),
        ({"options": Options(sampler="dpm"), "method": "resample"}, "dpm cannot walk back up"),
        ({"options": Options(resamples=0)}, "resamples must lie between 1 and 100, not 0"),
        ({"prompts": []}, "0 prompts"),
    ],
)
def test_what_cannot_be_painted_is_refused(cascade, change, said):
    arguments = {"picture": random_picture(64), "mask": corner_mask(64), "prompts": PROMPT, "options": SMALL}
    with pytest.raises(ValueError, match=said):
        inpaint(cascade, **(arguments | change))


def test_the_finetuned_method_needs_its_decoder(cascade):
    with pytest.raises(ValueError, match="no inpaint.safetensors"):
        inpaint(cascade._replace(inpaint=None), random_picture(64), corner_mask(64), PROMPT, method="finetuned")


def test_mask_channels_begin_without_effect(cascade):
    plain, widened = cascade.decoder, inpainting(cascade.decoder)
    whole = cascade._replace(inpaint=widened)
    picture, mask = random_picture(64), corner_mask(64)
    # One walk without jumps, as the fine-tuned method takes it.
    options = SMALL._replace(resamples=1)
    resampled = inpaint(whole, picture, mask, PROMPT, 0, options, "resample")
    finetuned = inpaint(whole, picture, mask, PROMPT, 0, options, "finetuned")
    assert np.abs(resampled.astype(int) - finetuned).max() <= 1
    assert weights_name(plain.config) == "decoder.safetensors"
    assert weights_name(widened.config) == "inpaint.safetensors"


def test_a_widened_decoder_begins_with_the_plain_loss_and_learns_from_the_mask(cascade):
    widened, clip = inpainting(cascade.decoder), cascade.clip
    tokens = cascade.tokenizer.encode([PROMPT, "a dog"])
    image = jnp.asarray(np.stack([random_picture(64), random_picture(64, 1)]))
    embedding = jnp.asarray(np.eye(2, 16, dtype=np.float32))
    batch = Batch(image, jnp.asarray(tokens.ids), jnp.asarray(tokens.mask), None, embedding)
    context, key = {"clip": clip.params}, jax.random.key(3)
    plain, stage = (build(network.config, clip.config.network) for network in (cascade.decoder, widened))
    loss, _ = jax.jit(plain.loss)(cascade.decoder.params, context, batch, key)
    learn = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))
    (begun, _), gradient = learn(jax.tree.map(jnp.asarray, widened.params), context, batch, key)
    np.testing.assert_allclose(begun, loss, rtol=1e-5)
    unet = widened.config.network.unet
    of_stem = gradient["unet"]["stem"]["kernel"].reshape(3, 3, unet.patch**2, 7, unet.channels)
    assert (np.abs(of_stem).max(axis=(0, 1, 2, 4)) > 0).all()
    with pytest.raises(ValueError, match="reads 3 channels, or 7 where it inpaints, not 4"):
        four = replace(widened.config.network, unet=replace(unet, in_channels=4))
        build(replace(widened.config, network=four), clip.config.network)


def test_a_cascade_may_hold_an_inpainting_decoder(tiny_cascade_folder, tmp_path):
    for path in tiny_cascade_folder.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    plain = load_cascade(tmp_path)
    network = inpainting(plain.decoder)
    save_network(tmp_path / "inpaint.safetensors", network.config, network.params, clip=plain.clip.digest)
    whole = load_cascade(tmp_path)
    assert whole.inpaint is not None and whole.digest != plain.digest
    (tmp_path / "inpaint.safetensors").unlink()
    (tmp_path / "inpaint.safetensors").symlink_to(tiny_cascade_folder / "decoder.safetensors")
    with pytest.raises(CheckpointError, match="reads 3 channels, not 7"):
        load_cascade(tmp_path)


def save(path, pixels, **options) -> str:
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def with_alpha(mask: np.ndarray, transparent: int = 0) -> np.ndarray:
    alpha = np.where(mask, transparent, 255)[..., None]
    return np.concatenate([random_picture(len(mask)), alpha], axis=-1).astype(np.uint8)


def test_white_or_transparent_is_painted_over(tmp_path):
    mask = corner_mask(40)
    levels = np.where(mask, 255, 0).astype(np.uint8)
    files = [
        save(tmp_path / "white.png", levels),
        save(tmp_path / "one_bit.png", mask),
        save(tmp_path / "deep.png", levels.astype(np.uint16) * 257),
        save(tmp_path / "rgb.png", np.stack([levels] * 3, axis=-1)),
        save(tmp_path / "white.jpg", levels, quality=95),
        save(tmp_path / "hole.png", with_alpha(mask)),
        save(tmp_path / "opaque.png", np.stack([levels] * 3 + [np.full_like(levels, 255)], axis=-1)),
    ]
    for file in files:
        np.testing.assert_array_equal(read_mask(file, (40, 40)), mask, err_msg=file)
    np.testing.assert_array_equal(np.argwhere(box_mask((9, 7), (3, 2, 5, 1))), [[2, x] for x in range(3, 8)])


@pytest.fixture
def unclip(tiny_cascade_folder, tmp_path, capsys, monkeypatch):
    """Runs a command in a folder with pictures; gives exit code, lines of output and lines of errors."""
    monkeypatch.chdir(tmp_path)
    mask = corner_mask(64)
    save("cat.png", random_picture(64))
    save("wide.png", random_picture(64)[:40])
    save("pixel.png", random_picture(1))
    save("mask.png", mask)
    save("small.png", mask[:32, 32:])
    save("nothing.png", np.zeros((64, 64), np.uint8))
    save("all.png", np.full((64, 64), 255, np.uint8))
    save("hole.png", with_alpha(mask))
    save("clear.png", with_alpha(np.ones((64, 64), bool)))
    data = (tmp_path / "cat.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")

    def run(*arguments: str):
        code = main([*arguments, "--weights", str(tiny_cascade_folder)])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.mark.parametrize("place", [["cat.png", PROMPT, "--mask", "mask.png"], ["hole.png", PROMPT]])
def test_the_command_paints_where_the_mask_says(unclip, place):
    code, out, err = unclip("inpaint", *place, "--size", "64", "--n", "2", "--seed", "4", "--out", "new.png")
    assert (code, out) == (0, ["new.png", "new-1.png", "new-grid.png"])
    assert err[-1].startswith("unclip: text ")
    kept = ~corner_mask(64)
    given = np.asarray(Image.open(place[0]).convert("RGB"))
    for number, name in enumerate(out[:2]):
        with Image.open(name) as picture:
            about = picture.text
            np.testing.assert_array_equal(np.asarray(picture)[kept], given[kept])
        assert (about["prompt"], about["seed"]) == (PROMPT, str(4 + number))
        assert json.loads(about["settings"])["method"] == "resample"


def test_a_box_is_a_mask(unclip):
    assert unclip("inpaint", "cat.png", PROMPT, "--box", "10,20,30,40", "--size", "64")[0] == 0
    changed = (np.asarray(Image.open("unclip.png")) != np.asarray(Image.open("cat.png"))).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 39, 59)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inpaint", "cat.png", PROMPT], "no transparent part"),
        (["inpaint", "cat.png", PROMPT, "--mask", "small.png"], "has 32 x 32 px, its picture 64 x 64"),
        (["inpaint", "cat.png", PROMPT, "--mask", "nothing.png"], "marks nothing to paint"),
        (["inpaint", "cat.png", PROMPT, "--mask", "all.png"], "marks the whole picture"),
        (["inpaint", "cat.png", PROMPT, "--mask", "cut.png"], "'cut.png' is truncated or damaged"),
        (["inpaint", "cat.png", PROMPT, "--mask", "text.png"], "'text.png' is not a picture"),
        (["inpaint", "cat.png", PROMPT, "--mask", "none.png"], "no picture 'none.png'"),
        (["inpaint", "cut.png", PROMPT, "--box", "1,1,2,2"], "'cut.png' is truncated or damaged"),
        (["inpaint", "clear.png", PROMPT], "marks the whole picture"),
        (["inpaint", "wide.png", PROMPT, "--box", "1,1,2,2"], "square pictures, not 64 x 40"),
        (["inpaint", "pixel.png", PROMPT, "--box", "0,0,1,1"], "marks the whole picture"),
        (["inpaint", "cat.png", PROMPT, "--box", "40,40,40,4"], "does not lie in the picture"),
        (["inpaint", "cat.png", PROMPT, "--box", "1,2,3"], "four whole numbers"),
        (["inpaint", "cat.png", PROMPT, "--box", "1,1,2,2", "--n", "0"], "--n must lie"),
        (["inpaint", "cat.png", PROMPT, "--box", "1,1,2,2", "--size", "65"], "px, not 65"),
        (["inpaint", "cat.png", PROMPT, "--box", "1,1,2,2", "--method", "finetuned"], "no inpaint.safetensors"),
        (["inpaint", "cat.png", PROMPT, "--box", "1,1,2,2", "--sampler", "dpm"], "dpm cannot walk back"),
        (["outpaint", "cat.png", PROMPT], "at least one side"),
        (["outpaint", "cat.png", PROMPT, "--left", "-4"], "at least one side"),
        (["outpaint", "cat.png", PROMPT, "--right", "200000"], "1 to 100000 px"),
        (["outpaint", "cat.png", PROMPT, "--right", "8", "--out", "new"], "must end in .png"),
        (["outpaint", "text.png", PROMPT, "--right", "8"], "not a picture"),
    ],
)
def test_refused_in_one_sentence(unclip, tmp_path, arguments, said):
    before = sorted(tmp_path.iterdir())
    code, out, err = unclip(*arguments)
    assert (code, out, sorted(tmp_path.iterdir())) == (1, [], before)
    assert len([line for line in err if "Traceback" in line]) == 0
    assert err[-1].startswith("unclip: ") and said in err[-1]


@pytest.mark.parametrize("grow", [{"right": 40}, {"left": 30, "top": 20, "bottom": 70}])
def test_a_picture_grows_and_stays_as_it_was(cascade, grow):
    picture = random_picture(96)[:80]
    grown = outpaint(cascade, picture, **grow, prompt=PROMPT, options=SMALL)
    left, top = grow.get("left", 0), grow.get("top", 0)
    assert grown.shape == (80 + top + grow.get("bottom", 0), 96 + left + grow.get("right", 0), 3)
    np.testing.assert_array_equal(grown[top : top + 80, left : left + 96], picture)
    new = np.ones(grown.shape[:2], bool)
    new[top : top + 80, left : left + 96] = False
    assert (grown[new] != 128).any(axis=-1).mean() > 0.9


def test_frames_of_a_picture_smaller_than_the_cascade(cascade):
    picture = random_picture(40)
    grown = outpaint(cascade, picture, left=9, prompt=PROMPT)
    assert grown.shape == (40, 49, 3)
    np.testing.assert_array_equal(grown[:, 9:], picture)


def test_the_command_outpaints(unclip):
    code, out, _ = unclip("outpaint", "wide.png", PROMPT, "--right", "24", "--size", "64", "--out", "wider.png")
    assert (code, out) == (0, ["wider.png"])
    with Image.open("wider.png") as picture:
        assert picture.size == (88, 40) and picture.text["prompt"] == PROMPT
        np.testing.assert_array_equal(np.asarray(picture)[:, :64], np.asarray(Image.open("wide.png")))
