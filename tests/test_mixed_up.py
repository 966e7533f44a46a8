"""Files of one run in the place of another's, and folders that change while they are used."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, Call, write_classes
from test_schemas import rewritten

from sparsenet import checkpoints
from sparsenet.checkpoints import RunError
from sparsenet.data.config import DataConfig
from sparsenet.data.parquet import read_parquet
from sparsenet.files import write_atomic
from sparsenet.memory import shortage
from sparsenet.run import Run


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_runs(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    with run.locked():
        run.write_metrics([])
        run.path.rename(tmp_path / "moved")
        other = Run.create(tmp_path / "run")
        with other.locked():
            for write in (lambda: run.write_metrics([]), lambda: run.checkpoints):
                with pytest.raises(RunError, match="found another in its place"):
                    write()
            other.write_metrics([])
    assert (tmp_path / "moved" / "metrics.csv").exists()


def test_a_best_checkpoint_of_another_run_or_a_later_step_is_no_result(
    call: Call, copied: Path, trained: Path
) -> None:
    error = json.loads((trained / "result.json").read_text())["error"]
    assert call("train", *TINY, "--max_epoch", 4, "--seed", 1, "--out", "other").code == 0
    for file in (copied / "checkpoints").glob("best-*"):
        file.unlink()
    for file in Path("other/checkpoints").glob("best-*"):
        shutil.copy(file, copied / "checkpoints" / file.name)
    outcome = call("train", "--resume", copied)
    assert outcome.code == 0 and "the best weights are those of step 46" in outcome.out
    result = json.loads((copied / "result.json").read_text())
    assert (result["error"], result["epochs"]) == (error, 2)


def test_another_runs_record_of_images_is_refused(call: Call) -> None:
    write_classes(Path("d"), images=25)
    common = ("train", *TINY, "--max_epoch", 1, "--batch_size", 8, "--dataset_dir", "d")
    assert call(*common, "--out", "a").code == 0
    assert call(*common, "--test_fraction", 0.5, "--out", "b").code == 0
    shutil.copy("b/images.safetensors", "a/images.safetensors")
    outcome = call("eval", "a")
    assert outcome.code == 2 and "expected the images that the weights were" in outcome.error


@pytest.mark.parametrize("order", [("bytes", "path"), ("path", "bytes")])
def test_embedded_bytes_come_before_a_path_in_whatever_order(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    values = {"bytes": b"image", "path": "../elsewhere.png"}
    types = {"bytes": pa.binary(), "path": pa.string()}
    struct = pa.struct([(name, types[name]) for name in order])
    table = pa.table({"image": pa.array([values] * 2, struct), "label": [0, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    source = read_parquet(tmp_path, DataConfig(dataset_dir=str(tmp_path)))
    assert source is not None
    assert [example.source for example in source.splits["train"]] == [b"image"] * 2


@pytest.mark.parametrize(
    ("fetch", "blocks"),
    [([[0], [0]], (1, 1, 1)), ([[0], [0], [1], [2], [3]], (4, 4))],
)
def test_a_network_with_layers_that_no_output_depends_on_is_resumed(
    call: Call, fetch: list[list[int]], blocks: tuple[int, ...]
) -> None:
    """Their weights have no gradient, and so no momentum."""
    Path("c.json").write_text(json.dumps({"network": {"fetch": fetch, "blocks": blocks}}))
    arguments = ("--config", "c.json", "--growth_rate", 4, "--max_epoch", 1)
    assert call("train", "--preset", "digits", *arguments, "--out", "run").code == 0
    assert call("train", "--resume", "run", "--max_epoch", 2).code == 0


def test_rows_that_an_older_version_lost_do_not_stop_a_run_for_good(
    call: Call, copied: Path
) -> None:
    newest, older = checkpoints.saved(copied / "checkpoints", "last")
    older.unlink()
    told = json.loads(newest.read_text())
    rewritten(copied, "last", json.dumps({**told, "rows": None}))
    (copied / "metrics.csv").unlink()
    for epochs in (3, 4):
        outcome = call("train", "--resume", copied, "--max_epoch", epochs)
        assert outcome.code == 0, outcome.err
    assert [row.epoch for row in Run(copied).metrics()] == [3, 4]


def test_a_shortage_that_is_an_error_of_the_system_is_known() -> None:
    assert shortage(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert shortage(OSError("out of memory when reading image file"))
    assert not shortage(ImportError("x.so: failed to map segment: Operation not permitted"))


def test_a_device_and_another_page_are_not_replaced(call: Call, copied: Path) -> None:
    with pytest.raises(OSError, match="a device"):
        write_atomic(Path("/dev/null"), "x")
    page = copied / "report.html"
    page.write_text("my own")
    outcome = call("report", copied)
    assert outcome.code == 2 and "--out names another" in outcome.error
    assert page.read_text() == "my own"
    assert call("report", copied, "--out", page).code == 0
    assert call("report", copied).code == 0
