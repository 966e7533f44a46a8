"""What a folder or file is that no reader takes, in words and with advice."""

from __future__ import annotations

from pathlib import Path

from sparsenet.data.tree import is_visible

ARCHIVES = (".7z", ".rar", ".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz", ".zip")
TABLES = (".csv", ".tsv")


def name_what_it_is(root: Path) -> str:
    """What *root* is, and what to do about it, to follow ``found``; empty where it is not known.

    It knows archives, a table of labels, and a folder that ``datasets.save_to_disk`` wrote.
    """
    if not root.is_dir():
        return _name_files([root]) if root.is_file() else ""
    paths = sorted(path for path in root.iterdir() if is_visible(path.name))
    names = {path.name for path in paths}
    parts = {path.name for path in root.glob("*.arrow")} and {"state.json", "dataset_info.json"}
    if "dataset_dict.json" in names or names & parts:
        return (
            f"{root}, written by save_to_disk of datasets: write a file for each split with "
            "dataset.to_parquet('train.parquet')"
        )
    if paths and all(path.is_file() and _ends(path, ARCHIVES) for path in paths):
        return _name_files(paths)
    return _name_files([path for path in paths if path.is_file() and _ends(path, TABLES)])


def _name_files(paths: list[Path]) -> str:
    listed = ", ".join(map(str, paths[:4])) + ", …" * (len(paths) > 4)
    if paths and _ends(paths[0], ARCHIVES):
        what = "an archive: unpack it first" if len(paths) == 1 else "archives: unpack them first"
        return f"{listed}, {what}"
    if paths and _ends(paths[0], TABLES):
        return (
            f"{listed}, a table: where it says which class images have, --labels {paths[0]} and "
            "the folder of the images as --dataset_dir take it"
        )
    return ""


def _ends(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)
