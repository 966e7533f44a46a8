"""A folder for the Hugging Face hub: weights, what they say of themselves, and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sparsenet import __version__
from sparsenet.addresses import FILE
from sparsenet.architecture import from_dict
from sparsenet.data.errors import count_images, shortened
from sparsenet.data.selection import Selection
from sparsenet.data.splits import IMAGES_OF
from sparsenet.export import check_empty, check_target
from sparsenet.export.safetensors import errors, measured
from sparsenet.extras import require
from sparsenet.files import behind_link, size_text, write_atomic
from sparsenet.graph import count
from sparsenet.results import ClassScores, Scores, likely
from sparsenet.texts import printable
from sparsenet.topology import family_name
from sparsenet.trained import Trained
from sparsenet.weights import CONFIG, About

CARD = "README.md"
TEMPLATE = Path(__file__).parent.parent / "templates" / "card.md"
MOST_NAMES, MOST_ROWS = 30, 20  # of classes
READS = {  # by how a network aggregates: what a layer reads, and the paper
    "dense": ("all layers", "1608.06993"),
    "": ("some of the layers", "1801.05895"),
}


def export(trained: Trained, target: Path, data: Selection | None, opset: int | None = None) -> str:
    """Writes a folder that can be uploaded as it is, and returns a line to print.

    Its numbers are measured as those of a weights file are. Raises ``ValueError`` where there are
    files in *target* already, so that no card that somebody has written on is replaced.
    """
    assert data is not None, "the format needs data"
    require("huggingface_hub", "hub")
    check_target(target, trained.path, "hf")
    content, about, evaluation = measured(trained, data)
    target = behind_link(target)
    scores, title = evaluation.scores(about.classes), trained.name or target.resolve().name
    write(target, content, about, card(title, about, scores, data.seen))
    size = size_text(len(content))
    return (
        f"{target}: {FILE} ({size}), {CONFIG}, {CARD}; {errors(about, data)}; "
        f"name a licence in {CARD} before you publish it"
    )


def write(folder: Path, content: bytes, about: About, card: str | bytes) -> None:
    """Writes the files of a new or empty *folder*, or none of them.

    Raises ``ValueError`` where there is something in it after all.
    """
    check_empty(folder, "--out")
    config = msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n"
    # The weights first: with them a folder is one that they can be loaded from.
    files: dict[str, bytes | str] = {FILE: content, CONFIG: config, CARD: card}
    is_new, written = not folder.exists(), list[Path]()
    folder.mkdir(exist_ok=True)
    try:
        for name, each in files.items():
            write_atomic(folder / name, each)
            written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if is_new:
            folder.rmdir()
        raise


def card(
    title: str,
    about: About,
    scores: Scores | None = None,
    seen: Mapping[str, int] | None = None,
) -> str:
    """The model card, Markdown after metadata in YAML, of a network that is called *title*.

    *scores* are those of the images on which its error was measured, and *seen* of how many of them
    the training made use, as ``Selection`` has it, where they are known.
    """
    hub = require("huggingface_hub", "hub")
    architecture = from_dict(about.architecture)
    size = about.preprocessing.size
    parameters, macs = count(architecture, size)
    found = about.measured["fp32"]
    low, high = likely(found.error / 100, found.images)
    reads, paper = READS.get(str(architecture.fetch), READS[""])
    tested_on = f"{count_images(found.images, found.split)} of {_escaped(found.dataset)}"
    named = [_escaped(each) for each in about.classes[:MOST_NAMES]]
    left = len(about.classes) - len(named)
    rows = [] if scores is None else list(_rows(scores))
    heading = "Of each class:" if len(rows) <= MOST_ROWS else f"Of the {MOST_ROWS} worst classes:"
    return str(
        hub.ModelCard.from_template(
            _metadata(hub, title, about),
            template_path=str(TEMPLATE),
            title=_escaped(title),
            classes=f"{len(about.classes):,}",
            class_names=", ".join(named) + (f" and {left:,} more" if left else ""),
            family=family_name(architecture.fetch),
            parameters=f"{parameters:,}",
            macs=f"{macs:,}",
            reads=reads,
            paper=paper,
            size=size,
            version=__version__,
            tested_on=tested_on,
            measured=about.measured,
            has_top5=len(about.classes) > 5,
            low=f"{100 * low:.1f}",
            high=f"{100 * high:.1f}",
            images=count_images(found.images),
            scores=scores,
            heading=heading,
            rows=rows[:MOST_ROWS],
            data=_data(about),
            rule=_escaped(about.rule),
            epochs=about.epoch,
            begun_with=_escaped(str(about.recipe.get("train", {}).get("weights", ""))),
            recipe=json.dumps(about.recipe, indent=2),
            remarks=list(_remarks(about, scores, seen)),
        )
    )


def _metadata(hub: Any, title: str, about: About) -> Any:
    """What the hub shows and finds a network by."""
    found = about.measured["fp32"]
    result = hub.EvalResult(
        task_type="image-classification",
        dataset_type=re.sub(r"[^\w.-]+", "-", found.dataset).strip("-.") or "images",
        dataset_name=found.dataset,
        dataset_split=found.split or None,
        metric_type="accuracy",
        metric_value=round(1 - found.error / 100, 6),
    )
    return hub.ModelCardData(
        library_name="sparsenet",
        pipeline_tag="image-classification",
        tags=["sparsenet", "image-classification"],
        metrics=["accuracy"],
        model_name=title,
        eval_results=[result],
    )


def _rows(scores: Scores) -> Iterator[tuple[str, ...]]:
    """Cells for each class that has images, the worst first."""

    def error(named: tuple[str, ClassScores]) -> float:
        return named[1].wrong / named[1].images

    there = [(name, each) for name, each in scores.classes.items() if each.images]
    for name, each in sorted(there, key=error, reverse=True):
        precision, f1 = (
            "–" if rate is None else f"{rate:.2f} %" for rate in (each.precision, each.f1)
        )
        wrong = f"{100 * each.wrong / each.images:.2f} %"
        yield _escaped(name), str(each.images), wrong, precision, f1


def _data(about: About) -> str:
    """Which images the network was made with."""
    counts = about.data.images if about.data else {}
    names = IMAGES_OF | ({"test": about.data.tested_on} if about.data else {})
    parts = [count_images(counts[name], names[name]) for name in IMAGES_OF if name in counts]
    return f"{_escaped(about.dataset)}{': ' * bool(parts)}{', '.join(parts)}."


def _remarks(about: About, scores: Scores | None, seen: Mapping[str, int] | None) -> Iterator[str]:
    """What else its user has to know, in sentences."""
    of = f"of the {count_images(about.measured['fp32'].images)} that its error was measured on"
    if seen is None:
        yield f"Whether it was trained on some {of} is not recorded."
        seen = {}
    if count := seen.get("train"):
        yield f"It was trained on {count} {of}."
    if count := seen.get("val"):
        yield f"Its best epoch may have been chosen by {count} {of}."
    if about.recipe.get("train", {}).get("weights"):
        yield f"Whether the weights that it began with were trained on some {of} is not recorded."
    if scores is None:
        return
    if missing := [name for name, each in scores.classes.items() if not each.images]:
        yield f"No image of these classes was among them: {_escaped(shortened(missing))}."
    if scores.remark:
        yield _escaped(f"{scores.remark[0].upper()}{scores.remark[1:]}.")


def _escaped(text: str) -> str:
    """*text* that means in Markdown what it says."""
    return re.sub(r"[\\`*_\[\]<>|~&$]", r"\\\g<0>", printable(text))
