"""Data at an address: fetched once, like data in a folder, and refused in one line."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import TINY, Call
from test_data_tar import samples, write

from sparsenet.data.config import DataConfig
from sparsenet.data.errors import DataError
from sparsenet.data.images import read_images
from sparsenet.data.load import finding, load_dataset
from sparsenet.data.preprocessing import Form
from sparsenet.events import drained


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of shards at an address."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, first in (("train-0", 0), ("train-1", 20), ("test", 40)):
        file = write(tmp_path / "local" / f"{name}.tar", samples(first, ["ant", "bee"] * 10))
        system.pipe_file(f"/bucket/insects/{name}.tar", file.read_bytes())
    system.pipe_file("/bucket/insects/readme.txt", b"insects")
    return "memory://bucket/insects"


def test_an_address_holds_what_a_folder_does(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_dataset(DataConfig(dataset_dir=str(tmp_path / "local")))
    system = fsspec.filesystem("memory")
    fetched = []
    get_file = type(system).get_file

    def counted(self: object, name: str, *arguments: object, **options: object) -> None:
        fetched.append(name)
        get_file(system, name, *arguments, **options)

    monkeypatch.setattr(type(system), "get_file", counted)
    for cache in ("memory", "disk"):
        data = load_dataset(DataConfig(dataset_dir=bucket, cache=cache))
        assert data.name == "insects" and data.classes == local.classes
        for split in ("train", "test"):
            assert torch.equal(getattr(data, split).pixels, getattr(local, split).pixels)
            assert torch.equal(data.ids[split], local.ids[split])
    assert len(fetched) == 3
    system.pipe_file("/bucket/insects/train-1.tar", (tmp_path / "local/test.tar").read_bytes())
    assert load_dataset(DataConfig(dataset_dir=bucket)).train.pixels.max() == 59
    assert len(fetched) == 4
    system.rm_file("/bucket/insects/train-1.tar")
    assert len(load_dataset(DataConfig(dataset_dir=bucket)).train) == 20
    one = load_dataset(DataConfig(dataset_dir=f"{bucket}/train-0.tar", test_fraction=0.5))
    assert len(one.train) + len(one.test) == 20


def test_files_that_another_reads_are_not_replaced(bucket: str, tmp_path: Path) -> None:
    """Its labels are those of the files that it has found."""
    system, config = fsspec.filesystem("memory"), DataConfig(dataset_dir=bucket)
    found = drained(finding(config))
    assert load_dataset(config).train  # the same files may be read by several
    system.pipe_file("/bucket/insects/train-1.tar", (tmp_path / "local/test.tar").read_bytes())
    with pytest.raises(DataError, match="another process reads them, found others; wait until"):
        load_dataset(config)
    read = read_images(found.splits["train"], Form(4, 3))
    assert read.images.pixels.max() == 39
    del found
    gc.collect()
    assert load_dataset(config).train.pixels.max() == 59


def test_a_run_on_data_at_an_address_goes_on_and_is_evaluated(bucket: str, call: Call) -> None:
    settings = [*TINY, "--image_size", 8, "--max_epoch", 1]
    settings += ["--implementation", "shared", "--precision", "fp32"]
    began = call("train", "--dataset_dir", bucket, *settings, "--out", "run", "--time_limit", 1e-3)
    assert began.code == 0, began.err
    assert call("train", "--resume", "run", "--time_limit", 0).code == 0
    assert call("eval", "run").out.startswith(f"insects: 20 test images in {bucket}, ")


@pytest.fixture
def server(bucket: str, tmp_path: Path) -> Iterator[str]:
    """The same shards behind http."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "local"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_server_gives_a_folder_or_one_file_and_again_what_has_changed(
    server: str, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    local = load_dataset(DataConfig(dataset_dir=str(tmp_path / "local")))
    data = load_dataset(DataConfig(dataset_dir=f"{server}/"))
    assert torch.equal(data.train.pixels, local.train.pixels)
    address = f"{server}/train-0.tar"
    config = DataConfig(dataset_dir=address, test_fraction=0.5)
    assert sorted(load_dataset(config).train.pixels[:, 0, 0, 0])[-1] < 20
    file, other = tmp_path / "local" / "train-0.tar", tmp_path / "local" / "test.tar"
    assert file.stat().st_size == other.stat().st_size
    shutil.copyfile(other, file)
    os.utime(file, (0, 0))
    assert min(load_dataset(config).train.pixels[:, 0, 0, 0]) >= 40
    for place, words in (
        (f"{server}/none.tar", r"found none \(404"),
        ("http://127.0.0.1:1/a.tar", "Cannot connect"),
        (f"{address}?download=true", "has to end in its name, as http.*/train-0.tar$"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_dataset(DataConfig(dataset_dir=place))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_fetched_is_refused_in_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for address, words in (
        ("s3://bucket/x", "expected a package that reads it, found: .*s3fs"),
        ("memory://nowhere", "expected parquet or tar files, found none"),
        ("nothing://x/y", "expected data that can be read, found: Protocol not known"),
        (f"{bucket}/readme.txt", "expected parquet or tar files, found none"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_dataset(DataConfig(dataset_dir=address))
        assert str(caught.value).startswith(address)

    def cut(self: object, name: str, target: str, **options: object) -> None:
        Path(target).write_bytes(b"half")

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "get_file", cut)
        with pytest.raises(DataError, match=r"memory://bucket/insects: .* found: 4 of the"):
            load_dataset(DataConfig(dataset_dir=bucket))
    assert len(load_dataset(DataConfig(dataset_dir=bucket)).train) == 40
