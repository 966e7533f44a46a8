"""The report: one page on its own, best run first, plain about what is missing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsenet.report import COLUMNS, markdown_table, summarise, write_report

METRICS = """epoch,lr,train_error,val_error,test_error,seconds,eval_seconds,peak_memory_mb
1,0.1,60.0,,55.5,30.0,2.0,1000.0
2,0.1,40.0,,44.5,20.0,3.0,1234.5
3,0.01,20.0,,,25.0,,1200.0
"""


def make(path: Path, error: float | None, fetch: str = "sparse") -> Path:
    path.mkdir()
    network = {"fetch": fetch, "aggregation": "concat", "depth": 40, "growth_rate": [12], "bottleneck": True}
    files: dict[str, Any] = {
        "config": {"network": network, "data": {"dataset": "auto"}, "train": {"seed": 7, "max_epoch": 9}},
        "environment": {"device": "cpu", "device_name": "A CPU | fast", "threads": 2},
        "graph": {"parameters": 123456, "macs": 5, "nodes": []},
    }
    if error is not None:
        files["result"] = {"dataset": "CIFAR-10 (JPEG)", "error": error, "epochs": 3}
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "metrics.csv").write_text(METRICS)
    (path / "graph.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><title>net</title></svg>')
    return path


class Page(HTMLParser):
    """What a page loads, runs and says."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_row_holds_what_the_folder_says(tmp_path: Path) -> None:
    row = summarise(make(tmp_path / "run", 5.5))
    assert row == {
        "platform": "A CPU | fast, 2 threads",
        "architecture": "SparseNet-BC",
        "depth": 40,
        "growth": "12",
        "parameters": 123456,
        "dataset": "CIFAR-10 (JPEG)",
        "error": 5.5,
        "train_seconds": 25.0,
        "test_seconds": 2.5,
        "epochs": "3 of 9",
        "peak_memory_mb": 1234.5,
        "seed": 7,
        "final": True,
    }


def test_a_run_without_a_result_reports_its_last_test_and_says_so(tmp_path: Path) -> None:
    row = summarise(make(tmp_path / "run", None))
    assert (row["error"], row["epochs"], row["final"]) == (44.5, "3 of 9", False)
    assert "| 44.50* |" in markdown_table([row])


def test_the_table_is_markdown_with_the_best_first(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, error, name) for name, error in (("dense", 9.25), ("sparse", 5.5))]
    lines = markdown_table([summarise(run) for run in runs]).splitlines()
    assert [line.replace(r"\|", "").count("|") for line in lines] == [len(COLUMNS) + 1] * 4
    assert "SparseNet-BC" in lines[2]
    assert "DenseNet-BC" in lines[3]


def test_the_page_stands_alone_with_the_best_run_first(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, error) for name, error in (("worse", 9.25), ("<b>best & $1", 5.5), ("going", None))]
    (runs[1] / "curves.png").write_bytes(b"\x89PNG")
    text = write_report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not {"script", "link", "iframe", "b>best"} & set(page.tags)
    assert page.words.index("<b>best & $1") < page.words.index("worse") < page.words.index("going")
    assert sum(source.startswith("data:image/png;base64,") for source in page.sources) == 1
    assert page.tags.count("svg") == 1 + len(runs)  # the chart and each run's network
    assert "still going or was stopped" in page.words
    assert "sparsenet train --config" in page.words
    assert "default-src 'none'" in text


@pytest.mark.parametrize("kept", ["config.json", "metrics.csv", "result.json"])
def test_any_one_file_is_enough(tmp_path: Path, kept: str) -> None:
    run = make(tmp_path / "run", 5.5)
    for file in run.iterdir():
        if file.name != kept:
            file.unlink()
    words = Page(write_report([run], tmp_path / "report.html").read_text()).words
    assert "Not in the folder: " in words
    assert kept not in words.split("Not in the folder: ")[1].split("Command")[0]
    assert markdown_table([summarise(run)])


@pytest.mark.parametrize("name", ["nothing here", "."])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a run folder") as error:
        write_report([make(tmp_path / "run", 5.5), tmp_path / name], tmp_path / "report.html")
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("graph.json", "[]"), ("metrics.csv", "epoch\nx\n")])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    run = make(tmp_path / "run", 5.5)
    (run / name).write_text(text)
    with pytest.raises(ValueError, match="expected") as error:
        summarise(run)
    assert str(run / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file that can be written"):
        write_report([make(tmp_path / "run", 5.5)], tmp_path / "missing" / "report.html")
