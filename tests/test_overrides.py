from pathlib import Path

import pytest

from unclip_jax.config import ClipConfig, DataConfig, DecoderConfig, DiffusionConfig, OptimConfig, TrainConfig
from unclip_jax.overrides import UsageError, apply, available_configs, load_config, options

CONFIG = TrainConfig("tiny", DecoderConfig())


def test_values_take_the_type_of_their_field():
    arguments = (
        "--optim.learning-rate 1e-4 --data.batch_size=16 --network.text-embedding false --diffusion.prediction v"
    )
    arguments += " --network.unet.multipliers 1,2.5 --network.unet.context-dim none --optim.decay-steps 7 --clip none"
    arguments += " --data.concepts=cat,dog --tags author=me --seed -3 --network.unet.attention-factors="
    changed = apply(CONFIG, arguments.split())
    assert isinstance(changed.network, DecoderConfig)
    assert changed.optim == OptimConfig(learning_rate=1e-4, decay_steps=7) and not changed.network.text_embedding
    assert changed.data == DataConfig(batch_size=16, concepts=("cat", "dog"))
    assert changed.diffusion == DiffusionConfig(prediction="v")
    assert changed.network.unet.multipliers == (1, 2.5) and changed.network.unet.context_dim is None
    assert changed.network.unet.attention_factors == ()
    assert (changed.clip, changed.tags, changed.seed) == (None, {"author": "me"}, -3)
    assert apply(CONFIG, []) == CONFIG


def test_a_boolean_may_stand_alone_and_the_last_of_two_wins():
    changed = apply(CONFIG, ["--network.unet.scale-shift=false", "--network.unet.scale-shift", "--seed=1", "--seed=2"])
    assert isinstance(changed.network, DecoderConfig)
    assert changed.network.unet.scale_shift is True and changed.seed == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--optim.learning-rte", "1"], "unknown option --optim.learning-rte; did you mean --optim.learning-rate?"),
        (["--batch-size", "1"], "unknown option --batch-size; did you mean --data.batch-size?"),
        (["--optim.learning-rate", "fast"], "--optim.learning-rate expects a number, not 'fast'"),
        (["--optim.learning-rate", "nan"], "--optim.learning-rate expects a number, not 'nan'"),
        (["--data.batch-size=1.5"], "--data.batch-size expects an integer, not '1.5'"),
        (["--network.text-embedding=maybe"], "--network.text-embedding expects true or false, not 'maybe'"),
        (["--diffusion.schedule", "cosin"], "--diffusion.schedule expects one of cosine, linear, not 'cosin'"),
        (["--network.unet.context-dim", "x"], "--network.unet.context-dim expects an integer or none, not 'x'"),
        (["--seed"], "--seed needs a value: an integer"),
        (["--seed", "--steps=1"], "--seed needs a value: an integer"),
        (["--optim", "3"], "--optim is a group of options, such as --optim.learning-rate"),
        (["seed", "3"], "expected an option such as --optim.learning-rate, not 'seed'"),
    ],
)
def test_a_wrong_option_gets_one_sentence(arguments: list[str], sentence: str):
    with pytest.raises(UsageError) as error:
        apply(CONFIG, arguments)
    assert str(error.value) == sentence


def test_a_tuple_of_fixed_length_is_counted():
    config = TrainConfig("clip", ClipConfig())
    changed = apply(config, ["--network.image-mean", "0.1,0.2,0.3"])
    assert isinstance(changed.network, ClipConfig) and changed.network.image_mean == (0.1, 0.2, 0.3)
    with pytest.raises(UsageError, match="expects 3 values separated by commas, each a number, not '0.1,0.2'"):
        apply(config, ["--network.image-mean", "0.1,0.2"])


def test_every_option_accepts_its_own_value():
    for key in options(CONFIG):
        value = CONFIG
        for name in key.split("."):
            value = getattr(value, name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else "" if value == {} else str(value)
        assert apply(CONFIG, [f"--{key}={text}"]) == CONFIG


def test_packaged_configs_load():
    for name in available_configs():
        assert isinstance(load_config(name), TrainConfig), name


def test_configs_from_files(tmp_path: Path):
    good = "from unclip_jax.config import *\ndef get_config():\n    return TrainConfig('mine', PriorConfig())\n"
    (tmp_path / "good.py").write_text(good)
    assert load_config(tmp_path / "good.py").name == "mine"
    bad = {
        "broken.py": ("def get_config(:", "does not work: SyntaxError"),
        "empty.py": ("", "needs a function get_config()"),
        "other.py": ("def get_config():\n    return 3\n", "gives a int, expected a TrainConfig"),
    }
    for name, (text, sentence) in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError) as error:
            load_config(str(tmp_path / name))
        assert sentence in str(error.value)
    with pytest.raises(UsageError, match="there is no config file"):
        load_config(str(tmp_path / "none.py"))


def test_an_unknown_name_lists_the_nearest_and_all(monkeypatch: pytest.MonkeyPatch):
    known = {"emoji_clip": Path("a"), "emoji_decoder": Path("b")}
    monkeypatch.setattr("unclip_jax.overrides.available_configs", lambda: known)
    with pytest.raises(UsageError) as error:
        load_config("emoji-decodr")
    assert str(error.value).startswith("unknown config 'emoji-decodr'; did you mean emoji_decoder? ")
    assert "available: emoji_clip, emoji_decoder" in str(error.value)
