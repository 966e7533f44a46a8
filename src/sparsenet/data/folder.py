"""Folders of images: ``DIR/CLASS/*``, or ``DIR/train/CLASS/*`` beside ``DIR/test/CLASS/*``."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Source
from sparsenet.data.errors import DataError, count_images, shortened
from sparsenet.data.splits import find_splits, split_of
from sparsenet.data.tree import Listing, describe_others, is_folder, is_visible, list_folder
from sparsenet.data.unreadable import name_what_it_is


@dataclass(frozen=True)
class Tree:
    """A folder, what lies straight in it, and what lies in and below each of its folders."""

    path: Path
    straight: Listing
    below: Mapping[str, Listing]  # by the names of its visible folders, sorted

    @classmethod
    def of(cls, path: Path, listing: Listing) -> Tree:
        """The tree of a folder of which *listing* is all that lies in and below it."""
        depth = len(path.parts)
        parts: dict[str, tuple[list[Path], list[Path]]] = {}
        parts |= {name: ([], []) for name in _folders(path)}
        straight: tuple[list[Path], list[Path]] = ([], [])
        for place, paths in enumerate((listing.images, listing.others)):
            for each in paths:
                inner = parts.get(each.parts[depth]) if len(each.parts) > depth else None
                (straight if inner is None else inner)[place].append(each)
        below = {name: Listing(tuple(a), tuple(b)) for name, (a, b) in parts.items()}
        return cls(path, Listing(tuple(straight[0]), tuple(straight[1])), below)

    def inner(self, name: str) -> Tree:
        """The tree of one of its folders."""
        return Tree.of(self.path / name, self.below[name])

    def count(self, name: str) -> int:
        """The number of images in one of its folders."""
        return len(self.below[name].images)

    @cached_property
    def filled(self) -> list[str]:
        """The names of the folders that hold images."""
        return [name for name, listing in self.below.items() if listing.images]

    @property
    def in_folders(self) -> int:
        """The number of images that lie in its folders."""
        return sum(len(listing.images) for listing in self.below.values())

    @property
    def has_classes(self) -> bool:
        """Whether it holds class folders, and not mostly images."""
        return self.in_folders > len(self.straight.images)


def _folders(path: Path) -> list[str]:
    """The names of the visible folders in *path*, sorted; none where it may not be read."""
    with suppress(OSError), os.scandir(path) as entries:
        return sorted(each.name for each in entries if is_visible(each.name) and is_folder(each))
    return []


def read_folder(root: Path, config: DataConfig) -> Source:
    """The images below *root*; classes are the sorted names of folders, in Unicode's NFC.

    Folders named as splits (``sparsenet.data.splits``) that hold class folders are splits.
    Images in folders within a class folder belong to that class. A folder that holds nothing but
    one other folder stands for it. Raises ``DataError`` where there are fewer than 2 classes, a
    split has a class that the training images do not have, or folders look like splits but are not
    named so, unless ``--dataset folder`` says that they are classes.
    """
    if not root.is_dir():
        found = name_what_it_is(root) or f"{root}, a file that is none of these"
        raise DataError(f"--dataset_dir: expected a folder or a parquet file, found {found}")
    notes: list[str] = []
    tree = _entered(Tree.of(root, list_folder(root)), notes)
    splits = _split_trees(tree, notes, config.dataset == "folder")
    if not splits:
        if config.dataset != "folder":
            _refuse_unnamed_splits(tree)
        splits = {"train": tree}
    first = splits.get("train") or next(iter(splits.values()))
    classes, _ = _classes(first)
    if len(classes) == 1 and first is tree and _tables(tree):
        found = f"only {classes[0]} and {_tables(tree)[0].name}; {_how_to_label(tree)}"
        raise DataError(f"--dataset_dir: expected class folders in {first.path}, found {found}")
    if not classes:
        raise DataError(
            f"--dataset_dir: expected class folders in {first.path}, found {_what_else(tree)}"
        )
    examples = {name: _examples(each, classes, first.path) for name, each in splits.items()}
    empty = [
        f"{first.path / name}: expected images of this class, found none; "
        f"{describe_others(each.others) if each.others else 'remove the folder'}"
        for name, each in first.below.items()
        if not each.images
    ]
    return Source(
        name=_name(root),
        classes=tuple(classes),
        channels=3,
        splits=examples,
        notes=(*notes, *_deeper(splits), *_left_out(tree, splits)),
        places={name: str(each.path) for name, each in splits.items()},
        empty=tuple(empty),
    )


def _entered(tree: Tree, notes: list[str]) -> Tree:
    """*tree*, or that of the folder which is all that it and the like hold."""
    outermost = tree
    while len(tree.below) == 1 and not tree.straight.images:
        (name,) = tree.below
        inner = tree.inner(name)
        # A lone split or class folder is not one that was packed once more.
        is_split = split_of(name) and not any(map(split_of, inner.below))
        if not inner.below or inner.straight.images or (is_split and name != tree.path.name):
            break
        tree = inner
    if tree is not outermost:
        notes.append(f"taken: {tree.path}, the only folder in {outermost.path}")
    return tree


def _split_trees(tree: Tree, notes: list[str], stated: bool) -> dict[str, Tree]:
    """The folders of *tree* that are splits; none where it holds class folders itself.

    Where somebody *stated* that it is class folders, their names are not doubted.
    """
    entered: dict[str, list[str]] = {name: [] for name in tree.below if split_of(name)}
    named = {name: _entered(tree.inner(name), said) for name, said in entered.items()}
    names = find_splits((name for name, each in named.items() if each.has_classes), str(tree.path))
    splits = {split: named[name] for split, name in names.items()}
    others = [name for name in tree.filled if name not in names.values()]
    if not splits:
        as_classes = [name for name in others if name in named]
        _check_classes_named_as_splits(tree, as_classes, notes, stated)
        return {}
    _refuse_ambiguous(tree, splits, others)
    notes += [note for name in names.values() for note in entered[name]]
    for name in named.keys() - set(tree.filled):
        notes.append(f"warning: {tree.path / name} holds no images")
    for name in others:
        reason = "in a folder that is no split"
        if name in named:
            doubled = named[name].has_classes
            reason = "in a second folder for a split" if doubled else "in no class folders"
        notes.append(f"left out: {tree.path / name}, {count_images(tree.count(name))} {reason}")
    if any(split_of(name) != (split, "*") for split, name in names.items()):
        taken = ", ".join(f"{name} as {split}" for split, name in names.items())
        notes.append(f"taken as splits: {taken}")
    return _without_foreign_tests(splits, notes)


def _check_classes_named_as_splits(
    tree: Tree, names: list[str], notes: list[str], stated: bool
) -> None:
    """Says that class folders are named as splits are; ``DataError`` where they look like some."""
    meanings = {meaning[0] for name in names if (meaning := split_of(name))}
    if len(meanings) > 1 and names == tree.filled and not stated:
        raise DataError(
            f"{tree.path}: expected class folders, or splits that hold some, found "
            f"{shortened(names)}, named as splits, with images in no class folders; "
            f"{_how_to_label(tree)}, --dataset folder that these are the classes"
        )
    if names:
        notes.append(f"taken as classes, since they hold no class folders: {', '.join(names)}")


def _refuse_ambiguous(tree: Tree, splits: Mapping[str, Tree], others: list[str]) -> None:
    """Raises ``DataError`` where *others*, which are no splits, may be what is missing."""
    for name in others:
        meaning = split_of(name)
        if meaning and meaning[0] == "train" and "train" not in splits:
            found = count_images(len(tree.inner(name).straight.images))
            raise DataError(
                f"{tree.path / name}: expected class folders, found {found} outside of any; "
                f"{_how_to_label(tree)}"
            )
    doubtful = [name for name in others if not split_of(name)]
    unknown = [f"{name} ({count_images(tree.count(name))})" for name in doubtful]
    if unknown and not ("train" in splits and len(splits) > 1):
        first = next(iter(splits.values())).path
        raise DataError(
            f"{tree.path}: expected splits (train, test) or class folders, found {first.name} "
            f"with class folders beside {shortened(unknown)}; name splits train, val and test, "
            f"or give --dataset_dir {first}"
        )


def _tables(tree: Tree) -> list[Path]:
    """The tables straight in a folder that may say classes, the most likely one first.

    A sample of a submission has made-up classes.
    """
    tables = [path for path in tree.straight.others if path.suffix.lower() in (".csv", ".tsv")]
    tables = [path for path in tables if "sample" not in path.name.lower()]
    return sorted(tables, key=lambda path: "train" not in path.name.lower())


def _how_to_label(tree: Tree) -> str:
    file = next(iter(_tables(tree)), "FILE")
    return f"--labels {file} can say which class each image has"


def _without_foreign_tests(splits: dict[str, Tree], notes: list[str]) -> dict[str, Tree]:
    """*splits* without those whose images lie in one folder that is no class of train's."""
    if "train" not in splits:
        return splits
    classes = {name.casefold() for name in _classes(splits["train"])[0]}
    kept = {}
    for split, tree in splits.items():
        lone = _nfc(tree.filled[0]).casefold() if len(tree.filled) == 1 else ""
        if split != "train" and lone and lone not in classes:
            where = tree.path / tree.filled[0]
            notes.append(f"left out: {where}, {tree.in_folders} images of no class of train")
        else:
            kept[split] = tree
    return kept


def _refuse_unnamed_splits(tree: Tree) -> None:
    """Raises ``DataError`` where the folders of *tree* hold no images but folders as splits have.

    These are the same folders in all of them, or splits within each class.
    """
    inner = [tree.inner(name) for name in tree.filled]
    if len(inner) < 2 or any(each.straight.images for each in inner):
        return
    listed = shortened(tree.filled)
    if all(all(map(split_of, each.filled)) for each in inner):
        raise DataError(
            f"{tree.path}: expected splits with class folders in them, found splits in each of "
            f"{listed}; put them the other way round, as train/{tree.filled[0]}, or give "
            "--dataset folder, which takes all in a class folder together"
        )
    shared = inner[0].filled
    if len(shared) > 1 and all(each.filled == shared for each in inner):
        raise DataError(
            f"{tree.path}: expected class folders, found {listed} with the same folders "
            f"({shortened(shared)}), as splits have; name splits train, val and test, or give "
            "--dataset folder, which takes all in a class folder together"
        )


def _what_else(tree: Tree) -> str:
    """What a folder without class folders holds, with advice."""
    if known := name_what_it_is(tree.path):
        return known
    if count := len(tree.straight.images):
        return f"{count_images(count)} outside of any; --labels FILE can say which class each has"
    if others := list_folder(tree.path).others:
        return f"none; {describe_others(others)}"
    return "none, and no parquet files or CIFAR archives"


def _name(root: Path) -> str:
    """The name of the data: that of its folder, and of the one above where that is a split's."""
    path = root.resolve()
    meaning = split_of(path.name)
    return f"{path.parent.name}/{path.name}" if meaning and meaning[1] == "*" else path.name


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _classes(tree: Tree) -> tuple[list[str], dict[str, str]]:
    """The classes whose images *tree* holds, sorted, and the folder of each."""
    folders: dict[str, str] = {}
    for name in tree.filled:
        if name.encode(errors="ignore").decode() != name:  # bytes that Python could not decode
            raise DataError(f"{tree.path}: expected names of classes in UTF-8, found {name!r}")
        if _nfc(name) in folders:
            raise DataError(f"{tree.path}: expected one folder a class, found two named {name}")
        folders[_nfc(name)] = name
    return sorted(folders), folders


def _examples(tree: Tree, classes: list[str], train: Path) -> list[Example]:
    """The images of a split, whose classes must be among those in the folder *train*."""
    present, folders = _classes(tree)
    if unknown := sorted(set(present) - set(classes)):
        expected = f"the classes of {train} ({shortened(classes)})"
        raise DataError(f"{tree.path}: expected {expected}, found also {shortened(unknown)}")
    return [
        Example(str(path), path, label)
        for label, name in enumerate(classes)
        if name in folders
        for path in tree.below[folders[name]].images
    ]


def _deeper(splits: Mapping[str, Tree]) -> Iterable[str]:
    """A line about images in folders within class folders, whose names mean nothing."""
    deeper = [
        path
        for tree in splits.values()
        for name, folder in tree.below.items()
        for path in folder.images
        if path.parent != tree.path / name
    ]
    if deeper:
        yield (
            f"{count_images(len(deeper))} in folders within class folders belong to these classes, "
            f"the first: {deeper[0]}"
        )


def _left_out(tree: Tree, splits: Mapping[str, Tree]) -> Iterable[str]:
    """Lines that name and count the files that are in no split."""
    trees = {each.path: each for each in (tree, *splits.values())}.values()
    stray = [path for each in trees for path in each.straight.images]
    if stray:
        yield f"left out: {count_images(len(stray))} in no class folder, the first: {stray[0]}"
    listings = [each.straight for each in trees]
    listings += [folder for each in splits.values() for folder in each.below.values()]
    others = [path for listing in listings for path in listing.others]
    if others:
        yield describe_others(others)
