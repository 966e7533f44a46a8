"""What a program or a notebook calls: train, load, evaluate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsenet import presets
from sparsenet.commands.evaluate import EvaluationReport, evaluated
from sparsenet.composition import compose, name_of, pointed, resumed
from sparsenet.config import RunConfig, changed
from sparsenet.data.config import POINTERS
from sparsenet.data.errors import shortened
from sparsenet.data.images import read_image
from sparsenet.device import choose_device
from sparsenet.display import display
from sparsenet.events import Concluded, Event
from sparsenet.files import user_path
from sparsenet.flags import parser
from sparsenet.predict import Prediction, as_example, find_images, predict
from sparsenet.ranks import started_by_others
from sparsenet.results import EpochMetrics, TrainingResult
from sparsenet.run import Run
from sparsenet.signals import Signals
from sparsenet.texts import shown
from sparsenet.tracking import require_all, tracked
from sparsenet.train import train
from sparsenet.trained import Trained, load_trained

TEXT_AND_BYTES = (str, bytes, bytearray, memoryview)  # iterables that are one picture


@dataclass(frozen=True)
class Fit:
    """A run that has ended."""

    path: Path  # the run folder
    metrics: tuple[EpochMetrics, ...]  # a row for each epoch
    result: TrainingResult | None  # of the best weights on the test images; ``None`` where stopped
    stopped: str | None = None  # why it ended before its last epoch: a signal, or the time limit

    @property
    def error(self) -> float | None:
        """Wrong test images in percent."""
        return self.result.error if self.result else None

    def load(self, device: str = "auto") -> Network:
        """The network with its best weights."""
        return load(self.path, device=device)


def fit(
    config: RunConfig | None = None,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    preset: str = "",
    model: str = "",
    events: Callable[[Event], object] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Fit:
    """Trains a network as ``sparsenet train`` does, and writes the same run folder.

    *config* is the whole of the settings, by default those of a *preset*, which is chosen by the
    data; *model* is a network of ``sparsenet.list_models``; *settings* are single ones by the names
    that flags have: ``fit(dataset_dir="photos", max_epoch=10)``. Where they name other data than
    *config* has, its labels, columns and name are not kept. The run is written to *out*, by default
    a new folder in ``runs``; *resume* goes on with one. *events* is called with all that
    ``sparsenet.events`` has, as it happens; what it raises ends the run, which can be resumed from
    its last checkpoint. Unless *quiet*, lines are printed as on the command line.

    Ctrl-C (in a notebook: interrupt) saves and ends the run. Raises ``ValueError`` in one line for
    settings and data that do not fit, ``sparsenet.train.DivergedError`` for a loss that is no
    number.
    """
    _refuse_empty_texts({"out": out, "resume": resume, **settings})
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if value is not None
    }
    if started_by_others():
        expected = "one process; sparsenet train runs under torchrun"
        raise ValueError(f"fit: expected {expected}, found several")
    if resume is not None:
        if out is not None or preset or model:
            raise ValueError("fit: expected resume without out, preset and model, found them")
        run = Run.open(user_path(str(resume)))
        config = resumed(run, changed(config or run.config(), settings))
        require_all(config.train.trackers)
    else:
        if preset and config is not None:
            raise ValueError("fit: expected config or preset, found both")
        base = presets.preset(preset) if preset else config and pointed(config, settings)
        config = compose(settings, base, model)
        require_all(config.train.trackers)
        own = Path("runs") / name_of(config)
        run = Run.create(user_path(str(out))) if out is not None else Run.create_one_of_its_own(own)
    results: list[TrainingResult] = []

    def watched(signals: Signals) -> Iterator[Event]:
        for event in train(config, run, resume is not None, signals.received):
            if isinstance(event, Concluded):
                results.append(event.result)
            if events:
                events(event)
            yield event

    with (
        Signals(ends_program=False) as signals,
        run.locked(),
        closing(tracked(watched(signals), run, config.train.trackers)) as followed,
    ):
        stopped = display(followed, run, quiet)
    return Fit(run.path, tuple(run.metrics()), results[0] if results else None, stopped)


def _refuse_empty_texts(given: Mapping[str, object]) -> None:
    for name in ("out", "resume", *POINTERS, "weights"):
        if given.get(name) == "":  # such as of a variable that was not set
            raise ValueError(f"{name}: expected a value, found an empty text")


class Network(Trained):
    """A trained network, in evaluation mode, that takes pictures."""

    def __repr__(self) -> str:
        about = self.preprocessing
        shape = f"({about.channels}, {about.size}, {about.size})"
        return f"{self.name}: {len(self.classes)} classes ({shortened(self.classes)}), {shape}"

    def transform(self, picture: Any) -> Tensor:
        """What ``model`` takes of a picture: float32 ``(channels, size, size)``, on the CPU.

        Pictures are those of ``sparsenet.predict.predict``, made the size of the training images
        and normalised as these were, to the bit. Raises ``ValueError`` for what is no image.
        """
        about = self.preprocessing
        example = as_example(picture, 0, about.max_megapixels)
        pixels = read_image(example.source, about.form(), example.name)
        return about.normalise(torch.tensor(pixels)[None])[0]

    def predict(
        self,
        pictures: Any,
        top: int = 5,
        batch_size: int = 64,
        explained: bool = False,
        precision: str = "fp32",
    ) -> list[Prediction]:
        """The *top* classes of each picture with their probabilities, or what is wrong with it.

        Those that are *explained* say what speaks for the first class, and ``drawn`` are the bytes
        of a PNG that shows where. *precision* is fp32, bf16, or auto: what is fastest there.

        *pictures* is one or an iterable of those of ``sparsenet.predict.predict``; a folder or a
        glob (``"photos/*.jpg"``) stands for the images that it names. What cannot be read raises
        nothing: its prediction has an ``error``.
        """
        alone = not isinstance(pictures, Iterable) or isinstance(pictures, TEXT_AND_BYTES)
        if alone or any(hasattr(pictures, name) for name in ("read", "__array_interface__")):
            pictures = [pictures]
        return [*predict(self, _found(pictures), top, batch_size, None, explained, precision)]


def _found(pictures: Iterable[Any]) -> Iterator[Any]:
    """*pictures*, with the images that folders and globs name in their place."""
    for picture in pictures:
        if isinstance(picture, str | Path):
            yield from find_images([str(picture)]).images
        else:
            yield picture


def load(
    source: Path | str,
    checkpoint: str = "best",
    device: str = "auto",
    implementation: str = "auto",
) -> Network:
    """A trained network: its ``model``, ``classes`` and ``preprocessing``, and ``predict``.

    *source* is a run folder, of which *checkpoint* is ``best`` or ``last``, or weights: a file, an
    address (``https://``, ``hf://``) or a name of ``sparsenet.list_models`` that has some. *device*
    is ``auto`` or one that PyTorch knows. Warns of damaged checkpoints, in whose place an older one
    is taken; raises ``ValueError`` in one line.
    """
    trained = load_trained(source, checkpoint, choose_device(device), implementation)
    for each in trained.warnings:
        warnings.warn(f"{source}: {each}", stacklevel=2)
    return Network(**vars(trained))


def evaluate(source: Path | str, *, mirror: bool = False, **options: Any) -> EvaluationReport:
    """What ``sparsenet eval`` says of a run or of weights: errors, scores of classes, calibration.

    With *mirror*, probabilities are means over each image and its mirror image. *options* have the
    names of its other flags: ``evaluate("runs/birds", split="val")``,
    ``evaluate("sparsenet_40_12", dataset_dir="photos", predictions="out.csv")``. Raises
    ``ValueError`` in one line, and ``OSError`` where predictions cannot be written after all.
    """
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if mirror not in (True, False, None):  # such as "false"
        raise ValueError(f"mirror: expected True or False, found {shown(mirror)}")
    if mirror:
        flags.append("--mirror")
    report, _, write = evaluated(parser().parse(["eval", *flags, "--", str(source)]))
    write()
    return report
