"""The commands `unclip import`, `unclip export` and `unclip inspect`."""

import argparse
import sys
from pathlib import Path


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds the three commands that read and write published weights."""
    bring = commands.add_parser(
        "import",
        help="turn published weights into a cascade of ours",
        description="Turn published weights into files of ours: an unCLIP in diffusers' layout, Karlo's original "
        "checkpoints, or a CLIP in Hugging Face's layout.",
    )
    bring.add_argument(
        "source", nargs="+", help="folder, or owner/name[@revision] on the hub; several pipelines complete each other"
    )
    bring.add_argument("--out", type=Path, required=True, help="new folder")
    bring.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the parameters (auto: as they come)",
    )
    bring.add_argument("--clip", type=Path, help="CLIP in Hugging Face's layout, for Karlo's original checkpoints")
    bring.set_defaults(run=_import)

    export = commands.add_parser(
        "export",
        help="turn a cascade of ours into a folder for diffusers, or a CLIP into one for transformers",
        description="Turn a cascade of Karlo's architecture into a folder that diffusers' UnCLIPPipeline loads, or a "
        "CLIP into one that transformers' CLIPModel loads.",
    )
    export.add_argument("checkpoint", type=Path, help="folder of a cascade, or a clip.safetensors")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.set_defaults(run=_export)

    look = commands.add_parser(
        "inspect",
        help="say what a folder or file of weights holds",
        description="Say what a folder or file of weights holds, ours or published, and whether its parts fit.",
    )
    look.add_argument("path", help="folder or file, or owner/name[@revision] on the hub, which is fetched")
    look.set_defaults(run=_inspect)


def _import(options: argparse.Namespace) -> None:
    from unclip_jax.interop.importing import import_weights

    import_weights(options.source, options.out, options.dtype, options.clip)
    print(options.out)


def _export(options: argparse.Namespace) -> None:
    from unclip_jax.cascade import load_cascade, load_checked, tokenizer_from
    from unclip_jax.checkpoint.writing import new_folder
    from unclip_jax.config import ClipConfig
    from unclip_jax.interop.clip import clip_folder
    from unclip_jax.interop.clip_tokenizer import load_tokenizer
    from unclip_jax.interop.exporting import export_cascade
    from unclip_jax.interop.folder import is_published, load_folders

    path: Path = options.checkpoint
    if path.is_file():
        network = load_checked(path, ClipConfig)
        config = network.config.network
        assert isinstance(config, ClipConfig)
        tokenizer = None
        if network.extra.get("kept_ids"):
            print("unclip: this CLIP's vocabulary was cut, so that the folder has no tokenizer", file=sys.stderr)
        else:
            beside = path.parent / "tokenizer"
            tokenizer = load_tokenizer(beside, config) if beside.is_dir() else tokenizer_from(network)
        with new_folder(options.out) as folder:
            clip_folder(network.params, config, folder, tokenizer)
    else:
        cascade = load_folders([path], place="file") if is_published(path) else load_cascade(path, offload="always")
        export_cascade(cascade, options.out)
    print(options.out)


def _inspect(options: argparse.Namespace) -> None:
    from unclip_jax.interop.hub import is_repository, snapshot
    from unclip_jax.interop.inspecting import inspect, table

    print(table(inspect(snapshot(options.path, clip=True).folder if is_repository(options.path) else options.path)))
