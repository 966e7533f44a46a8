"""``sparsenet predict``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from sparsenet.commands.common import json_text, load_network
from sparsenet.data.tree import HEAT_MAP, describe_others
from sparsenet.device import choose_device
from sparsenet.display import say, warn
from sparsenet.extras import require
from sparsenet.files import failure, write_atomic
from sparsenet.pictures.heat_map import mark_of
from sparsenet.predict import Prediction, find_images, predict
from sparsenet.texts import printable


def run(args: argparse.Namespace) -> int:
    folder = _folder(args.explain_dir) if args.explain_dir else None
    explained = args.explain or folder is not None
    if explained:
        require("matplotlib.figure", "train")  # missed before anything is read
    trained = load_network(args, choose_device(args.device))
    found = find_images(args.images)
    if found.others:
        warn(f"sparsenet predict: {describe_others(found.others)}")
    values: list[dict[str, Any]] = []
    unwritten = 0
    given = args.top, args.batch_size, args.max_megapixels, explained, args.precision
    for prediction in predict(trained, found.images, *given):
        values.append(prediction.to_dict())
        heat_map = None
        if prediction.drawn:
            heat_map = _written(prediction, folder)
            unwritten += heat_map is None
            values[-1]["explanation"]["heat_map"] = heat_map and str(heat_map)
        if args.json:
            continue
        if prediction.error is not None:
            warn(f"sparsenet predict: {prediction.error}")
            continue
        say(prediction.summary())
        if prediction.explanation:
            say(*(f"  {line}" for line in prediction.explanation.lines()))
        if heat_map:
            say(f"  heat map: {printable(str(heat_map))}")
    if args.json:
        print(json_text(values))
    failed = [value["path"] for value in values if "error" in value]
    named = {str(Path(name)) for name in args.images}.intersection(failed)
    return 1 if unwritten or named or len(failed) == len(values) else 0


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected = "a folder that can be written"
        raise ValueError(f"--explain_dir: expected {expected}, found {failure(error)}") from None
    return folder


def _written(prediction: Prediction, folder: Path | None) -> Path | None:
    """Where the heat map was written: *folder*, by default that of the picture or, where it cannot
    be written, the current one. ``None`` for nowhere, which is told.
    """
    picture = Path(prediction.path)
    errors = []
    for place in [folder] if folder else [picture.parent, Path()]:
        try:
            return _write(prediction.drawn, place / picture.name)
        except OSError as error:
            errors.append(failure(error))
    warn(f"sparsenet predict: {picture}: its heat map was not written: {errors[-1]}")
    return None


def _write(drawn: bytes, picture: Path) -> Path:
    """Writes under the first name that nobody has, or that an earlier one of the same picture has.

    The whole name of the picture is part of it, since a.jpg and a.png may lie side by side.
    """
    for number in count(1):
        counted = f"-{number}" if number > 1 else ""
        path = picture.with_name(f"{picture.name}{counted}{HEAT_MAP}")
        with suppress(FileExistsError):
            path.open("xb").close()  # of several processes each has another name
            break
        if not path.is_symlink() and path.is_file():
            with path.open("rb") as file:
                if mark_of(file.read(4096)) == mark_of(drawn):
                    break
    try:
        write_atomic(path, drawn)
    except OSError:
        with suppress(OSError):  # an empty one would be taken for somebody else's
            if not path.stat().st_size:
                path.unlink()
        raise
    return path
