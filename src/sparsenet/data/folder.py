"""A folder of class folders: ``DIR/<class>/*``, or ``DIR/train/<class>/*`` beside ``DIR/test/<class>/*``."""

from __future__ import annotations

from pathlib import Path

from sparsenet.data.dataset import Example, Source, Split
from sparsenet.data.errors import DataError
from sparsenet.data.images import SUFFIXES


def holds(root: Path, name: str) -> bool:
    """Always: what is no other kind of data set is a folder of class folders, or refused as one."""
    return True


def open_source(root: Path, name: str) -> Source:
    return open_folder(root)


def open_folder(root: Path) -> Source:
    """The images below *root*; classes are the sorted names of its folders. Raises :class:`DataError`.

    Hidden files, and those that are no images by their extension, are ignored; images in folders within a
    class folder belong to that class. A validation split without a test split is the test split.
    """
    folders = {"train": root}
    if _holds_classes(root / "train"):
        names = {"test": ("test",), "val": ("val", "valid", "validation")}
        found = {
            s: root / n
            for s, options in names.items()
            for n in options[::-1]
            if (root / n).is_dir()
        }
        folders = {"train": root / "train", **found}
        if "test" not in found and "val" in found:
            folders["test"] = folders.pop("val")
    classes = tuple(_class_folders(folders["train"]))
    if len(classes) < 2:
        expected = "at least 2 class folders (or CIFAR archives, or train*.parquet)"
        raise DataError(
            f"--dataset_dir: expected {expected} in {folders['train']}, found {len(classes)}"
        )
    splits: dict[str, Split] = {
        split: _examples(folder, classes) for split, folder in folders.items()
    }
    return Source(root.resolve().name, classes, 3, splits)


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _holds_classes(folder: Path) -> bool:
    """Whether *folder* is a split; a class of that name would hold images itself."""
    return (
        folder.is_dir()
        and bool(_class_folders(folder))
        and not any(map(_is_image, folder.iterdir()))
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()


def _examples(folder: Path, classes: tuple[str, ...]) -> list[Example]:
    found = set(_class_folders(folder))
    if differing := sorted(found ^ set(classes)):
        signed = ", ".join(("+" if name in found else "-") + name for name in differing)
        raise DataError(
            f"{folder}: expected the classes of train, found unknown (+) or missing (-): {signed}"
        )
    return [
        each for label, name in enumerate(classes) for each in _class_examples(folder / name, label)
    ]


def _class_examples(folder: Path, label: int) -> list[Example]:
    hidden = {path for path in folder.rglob(".*") if path.is_dir()}
    paths = [p for p in sorted(folder.rglob("*")) if _is_image(p) and hidden.isdisjoint(p.parents)]
    if not paths:
        raise DataError(
            f"{folder}: expected images of this class, found none ({' '.join(SUFFIXES)})"
        )
    return [Example(str(path), path, label) for path in paths]
