"""Runs as rows of a table: a row for each network, recipe and platform, with all of its seeds."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from sparsenet.architecture import Architecture
from sparsenet.results import EpochMetrics
from sparsenet.texts import printable
from sparsenet.topology import family_name

HEADINGS = {
    "platform": "platform",
    "architecture": "architecture",
    "depth": "depth",
    "growth": "growth",
    "parameters": "parameters",
    "macs": "million MACs",
    "dataset": "data",
    "error": "error %",
    "train_seconds": "training epoch (s)",
    "test_seconds": "test pass (s)",
    "duration": "training and tests",
    "peak_memory_mb": "peak memory (MB)",
    "recipe": "recipe",
    "seeds": "seed",
}
ONCE = ("dataset", "recipe", "seeds")  # are written once, below a table, where all rows agree
NO_VALUE = "–"


@dataclass(frozen=True)
class MeasuredRun:
    """What one run came to."""

    path: Path
    seed: int | None
    error: float | None  # percent; without a result that of the last epoch tested or validated
    metrics: tuple[EpochMetrics, ...]

    def column(self, name: str) -> list[float]:
        """Returns the values of a column of metrics.csv where it was measured."""
        values = [getattr(row, name) for row in self.metrics]
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class RunSummary:
    """Runs that differ in their seeds only; ``None`` is what their folders do not say."""

    runs: tuple[MeasuredRun, ...]
    network: Architecture | None
    machine: str | None  # device, threads, version of PyTorch, precision, …
    implementation: str | None
    image_size: int | None
    batch_size: int | None
    parameters: int | None
    macs: int | None  # multiply-accumulates of an image
    dataset: str | None
    recipe: str | None
    details: tuple[str, ...]  # images and settings that a recipe names only where rows need it
    is_final: bool  # whether the runs have results

    @property
    def name(self) -> str:
        """The names of the runs' folders."""
        return ", ".join(run.path.resolve().name for run in self.runs)

    @property
    def architecture(self) -> str | None:
        """The kind of network, such as SparseNet-BC."""
        if not self.network:
            return None
        name = family_name(self.network.fetch)
        if self.network.bottleneck:
            name += "-BC"
        return f"{name} (sum)" if self.network.aggregation == "sum" else name

    @property
    def depth(self) -> int | None:
        return self.network.depth if self.network else None

    @property
    def growth(self) -> str | None:
        """The growth rates, such as 16-32-64."""
        if not self.network:
            return None
        rates = self.network.growth_rate
        return str(rates) if isinstance(rates, int) else "-".join(map(str, rates))

    @property
    def errors(self) -> list[float]:
        return [run.error for run in self.runs if run.error is not None]

    @property
    def error(self) -> float | None:
        """The mean of the errors in percent."""
        return fmean(self.errors) if self.errors else None

    @property
    def train_seconds(self) -> float | None:
        """The mean over the runs of the median over their epochs."""
        return self._mean(median, "seconds")

    @property
    def test_seconds(self) -> float | None:
        """The same for the pass over the test images."""
        return self._mean(median, "eval_seconds")

    @property
    def duration(self) -> float | None:
        """The mean seconds of training and tests, all epochs together, of finished runs."""
        return self._mean(sum, "seconds", "eval_seconds") if self.is_final else None

    @property
    def peak_memory_mb(self) -> float | None:
        return self._mean(max, "peak_memory_mb")

    def _mean(self, of_run: Callable[[list[float]], float], *columns: str) -> float | None:
        measured = [[v for name in columns for v in run.column(name)] for run in self.runs]
        values = [of_run(column) for column in measured if column]
        return fmean(values) if values else None

    def cells(self) -> dict[str, str]:
        """Returns the texts of a table's row by the keys of ``HEADINGS``; no value is ''."""
        error = _format(self.error, ".2f")
        if len(self.errors) > 1:
            error += f" ± {stdev(self.errors):.2f}"
        if error and not self.is_final:
            error += "*"
        return {
            "platform": ", ".join(filter(None, (self.machine, self.implementation))),
            "architecture": self.architecture or "",
            "depth": _format(self.depth, ""),
            "growth": self.growth or "",
            "parameters": _format(self.parameters, ","),
            "macs": _format(self.macs and self.macs / 1e6, ",.1f"),
            "dataset": self.dataset or "",
            "error": error,
            "train_seconds": format_seconds(self.train_seconds),
            "test_seconds": format_seconds(self.test_seconds),
            "duration": format_duration(self.duration),
            "peak_memory_mb": _format(self.peak_memory_mb, ",.0f"),
            "recipe": self.recipe or "",
            "seeds": ", ".join(str(run.seed) for run in self.runs if run.seed is not None),
        }


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def format_seconds(value: float | None) -> str:
    """Returns the text of seconds in a table, '' for ``None``."""
    if value is None:
        return ""
    if value < 1:
        return f"{value:.3f}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def format_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def used_columns(rows: Sequence[Mapping[str, str]], headings: Mapping[str, str]) -> list[str]:
    """Returns the keys of *headings* for which some row has a text."""
    return [key for key in headings if any(row.get(key) for row in rows)]


def markdown_table(
    rows: Sequence[Mapping[str, str]], headings: Mapping[str, str] = HEADINGS
) -> str:
    """Returns rows like ``RunSummary.cells`` as a Markdown table without its empty columns.

    Where several rows all have the same data, recipe or seeds, a line below the table says so.
    """
    keys = used_columns(rows, headings)
    texts = {key: [_as_markdown(row.get(key) or NO_VALUE) for row in rows] for key in keys}
    common = [key for key in ONCE if key in keys and len(rows) > 1 and len(set(texts[key])) == 1]
    notes = [f"{headings[key]}: {texts.pop(key)[0]}" for key in common]
    lines = [[headings[key] for key in texts], ["---"] * len(texts)]
    lines += [list(line) for line in zip(*texts.values(), strict=True)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + (f"\nAll rows: {'; '.join(notes)}.\n" if notes else "")


def _as_markdown(text: str) -> str:
    """*text* as Markdown that ends neither a cell, a line nor a comment, and loads nothing."""
    text = html.escape(printable(text), quote=False)
    for sign in r"\|[":
        text = text.replace(sign, f"\\{sign}")
    return text
