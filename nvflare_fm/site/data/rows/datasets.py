"""Folders of Hugging Face `datasets`: as `save_to_disk` writes them, or files named after their splits, as on the hub.

    train-00000-of-00002.parquet     data/validation.jsonl     test/part1.csv.gz

Files named after splits are read here, one after another, each as its format is: nothing in the folder is run, and
nothing of it is copied into a cache.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ...offer.site_config import DataSource
from . import Format, Reading, Row, check_regular, ending_of, how_to_read, registry, rows, small

_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "devel"},
    "test": {"test", "testing", "eval"},
}
_SAVED = ("state.json", "dataset_dict.json")
_ABOUT = re.compile(r"[._].*|readme.*|licen[cs]e.*|datasets?_infos?\.json|config\.json", re.IGNORECASE)
_BATCH = 64  # rows in memory at once


def _rows(reading: Reading) -> Iterator[Row]:
    check_regular(reading.file)
    if any((reading.file / name).exists() for name in _SAVED):
        yield from _saved(reading)
        return
    found = _files(reading.file)
    if reading.split not in found:
        raise ValueError(f"no file is named after the split {reading.split!r}, only after {sorted(found)}")
    several = (rows(how_to_read(file, DataSource(train=str(file)), reading.split)) for file in found[reading.split])
    yield from enumerate((row for each in several for _, row in each), start=1)


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split; of "train" alone, where none is named after a split."""
    endings = {ending for name in registry for ending in registry[name].endings}
    found: dict[str, list[Path]] = {}
    plain: list[Path] = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and ending_of(file) in endings and not any(map(_ABOUT.fullmatch, parts)):
            split = next(filter(None, map(_split, reversed(parts))), None)
            (found.setdefault(split, []) if split else plain).append(file)
    return found or ({"train": plain} if plain else {})


def _split(name: str) -> str | None:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, keywords in _SPLITS.items() if words & keywords), None)


def _saved(reading: Reading) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    from .features import with_class_names

    saved = load_from_disk(str(reading.file))
    if isinstance(saved, DatasetDict):
        if reading.split not in saved:
            raise ValueError(f"no split {reading.split!r} among {sorted(saved)}; name the sub-folder of one of them")
        saved = saved[reading.split]
    saved.data.validate(full=True)  # it is mapped: an offset that points elsewhere would end the process
    name = with_class_names(saved.features.arrow_schema)
    batches = saved.with_format("arrow").iter(_BATCH)  # as they are: no image or sound is decoded
    for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
        yield number, small(name(record))


registry.register("datasets")(Format((), _rows, is_text=False))
