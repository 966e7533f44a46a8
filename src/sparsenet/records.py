"""What run folders say, as rows of a table: one for each network, recipe and platform, with all of its seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import split
from statistics import fmean, median, stdev
from typing import Any

from sparsenet.config import RunConfig
from sparsenet.files import write_atomic
from sparsenet.run import Run

COLUMNS = {
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
    "step_seconds": "training step, benchmarked (s)",
    "duration": "training and tests",
    "peak_memory_mb": "peak memory (MB)",
    "recipe": "recipe",
    "seed": "seed",
}
MEASURED = ("error", "train_seconds", "test_seconds", "step_seconds", "duration", "peak_memory_mb")
ONCE = ("dataset", "recipe", "seed")  # said once below a table where all of its rows agree
SAME = (
    *(key for key in COLUMNS if key not in (*MEASURED, "seed")),
    "network",
)  # in the runs of one row
BENCH = "bench.json"  # what sparsenet bench --out writes
MADE_ON = (
    "machine",
    "batch_size",
    "image_size",
)  # in which a run and a row of the benchmark must agree
PUBLISHED = "published.json"  # rows that others measured: {"published": [{"platform": ..., "error": ...}, ...]}
FILES = ("config.json", "metrics.csv", "result.json")  # any of them makes a folder a run
PAPER = dataclasses.asdict(RunConfig())
OF_DATA = (
    "image_size",
    "mirror",
    "shift",
    "cutout",
    "mixup",
    "cutmix",
    "trivial_augment",
    "first_size",
    "val_fraction",
)
NOTHING, BAR = (
    "–",
    r"\|",
)  # in the cell of a Markdown table: no value, and the character that would end it
BLOCK = re.compile(
    r"(<!-- report (?P<runs>[^\n]*?) -->\n)(?:(?!<!-- report ).)*?(<!-- /report -->)", re.S
)

Row = dict[str, Any]


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """A row for each group of runs that differ in nothing but the seed, by the keys of :data:`COLUMNS`.

    *paths* are run folders, folders that hold some, and files like :data:`PUBLISHED`, whose rows stay as they are.
    Besides, a row has ``runs``, their folders, and ``errors``, one each; ``error``, the seconds and the memory are
    means over the seeds. ``step_seconds`` is from a record of ``sparsenet bench --model RUN`` in a folder of *paths*,
    made on the run's platform at its batch and size of images, and of the fastest implementation. ``final`` is false
    where a run has no result. Raises ``ValueError`` for a path without any and for a damaged file.
    """
    paths = list(paths)
    groups: dict[str, list[Row]] = {}
    published: list[Row] = []
    known: set[Path] = set()
    steps = _benchmarked(paths)
    for row in (row for path in paths for row in _found(path)):
        if row["published"]:
            row["errors"] = [row["error"]] if row["error"] is not None else []
            published += [row] if row not in published else []
            continue
        if row["runs"][0].resolve() in known:
            continue
        known.add(row["runs"][0].resolve())
        row["step_seconds"] = steps.get((row["runs"][0].name, *(row[key] for key in MADE_ON)))
        key = json.dumps([row[key] for key in (*SAME, "final")])
        while row["seed"] in (
            other["seed"] for other in groups.get(key, ())
        ):  # a seed again is not one more seed
            key += " again"
        groups.setdefault(key, []).append(row)
    return published + [_joined(rows) for rows in groups.values()]


def _found(path: Path) -> list[Row]:
    if path.is_file() and path.suffix == ".json":
        return _published(path)
    if any((path / name).is_file() for name in FILES):
        return [summarise(path)]
    below = sorted({file.parent for name in FILES for file in path.rglob(name)})
    rows = [row for file in sorted(path.rglob(PUBLISHED)) for row in _published(file)] + [
        *map(summarise, below)
    ]
    if not rows and not any(
        path.rglob(BENCH)
    ):  # a record of the benchmark, which has tables of its own
        raise ValueError(
            f"{path}: expected a run folder with {', '.join(FILES[:-1])} or {FILES[-1]}, found none"
        )
    return rows


def _published(file: Path) -> list[Row]:
    rows = read_json(file).get("published")
    rows = rows if isinstance(rows, list) else [None]
    if not all(
        isinstance(row, dict) and isinstance(row.get("error"), int | float | None) for row in rows
    ):
        raise ValueError(
            f"{file}: expected an object with a list of rows named published, their errors being numbers"
        )
    return [
        dict.fromkeys(COLUMNS) | row | {"published": True, "final": True, "runs": []}
        for row in rows
    ]


def _benchmarked(paths: Iterable[Path]) -> dict[tuple[Any, ...], float]:
    """Seconds of a training step by what was measured, from records of the benchmark: those of the fastest variant."""
    found: dict[tuple[Any, ...], float] = {}
    for file in sorted(file for path in paths for file in path.rglob(BENCH)):
        record = read_json(file)
        try:
            for row in record.get("rows", []):
                if (
                    "train_seconds" in row and not row["options"]
                ):  # options are not how a run was trained
                    made_on = row | {"machine": _machine(record["environment"], row)}
                    key = Path(row["model"]).name, *(made_on[key] for key in MADE_ON)
                    found[key] = min(row["train_seconds"]["median"], found.get(key, math.inf))
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file}: expected a record of sparsenet bench, found another file ({error})"
            ) from None
    return found


def summarise(run: Path) -> Row:
    """The row of one run; ``None`` where its folder does not say.

    ``final`` is false where the run has no result: then ``error`` is that of the last epoch tested. Raises
    ``ValueError`` for a folder that is no run or a file in it that is not as a run writes it.
    """
    try:
        return _summarised(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{run}: expected files as a run writes them, found others ({error})"
        ) from None


def _summarised(run: Path) -> Row:
    names = ("config", "environment", "graph", "result")
    config, environment, graph, result = (read_json(run / f"{name}.json") for name in names)
    rows = read_metrics(run)
    if not (config or result or rows):
        raise ValueError(
            f"{run}: expected a run folder with config.json, metrics.csv or result.json, found none"
        )
    network, train = config.get("network", {}), config.get("train", {})
    tested = _column(rows, "test_error") or _column(rows, "val_error")
    rates, data = network.get("growth_rate"), config.get("data", {})
    seconds = _column(rows, "seconds") + _column(rows, "eval_seconds")
    return {
        "platform": _platform(environment, train) if environment else None,
        "architecture": _architecture(network) if network else None,
        "depth": network.get("depth") or None,
        "growth": "-".join(map(str, rates)) if isinstance(rates, list) else rates,
        "parameters": graph.get("parameters"),
        "macs": graph.get("macs"),
        "dataset": result.get("dataset") or data.get("dataset_name") or data.get("dataset"),
        "error": result["error"] + 0.0 if result else tested[-1] if tested else None,
        "train_seconds": _median(rows, "seconds"),
        "test_seconds": _median(rows, "eval_seconds"),
        "step_seconds": None,
        "duration": sum(seconds) if seconds and result else None,  # seconds
        "peak_memory_mb": max(_column(rows, "peak_memory_mb"), default=None),
        "recipe": _recipe(config, len(rows) or result.get("epochs")),
        "seed": train.get("seed"),
        "machine": _machine(environment, train) if environment else None,
        "batch_size": train.get("batch_size"),
        "image_size": graph.get("image_size"),
        "network": PAPER["network"] | network,
        "final": bool(result),
        "published": False,
        "runs": [run],
    }


def _platform(environment: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    implementation = environment.get("implementation") or train.get("implementation")
    return _machine(environment, train) + f", {implementation}" * (
        implementation not in (None, "auto")
    )


def _machine(environment: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """The platform, whatever the implementation."""
    device, threads = (
        environment.get("device_name") or environment.get("device"),
        environment.get("threads"),
    )
    precision = environment.get("precision") or train.get("precision")
    parts = [
        device,
        f"{threads} thread{'s' * (threads != 1)}" if environment.get("device") == "cpu" else None,
    ]
    parts += [f"torch {environment['torch']}" if "torch" in environment else None, precision]
    return ", ".join(str(part) for part in parts if part not in (None, "auto"))


def _architecture(network: Mapping[str, Any]) -> str:
    fetch = network.get("fetch", "sparse")
    kinds = {"sparse": "SparseNet", "dense": "DenseNet", "harmonic": "HarDNet"}
    name = (
        kinds.get(fetch, f"SparseNet ({fetch})")
        if isinstance(fetch, str)
        else "SparseNet (own topology)"
    )
    return (
        name
        + "-BC" * bool(network.get("bottleneck"))
        + " (sum)" * (network.get("aggregation") == "sum")
    )


def _recipe(config: Mapping[str, Any], done: int | None) -> str | None:
    """Epochs, and the settings in which a run differs from the paper's."""
    train = config.get("train", {})
    planned = train.get("max_epoch")
    epochs = f"{planned}" if planned in (None, done) else f"{done or 0} of {planned}"
    settings = [("train", "batch_size"), *(("optim", name) for name in PAPER["optim"])]
    settings += [("network", "dropout"), *(("data", name) for name in OF_DATA)]
    given = {name: config.get(part, {}).get(name, PAPER[part][name]) for part, name in settings}
    changed = {name: given[name] for part, name in settings if given[name] != PAPER[part][name]}
    if given["schedule"] == "step" and planned == PAPER["train"]["max_epoch"] and not changed:
        return f"the paper's, {epochs} epochs"
    words = [
        f"{epochs} epoch{'s' * (epochs != '1')}",
        *(_setting(name, value) for name, value in changed.items()),
    ]
    return ", ".join(words) if train else None


def _setting(name: str, value: Any) -> str:
    if name == "schedule":
        return str(value)
    words = name.replace("_", " ")
    return words if value is True else f"no {words}" if value is False else f"{words} {value:g}"


def _joined(rows: Sequence[Row]) -> Row:
    """One row of several that differ in their seeds."""
    rows = sorted(rows, key=lambda row: row["seed"] or 0)
    joined = {key: fmean(found) if (found := _column(rows, key)) else None for key in MEASURED}
    seeds = [row["seed"] for row in rows if row["seed"] is not None]
    runs = [run for row in rows for run in row["runs"]]
    return (
        rows[0]
        | joined
        | {"errors": _column(rows, "error"), "seed": ", ".join(map(str, seeds)), "runs": runs}
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`read_rows` as a Markdown table, published ones first, then the best; no empty columns.

    An error that is not final is marked with ``*``. Where all of several rows agree in their data, recipe or seeds, a
    line below says so.
    """
    ordered = sorted(rows, key=rank)
    texts = {key: [cell(row, key) for row in ordered] for key in columns(rows)}
    once = [key for key in ONCE if key in texts and len(rows) > 1 and len(set(texts[key])) == 1]
    said = "; ".join(f"{COLUMNS[key]}: {texts.pop(key)[0]}" for key in once)
    lines = [
        [COLUMNS[key] for key in texts],
        ["---"] * len(texts),
        *zip(*texts.values(), strict=True),
    ]
    table = "".join(
        f"| {' | '.join(text.replace('|', BAR) for text in line)} |\n" for line in lines
    )
    return table + (f"\nAll rows: {said}.\n" if said else "")


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of :data:`COLUMNS` in which some row has anything."""
    return [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]


def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """What rows are sorted by."""
    return not row["published"], row["error"] is None, row["error"] or 0.0


def cell(row: Mapping[str, Any], key: str) -> str:
    """The text of one cell of a table."""
    value = row.get(key)
    if value in (None, ""):
        return NOTHING
    if key == "platform" and row["published"]:
        return f"*published:* {value}"
    if isinstance(value, str):
        return value
    if key == "error":
        spread = f" ± {stdev(row['errors']):.2f}" if len(row["errors"]) > 1 else ""
        return f"{value:.2f}{spread}" + "*" * (not row["final"])
    if key == "macs":
        return f"{value / 1e6:,.1f}"
    if key == "duration":
        return (
            f"{value:.0f} s"
            if value < 120
            else f"{value / 60:.0f} min"
            if value < 7200
            else f"{value / 3600:.1f} h"
        )
    if key.endswith("seconds"):
        return f"{value:.3f}" if value < 1 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,.0f}" if key in ("parameters", "peak_memory_mb") else str(value)


def update(page: Path) -> int:
    """Writes the tables of a Markdown *page* anew, from the records that each names; returns how many there are.

    A table stands between ``<!-- report FOLDER... -->`` and ``<!-- /report -->``; folders are relative to the page and
    may be globs. Raises ``ValueError``.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page}: expected a page of text, found: {error}") from None
    updated, count = BLOCK.subn(
        lambda found: found[1] + _table(page.parent, found["runs"]) + found[3], text
    )
    if not count:
        raise ValueError(
            f"{page}: expected a table between <!-- report RUN... --> and <!-- /report -->, found none"
        )
    if updated != text:
        write_atomic(page, updated)
    return count


def _table(folder: Path, runs: str) -> str:
    paths: list[Path] = []
    for pattern in split(runs):
        matches = [] if Path(pattern).is_absolute() else sorted(folder.glob(pattern))
        paths += matches or [folder / pattern]
    return f"\n{markdown_table(read_rows(paths))}\n"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in *file*; an empty one where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected readable JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The rows of a run's metrics.csv."""
    try:
        return [dataclasses.asdict(row) for row in Run(run).metrics()]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{run / 'metrics.csv'}: expected a table of numbers, found: {error}"
        ) from None


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _median(rows: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = _column(rows, name)
    return median(values) if values else None
