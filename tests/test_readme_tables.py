"""The tables of the pages: those of the records, with the benchmark's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report import make_run, markdown, write

from benchmarks.readme_tables import Marker, draw, main, read_runs, table, update

ROOT = Path(__file__).parent.parent


def write_benchmark(folder: Path, seconds: float, **change: Any) -> None:
    """As ``benchmarks.bench --model runs/run`` writes it, on the platform of ``make_run``."""
    environment = {"device": "cpu", "device_name": "A CPU | fast", "threads": 2, "torch": "9"}
    row = {
        "model": "runs/run",
        "batch_size": 32,
        "image_size": 32,
        "precision": "bf16",
        "options": [],
        "train_seconds": {"median": seconds},
    }
    row |= {key: value for key, value in change.items() if key in row}
    environment |= {key: value for key, value in change.items() if key in environment}
    folder.mkdir(exist_ok=True)
    write(folder / "bench.json", {"environment": environment, "rows": [row]})


def test_a_damaged_record_of_the_benchmark_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"rows": [{"train_seconds": 1, "options": []}]}')
    with pytest.raises(ValueError, match=r"bench\.json: "):
        table(Marker((tmp_path,)))


def test_a_step_s_seconds_are_the_benchmark_s_of_that_run_on_its_platform(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5.5)
    make_run(tmp_path / "seed8", 6.5, seed=8)
    write_benchmark(tmp_path / "bench", 0.125)
    [row] = read_runs([tmp_path])
    assert row.step_seconds == 0.125
    assert "| 0.125 |" in table(Marker((tmp_path,)))
    write_benchmark(tmp_path / "slower", 0.25)
    # The records of the benchmark may lie anywhere in the paths.
    [row] = read_runs([tmp_path / "run", tmp_path / "bench", tmp_path / "slower"])
    assert row.step_seconds == 0.125
    write_benchmark(tmp_path / "faster", 0.1)
    [row] = read_runs([tmp_path])
    assert row.step_seconds == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 1},
        {"torch": "8"},
        {"batch_size": 64},
        {"image_size": 64},
        {"precision": "fp32"},
        {"options": ["lean"]},
        {"train_seconds": None},
        {"model": "sparsenet_40_12"},
    ],
)
def test_a_step_of_something_else_is_not_the_run_s(tmp_path: Path, change: dict[str, Any]) -> None:
    make_run(tmp_path / "run", 5.5)
    write_benchmark(tmp_path / "bench", 0.125, **change)
    [row] = read_runs([tmp_path])
    assert row.step_seconds is None


def test_the_tables_of_a_page_are_written_from_records(tmp_path: Path) -> None:
    make_run(tmp_path / "results", 5.5)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- report resul* -->\nanything\n<!-- /report -->\nafter <!-- /report -->\n"
    )
    expected = (
        f"before\n<!-- report resul* -->\n\n{markdown([tmp_path / 'results'])}\n<!-- /report -->\n"
        "after <!-- /report -->\n"
    )
    for _ in range(2):
        assert update(page) == 1
        assert page.read_text() == expected


def test_a_table_without_an_end_takes_nothing_with_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5.5)
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
    with pytest.raises(SystemExit, match=r"^readme_tables: .*expected [^\n]*$"):
        main([str(page)])


def test_a_table_has_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5.5)
    page = tmp_path / "page.md"
    page.write_text("<!-- report run columns=error,network -->\n<!-- /report -->\n")
    assert update(page) == 1
    assert "| error % | network |\n| --- | --- |\n| 5.50 | SparseNet-" in page.read_text()
    page.write_text("<!-- report run columns=error,speed -->\n<!-- /report -->\n")
    with pytest.raises(ValueError, match=r"expected columns of .*error.*, found 'speed'"):
        update(page)


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_tables_of_the_pages_are_those_of_the_records(tmp_path: Path, name: str) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    page = tmp_path / name
    page.parent.mkdir(exist_ok=True)
    page.write_text((ROOT / name).read_text())
    assert update(page) > 0
    # If it fails: python -m benchmarks.readme_tables README.md docs/results.md
    assert page.read_text() == (ROOT / name).read_text()


def test_pictures_are_drawn_where_the_page_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("shown", "not-shown"):
        (tmp_path / name).mkdir()
        for depth in (22, 40):
            make_run(tmp_path / name / f"{depth}", 9.0 - depth / 10, depth=depth)
    page = tmp_path / "page.md"
    tables = [f"<!-- report {name} -->\n<!-- /report -->\n" for name in ("shown", "not-shown")]
    page.write_text("".join(tables).replace("shown -->", "shown picture=shown.png -->", 1))
    main([str(page)])
    assert capsys.readouterr().out == f"{page}: 2 tables written anew\n"
    assert not list(tmp_path.glob("*.png"))
    assert [*draw(page)] == [*tmp_path.glob("*.png")] == [tmp_path / "shown.png"]
    main([str(page), "--pictures"])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'shown.png'}\n")


def test_a_name_of_data_ends_no_table_of_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5.5)
    (run / "result.json").write_text('{"error": 5.5, "dataset": "<!-- /report -->\\n--> x"}')
    page = tmp_path / "page.md"
    page.write_text("<!-- report run -->\n<!-- /report -->\nafter\n")
    assert [update(page), update(page)] == [1, 1]
    assert page.read_text().count("<!-- /report -->") == page.read_text().count("-->\nafter") == 1
