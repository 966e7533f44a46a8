"""Classes of image files, decoded by many threads and classified in batches, in the order given."""

# os.path and glob: pathlib raises where a folder may not be entered, here the error of one file.
# ruff: noqa: PTH111, PTH112, PTH207
from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Content, Example
from sparsenet.data.errors import BadImage
from sparsenet.data.images import image_id as content_id
from sparsenet.data.images import read_image, read_images
from sparsenet.data.pixels import MAX_BYTES, copied, file_content
from sparsenet.data.preprocessing import Form
from sparsenet.data.tree import HEAT_MAP, Listing, list_folder
from sparsenet.device import autocast
from sparsenet.explain import Explanation, check_evaluates, draw_explanation, explain
from sparsenet.extras import require
from sparsenet.ops.dispatch import choose_precision
from sparsenet.texts import printable, shown
from sparsenet.trained import Trained
from sparsenet.validation import plain

CHANGED = "found one that changed while it was read"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, best first, or the one-line error that it met.

    The *explanation* is that of the first class, where it was asked for, and *drawn* the bytes of
    the PNG that shows it.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()  # of these classes, from 0 to 1
    error: str | None = None
    explanation: Explanation | None = None
    drawn: bytes = field(default=b"", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: ``path`` and either ``classes`` and ``probabilities``, or ``error``.

        Where there is an explanation, it has ``explanation`` as well.
        """
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        found = {"path": self.path, "classes": self.classes, "probabilities": self.probabilities}
        return found | ({"explanation": self.explanation.to_dict()} if self.explanation else {})

    def summary(self) -> str:
        """One line to print."""
        ranked = zip(self.classes, self.probabilities, strict=True)
        shown = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in ranked)
        return f"{printable(self.path)}: {shown}"


def find_images(patterns: Sequence[str]) -> Listing:
    """The images that files, folders and globs (``**`` goes deep) name, in the order given.

    A folder gives every image in it and below (``sparsenet.data.tree``), sorted, and ``**`` those
    of them that fit. An image that is named several times comes once. What ``--explain`` has drawn
    comes only where nothing else is named, and of a glob where its end is ``.explained.png``. A
    pattern that names nothing stays in the list as it is, so that ``predict`` reports it in its
    place. What folders hold besides are the listing's *others*.
    """
    images: list[Path] = []
    others = [Path(pattern) for pattern in patterns if pattern.endswith(HEAT_MAP)]
    if len(others) == len(patterns):  # they are meant, and no shell has found them
        others = []
    for pattern in patterns:
        if Path(pattern) in others:
            continue
        path = os.path.expanduser(pattern)
        found = [_list(path)] if os.path.lexists(path) else _matches(path)
        images += [image for each in found for image in each.images] or [Path(path)]
        others += [other for each in found for other in each.others]
    return Listing(tuple(dict.fromkeys(images)), tuple(dict.fromkeys(others)))


def _list(path: str, with_heat_maps: bool = True) -> Listing:
    if os.path.isdir(path):
        return list_folder(Path(path))
    is_other = path.endswith(HEAT_MAP) and not with_heat_maps
    return Listing(others=(Path(path),)) if is_other else Listing((Path(path),))


def _matches(pattern: str) -> list[Listing]:
    """What a pattern names; ``**`` stands for folders in each other, as ``list_folder`` finds them.

    Python's own follows links from a folder to itself until it has gone through 2**40 of them.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        are_meant = pattern.endswith(HEAT_MAP)
        return [_list(match, are_meant) for match in sorted(glob.glob(pattern))]
    deep = parts.index("**")
    listings = []
    for folder in sorted(glob.glob(str(Path(*parts[:deep])))) if deep else [""]:
        listing = list_folder(Path(folder)) if os.path.isdir(folder or ".") else Listing()
        kept = (
            tuple(path for path in paths if _fits(path.relative_to(folder).parts, parts[deep:]))
            for paths in (listing.images, listing.others)
        )
        listings.append(Listing(*kept))
    return listings


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a *pattern* name a path of these *parts* or a folder that holds it."""
    behind = {0}  # how many parts of the pattern may be fitted already
    for part in (*parts, ""):
        for at, each in enumerate(pattern):
            if at in behind and each == "**":
                behind.add(at + 1)
        if len(pattern) in behind:
            return True
        behind = {
            at + (pattern[at] != "**")
            for at in behind
            if pattern[at] == "**" or fnmatchcase(part, pattern[at])
        }
    return False


def predict(
    trained: Trained,
    pictures: Iterable[Path | Content],
    top: int = 5,
    batch_size: int = 64,
    max_megapixels: float | None = None,
    explained: bool = False,
    precision: str = "fp32",
) -> Iterator[Prediction]:
    """Yields the *top* classes of each image, in the order of *pictures*, perhaps *explained*.

    A picture is a file's path or bytes, what such bytes can be ``read`` from, an image of Pillow's,
    or an array uint8 ``(H, W)`` or ``(H, W, C)`` of 1, 3 or 4 channels; what has no path is called
    by its number, ``image 0``. Pictures are taken as they are when they come, so that one buffer
    may hold them in turn. It computes where the model lies and holds one batch at a time. A file
    that cannot be read, or has more than *max_megapixels* (by default what the network was trained
    with), gives a prediction with an error, and so does one whose logits are not finite.
    *precision* is fp32, bf16, or auto: what is fastest there. Raises ``ValueError`` for a *top* or
    *batch_size* below 1, a model in training or of other classes, what is no picture, and where
    bf16 is to be *explained*: shares add up to the logits of fp32.
    """
    top, batch_size = plain(top), plain(batch_size)
    for flag, value in (("top", top), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            expected = "a whole number of at least 1"
            raise ValueError(f"--{flag}: expected {expected}, found {shown(value)}")
    check_evaluates(trained.model)
    device = next(trained.model.parameters()).device
    if explained and precision == "bf16":
        raise ValueError("--precision: expected fp32 for what is to be explained, found 'bf16'")
    if explained and precision == "auto":
        precision = "fp32"
    precision = choose_precision(precision, device, training=False)
    form = trained.preprocessing.form(max_megapixels)
    remaining = (
        as_example(each, number, form.max_megapixels) for number, each in enumerate(pictures)
    )
    batches = iter(lambda: list(islice(remaining, batch_size)), [])
    return (
        prediction
        for batch in batches
        for prediction in _predict_batch(trained, batch, form, top, explained, precision)
    )


@torch.inference_mode()
def _predict_batch(
    trained: Trained,
    batch: list[Example],
    form: Form,
    top: int,
    explained: bool,
    precision: str,
) -> list[Prediction]:
    # The label of an example is its index in the batch: those missing afterwards were not readable.
    examples = [
        example._replace(source=_source(example.source), label=index)
        for index, example in enumerate(batch)
    ]
    images, ids, *_ = read_images(examples, form, skip_corrupt=True)
    predictions: dict[int, Prediction] = {}
    if len(images):
        parameter = next(trained.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        normalised = trained.preprocessing.normalise(images.pixels.to(device), dtype)
        indices = images.labels.tolist()
        names = [batch[index].name for index in indices]
        with autocast(device, precision):
            logits = trained.model(normalised)
        found = ranked(logits, names, trained.classes, top)
        predictions = dict(zip(indices, found, strict=True))
        if explained:
            for row, (index, image_id) in enumerate(zip(indices, ids.tolist(), strict=True)):
                if predictions[index].error is None:
                    given = trained, examples[index], predictions[index]
                    seen = normalised[row : row + 1], image_id, form
                    predictions[index] = _explained(*given, *seen)
    return [
        predictions.get(index) or _failure(named.source, example, form)
        for index, (named, example) in enumerate(zip(batch, examples, strict=True))
    ]


def ranked(
    logits: Tensor, paths: Iterable[str], classes: Sequence[str], top: int
) -> list[Prediction]:
    """The *top* classes of each row of *logits*, ``(N, classes)``, which are of these *paths*."""
    if logits.dim() != 2 or logits.shape[1] != len(classes):
        expected = f"logits of {len(classes)} classes, those that it was trained on"
        raise ValueError(f"model: expected {expected}, found {tuple(logits.shape)}")
    best = logits.float().softmax(1).topk(min(top, len(classes)), 1)
    columns = logits.isfinite().all(1), best.indices, best.values
    rows = zip(paths, *(column.tolist() for column in columns), strict=True)
    return [
        Prediction(path, tuple(classes[label] for label in labels), tuple(probabilities))
        if is_finite
        else Prediction(path, error=f"{path}: expected finite logits, found NaN or infinity")
        for path, is_finite, labels, probabilities in rows
    ]


def _explained(
    trained: Trained,
    example: Example,
    found: Prediction,
    image: Tensor,
    image_id: int,
    form: Form,
) -> Prediction:
    """*found* with an explanation, drawn over the whole picture, which is read once more for it."""
    try:
        content = file_content(example)
        if content_id(content) != image_id:
            raise BadImage(f"{example.name}: expected an image, {CHANGED}")
        whole = read_image(content, replace(form, size=0, channels=3), example.name)
    except BadImage as error:
        return Prediction(found.path, error=str(error))
    label = torch.tensor([trained.classes.index(found.classes[0])])
    explanation = explain(trained.model, image, label)[0]
    name = Path(found.path).name if isinstance(example.source, Path) else example.name
    name = printable(name)
    title = f"{name}: {found.classes[0]} {100 * found.probabilities[0]:.1f} %"
    mark = f"{image_id % 2**64:016x}"
    given = explanation, trained.model, form.size, f"{title}, logit {explanation.logit:.2f}", mark
    return replace(found, explanation=explanation, drawn=draw_explanation(whole, *given))


def as_example(picture: object, number: int, max_megapixels: float) -> Example:
    """What is decoded of a *picture* of those that ``predict`` takes; ``ValueError`` for others.

    It is the picture as it is now: the caller may go on to use what holds it.
    """
    if isinstance(picture, str | Path):
        return Example(str(picture), Path(picture), 0)
    name = f"image {number}"
    if hasattr(picture, "read"):
        picture = _read(picture, name)
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2] if picture.ndim == 3 else 1 if picture.ndim == 2 else 0
        if picture.dtype == np.uint8 and picture.size and channels in (1, 3, 4):
            rows = picture.reshape(*picture.shape[:2], channels).copy()
            return Example(name, rows.transpose(2, 0, 1), 0)
        found = f"{picture.dtype} {picture.shape}"
        raise ValueError(f"{name}: expected an array uint8 (H, W) or (H, W, 3), found {found}")
    if isinstance(picture, bytes | bytearray | memoryview):
        return Example(name, bytes(picture), 0)
    if isinstance(picture, require("PIL.Image", "train").Image):
        return Example(name, copied(picture, max_megapixels), 0)
    expected = "a path, the bytes of a file, an image of Pillow's or an array uint8"
    raise ValueError(f"{name}: expected {expected}, found {type(picture).__name__}")


def _read(file: Any, name: str) -> bytes:
    """What an open file holds."""
    try:
        content = file.read()
    except UnicodeDecodeError:
        content = ""
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    found = "text" if isinstance(content, str) else type(content).__name__
    raise ValueError(f"{name}: expected an open file of bytes (mode 'rb'), found one of {found}")


def _source(source: Path | Content) -> Path | Content:
    """What an image is read from: of a pipe that was named, such as <(curl …), its bytes, once."""
    if isinstance(source, Path):
        with suppress(OSError):
            if source.is_fifo():
                with source.open("rb") as pipe:
                    return pipe.read(MAX_BYTES)
    return source


def _failure(source: Path | Content, example: Example, form: Form) -> Prediction:
    """Reads an image once more, alone, to learn what is wrong with it."""
    name = example.name
    error = f"{name}: expected an image, {CHANGED}"
    if isinstance(source, Path) and os.path.isdir(source):
        found = "none in it" if os.access(source, os.R_OK | os.X_OK) else "one that cannot be read"
        error = f"{name}: expected a folder with images, found {found}"
    elif isinstance(source, Path) and not os.path.lexists(source):
        expected = "an image, a folder or a glob that matches some"
        error = f"{name}: expected {expected}, found nothing of that name"
    else:
        try:
            read_image(example.source, form, example.name)
        except BadImage as bad:
            error = str(bad)
    return Prediction(name, error=error)
