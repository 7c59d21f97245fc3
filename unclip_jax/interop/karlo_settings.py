"""What diffusers' configs of Karlo's classes may say, and how they are read: strictly, naming what is wrong.

The defaults are those of diffusers 0.42; a setting in none of the tables below is one that this version does not know.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from unclip_jax.checkpoint.schema import CheckpointError

Settings = Any  # whatever JSON gave, which should be an object

LARGEST = 2**20  # of any width or count: a hostile config must not ask for a table without end
DEEPEST = 256  # layers, levels, blocks of a level
REFUSED = ": this network cannot be exported"
NORM_EPSILON = 1e-5  # diffusers writes it into its code where no setting names it


class Model(NamedTuple):
    """A class of diffusers: its settings that we read, with diffusers' defaults, and those with one value only.

    stated: settings with one value that is not diffusers' default, so that they must be there.
    """

    name: str
    read: dict[str, Any]
    fixed: dict[str, Any]
    stated: dict[str, Any]


PRIOR = Model(
    "PriorTransformer",
    read={
        "attention_head_dim": 64,
        "dropout": 0.0,
        "embedding_dim": 768,
        "num_attention_heads": 32,
        "num_embeddings": 77,
        "num_layers": 20,
    },
    fixed={
        "added_emb_type": "prd",
        "additional_embeddings": 4,
        "clip_embed_dim": None,
        "embedding_proj_dim": None,
        "embedding_proj_norm_type": None,
        "encoder_hid_proj_type": "linear",
        "norm_in_type": None,
        "time_embed_act_fn": "silu",
        "time_embed_dim": None,
    },
    stated={},
)
_UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
DECODER = Model(
    "UNet2DConditionModel",
    read={
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1280,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "dropout": 0.0,
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 4,
        "resnet_time_scale_shift": "default",
        "sample_size": None,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    fixed=_UNET
    | {
        "addition_embed_type": None,
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "norm_eps": NORM_EPSILON,  # its attention has no other
        "num_attention_heads": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
        "upcast_attention": False,
        "use_linear_projection": False,
    },
    stated={"class_embed_type": "identity", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
)
PROJECTIONS = Model(
    "UnCLIPTextProjModel",
    read={
        "clip_embeddings_dim": 768,
        "clip_extra_context_tokens": 4,
        "cross_attention_dim": None,
        "time_embed_dim": None,
    },
    fixed={},
    stated={},
)
UPSAMPLER = Model(
    "UNet2DModel",
    read={
        "attention_head_dim": 8,  # of no consequence: nothing attends
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "dropout": 0.0,
        "in_channels": 3,
        "layers_per_block": 2,
        "norm_eps": NORM_EPSILON,
        "norm_num_groups": 32,
        "out_channels": 3,
        "resnet_time_scale_shift": "default",
        "sample_size": None,
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    fixed=_UNET
    | {
        "attn_norm_num_groups": None,
        "class_embed_type": None,
        "downsample_type": "conv",
        "mid_block_type": "UNetMidBlock2D",
        "num_train_timesteps": None,
        "upsample_type": "conv",
    },
    stated={"add_attention": False},
)
SCHEDULER = Model(
    "UnCLIPScheduler",
    read={
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small_log",
    },
    fixed={"beta_schedule": "squaredcos_cap_v2"},
    stated={},
)


class Reader:
    """The settings of one config of a class of diffusers, defaults filled in; CheckpointError where they do not suit.

    given: as JSON gave it, with or without "_class_name" and other names that begin with an underscore.
    """

    def __init__(self, model: Model, given: Settings) -> None:
        if not isinstance(given, Mapping):
            raise CheckpointError(f"the config of a {model.name} is no JSON object: it belongs to something else")
        if given.get("_class_name", model.name) != model.name:
            raise CheckpointError(f"the config describes a {given['_class_name']}, not a {model.name}")
        own = {key: value for key, value in given.items() if not str(key).startswith("_")}
        known = model.read | model.fixed | dict.fromkeys(model.stated)
        if unknown := [key for key in own if key not in known]:
            raise CheckpointError(f"{model.name} has the unknown setting {unknown[0]}: a newer unclip_jax may know it")
        self.name = model.name
        self.values: dict[str, Any] = known | {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        for key, value in (model.fixed | model.stated).items():
            self.require(key, value)

    def require(self, key: str, value: Any) -> None:
        """The setting must have this value."""
        if self.values[key] != value:
            raise CheckpointError(
                f"{self.name} has the setting {key}={self.values[key]!r}, and here only {value!r} is supported"
            )

    def count(self, key: str, largest: int = LARGEST) -> int:
        """A positive integer; diffusers may also repeat it in a list, once for every level."""
        value = self.values[key]
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 0 < value <= largest:
            raise self._unsuitable(key, f"a whole number from 1 to {largest}")
        return value

    def number(self, key: str) -> float:
        """A finite number that is not negative."""
        value = self.values[key]
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self._unsuitable(key, "a number of at least 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        if type(self.values[key]) is not bool:
            raise self._unsuitable(key, "true or false")
        return self.values[key]

    def choice(self, key: str, options: Iterable[str]) -> str:
        """One of the options."""
        options = list(options)
        if self.values[key] not in options:
            raise self._unsuitable(key, " or ".join(options))
        return self.values[key]

    def levels(self, key: str) -> list[Any]:
        """A list with an item for every level of a U-Net."""
        value = self.values[key]
        if not isinstance(value, list) or not 0 < len(value) <= DEEPEST:
            raise self._unsuitable(key, "a list of one item per level")
        return value

    def _unsuitable(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.name} has the setting {key}={self.values[key]!r}, which must be {wanted}")


def settings(model: Model, **values: Any) -> dict[str, Any]:
    """A whole config of the class, as diffusers would write it; values: of every setting that is read."""
    if values.keys() != model.read.keys():
        raise TypeError(f"{model.name} takes the settings {sorted(model.read)}, not {sorted(values)}")
    return {"_class_name": model.name, **dict(sorted((model.fixed | model.stated | values).items()))}


def refuse(model: Model, lacking: Mapping[str, bool]) -> None:
    """CheckpointError naming everything that a network has and the class does not."""
    if names := [name for name, there in lacking.items() if there]:
        raise CheckpointError(f"diffusers' {model.name} has no {', no '.join(names)}{REFUSED}")
