"""Which of several files hold which split: as the Hugging Face hub and WebDataset name them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from sparsenet.data.errors import DataError, shortened
from sparsenet.data.splits import SPLITS, find_splits, split_of
from sparsenet.data.tree import is_folder, is_visible, list_folder

# What ends the name of one of several files: train-00000-of-00002-a09b74b3ef9c3b56, train_1.
PART = re.compile(r"[-_. ]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$")


def find_files(root: Path, suffix: str) -> dict[str, list[Path]]:
    """The files of each split, in the order of ``SPLITS``; nothing where there are none."""
    if not root.is_dir():
        return {"train": [root]} if _is_one(root, suffix) else {}
    for folder in (root, root / "data"):
        entries = _entries(folder, suffix)
        plain = [path for name, paths in entries.items() if name[-1:] != "/" for path in paths]
        if found := _splits(folder, entries) or ({"train": sorted(plain)} if plain else {}):
            return found
    folders = _look_into(root, suffix)[1]
    configs = {path: found for path in folders if (found := _splits(path, _entries(path, suffix)))}
    if len(configs) > 1:
        names = ", ".join(path.name for path in configs)
        raise DataError(
            f"--dataset_dir: expected one data set in {root}, found {names}; "
            f"--dataset_dir {next(iter(configs))} takes the first"
        )
    return next(iter(configs.values()), {})


def _is_one(path: Path, suffix: str) -> bool:
    return path.suffix.lower() == suffix and is_visible(path.name) and path.is_file()


def _look_into(folder: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """The files with *suffix* and the folders straight in *folder*, which may hold many others.

    Both are sorted.

    There are none where it may not be read, which other readers report.
    """
    files, folders = [], []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(suffix) and _is_one(folder / entry.name, suffix):
                files.append(folder / entry.name)
            elif is_visible(entry.name) and is_folder(entry):
                folders.append(folder / entry.name)
    return sorted(files), sorted(folders)


def _entries(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """The files in *folder* by their names without numbers, and in folders, as ``NAME/``"""
    entries: dict[str, list[Path]] = {}
    files, folders = _look_into(folder, suffix)
    for path in files:
        entries.setdefault(PART.sub("", path.stem), []).append(path)
    entries |= {f"{path.name}/": _look_into(path, suffix)[0] for path in folders}
    return {name: files for name, files in entries.items() if files}


def _splits(folder: Path, entries: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    names = find_splits(entries, f"--dataset_dir {folder}", "name")
    for split, name in names.items():
        for path in entries[name]:
            meaning = split_of(path.stem)
            if meaning and meaning[0] != split:
                raise DataError(
                    f"--dataset_dir: expected the files of {split} in {path.parent}, found "
                    f"{path.name}; --dataset_dir {path.parent} takes the splits in it"
                )
    return {split: entries[names[split]] for split in SPLITS if split in names}


def left_out(root: Path, files: Mapping[str, list[Path]], suffix: str) -> tuple[str, ...]:
    if root.is_file():
        return ()
    used = {path for paths in files.values() for path in paths}
    below = list_folder(root).others
    others = [path for path in below if _is_one(path, suffix) and path not in used]
    if not others:
        return ()
    names = shortened(path.relative_to(root).as_posix() for path in others)
    count = f"{len(others)} {suffix[1:]} file{'s' * (len(others) > 1)}"
    return (f"{count} beside those of {' and '.join(files)} left out: {names}",)


def missing_parts(files: Mapping[str, list[Path]]) -> Iterator[str]:
    """Lines about files whose names say that there are more of them than there are."""
    for split, paths in files.items():
        parts = [found for path in paths if (found := re.search(r"-of-0*(\d+)", path.stem))]
        if parts and len(parts) < (total := int(parts[0][1])):
            yield f"warning: {split} has {len(parts)} of {total} files, as their names say"
