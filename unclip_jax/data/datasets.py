"""Prepared datasets of tensorflow-datasets (array_record, read without TensorFlow) and of Hugging Face `datasets`."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.data.folders import MOST_PICTURE
from unclip_jax.data.listing import digest_of
from unclip_jax.data.records import Broken, DataError, Record
from unclip_jax.data.remote import whole
from unclip_jax.data.tables import CAPTIONS, IMAGES
from unclip_jax.data.texts import texts_of


class TfdsSource:
    """A split of a dataset that tensorflow-datasets prepared as array_record.

    place: NAME:SPLIT, or FOLDER:SPLIT where FOLDER holds the prepared files; a split may be a part, as train[:90%].
    image, caption: features, with / between the parts of a nested one, as captions/text. A class label is a caption
    too, by its name. data_dir: where prepared datasets are, by default tensorflow-datasets' own place.
    """

    problems: tuple[str, ...] = ()

    def __init__(self, name: str, place: str, image: str = "", caption: str = "", data_dir: str = "") -> None:
        self.name, self.data_dir = name, data_dir
        self.dataset, colon, self.split = place.rpartition(":")
        if not colon or not self.dataset:
            raise DataError(f"'{name}' names no split: give it as tfds:{place}:train")
        builder = self._builder
        features = builder.info.features
        if not hasattr(features, "keys"):
            raise DataError(f"'{self.dataset}' holds {features}, not features by name")
        self.image = image or next(
            (key for key in (*IMAGES, *features) if key in features and _is_image(features[key])), ""
        )
        self.caption = caption or next((key for key in (*CAPTIONS, "label") if key in features), "")
        for key in (self.image, self.caption):
            if key and key.split("/")[0] not in features:
                raise DataError(f"'{self.dataset}' has no feature '{key}'; it has {', '.join(features)}")
        if not self.image:
            raise DataError(f"'{self.dataset}' has no picture among {', '.join(features)}")
        self.length = len(self._examples)
        paths = sorted(Path(str(builder.data_path)).glob("*"))
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        self.digest = digest_of("tfds", self.dataset, self.split, self.image, self.caption, files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_builder", "_examples", "_names")}

    @cached_property
    def _builder(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ModuleNotFoundError as error:
            raise DataError("tfds: sources need tensorflow-datasets: pip install 'unclip-jax[train]'") from error
        try:
            folder = Path(self.dataset).expanduser()
            if (folder / "dataset_info.json").is_file():
                return tfds.builder_from_directory(str(folder))
            options: dict[str, Any] = {"data_dir": self.data_dir} if self.data_dir else {}
            builder = tfds.builder(self.dataset, file_format="array_record", **options)
        except Exception as error:  # of many kinds, and pages long
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(f"tensorflow-datasets has no '{self.dataset}': {first[:200]}") from error
        if not (Path(str(builder.data_path)) / "dataset_info.json").is_file():
            raise DataError(
                f"'{self.dataset}' is not prepared in '{builder.data_path}': run tfds.builder('{self.dataset}', "
                "file_format='array_record').download_and_prepare() first"
            )
        return builder

    @cached_property
    def _examples(self) -> Any:
        import tensorflow_datasets as tfds

        decoders: Any = _nested(self.image.split("/"), tfds.decode.SkipDecoding())
        try:
            return self._builder.as_data_source(self.split, decoders=decoders)
        except Exception as error:
            raise DataError(
                f"cannot read '{self.split}' of '{self.dataset}': {' '.join(str(error).split())[:200]}"
            ) from error

    @cached_property
    def _names(self) -> Any:
        feature = self._builder.info.features.get(self.caption.split("/")[0])
        return getattr(feature, "int2str", None)

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The number of an example in its split."""
        return f"{self.split}/{index}"

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        try:
            example = self._examples[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise Broken(f"'{key}' cannot be read: {' '.join(str(error).split())[:200]}") from None
        image = _at(example, self.image.split("/"))
        captions = _at(example, self.caption.split("/")) if self.caption else None
        if isinstance(captions, int | np.integer) and self._names is not None:
            captions = self._names(int(captions)).replace("_", " ")
        if isinstance(captions, np.ndarray):
            captions = captions.tolist()
        return Record(key, image, texts_of(captions, key))


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _nested(path: list[str], leaf: Any) -> Any:
    return {path[0]: _nested(path[1:], leaf)} if path else leaf


def _at(example: Any, path: list[str]) -> Any:
    """A feature by its path, through lists where it passes any."""
    if not path:
        return example
    if isinstance(example, list | tuple):
        return [_at(item, path) for item in example]
    return _at(example[path[0]], path[1:])


class HubSource:
    """A dataset that Hugging Face `datasets` wrote with save_to_disk; a DatasetDict's split is `split`, else train."""

    problems: tuple[str, ...] = ()

    def __init__(self, name: str, place: str, image: str = "", caption: str = "", split: str = "") -> None:
        self.name, self.folder, self.split = name, os.path.abspath(os.path.expanduser(place)), split
        columns = self._dataset.column_names
        self.image = image or next((key for key in (*IMAGES, "img") if key in columns), "")
        self.caption = caption or next((key for key in (*CAPTIONS, "label") if key in columns), "")
        for key in (self.image, self.caption):
            if key and key not in columns:
                raise DataError(f"'{place}' has no column '{key}'; it has {', '.join(columns)}")
        if not self.image:
            raise DataError(f"'{place}' has the columns {', '.join(columns)}: say ?image=NAME&caption=NAME")
        self.length = len(self._dataset)
        self.digest = digest_of("hf", self.folder, split, self._dataset._fingerprint, self.image, self.caption)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_dataset", "_raw")}

    @cached_property
    def _dataset(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DataError("hf: sources need a package: pip install 'unclip-jax[data]'") from error
        try:
            found = datasets.load_from_disk(self.folder)
        except Exception as error:
            raise DataError(
                f"'{self.folder}' is no dataset that save_to_disk wrote: {' '.join(str(error).split())[:200]}"
            ) from error
        if not isinstance(found, dict):
            return found
        if (self.split or "train") not in found:
            raise DataError(
                f"'{self.folder}' has the splits {', '.join(map(str, found))}: say which, as hf:PATH?split=NAME"
            )
        return found[self.split or "train"]

    @cached_property
    def _raw(self) -> Any:
        """The dataset with its pictures as the files' bytes."""
        import datasets

        is_image = isinstance(self._dataset.features[self.image], datasets.Image)
        raw = self._dataset.cast_column(self.image, datasets.Image(decode=False)) if is_image else self._dataset
        return raw.select_columns([name for name in (self.image, self.caption) if name])

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The number of a row."""
        return f"row {index}"

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        row = self._raw[index]
        image, captions = row[self.image], row[self.caption] if self.caption else None
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = whole(os.path.join(self.folder, image), MOST_PICTURE)
        if not isinstance(image, bytes):
            raise Broken(f"'{key}' has no picture")
        if isinstance(captions, int) and hasattr(self._dataset.features[self.caption], "int2str"):
            captions = self._dataset.features[self.caption].int2str(captions).replace("_", " ")
        return Record(key, image, texts_of(captions, key))
