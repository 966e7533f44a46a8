"""The report: one page on its own, best run first, plain about what is missing."""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from sparsenet.config import RunConfig
from sparsenet.pictures import draw_comparison
from sparsenet.records import COLUMNS, markdown_table, read_rows, summarise, update
from sparsenet.report import write_report

ROOT = Path(__file__).parent.parent

METRICS = """epoch,lr,train_error,val_error,test_error,seconds,eval_seconds,peak_memory_mb
1,0.1,60.0,,55.5,30.0,2.0,1000.0
2,0.1,40.0,,44.5,20.0,3.0,1234.5
3,0.01,20.0,,,25.0,,1200.0
"""


def make(
    path: Path, error: float | None, fetch: str = "sparse", depth: int = 40, seed: int = 7
) -> Path:
    path.mkdir()
    network = {
        "fetch": fetch,
        "aggregation": "concat",
        "depth": depth,
        "growth_rate": [12],
        "bottleneck": True,
    }
    files: dict[str, Any] = {
        "config": {
            "network": network,
            "data": {"dataset": "auto", "mirror": False},
            "optim": {"schedule": "onecycle", "lr": 0.2},
            "train": {"seed": seed, "max_epoch": 9, "batch_size": 32},
        },
        "environment": {
            "device": "cpu",
            "device_name": "A CPU | fast",
            "threads": 2,
            "torch": "9",
            "precision": "bf16",
        },
        "graph": {"parameters": 123456, "macs": 5_000_000, "image_size": 32, "nodes": []},
    }
    if error is not None:
        files["result"] = {"dataset": "CIFAR-10 (JPEG)", "error": error, "epochs": 3}
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "metrics.csv").write_text(METRICS)
    (path / "graph.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><title>net</title></svg>'
    )
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
    run = make(tmp_path / "run", 5.5)
    assert summarise(run) == {
        "platform": "A CPU | fast, 2 threads, torch 9, bf16",
        "architecture": "SparseNet-BC",
        "depth": 40,
        "growth": "12",
        "parameters": 123456,
        "macs": 5_000_000,
        "dataset": "CIFAR-10 (JPEG)",
        "error": 5.5,
        "train_seconds": 25.0,
        "test_seconds": 2.5,
        "step_seconds": None,
        "duration": 80.0,
        "peak_memory_mb": 1234.5,
        "recipe": "3 of 9 epochs, batch size 32, lr 0.2, onecycle, no mirror",
        "seed": 7,
        "machine": "A CPU | fast, 2 threads, torch 9, bf16",
        "batch_size": 32,
        "image_size": 32,
        "network": {
            **RunConfig().to_dict()["network"],
            "depth": 40,
            "growth_rate": [12],
            "bottleneck": True,
        },
        "final": True,
        "published": False,
        "runs": [run],
    }


def test_a_run_without_a_result_reports_its_last_test_and_says_so(tmp_path: Path) -> None:
    rows = read_rows([make(tmp_path / "run", None)])
    assert (rows[0]["error"], rows[0]["final"]) == (44.5, False)
    assert "| 44.50* |" in markdown_table(rows)


def test_the_default_settings_are_called_the_paper_s(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 5.5)
    (run / "config.json").write_text(json.dumps(RunConfig().to_dict()))
    (run / "metrics.csv").unlink()
    (run / "result.json").write_text(json.dumps({"error": 4.44, "epochs": 300}))
    assert summarise(run)["recipe"] == "the paper's, 300 epochs"


def test_the_table_is_markdown_with_the_best_first_and_no_empty_column(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / name, error, name) for name, error in (("dense", 9.25), ("sparse", 5.5))
    ]
    lines = markdown_table(
        [*read_rows(runs), *read_rows([make(tmp_path / "other", 7.0, seed=8)])]
    ).splitlines()
    assert [line.replace(r"\|", "").count("|") for line in lines] == [
        len(lines[0].split("|")) - 1
    ] * 5 + [0, 0]
    assert [*map(str.strip, lines[0].split("|")[1:-1])] == [
        name for key, name in COLUMNS.items() if key not in ("step_seconds", "dataset", "recipe")
    ]
    assert ["SparseNet-BC" in lines[2], "DenseNet-BC" in lines[4]] == [True, True]
    for run in (*runs, tmp_path / "other"):
        (run / "environment.json").unlink()
    assert not markdown_table(read_rows([tmp_path])).startswith("| platform")


def test_what_all_rows_agree_in_is_said_once_below_the_table(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / name, error, name) for name, error in (("dense", 9.25), ("sparse", 5.5))
    ]
    recipe = "3 of 9 epochs, batch size 32, lr 0.2, onecycle, no mirror"
    table = markdown_table(read_rows(runs))
    assert table.endswith(f"|\n\nAll rows: data: CIFAR-10 (JPEG); recipe: {recipe}; seed: 7.\n")
    assert table.count(recipe) == table.count("CIFAR-10 (JPEG)") == 1
    alone = markdown_table(read_rows(runs[:1]))
    assert "All rows" not in alone and recipe in alone
    (runs[0] / "result.json").write_text(
        json.dumps({"dataset": "photos", "error": 9.25, "epochs": 3})
    )
    table = markdown_table(read_rows(runs))
    assert table.endswith(f"|\n\nAll rows: recipe: {recipe}; seed: 7.\n")
    assert "| photos |" in table and "| CIFAR-10 (JPEG) |" in table


def test_runs_that_differ_in_the_seed_only_are_one_row(tmp_path: Path) -> None:
    errors = {3: 5.0, 1: 6.0, 2: 7.0}
    runs = [make(tmp_path / f"seed{seed}", error, seed=seed) for seed, error in errors.items()]
    [row] = read_rows([tmp_path])
    assert (row["error"], row["seed"], sorted(row["errors"]), sorted(row["runs"])) == (
        6.0, "1, 2, 3", [5.0, 6.0, 7.0], sorted(runs),
    )  # fmt: skip
    assert "| 6.00 ± 1.00 |" in markdown_table([row])
    assert read_rows([tmp_path, runs[0], tmp_path / "seed1" / ".." / "seed2"]) == [
        row
    ]  # however they are named
    for change in (
        {"fetch": "dense"},
        {"depth": 22},
        {"seed": 3},
    ):  # a seed again is not one more seed
        make(tmp_path / "other", 5.0, **change)
        assert sorted(len(row["runs"]) for row in read_rows([tmp_path])) == [1, 3]
        shutil.rmtree(tmp_path / "other")
    for file, part, setting in (
        ("config", "network", {"dropout": 0.2}),
        ("environment", None, {"implementation": "x"}),
    ):
        other = make(tmp_path / "other", 5.0, seed=4)
        values = json.loads((other / f"{file}.json").read_text())
        (values[part] if part else values).update(setting)
        (other / f"{file}.json").write_text(json.dumps(values))
        assert sorted(len(row["runs"]) for row in read_rows([tmp_path])) == [1, 3]
        shutil.rmtree(other)


def test_published_rows_come_first_and_say_so(tmp_path: Path) -> None:
    rows = [{"platform": "paper", "error": 4.44, "train_seconds": "61–70"}]
    (tmp_path / "published.json").write_text(json.dumps({"published": rows}))
    make(tmp_path / "run", 2.5)
    lines = markdown_table(read_rows([tmp_path])).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| *published:* paper |")
    assert "| 4.44 | 61–70 |" in lines[2]
    (tmp_path / "published.json").write_text(
        json.dumps({"published": [*rows, rows[0] | {"error": 8.0}]})
    )
    lines = markdown_table(read_rows([tmp_path, tmp_path / "published.json"])).splitlines()
    assert ["| 4.44 |" in lines[2], "| 8.00 |" in lines[3]] == [
        True,
        True,
    ]  # each stays as it is, and is there once
    assert sum("*published:*" in line for line in lines) == 2
    for damaged in ([1], {"published": [1]}, {"published": {}}, {"published": [{"error": "4.4"}]}):
        (tmp_path / "published.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"published\.json: expected "):
            read_rows([tmp_path])


def test_networks_of_one_look_are_not_one_row(tmp_path: Path) -> None:
    """Two topologies of a user's own, which have the same name and counts in the table."""
    for seed, sources in enumerate(([[0], [1]], [[0], [0]])):
        run = make(tmp_path / f"run{seed}", 5.0, seed=seed)
        config = json.loads((run / "config.json").read_text())
        config["network"]["fetch"] = sources
        (run / "config.json").write_text(json.dumps(config))
    assert [row["seed"] for row in read_rows([tmp_path])] == ["0", "1"]


def write_benchmark(folder: Path, seconds: float, **change: Any) -> None:
    """As ``sparsenet bench --model runs/run`` writes it, on the platform of :func:`make`."""
    environment = {"device": "cpu", "device_name": "A CPU | fast", "threads": 2, "torch": "9"}
    row = {
        "model": "runs/run",
        "batch_size": 32,
        "image_size": 32,
        "precision": "bf16",
        "implementation": None,
        "options": [],
    }
    row |= {"train_seconds": {"median": seconds}} | {
        key: value for key, value in change.items() if key in row
    }
    environment |= {key: value for key, value in change.items() if key in environment}
    folder.mkdir(exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"environment": environment, "rows": [row]}))


def test_records_of_the_benchmark_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    assert read_rows([tmp_path]) == []
    (tmp_path / "bench.json").write_text('{"rows": [{"train_seconds": 1, "options": []}]}')
    with pytest.raises(ValueError, match=r"bench\.json: expected a record of sparsenet bench"):
        read_rows([tmp_path])


def test_a_step_s_seconds_are_the_benchmark_s_of_that_run_on_its_platform(tmp_path: Path) -> None:
    make(tmp_path / "run", 5.5)
    make(tmp_path / "seed8", 6.5, seed=8)
    write_benchmark(tmp_path / "bench", 0.125)
    [row] = read_rows([tmp_path])
    assert row["step_seconds"] == 0.125
    assert "| 0.125 |" in markdown_table([row])
    write_benchmark(tmp_path / "another", 0.25, implementation="shared")
    write_benchmark(tmp_path / "third", 0.1, implementation="native")
    [row] = read_rows(
        [tmp_path / "run", tmp_path / "bench", tmp_path / "another"]
    )  # wherever they lie
    assert row["step_seconds"] == 0.125
    [row] = read_rows([tmp_path])
    assert row["step_seconds"] == 0.1  # of whichever implementation is the fastest
    shutil.rmtree(tmp_path / "third")
    shutil.rmtree(tmp_path / "another")
    for change in (
        {"threads": 1}, {"torch": "8"}, {"batch_size": 64}, {"image_size": 64}, {"precision": "fp32"},
        {"options": ["lean"]}, {"model": "sparsenet_40_12"},
    ):  # fmt: skip
        write_benchmark(tmp_path / "bench", 0.125, **change)
        [row] = read_rows([tmp_path])
        assert row["step_seconds"] is None, change


def test_the_tables_of_a_page_are_written_from_records(tmp_path: Path) -> None:
    make(tmp_path / "results", 5.5)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- report resul* -->\nanything\n<!-- /report -->\nafter <!-- /report -->\n"
    )
    assert update(page) == 1
    table = markdown_table(read_rows([tmp_path / "results"]))
    expected = (
        f"before\n<!-- report resul* -->\n\n{table}\n<!-- /report -->\nafter <!-- /report -->\n"
    )
    assert page.read_text() == expected
    assert update(page) == 1
    assert page.read_text() == expected


def test_a_table_without_an_end_takes_nothing_with_it(tmp_path: Path) -> None:
    make(tmp_path / "run", 5.5)
    page = tmp_path / "page.md"
    page.write_text("<!-- report run -->\nkept\n<!-- report run -->\n<!-- /report -->\n")
    assert update(page) == 1
    assert page.read_text().startswith(
        "<!-- report run -->\nkept\n<!-- report run -->\n\n| platform"
    )


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no table",
        "<!-- report nothing -->\n<!-- /report -->",
        "<!-- report /nothing -->\n<!-- /report -->",
    ],
)
def test_a_page_that_cannot_be_updated_is_named_and_kept(tmp_path: Path, text: str | None) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    with pytest.raises(ValueError, match=r"expected a (page|table|run folder)"):
        update(page)
    assert text is None or page.read_text() == text


def test_the_readme_s_tables_are_those_of_the_records(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text())
    assert update(page) > 0
    assert (
        page.read_text() == (ROOT / "README.md").read_text()
    )  # else: sparsenet report --update README.md


def test_the_page_compares_error_with_cost(tmp_path: Path) -> None:
    for depth, macs in ((22, 10), (40, 30)):
        for seed in (0, 1):
            run = make(
                tmp_path / f"{depth}-{seed}", 9.0 - depth / 10 + seed, depth=depth, seed=seed
            )
            (run / "graph.json").write_text(
                json.dumps({"parameters": 100 * depth, "macs": macs * 1_000_000})
            )
    page = Page(write_report([tmp_path], tmp_path / "report.html").read_text())
    picture = (tmp_path / "report-comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "data:image/png;base64," + b64encode(picture).decode() in page.sources
    assert "7.30 ± 0.71" in page.words
    assert "5.50 ± 0.71" in page.words
    assert all(f"{depth}-{seed}" in page.words for depth in (22, 40) for seed in (0, 1))


def test_the_costs_shown_are_those_that_all_networks_have(tmp_path: Path) -> None:
    def width(rows: list[dict[str, Any]]) -> int:
        draw_comparison(rows, tmp_path / "comparison.png")
        return int.from_bytes((tmp_path / "comparison.png").read_bytes()[16:20])

    runs = [make(tmp_path / f"{depth}", 9.0 - depth / 10, depth=depth) for depth in (22, 40)]
    rows = read_rows(runs)
    two = width(rows)
    assert width([row | {"step_seconds": 0.1} for row in rows]) > two
    assert width([rows[0] | {"step_seconds": 0.1}, rows[1]]) == two
    assert (
        width([*rows, *read_rows([make(tmp_path / "58", 3.0, depth=58)])]) > two
    )  # three depths: a sweep


def test_the_page_stands_alone_with_the_best_run_first(tmp_path: Path) -> None:
    errors = {"worse": 9.25, "<b>best & $1": 5.5, "going": None}
    runs = [make(tmp_path / name, error, depth=len(name)) for name, error in errors.items()]
    (runs[1] / "curves.png").write_bytes(b"\x89PNG")
    text = write_report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not {"script", "link", "iframe", "b>best"} & set(page.tags)
    assert page.words.index("<b>best & $1") < page.words.index("worse") < page.words.index("going")
    assert (
        sum(source.startswith("data:image/png;base64,") for source in page.sources) == 2
    )  # and the comparison
    assert (
        page.tags.count("svg") == 1
    )  # the chart; each run's network is an image, which cannot do anything
    assert sum(source.startswith("data:image/svg+xml;base64,") for source in page.sources) == len(
        runs
    )
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
    assert markdown_table(read_rows([run]))


@pytest.mark.parametrize("name", ["nothing here", "empty"])
def test_a_folder_without_a_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a run folder") as error:
        write_report([make(tmp_path / "run", 5.5), tmp_path / name], tmp_path / "report.html")
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"), ("config.json", '{"network": []}'), ("config.json", '{"optim": {"lr": []}, "train": {}}'),
        ("graph.json", "[]"), ("metrics.csv", "epoch\nx\n"), ("result.json", '{"error": []}'), ("result.json", "{}1"),
        ("result.json", '{"error": "good"}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    run = make(tmp_path / "run", 5.5)
    (run / name).write_text(text)
    with pytest.raises(ValueError, match="expected") as error:
        summarise(run)
    assert str(run) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file that can be written"):
        write_report([make(tmp_path / "run", 5.5)], tmp_path / "missing" / "report.html")


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


def test_the_program_updates_a_page_or_takes_runs_but_not_both(call: Call, copied: Path) -> None:
    page = copied.parent / "page.md"
    page.write_text("<!-- report copied -->\n<!-- /report -->\n")
    assert call("report", "--update", page).lines == [f"{page}: 1 table written anew"]
    assert markdown_table(read_rows([copied])) in page.read_text()
    for arguments in ((), (copied, "--update", page)):
        outcome = call("report", *arguments)
        assert outcome.code == 2
        assert "expected either run folders or --update" in outcome.error
