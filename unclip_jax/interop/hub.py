"""Published weights from the hub: what a cascade or a CLIP needs of a repository, through the hub's own client."""

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import PICKLED_STEMS, PICKLES, find_weights, locate, read_table

INDEX = "model_index.json"
ALONE = "config.json"  # what a CLIP's own repository has in its place
STEM = "diffusion_pytorch_model"
COMPONENTS: dict[str, str | None] = {  # folders that a cascade reads, and how their weights files are called
    "text_encoder": "model",
    "tokenizer": None,
    "image_encoder": "model",
    "feature_extractor": None,
    "prior": STEM,
    "prior_scheduler": None,
    "text_proj": STEM,
    "decoder": STEM,
    "decoder_scheduler": None,
    "super_res_first": STEM,
    "super_res_last": STEM,
    "super_res_scheduler": None,
}
TIMEOUT = 10.0  # seconds
DAMAGED = "delete it and fetch it again"  # a file in the cache, which the client takes for whole
WORD = r"\w[\w.-]*"  # begins with no dot, so no part of a path is `..`
NAME = re.compile(rf"(?P<repository>{WORD}/{WORD})(@(?P<revision>{WORD}(/{WORD})*))?", re.ASCII)
SETTINGS = re.compile(rf"(?P<component>(\w+/)?)(?!.*\.index\.){WORD}\.(json|txt)", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


class Snapshot(NamedTuple):
    """A repository at one commit, on this machine.

    folder: where its files lie, in the client's cache. revision: the commit, 40 hexadecimal digits.
    """

    folder: Path
    repository: str
    revision: str


def is_repository(name: str) -> bool:
    """Whether a name is `owner/name` or `owner/name@revision`, of no weights file and of nothing that exists here."""
    path = Path(name)
    return bool(NAME.fullmatch(name)) and path.suffix not in (".safetensors", ".json", *PICKLES) and not path.exists()


def snapshot(name: str, clip: bool = False) -> Snapshot:
    """The files of `owner/name` or `owner/name@revision` (a branch, tag or commit) that a cascade reads.

    clip: a repository of a CLIP alone, in Hugging Face's layout, will do too, and then what that needs is fetched.
    Only what the cache lacks is fetched: settings, and of every component's weights the file that `find_weights`
    prefers. A broken connection is taken up where it broke, and whole files that arrived are kept for the next call.
    A commit that the cache holds is not asked for again; where the hub does not answer, the cache's newest commit of
    the revision counts, which a line on stderr says. Raises CheckpointError in one sentence for all that goes wrong.
    """
    parsed = NAME.fullmatch(name)
    if parsed is None:
        raise CheckpointError(f"'{name[:80]}' names no repository: give owner/name or owner/name@revision")
    repository, revision = parsed["repository"], parsed["revision"] or "main"
    hub = _client()
    first = (INDEX, ALONE) if clip else (INDEX,)
    with _explained(name):
        cached = [hub.try_to_load_from_cache(repository, file, revision=revision) for file in first]
    held = next((Path(path).parent for path in cached if isinstance(path, str)), None)
    if held and COMMIT.fullmatch(revision) and _is_whole(held):
        return Snapshot(held, repository, held.name)
    try:
        siblings = hub.HfApi().model_info(repository, revision=revision, timeout=TIMEOUT).siblings
    except Exception as error:  # of the client's transport, which changes with its version
        if not _is_silence(error):
            raise CheckpointError(_explain(error, name)) from error
        reason = f"the hub does not answer ({type(error).__name__})"
        if not held or not _is_whole(held):
            raise CheckpointError(
                f"{reason} and the cache does not hold all of '{name}': connect and run again, or give a folder"
            ) from error
        print(f"unclip: {reason}: '{repository}' is the cache's, at {held.name}", file=sys.stderr)
        return Snapshot(held, repository, held.name)
    files = {sibling.rfilename for sibling in siblings or ()}
    index = next((file for file in first if file in files), None)
    if index is None:
        layout = "a pipeline in diffusers' layout" + (" or a CLIP" if clip else "")
        raise CheckpointError(f"'{name}' has no {' and no '.join(first)}: give a repository that holds {layout}")
    with _explained(name):  # by the revision's name, so that the cache knows the commit when it is offline
        folder = Path(hub.hf_hub_download(repository, index, revision=revision)).parent
    _complete(name, folder, files)
    return Snapshot(folder, repository, folder.name)


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            "fetching a repository needs the package huggingface_hub: pip install 'unclip_jax[hub]', or give a folder"
        ) from error
    return huggingface_hub


def _complete(name: str, folder: Path, files: set[str]) -> None:
    """Fetches what a snapshot that has its index still lacks of the files that the repository lists."""
    components = _components(folder)
    weights = {_weights(component, stem, files) for component, stem in components.items() if stem}
    indices = {file for file in weights if file.endswith(".json")}
    settings = {file for file in files if (match := SETTINGS.fullmatch(file)) and match["component"] in components}
    # Weights come last: where all of them lie, everything does.
    _fetch(name, folder, settings | indices)
    shards = {file[: file.rfind("/") + 1] + shard for file in indices for shard in _shards(folder / file)}
    if absent := sorted(shards - files):
        raise CheckpointError(f"'{name}' lacks '{absent[0][:120]}', which its index names: ask its owner for the shard")
    _fetch(name, folder, weights - indices | shards)


def _fetch(name: str, folder: Path, files: Iterable[str]) -> None:
    """Lets the client fetch what the snapshot lacks, several files at a time and with its progress bars."""
    missing = sorted(file for file in files if not (folder / file).is_file())
    if not missing:
        return
    with _explained(name):
        _client().snapshot_download(name.split("@")[0], revision=folder.name, allow_patterns=missing)
    # Without an answer of the hub the client may return a snapshot that is not whole.
    for file in missing:
        if not (folder / file).is_file():
            raise CheckpointError(f"'{file}' of '{name}' did not arrive: run again, and all that did is kept")


def _components(folder: Path) -> dict[str, str | None]:
    """The folders that are read, each with a slash, and how their weights files are called; a CLIP's own is ``.

    Components that a pipeline leaves out are nulls in its index.
    """
    if not (folder / INDEX).is_file():
        if (kind := read_table(folder / ALONE, DAMAGED).get("model_type")) != "clip":
            raise CheckpointError(f"'{folder / ALONE}' is of a model of type {kind!r}: give an unCLIP or a CLIP")
        return {"": "model"}
    index = read_table(folder / INDEX, DAMAGED)
    found = [name for name in COMPONENTS if isinstance(entry := index.get(name), list) and any(entry)]
    if "decoder" not in found:
        kind = str(index.get("_class_name"))[:80]
        raise CheckpointError(f"'{folder / INDEX}' lists no decoder but is of '{kind}': give a repository of an unCLIP")
    return {f"{name}/": COMPONENTS[name] for name in found}


def _weights(component: str, stem: str, files: set[str]) -> str:
    """The weights file of a listing that `find_weights` would prefer."""
    for base, ending in ((stem, "safetensors"), (PICKLED_STEMS.get(stem, stem), "bin")):
        for middle in ("", ".fp16"):
            for name in (f"{base}{middle}.{ending}", f"{base}.{ending}.index{middle}.json"):
                if component + name in files:
                    return component + name
    raise CheckpointError(f"the repository has neither {component}{stem}.safetensors nor a .bin: give another")


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names, which lie beside it."""
    names = read_table(index, DAMAGED).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"'{index}' has no weight_map of names to files: ask its owner for another")
    for name in names.values():
        if not re.fullmatch(WORD, name, re.ASCII):
            raise CheckpointError(f"'{index}' names the file '{name[:80]}' outside of its folder: do not trust it")
    return set(names.values())


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has the weights of all its components, shards included."""
    try:
        for component, stem in _components(folder).items():
            if stem:
                path = find_weights(folder / component, stem)
                for shard in _shards(path) if path.suffix == ".json" else ():
                    locate(path.parent, shard, path)
            elif not (folder / component).is_dir():
                return False
    except CheckpointError:
        return False
    return True


def _is_silence(error: Exception) -> bool:
    """Whether an error says nothing of the repository: no network, or a hub out of order."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, errors.HFValidationError)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the client raises into a CheckpointError; only calls of the client go inside."""
    try:
        yield
    except Exception as error:  # of its transport, which changes with the client's version
        raise CheckpointError(_explain(error, name)) from error


def _explain(error: BaseException, name: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    match error:
        case errors.GatedRepoError():
            return f"'{name}' is gated: ask for access on its page, then log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return (
                f"'{name}' is no path here and no repository that you may read: "
                "check the name, or log in with `hf auth login` if it is private"
            )
        case errors.RevisionNotFoundError():
            return f"'{name}' names a revision that the repository lacks: give one of its branches, tags or commits"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses '{name}' ({error.response.status_code}): log in with `hf auth login`"
        case errors.HfHubHTTPError():
            return f"the hub answers '{name}' with error {error.response.status_code}: try again later"
        case errors.HFValidationError():
            return f"'{name}' cannot be a repository's name: give owner/name or owner/name@revision"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return _disk_full(constants.HF_HUB_CACHE)
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            return f"'{constants.HF_HUB_CACHE}' cannot be written: set HF_HOME to a folder that can"
    if os.strerror(errno.ENOSPC) in str(error):  # of the client's native transfers, which have no errno
        return _disk_full(constants.HF_HUB_CACHE)
    return f"'{name}' did not arrive whole ({type(error).__name__}): run again, and all files that did are kept"


def _disk_full(cache: str) -> str:
    return f"the disk of '{cache}' is full: free some of it, or set HF_HOME to a folder on a larger one"
