"""The report: one page on its own, best run first, plain about what is missing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from base64 import b64encode
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call, write_image
from safetensors.torch import save_file

from sparsenet.architecture import Architecture
from sparsenet.config import RunConfig
from sparsenet.pictures import draw_comparison
from sparsenet.pictures.figure import series
from sparsenet.records import read_summaries
from sparsenet.report import write_report
from sparsenet.results import TrainingResult
from sparsenet.summary import HEADINGS, RunSummary, markdown_table

METRICS = """epoch,step,lr,train_error,val_error,test_error,seconds,eval_seconds,peak_memory_mb
1,10,0.1,60.0,,55.5,30.0,2.0,1000.0
2,20,0.1,40.0,,44.5,20.0,3.0,1234.5
3,30,0.01,20.0,,,25.0,,1200.0
"""
RECIPE = "3 of 9 epochs, batch size 32, lr 0.2, onecycle, no mirror"


def result(error: Any, dataset: str = "CIFAR-10 (JPEG)", epochs: int = 3) -> dict[str, Any]:
    return dataclasses.asdict(
        TrainingResult(
            dataset=dataset,
            error=error,
            top5_error=1.0,
            loss=0.5,
            images=100,
            seconds=2.0,
            epochs=epochs,
            checkpoint="last epoch",
            classes=("cat", "dog"),
            class_errors={"cat": 1.0, "dog": None},
        )
    )


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def make_run(
    path: Path, error: float | None, fetch: Any = "sparse", depth: int = 40, seed: int = 7
) -> Path:
    path.mkdir()
    network = {"fetch": fetch, "depth": depth, "growth_rate": [12], "bottleneck": True}
    config = {
        "network": network,
        "data": {"dataset": "auto", "mirror": False},
        "optim": {"schedule": "onecycle", "lr": 0.2},
        "train": {"seed": seed, "max_epoch": 9, "batch_size": 32},
    }
    environment = {
        "device": "cpu",
        "device_name": "A CPU | fast",
        "threads": 2,
        "torch": "9",
        "precision": "bf16",
    }
    costs = {"parameters": 123456, "macs": 5_000_000, "image_size": 32, "nodes": []}
    write(path / "config.json", config)
    write(path / "environment.json", environment)
    write(path / "graph.json", costs)
    if error is not None:
        write(path / "result.json", result(error))
    (path / "metrics.csv").write_text(METRICS)
    (path / "graph.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><title>net</title></svg>'
    )
    return path


def markdown(paths: Sequence[Path]) -> str:
    return markdown_table([row.cells() for row in read_summaries(paths)])


def test_the_table_names_runs_and_says_which_have_no_result(call: Call, tmp_path: Path) -> None:
    make_run(tmp_path / "done", error=5.0)
    make_run(tmp_path / "going", error=None)
    out = call("report", tmp_path, "--markdown").out
    lines = out.splitlines()
    assert lines[0].startswith("| run |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| done", "| going"]
    assert out.endswith("\n\n\\* last epoch so far, no final result\n")
    assert "*" not in call("report", tmp_path / "done", "--markdown").out
    (tmp_path / "more").mkdir()
    more = make_run(tmp_path / "more" / "done", error=7.0)
    lines = call("report", tmp_path / "done", more, "--markdown").lines
    assert [line.split(" | ")[0] for line in lines[2:4]] == [f"| {tmp_path}/done", f"| {more}"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"dataset": "auto", "dataset_dir": "a/photos"}, "photos"),
        ({"dataset": "folder", "dataset_dir": "a/photos"}, "photos"),
        ({"dataset": "auto", "dataset_dir": "a/train.parquet"}, "train"),
        ({"dataset": "c10", "dataset_dir": "a/data"}, "c10"),
        ({"dataset": "digits"}, "digits"),
        ({"dataset": "auto", "dataset_dir": "a/photos", "dataset_name": "birds"}, "birds"),
    ],
)
def test_a_run_without_a_result_says_what_its_data_are(
    tmp_path: Path, data: dict[str, str], name: str
) -> None:
    run = make_run(tmp_path / "run", error=None)
    config = json.loads((run / "config.json").read_text())
    write(run / "config.json", {**config, "data": data})
    assert [row.dataset for row in read_summaries([run])] == [name]


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
    run = make_run(tmp_path / "run", 5.5)
    [row] = read_summaries([run])
    assert (row.machine, row.implementation) == ("A CPU | fast, 2 threads, torch 9, bf16", None)
    assert (row.batch_size, row.image_size, row.is_final) == (32, 32, True)
    assert row.network == Architecture(fetch="sparse", depth=40, growth_rate=12, bottleneck=True)
    assert (row.error, row.errors, [each.path for each in row.runs]) == (5.5, [5.5], [run])
    assert row.cells() == {
        "platform": "A CPU | fast, 2 threads, torch 9, bf16",
        "architecture": "SparseNet-BC",
        "depth": "40",
        "growth": "12",
        "parameters": "123,456",
        "macs": "5.0",
        "dataset": "CIFAR-10 (JPEG)",
        "error": "5.50",
        "train_seconds": "25.0",
        "test_seconds": "2.5",
        "duration": "80 s",
        "peak_memory_mb": "1,234",
        "recipe": RECIPE,
        "seeds": "7",
    }


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ({}, "SparseNet"),
        ({"fetch": "dense", "bottleneck": True}, "DenseNet-BC"),
        ({"fetch": "harmonic"}, "HarDNet"),
        ({"fetch": "windowed:3"}, "SparseNet (windowed:3)"),
        ({"aggregation": "sum"}, "SparseNet (sum)"),
        ({"fetch": [[0], [0]], "blocks": [1]}, "SparseNet (own topology)"),
    ],
)
def test_a_network_has_the_name_of_its_kind(
    tmp_path: Path, network: dict[str, Any], name: str
) -> None:
    write(tmp_path / "config.json", {"network": network})
    [row] = read_summaries([tmp_path])
    assert row.architecture == name


def test_a_run_without_a_result_reports_its_last_test_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", None)
    [row] = read_summaries([run])
    assert (row.error, row.is_final) == (44.5, False)
    assert "| 44.50* |" in markdown([run])


def test_the_default_settings_are_called_the_paper_s(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5.5)
    write(run / "config.json", RunConfig().to_dict())
    (run / "metrics.csv").unlink()
    write(run / "result.json", result(4.44, epochs=300))
    [row] = read_summaries([run])
    assert row.recipe == "the paper's, 300 epochs"


def test_the_table_is_markdown_with_the_best_first_and_no_empty_column(tmp_path: Path) -> None:
    errors = {"dense": 9.25, "sparse": 5.5}
    runs = [make_run(tmp_path / fetch, error, fetch) for fetch, error in errors.items()]
    lines = markdown(runs).splitlines()
    bars = len(HEADINGS) - len(("dataset", "recipe", "seeds")) + 1
    assert [line.replace(r"\|", "").count("|") for line in lines] == [bars] * 4 + [0, 0]
    assert [*map(str.strip, lines[0].split("|")[1:-1])] == [
        name for key, name in HEADINGS.items() if key not in ("dataset", "recipe", "seeds")
    ]
    assert ["SparseNet-BC" in lines[2], "DenseNet-BC" in lines[3]] == [True, True]
    for run in runs:
        (run / "environment.json").unlink()
    assert not markdown([tmp_path]).startswith("| platform")


def test_what_all_rows_agree_in_is_said_once_below_the_table(tmp_path: Path) -> None:
    errors = {"dense": 9.25, "sparse": 5.5}
    runs = [make_run(tmp_path / fetch, error, fetch) for fetch, error in errors.items()]
    table = markdown(runs)
    assert table.endswith(f"|\n\nAll rows: data: CIFAR-10 (JPEG); recipe: {RECIPE}; seed: 7.\n")
    assert table.count(RECIPE) == table.count("CIFAR-10 (JPEG)") == 1
    alone = markdown(runs[:1])
    assert "All rows" not in alone and RECIPE in alone
    write(runs[0] / "result.json", result(9.25, dataset="photos"))
    table = markdown(runs)
    assert table.endswith(f"|\n\nAll rows: recipe: {RECIPE}; seed: 7.\n")
    assert "| photos |" in table and "| CIFAR-10 (JPEG) |" in table


def test_runs_that_differ_in_the_seed_only_are_one_row(tmp_path: Path) -> None:
    errors = {3: 5.0, 1: 6.0, 2: 7.0}
    runs = [make_run(tmp_path / f"seed{seed}", error, seed=seed) for seed, error in errors.items()]
    [row] = read_summaries([tmp_path])
    assert (row.error, row.errors) == (6.0, [6.0, 7.0, 5.0])
    assert [run.path.name for run in row.runs] == ["seed1", "seed2", "seed3"]
    assert row.cells()["seeds"] == "1, 2, 3"
    assert "| 6.00 ± 1.00 |" in markdown([tmp_path])
    # However a run is named, it counts once.
    assert read_summaries([tmp_path, runs[0], tmp_path / "seed1" / ".." / "seed2"]) == [row]


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"fetch": "dense"}},
        {"network": {"depth": 22}},
        {"network": {"dropout": 0.2}},
        {"train": {"seed": 3}},  # a seed again is not one more seed
        {"train": {"implementation": "native"}},
    ],
)
def test_runs_that_differ_in_more_are_two_rows(tmp_path: Path, change: dict[str, Any]) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path / f"seed{seed}", 5.0, seed=seed)
    other = make_run(tmp_path / "other", 5.0, seed=4)
    config = json.loads((other / "config.json").read_text())
    for component, settings in change.items():
        config[component].update(settings)
    write(other / "config.json", config)
    assert sorted(len(row.runs) for row in read_summaries([tmp_path])) == [1, 3]


def make_recorded_run(
    path: Path,
    seed: int,
    ranks: int = 1,
    ids: Sequence[int] = (1, 2, 3),
    labels: Sequence[int] = (0, 1, 1),
    fetch: str = "sparse",
    **settings: dict[str, Any],
) -> Path:
    """A run that says which images it was tested on, and by how many processes."""
    run = make_run(path, 5.0, fetch, seed=seed)
    config = json.loads((run / "config.json").read_text())
    config["train"]["weights"] = "/a/w.pth"
    for component, values in settings.items():
        config[component].update(values)
    write(run / "config.json", config)
    environment = json.loads((run / "environment.json").read_text())
    write(run / "environment.json", environment | {"ranks": ranks})
    images = {"train": ([9], [0]), "test": (ids, labels)}
    tensors = {
        f"{split}.{name}": torch.tensor(numbers)
        for split, columns in images.items()
        for name, numbers in zip(("ids", "labels"), columns, strict=True)
    }
    save_file(tensors, run / "images.safetensors")
    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"label_column": "kind"}}, "label column kind"),
        ({"data": {"test_fraction": 0.5}}, "test fraction 0.5"),
        ({"data": {"mean": [0.5], "std": [0.25]}}, "mean 0.5, std 0.25"),
        ({"train": {"weights": "/b/w.pth"}}, "weights /b/w.pth"),
        ({"train": {"weights": "https://b/w.pth"}}, "weights https://b/w.pth"),
        ({"train": {"sync_statistics": "on"}}, "sync statistics on"),
        ({"train": {"memory": "lean"}}, "lean memory"),
        ({"ranks": 2}, "2 processes"),
        ({"ids": [1, 2, 4]}, "test images "),
        ({"labels": [0, 1, 0]}, "test images "),
    ],
)
def test_runs_of_other_images_or_preparation_are_another_row(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    for seed in (1, 2, 3):  # in any order they are the same images
        ids, labels = ((1, 2, 3), (0, 1, 1)) if seed < 3 else ((3, 1, 2), (1, 0, 1))
        make_recorded_run(tmp_path / f"seed{seed}", seed, ids=ids, labels=labels)
    [row] = read_summaries([tmp_path])
    assert row.recipe == f"{RECIPE.removesuffix(', no mirror')}, from w.pth, no mirror"
    make_recorded_run(tmp_path / "other", 4, **change)
    rows = {len(row.runs): row.cells() for row in read_summaries([tmp_path])}
    assert rows.keys() == {1, 3}
    assert words in rows[1]["recipe"] + rows[1]["platform"]
    assert rows[3]["recipe"] + rows[3]["platform"] != rows[1]["recipe"] + rows[1]["platform"]


def test_networks_that_saw_other_images_are_not_compared(tmp_path: Path) -> None:
    for fetch in ("sparse", "dense"):
        make_recorded_run(tmp_path / fetch, 1, fetch=fetch)
    write_report([tmp_path], tmp_path / "same.html")
    assert (tmp_path / "same-comparison.png").exists()
    make_recorded_run(tmp_path / "harmonic", 1, fetch="harmonic", ids=[1, 2, 4])
    write_report([tmp_path], tmp_path / "other.html")
    assert not (tmp_path / "other-comparison.png").exists()
    assert all("test images " in (row.recipe or "") for row in read_summaries([tmp_path]))


def test_runs_of_older_versions_that_name_no_images_are_one_row(tmp_path: Path) -> None:
    for seed in (1, 2):
        run = make_recorded_run(tmp_path / f"seed{seed}", seed)
        (run / "images.safetensors").unlink()
        (run / "environment.json").unlink()
    [row] = read_summaries([tmp_path])
    assert len(row.runs) == 2 and "images" not in (row.recipe or "")


def test_networks_of_one_look_are_not_one_row(tmp_path: Path) -> None:
    """Two topologies of a user's own have the same name and counts in the table."""
    one, two = [[0]] * 3, [[0], [1], [0, 1]]
    for seed, sources in enumerate((one, two)):
        make_run(tmp_path / f"run{seed}", 5.0, fetch=sources, depth=10, seed=seed)
    rows = read_summaries([tmp_path])
    assert [row.cells()["seeds"] for row in rows] == ["0", "1"]


def test_records_of_the_benchmark_beside_runs_are_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5.5)
    expected = markdown([tmp_path])
    (tmp_path / "bench.json").write_text("not JSON")
    (tmp_path / "published.json").write_text("[]")
    assert markdown([tmp_path]) == expected


def test_the_page_compares_error_with_cost(tmp_path: Path) -> None:
    for depth, macs in ((22, 10), (40, 30)):
        for seed in (0, 1):
            error = 9.0 - depth / 10 + seed
            run = make_run(tmp_path / f"{depth}-{seed}", error, depth=depth, seed=seed)
            write(run / "graph.json", {"parameters": 100 * depth, "macs": macs * 1_000_000})
    page = Page(write_report([tmp_path], tmp_path / "report.html").read_text())
    picture = (tmp_path / "report-comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "data:image/png;base64," + b64encode(picture).decode() in page.sources
    assert "7.30 ± 0.71" in page.words
    assert "5.50 ± 0.71" in page.words
    assert all(f"{depth}-{seed}" in page.words for depth in (22, 40) for seed in (0, 1))


def test_the_costs_shown_are_those_that_all_networks_have(tmp_path: Path) -> None:
    def width(rows: Sequence[RunSummary], **costs: tuple[str, float]) -> int:
        draw_comparison(rows, tmp_path / "comparison.png", **({"costs": costs} if costs else {}))
        return int.from_bytes((tmp_path / "comparison.png").read_bytes()[16:20])

    for depth in (22, 40):
        make_run(tmp_path / f"{depth}", 9.0 - depth / 10, depth=depth)
    rows = read_summaries([tmp_path])
    two = width(rows)
    pair = {"parameters": ("parameters", 1.0), "macs": ("MACs", 1.0)}
    assert width(rows, **pair) == two
    assert width(rows, **pair, train_seconds=("epoch", 1.0)) > two
    (tmp_path / "22" / "metrics.csv").unlink()
    assert width(read_summaries([tmp_path]), **pair, train_seconds=("epoch", 1.0)) == two
    make_run(tmp_path / "58", 3.0, depth=58)
    assert width(read_summaries([tmp_path])) > two  # three depths are a sweep


def test_the_page_stands_alone_with_the_best_run_first(tmp_path: Path) -> None:
    errors = {"worse": (9.25, 22), "<b>best & $1": (5.5, 40), "going": (None, 58)}
    runs = [
        make_run(tmp_path / name, error, depth=depth) for name, (error, depth) in errors.items()
    ]
    (runs[1] / "curves.png").write_bytes(b"\x89PNG")
    config = json.loads((runs[1] / "config.json").read_text())
    config["data"]["dataset_name"] = "</pre><script>alert(1)</script>"
    write(runs[1] / "config.json", config)
    text = write_report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert not {"script", "link", "iframe", "svg", "b>best"} & set(page.tags)
    assert page.words.index("<b>best & $1") < page.words.index("worse") < page.words.index("going")
    png = [source for source in page.sources if source.startswith("data:image/png;base64,")]
    assert len(png) == 3  # the curves, and the page's own two: comparison and errors
    svg = [source for source in page.sources if source.startswith("data:image/svg+xml;base64,")]
    assert len(svg) == len(runs)  # as an image, a network cannot do anything
    assert "still going or was stopped" in page.words
    assert "sparsenet train --config" in page.words
    assert "default-src 'none'" in text


def test_runs_beyond_the_colours_are_told_apart_by_dashes(tmp_path: Path) -> None:
    assert len({series(number) for number in range(32)}) == 32
    for depth in range(9):
        make_run(tmp_path / f"run{depth}", 5.0 + depth, depth=40 + 6 * depth)
    page = write_report([tmp_path], tmp_path / "page.html").read_text()
    lines = re.findall('<i style="background:(.*?)"></i>', page)
    assert len(set(lines)) == 9 and f"({lines[0]} " in lines[8].replace("90deg, ", "")
    assert re.findall('<span class="first">(.*?)</span>', page)[:2] == [
        "5.00 % error",
        "6.00 % error",
    ]


def test_pictures_of_earlier_weights_are_not_shown(call: Call, copied: Path) -> None:
    assert call("report", copied, "--filters").code == 0
    before = {path.name for path in copied.glob("*.png")}
    assert call("train", "--resume", copied, "--max_epoch", 3).code == 0
    assert before - {path.name for path in copied.glob("*.png")} == {"filters.png"}


@pytest.mark.parametrize("kept", ["config.json", "metrics.csv", "result.json"])
def test_any_one_file_is_enough(tmp_path: Path, kept: str) -> None:
    run = make_run(tmp_path / "run", 5.5)
    for file in run.iterdir():
        if file.name != kept:
            file.unlink()
    words = Page(write_report([run], tmp_path / "report.html").read_text()).words
    assert "Not in the folder: " in words
    assert kept not in words.split("Not in the folder: ")[1].split("Command")[0]
    assert ("No run has measured an error yet." in words) == (kept != "metrics.csv")
    assert markdown([run])


@pytest.mark.parametrize("name", ["nothing here", "empty"])
def test_a_folder_without_a_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    runs = [make_run(tmp_path / "run", 5.5), tmp_path / name]
    with pytest.raises(ValueError, match="expected a run folder") as error:
        write_report(runs, tmp_path / "report.html")
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"network": []}'),
        ("config.json", '{"optim": {"lr": []}, "train": {}}'),
        ("environment.json", '{"threads": "two"}'),
        ("graph.json", "[]"),
        ("metrics.csv", "epoch,step\nx,1\n"),
        ("metrics.csv", 'epoch,step\n"""x""",1\n'),
        ("result.json", json.dumps(result(5.5)) + "1"),
        ("result.json", json.dumps(result([]))),
        ("result.json", json.dumps(result("good"))),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    run = make_run(tmp_path / "run", 5.5)
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=r"[Ee]xpected") as error:
        read_summaries([run])
    assert str(run / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file that can be written"):
        write_report([make_run(tmp_path / "run", 5.5)], tmp_path / "missing" / "report.html")


def test_a_link_to_a_page_stays(tmp_path: Path) -> None:
    link = tmp_path / "report.html"
    link.symlink_to("elsewhere.html")
    assert write_report([make_run(tmp_path / "run", 5.5)], link) == link
    assert link.is_symlink() and "5.5" in (tmp_path / "elsewhere.html").read_text()


def test_filters_are_drawn_into_the_run_and_shown(call: Call, copied: Path) -> None:
    outcome = call("report", copied, "--filters")
    assert outcome.lines == [str(copied / "report.html")]
    picture = b64encode((copied / "filters.png").read_bytes()).decode()
    assert "data:image/png;base64," + picture in Page((copied / "report.html").read_text()).sources
    shutil.rmtree(copied / "checkpoints")
    outcome = call("report", copied, "--filters")
    assert outcome.lines == [str(copied / "report.html")]
    assert "no picture of filters: " in outcome.error
    assert call("report", copied, "--filters", "--markdown").code == 2


def test_the_pages_of_earlier_reports_among_runs_are_passed_over(
    call: Call, tmp_path: Path
) -> None:
    for number, depth in enumerate((40, 100)):
        make_run(tmp_path / f"run{number}", 5.0 + number, depth=depth)
    first = call("report", ".", "--out", "report.html")
    assert first.lines == ["report.html"] and Path("report-comparison.png").is_file()
    again = call("report", *sorted(Path().iterdir()), "--out", "again.html")
    assert (again.code, again.lines, again.err) == (0, ["again.html"], "")
    line = call("report", "report.html").error
    assert line == ("sparsenet: report: expected RUN, a run folder or a folder of some, found none")


def test_a_picture_of_ones_own_is_not_replaced(call: Call, tmp_path: Path) -> None:
    for number, depth in enumerate((40, 100)):
        make_run(tmp_path / f"run{number}", 5.0 + number, depth=depth)
    mine = write_image(tmp_path / "mine-comparison.png")
    before = mine.read_bytes()
    outcome = call("report", "run0", "run1", "--out", "mine.html")
    assert outcome.code == 2 and "expected no other picture at mine-comp" in outcome.error
    assert mine.read_bytes() == before and not Path("mine.html").exists()
    assert call("report", "run0", "--out", "mine.html").code == 0  # which needs no picture
    Path("mine.html").unlink()
    mine.unlink()
    for _ in range(2):  # it is the report's, whether the page is still there or not
        assert call("report", "run0", "run1", "--out", "mine.html").code == 0
        Path("mine.html").unlink()


def test_the_program_prints_the_table(call: Call, copied: Path) -> None:
    found = [
        re.sub(r"^\| [^|]* \| ", "| ", line) for line in call("report", copied, "--markdown").lines
    ]
    assert found == markdown([copied]).splitlines()
    outcome = call("report")
    assert outcome.code == 2
    assert "RUN" in outcome.error


HOSTILE = "a|b\\|\n| x | --> <!-- /report --> <b> & [i](j) \x1b]0;t\x07\u202e\x9b"


def test_a_name_breaks_out_of_no_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / fetch, 5.5, fetch) for fetch in ("sparse", "dense")]
    for run in runs:
        write(run / "result.json", result(5.5, dataset=HOSTILE))
    shown = (
        r"a\|b\\\|\\n\| x \| --&gt; &lt;!-- /report --&gt; &lt;b&gt; &amp; \[i](j) "
        r"\\x1b]0;t\\x07\\u202e\\x9b"
    )
    alone, both = markdown(runs[:1]), markdown(runs)
    assert f"| {shown} |" in alone and f"data: {shown}; recipe" in both
    assert len(alone.splitlines()) == 3 and len(both.splitlines()) == 6
    bars = {line.replace(r"\\", "").replace(r"\|", "").count("|") for line in alone.splitlines()}
    assert len(bars) == 1


def test_what_the_page_says_obeys_no_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r\x1b]0;t\x07\u202e<b>", 5.5)
    write(run / "result.json", result(5.5, dataset=HOSTILE))
    (run / "environment.json").write_text('{"device_name": "\u202e\x7f"}')
    page = write_report([run], tmp_path / "page.html").read_text()
    assert all(each.isprintable() or each == "\n" for each in page)
    words = Page(page).words
    assert r"r\x1b]0;t\x07\u202e<b>" in words and r"<b> & [i](j) \x1b]0;t" in words
    assert r'"\u202e\x7f"' in words
