"""Class folders: ``DIR/<class>/*``, or ``DIR/train/<class>/*`` beside ``DIR/test/<class>/*``."""

from __future__ import annotations

from pathlib import Path

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source
from sparsenet.data.errors import DataError
from sparsenet.data.images import SUFFIXES
from sparsenet.data.registry import KINDS

SPLITS = {"test": ("test",), "val": ("val", "valid", "validation")}  # names of their folders


def read_folder(root: Path, config: DataConfig) -> Source:
    """The images below *root*; classes are the sorted names of its folders.

    Hidden files, and those that are no images by their extension, are ignored; images in folders
    within a class folder belong to that class. Raises ``DataError`` where there are fewer
    than 2 classes, a class without images, or a split with other classes than ``train``.
    """
    folders = _split_folders(root)
    classes = _class_folders(folders["train"])
    if len(classes) < 2:
        others = " or ".join(kind.expected for kind in KINDS.values() if kind.expected)
        expected = f"at least 2 class folders (or {others}) in {folders['train']}"
        raise DataError(f"--dataset_dir: expected {expected}, found {len(classes)}")
    splits = {name: _examples(folder, classes) for name, folder in folders.items()}
    return Source(root.resolve().name, tuple(classes), 3, splits)


def _split_folders(root: Path) -> dict[str, Path]:
    train = root / "train"
    if not (train.is_dir() and _class_folders(train)) or any(map(_is_image, train.iterdir())):
        return {"train": root}  # its folder "train" is a class, if there is one
    folders = {"train": train}
    for split, names in SPLITS.items():
        candidates = [root / name for name in names if (root / name).is_dir()]
        if candidates:
            folders[split] = candidates[0]
    return folders


def _class_folders(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    for name in names:
        if name.encode(errors="ignore").decode() != name:  # bytes that Python could not decode
            raise DataError(f"{folder}: expected names of classes in UTF-8, found {name!r}")
    return sorted(names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()


def _examples(folder: Path, classes: list[str]) -> list[Example]:
    present = set(_class_folders(folder))
    if differing := sorted(present ^ set(classes)):
        signed = ", ".join(("+" if name in present else "-") + name for name in differing)
        expected = "the classes of train"
        raise DataError(f"{folder}: expected {expected}, found unknown (+), missing (-): {signed}")
    examples: list[Example] = []
    for label, name in enumerate(classes):
        images = _images(folder / name)
        if not images:
            expected = f"images of this class ({' '.join(SUFFIXES)})"
            raise DataError(f"{folder / name}: expected {expected}, found none")
        examples += [Example(str(path), path, label) for path in images]
    return examples


def _images(folder: Path) -> list[Path]:
    """The images in *folder* and the folders in it, but for hidden ones."""
    hidden = {path for path in folder.rglob(".*") if path.is_dir()}
    images = filter(_is_image, sorted(folder.rglob("*")))
    return [path for path in images if hidden.isdisjoint(path.parents)]
