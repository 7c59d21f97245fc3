"""What a folder or a file of weights holds, as a table, from the headers of its files."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.cascade import Cascade, check_cascade, check_widths, expected_shapes
from unclip_jax.checkpoint.safetensors import Network, check_tree, load_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import PICKLES, TensorSource, find_weights, open_safetensors, open_source
from unclip_jax.config import ArPriorConfig, ClipConfig, DecoderConfig, PriorConfig, UpsamplerConfig
from unclip_jax.interop.clip import IGNORED
from unclip_jax.interop.folder import load_folders
from unclip_jax.interop.hub import COMPONENTS
from unclip_jax.interop.importing import ORIGINALS, clip_network, kind_of

UNKNOWN = "unknown tensors"
# Names of tensors that only this class has, the first that matches; patterns of all that must be there.
SIGNS = {
    "CLIPModel": ("text_model.*", "vision_model.*"),
    "CLIPTextModelWithProjection": ("text_model.*", "text_projection.*"),
    "CLIPVisionModelWithProjection": ("vision_model.*", "visual_projection.*"),
    "PriorTransformer": ("prd_embedding",),
    "UnCLIPTextProjModel": ("learned_classifier_free_guidance_embeddings",),
    "UNet2DConditionModel": ("conv_in.weight", "*.add_k_proj.weight"),
    "UNet2DModel": ("conv_in.weight", "*.time_emb_proj.weight"),
    "Karlo's original prior": ("model.prd_emb",),
    "Karlo's original decoder": ("model.input_blocks.*", "model.cf_param"),
    "Karlo's original upsamplers": ("model_first_steps.*", "model_last_step.*"),
    "Karlo's whitening statistics": ("0", "1"),
}


class Row(NamedTuple):
    """One network. parameters: numbers in it. size: bytes of its tensors. clip: digest of the CLIP it is or knows."""

    component: str
    kind: str
    parameters: int
    tensors: int
    dtype: str
    size: int
    clip: str = "-"


class Report(NamedTuple):
    """What lies at a path. verdict: whether its parts make a cascade, and why not."""

    family: str
    rows: list[Row]
    verdict: str


def inspect(path: str | Path) -> Report:
    """What a folder or a weights file holds; CheckpointError where there is nothing that can be read.

    Of the tensors nothing is read but, for the identity of a CLIP in diffusers' layout, their first few kilobytes; so
    that damage inside them goes unnoticed.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder '{path}': check the path")
    match kind_of(path):
        case "diffusers":
            return _diffusers(path)
        case "original":
            return _original(path)
        case "clip":
            network, tokenizer = clip_network(path)
            row = _row("clip", "CLIPModel", _network_arrays(network))
            lacks = "" if tokenizer else "; it has no tokenizer"
            return Report("CLIP in Hugging Face's layout", [row], f"a CLIP alone{lacks}")
    if files := sorted(path.glob("*.safetensors")):
        return _ours(path, files)
    raise CheckpointError(f"'{path}' holds no weights that unclip knows: check the path")


def table(report: Report) -> str:
    """The report as plain text."""
    head = ("component", "kind", "parameters", "tensors", "dtype", "size", "CLIP")
    lines = [head] + [
        (row.component, row.kind, f"{row.parameters:,}", str(row.tensors), row.dtype, _bytes(row.size), row.clip)
        for row in report.rows
    ]
    if len(report.rows) > 1:
        total, tensors, size = (sum(column) for column in zip(*((r[2], r[3], r[5]) for r in report.rows), strict=True))
        lines.append(("total", "", f"{total:,}", str(tensors), "", _bytes(size), ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (2, 3, 5)  # columns of numbers
    text = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([f"family: {report.family}", "", *text, "", f"can be combined: {report.verdict}"])


def _ours(folder: Path, files: list[Path]) -> Report:
    networks = {path.stem: load_network(path, verify=False) for path in files}
    rows = [_our_row(name, network) for name, network in networks.items()]
    verdict = _verdict(lambda: _combine(folder, networks))
    if verdict == "yes" and "prior" not in networks:
        verdict = "yes, but without prior.safetensors it needs pictures to start from"
    return Report("unclip_jax", rows, verdict)


def _combine(folder: Path, networks: dict[str, Network]) -> None:
    """Raises CheckpointError where load_cascade would, as far as headers tell."""
    clip = networks.get("clip")
    for name in ("clip", "decoder"):
        if name not in networks:
            raise CheckpointError(f"'{folder}' has no {name}.safetensors")
    assert clip is not None
    config = clip.config.network
    if not isinstance(config, ClipConfig):
        raise CheckpointError("clip.safetensors holds no CLIP")
    for name, network in networks.items():
        if network.clip not in (None, clip.digest):
            raise CheckpointError(
                f"{name} was trained on the CLIP {network.clip}, not on {clip.digest}: take all from one cascade"
            )
        check_tree(expected_shapes(network, config), network.params, name)
        check_widths(network, config, name)
    upsamplers = [network for network in networks.values() if isinstance(network.config.network, UpsamplerConfig)]
    upsamplers.sort(key=lambda network: network.config.network.size)  # type: ignore[union-attr]
    tokenizer: Any = None  # not asked
    decoder, inpaint = networks["decoder"], networks.get("inpaint")
    cascade = Cascade(tokenizer, clip, networks.get("prior"), decoder, tuple(upsamplers), (), None, inpaint)
    check_cascade(cascade, str(folder))


def _our_row(name: str, network: Network) -> Row:
    match network.config.network:
        case ClipConfig():
            kind = "CLIP" if "image_projection" in network.params else "CLIP, text tower alone"
        case PriorConfig():
            kind = "diffusion prior"
        case ArPriorConfig():
            kind = "autoregressive prior"
        case DecoderConfig(size=size):
            kind = f"decoder, {size} px"
        case UpsamplerConfig(low_size=low, size=size):
            kind = f"upsampler, {low} to {size} px"
    return _row(name, kind, _network_arrays(network), network.clip or "-")


def _diffusers(folder: Path) -> Report:
    rows = []
    for component, stem in COMPONENTS.items():
        if stem is not None and (folder / component).is_dir():
            source = open_source(find_weights(folder / component, stem))
            rows.append(_source_row(component, source))
    digests: list[str] = []
    verdict = _verdict(lambda: digests.append(load_folders([folder], place="file").clip.digest))
    rows = [row._replace(clip=digests[0]) if digests and row.component == "text_encoder" else row for row in rows]
    return Report("unCLIP in diffusers' layout", rows, verdict)


def _original(folder: Path) -> Report:
    rows, absent = [], []
    for name, pattern in ORIGINALS.items():
        paths = sorted(folder.glob(pattern))
        rows += [_source_row(name, open_source(path)) for path in paths]
        absent += [] if paths else [pattern]
    verdict = "yes, with a CLIP in Hugging Face's layout: unclip import --clip"
    if absent:
        verdict = f"no: '{folder}' has no {', no '.join(absent)}"
    return Report("Karlo's original checkpoints", rows, verdict)


def _file(path: Path) -> Report:
    if path.suffix == ".safetensors" and "seal" in open_safetensors(path)[1]:
        network = load_network(path, verify=False)
        return Report("unclip_jax", [_our_row(path.stem, network)], "one network alone")
    if path.suffix in (".safetensors", ".json", *PICKLES):
        return Report("a single file", [_source_row(path.stem, open_source(path))], "one file alone")
    raise CheckpointError(f"'{path}' is no weights file by its name: give a folder, .safetensors or {PICKLES[0]}")


def _source_row(component: str, source: TensorSource) -> Row:
    names = source.arrays
    kind = next(
        (
            kind
            for kind, patterns in SIGNS.items()
            if all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)
        ),
        UNKNOWN,
    )
    return _row(component, kind, [a for n, a in names.items() if not any(fnmatchcase(n, p) for p in IGNORED)])


def _row(component: str, kind: str, arrays: Iterable[Any], clip: str = "-") -> Row:
    arrays = list(arrays)
    sizes = [math.prod(array.shape) for array in arrays]
    stored = Counter[str]()
    for array, size in zip(arrays, sizes, strict=True):
        stored[np.dtype(array.dtype).name] += size
    dtype = " + ".join(name for name, _ in stored.most_common())
    size = sum(n * np.dtype(array.dtype).itemsize for n, array in zip(sizes, arrays, strict=True))
    return Row(component, kind, sum(sizes), len(arrays), dtype, size, clip)


def _network_arrays(network: Network) -> list[Any]:
    return jax.tree.leaves(network.params)


def _verdict(combine: Callable[[], None]) -> str:
    try:
        combine()
    except CheckpointError as error:
        return f"no: {error}"
    return "yes"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
