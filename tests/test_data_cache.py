"""Decoded images on disk are those in memory, are decoded once, and damage is not believed."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, Call, newest, write_classes, write_image
from PIL import Image

from sparsenet import memory
from sparsenet.data import cache, filling, load
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Example, Images
from sparsenet.data.errors import BadImage, DataError
from sparsenet.data.images import Decoded, read_images
from sparsenet.data.load import load_dataset, loading_dataset
from sparsenet.data.preprocessing import Form, channel_statistics
from sparsenet.data.sampling import Batches, plan_epoch, resized
from sparsenet.data.stored import StoredImages
from sparsenet.events import Message, drained
from sparsenet.files import cache_folder

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparsenet" / "images"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of images, as they are decoded into the cache."""
    names: list[str] = []
    decode = filling.decode

    def counted(example: Example, **options: object) -> object:
        names.append(example.name)
        return decode(example, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(filling, "decode", counted)
    return names


def mixed(root: Path, count: int = 30) -> Path:
    """Colours, greys of several depths of which the last is the deepest, and a damaged image."""
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(count):
            colours = generator.integers(0, 256, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(colours).save(root / label / f"colour{i}.png")
        for i, deepest in enumerate((900, 200, 3000)):
            levels = generator.integers(0, deepest, (9, 12)).astype(np.uint16)
            Image.fromarray(levels).save(root / label / f"grey{i}.png")
    (root / "a" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def examples(count: int, seed: int = 0) -> list[Example]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 5, 6), dtype=np.uint8)
    return [Example(f"no {i}", image, i % 7) for i, image in enumerate(pixels)]


def stored(split: list[Example], skip_corrupt: bool = False) -> Decoded:
    return drained(filling.reading_stored(split, Form(4, 3), skip_corrupt))


def assert_same(found: Decoded, split: list[Example]) -> None:
    expected = read_images(split, Form(4, 3))
    assert isinstance(found.images, StoredImages)
    assert torch.equal(found.images.pixels, expected.images.pixels)
    assert torch.equal(found.images.labels, expected.images.labels)
    assert torch.equal(found.ids, expected.ids)


def test_what_is_computed_from_the_disk_is_what_memory_gives(tmp_path: Path) -> None:
    config = DataConfig(
        dataset_dir=str(mixed(tmp_path / "data")),
        image_size=8,
        val_fraction=0.2,
        skip_corrupt=True,
        cache="memory",
        trivial_augment=True,
    )
    held = load_dataset(config)
    first, again = (load_dataset(replace(config, cache="disk")) for _ in range(2))
    for disk in (first, again):
        for field in ("notes", "skipped", "grey_range", "classes", "nbytes"):
            assert getattr(disk, field) == getattr(held, field)
        for split in SPLITS:
            one, other = getattr(held, split), getattr(disk, split)
            assert isinstance(other, StoredImages) and one.shape == other.shape
            assert torch.equal(held.ids[split], disk.ids[split])
            for small, same in ((one, other), (resized(one, 4), resized(other, 4))):
                assert isinstance(same, StoredImages)
                assert torch.equal(small.pixels, same.pixels)
                assert torch.equal(small.labels, same.labels)
        assert channel_statistics(held.train) == channel_statistics(disk.train)
        plan = plan_epoch(0, 1, len(held.train), config)
        for part in (None, plan):
            batches = (Batches(each.train, 7, part, 2) for each in (held, disk))
            for one, other in zip(*batches, strict=True):
                assert all(map(torch.equal, one, other))


def test_an_image_is_decoded_once_and_again_when_its_file_is_another(
    tmp_path: Path, decoded: list[str]
) -> None:
    root = write_classes(tmp_path / "data", images=5)
    config = DataConfig(dataset_dir=str(root), image_size=4, cache="disk")
    before = load_dataset(config)
    assert len(decoded) == 10
    os.chdir(tmp_path)  # where another name leads to the same files
    load_dataset(replace(config, dataset_dir="data"))
    assert len(decoded) == 10
    file = root / "ant" / "0.png"
    times, size = file.stat(), file.stat().st_size
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 1  # noise, which is packed to the same number of bytes
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == size
    after = load_dataset(config)
    known = {int(each) for ids in before.ids.values() for each in ids}
    assert len(known - {int(each) for ids in after.ids.values() for each in ids}) == 1
    load_dataset(replace(config, image_size=5))
    assert len(decoded) == 30


@pytest.mark.parametrize("cells", ["bytes", "paths"])
def test_a_table_is_known_by_its_file_or_by_the_images_it_names(
    cells: str, tmp_path: Path, decoded: list[str]
) -> None:
    table, files = tmp_path / "data" / "train.parquet", []
    for i in range(10):
        files.append(write_image(tmp_path / "data" / "images" / f"{i}.png", i))
    images = [
        {"bytes": file.read_bytes() if cells == "bytes" else None, "path": f"images/{file.name}"}
        for file in files
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(images, kind), "label": [i % 2 for i in range(10)]}
    pq.write_table(pa.table(columns), table)
    config = DataConfig(dataset_dir=str(table.parent), image_size=4)
    disk, held = (load_dataset(replace(config, cache=each)) for each in ("disk", "memory"))
    assert torch.equal(disk.train.pixels, held.train.pixels)
    assert torch.equal(disk.train.labels, held.train.labels)
    load_dataset(replace(config, cache="disk"))
    assert len(decoded) == 10
    write_image(files[3], 99)
    load_dataset(replace(config, cache="disk"))
    assert len(decoded) == (10 if cells == "bytes" else 20)
    pq.write_table(pa.table(columns), table)  # with the same content
    load_dataset(replace(config, cache="disk"))
    assert len(decoded) == 20


def test_a_path_among_bytes_is_refused_on_disk(tmp_path: Path) -> None:
    file = write_image(tmp_path / "data" / "0.png")
    cells = [{"bytes": file.read_bytes(), "path": None}] * 5 + [{"bytes": None, "path": "0.png"}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(cells, kind), "label": [0, 1] * 3}
    pq.write_table(pa.table(columns), tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"row 5: expected .* found the path of one; --cache"):
        load_dataset(DataConfig(dataset_dir=str(tmp_path / "data"), cache="disk"))


def test_digits_of_another_size_lie_on_disk(decoded: list[str]) -> None:
    config = DataConfig(dataset="digits", image_size=10)
    disk, held = (load_dataset(replace(config, cache=each)) for each in ("disk", "memory"))
    assert isinstance(disk.test, StoredImages) and len(decoded) == 1797
    assert torch.equal(disk.test.pixels, held.test.pixels)
    own = load_dataset(DataConfig(dataset="digits", cache="disk"))
    assert not isinstance(own.train, StoredImages)  # nothing is to be decoded


@pytest.mark.parametrize("after", [1, 70, 130])
def test_what_was_decoded_before_a_kill_is_not_decoded_again(
    after: int, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = examples(150)
    work = filling.reading_stored(split, Form(4, 3))
    while next(work) != after:
        pass
    # A kill leaves what was written to the file, of which a line may be half.
    (folder,) = (each for each in (cache_folder() / "images").iterdir() if each.is_dir())
    left = {file.name: file.read_bytes() for file in folder.iterdir()}
    work.close()
    for name, content in left.items():
        (folder / name).write_bytes(content)
    with (folder / "part-0").open("ab") as rows:
        rows.write(b'[3,17,"')
    decoded.clear()
    assert_same(stored(split), split)
    written = after // filling.LINES * filling.LINES
    assert sorted(decoded) == sorted(f"no {i}" for i in range(written, 150))


def damage(folder: Path, kind: str) -> None:
    pixels, rows, whole = (folder / name for name in ("pixels", "rows", "whole"))
    if kind == "a bit of a pixel":
        content = bytearray(pixels.read_bytes())
        content[3 * 48 + 7] ^= 1
        pixels.write_bytes(content)
    elif kind == "pixels cut":
        os.truncate(pixels, 3 * 48 + 7)
    elif kind == "pixels gone":
        pixels.unlink()
    elif kind == "rows cut":
        os.truncate(rows, 130)
    elif kind == "rows of others":
        rows.write_bytes(rows.read_bytes()[::-1])
    elif kind == "another number in a row":
        rows.write_bytes(re.sub(rb"^\[3,", b"[4,", rows.read_bytes(), flags=re.MULTILINE))
    elif kind == "no word that it is whole":
        whole.unlink()
    elif kind == "no text":
        whole.write_bytes(b"\0" * 100)


KINDS = {
    "a bit of a pixel": 1,
    "pixels cut": 17,
    "pixels gone": 20,
    "rows cut": 16,
    "rows of others": 20,
    "another number in a row": 1,
    "no word that it is whole": 0,
    "no text": 0,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_or_foreign_is_found_out(kind: str, decoded: list[str]) -> None:
    split = examples(20)
    assert_same(stored(split), split)
    (folder,) = (each for each in (cache_folder() / "images").iterdir() if each.is_dir())
    damage(folder, kind)
    decoded.clear()
    assert_same(stored(split), split)
    assert abs(len(decoded) - KINDS[kind]) <= 2  # a row or so more where lines are cut
    decoded.clear()
    assert_same(stored(split), split)
    assert not decoded


def test_the_pixels_of_another_split_are_not_taken(empty_cache: Path) -> None:
    one, other = examples(20), examples(20, seed=1)
    stored(one)
    (folder,) = (each for each in empty_cache.iterdir() if each.is_dir())
    stored(other)
    (place,) = (each for each in empty_cache.iterdir() if each.is_dir() and each != folder)
    shutil.rmtree(place)
    shutil.copytree(folder, place)  # with the times of its files
    assert_same(stored(other), other)


def test_a_damaged_image_ends_it_or_is_left_out_whoever_wrote(decoded: list[str]) -> None:
    split = examples(9)
    split[4] = split[4]._replace(source=b"?")
    filters, threads = warnings.filters[:], threading.active_count()
    with pytest.raises(BadImage, match=r"^no 4: .*; --skip_corrupt") as caught:
        stored(split)
    assert (warnings.filters, threading.active_count()) == (filters, threads), caught
    assert len(stored(split, skip_corrupt=True).skipped) == 1
    decoded.clear()
    assert stored(split, skip_corrupt=True).images.labels.tolist() == [0, 1, 2, 3, 5, 6, 0, 1]
    with pytest.raises(BadImage, match=r"^no 4: .*; --skip_corrupt"):
        stored(split)
    assert not decoded


def test_who_comes_second_waits_and_takes_what_the_first_has_written(decoded: list[str]) -> None:
    split = examples(40)
    first, second = (filling.reading_stored(split, Form(4, 3)) for _ in range(2))
    assert next(first) == 1
    waiting = next(second)
    assert isinstance(waiting, Message) and "waiting for another process" in waiting.text
    assert next(second) == 0
    assert_same(drained(first), split)
    assert_same(drained(second), split)
    assert len(decoded) == 40


@pytest.mark.parametrize("kind", ["no folder", "read only", "full", "data"])
def test_a_cache_that_cannot_be_written_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(dataset_dir=str(write_classes(tmp_path / "data")), cache="disk")

    def fails(*_: object) -> None:
        raise {
            "read only": OSError(errno.EACCES, "refused", str(cache.root() / "a file")),
            "full": OSError(errno.ENOSPC, "no space"),
            "data": OSError(errno.EIO, "a broken disk"),
        }[kind]

    if kind == "no folder":
        write_image(tmp_path / "file.png")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file.png"))
    else:
        monkeypatch.setattr(filling.PixelFile, "write", fails)
    named = "--dataset_dir: .* a broken disk$"
    if kind != "data":
        named = r"^--cache: expected a folder that can be written, .*sparsenet.images, found"
    with pytest.raises(DataError, match=named):
        load_dataset(config)


@pytest.mark.parametrize("end", ["both go on", "the first is killed"])
def test_several_decode_a_part_each(
    end: str, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "LEAST_IMAGES", 10)  # three parts
    split = examples(30)
    greys = [np.full((1, 5, 6), level, np.uint16) for level in (300, 4000, 200)]
    for place, grey in zip((2, 14, 29), greys, strict=True):
        file = io.BytesIO()
        Image.fromarray(grey[0]).save(file, "PNG")
        split[place] = split[place]._replace(source=file.getvalue())
    first, second = (filling.reading_stored(split, Form(4, 3)) for _ in range(2))
    assert next(first) == 1  # takes the first part
    assert next(second) == 1 and {"no 10", "no 11"} <= set(decoded)  # the second
    seen = list(islice(second, 19))
    assert seen == list(range(2, 21))  # and then the third
    assert next(second) == cache.WAITS
    if end == "both go on":
        assert_same(drained(first), split)
    else:
        first.close()
    decoded.clear()
    assert_same(drained(second), split)
    again = {"no 2", "no 29"} if end == "both go on" else {f"no {place}" for place in range(10)}
    assert set(decoded) <= again | {"no 2", "no 29"}
    assert_same(stored(split), split)
    (folder,) = (each for each in (cache_folder() / "images").iterdir() if each.is_dir())
    assert {each.name for each in folder.iterdir()} == {"pixels", "filled", "rows", "whole"}


def test_a_mark_of_a_process_that_ended_is_not_believed(
    decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "LEAST_IMAGES", 10)
    split = examples(30)
    work = filling.reading_stored(split, Form(4, 3))
    while next(work) < 25:
        pass
    work.close()
    (folder,) = (each for each in (cache_folder() / "images").iterdir() if each.is_dir())
    assert {path.name for path in folder.glob("*.done")} == {"part-0.done", "part-1.done"}
    damage(folder, "a bit of a pixel")
    decoded.clear()
    assert_same(stored(split), split)
    assert "no 3" in decoded and len(decoded) <= 11


def test_what_was_used_longest_ago_makes_room(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allowed(free: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def folders() -> set[Path]:
        return {each for each in empty_cache.iterdir() if each.is_dir()}

    places, kept = [], []
    for seed in range(3):
        before = folders() if empty_cache.exists() else set()
        kept.append(stored(examples(200, seed)).images)
        (place,) = folders() - before
        for path in (*place.iterdir(), place):
            os.utime(path, (seed, seed))
        places.append(place)
    allowed(5000)
    with pytest.raises(DataError, match=r"--cache: expected room .* XDG_CACHE_HOME"):
        stored(examples(200, 3))  # all others are in use
    assert set(places) <= folders()
    others = empty_cache / "holidays"
    others.mkdir()
    os.utime(others, (0, 0))
    still = kept.pop()
    kept.clear()
    allowed(20000)
    stored(examples(200, 4))
    assert not places[0].exists() and places[2].exists() and others.exists()
    assert len(still.pixels) == 200


def test_a_file_that_goes_as_folders_are_measured_counts_as_nothing(tmp_path: Path) -> None:
    for name in ("pixels", "rows"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    (tmp_path / ".part-3.xyz").symlink_to(tmp_path / "renamed")  # looked at, it is not there
    os.utime(tmp_path, (1, 1))
    for name in ("pixels", "rows"):
        os.utime(tmp_path / name, (5, 5))
    assert cache._taken(tmp_path) >= 2 << 20
    assert cache._last_used(tmp_path) == 5
    assert cache._taken(tmp_path / "gone") == cache._last_used(tmp_path / "gone") == 0


def test_what_is_removed_before_it_is_held_is_filled_again(
    decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, calls = cache.Entry.opened, itertools.count(1)

    def removed_first(self: cache.Entry) -> object:
        if next(calls) == 3:  # after it was filled, and looked at by who filled it
            shutil.rmtree(self.folder)
        return opened(self)

    monkeypatch.setattr(cache.Entry, "opened", removed_first)
    split = examples(5)
    assert_same(stored(split), split)
    assert len(decoded) == 10


def test_memory_that_a_group_has_in_files_it_can_drop_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (
        ("memory.max", "900000"),
        ("memory.current", "800000"),
        ("memory.stat", "anon 100000\ninactive_file 300000\nactive_file 5"),
    ):
        (tmp_path / name).write_text(text)
    limits = list(memory._group_limits(tmp_path))
    assert limits == [(900_000, 500_000)]
    (tmp_path / "memory.max").write_text("max")
    assert not list(memory._group_limits(tmp_path))
    monkeypatch.setattr(memory, "_group_limits", lambda: limits)
    assert memory.available_memory() == 400_000 and memory.total_memory() == 900_000


def test_auto_goes_by_the_memory_that_is_free(
    folder_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(cache: str, free: int) -> tuple[str, type]:
        monkeypatch.setattr(load, "available_memory", lambda: free)
        work = loading_dataset(DataConfig(dataset_dir=str(folder_data), cache=cache))
        lines = []
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return "\n".join(lines), type(end.value.train)
            lines += [event.text] if isinstance(event, Message) else []

    size = 12 * 3 * 8 * 8
    assert said("auto", 2 * size)[1] is Images is said("memory", 0)[1]
    assert said("auto", 2 * size - 1)[1] is StoredImages is said("disk", 1 << 40)[1]
    text = said("auto", 0)[0]
    assert text.startswith("12 images of 8x8 pixels are 2.2 KiB decoded") and "on disk in" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each of two processes would hold them
    assert said("auto", 1 << 40)[1] is StoredImages
    assert said("memory", 0)[1] is Images


def test_a_run_goes_on_bit_for_bit_wherever_its_pixels_lie(call: Call, tmp_path: Path) -> None:
    write_classes(tmp_path / "data", images=20)
    settings = ("--dataset_dir", "data", *TINY, "--max_epoch", 2, "--batch_size", 8)
    settings += ("--image_size", 12, "--first_size", 8, "--val_fraction", 0.2)
    settings += ("--implementation", "shared", "--precision", "fp32")
    assert call("train", *settings, "--cache", "memory", "--out", "memory").code == 0
    assert (
        call("train", *settings, "--time_limit", 0.01, "--cache", "disk", "--out", "disk").code == 0
    )
    outcome = call("train", "--resume", "disk", "--time_limit", 0, "--cache", "auto")
    assert outcome.code == 0, outcome.err
    one, other = (newest(tmp_path / name / "checkpoints", "last")[0] for name in ("memory", "disk"))
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    log = (tmp_path / "disk" / "train.log").read_text()
    assert re.search(r"^40 images of 12x12 pixels are 16.9 KiB decoded, .* on disk in", log)


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from sparsenet.config import RunConfig, replace
from sparsenet.data import dataset, images, sampling
from sparsenet.data.load import load_dataset
from sparsenet.events import Message, Step
from sparsenet.memory import _process_bytes
from sparsenet.run import Run
from sparsenet.train import train

torch.set_num_threads(1)
dataset.PART, images.READ_AHEAD, sampling.AHEAD = 1 << 20, 1 << 21, 1 << 20  # small as all else
how = {"device": "cpu", "implementation": "shared", "precision": "fp32", "batch_size": 4}

def config(folder, **data):
    data |= {"dataset_dir": folder, "image_size": 128, "test_fraction": 0.01}
    network = {"depth": 7, "growth_rate": 1}
    return replace(RunConfig(), {"network": network, "train": how, "data": data})

def trained(run, config, last_step, resume=False):
    step = 0
    for event in train(config, run, resume, lambda: "enough" if step == last_step else None):
        step = event.step if isinstance(event, Step) else step
        if isinstance(event, Message) and "decoded" in event.text:
            print(event.text)

trained(Run.create(Path("before")), config("few"), 2)  # what any run needs is there from now on
limit = _process_bytes("VmSize") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_dataset(config("many", cache="memory").data)
except ValueError as error:
    print(error)
trained(Run.create(Path("whole")), config("many"), 20)
trained(Run.create(Path("part")), config("many"), 9)
trained(Run.open(Path("part")), config("many"), 20, True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds to this limit")
def test_data_of_four_times_the_memory_are_trained_on_and_resumed_bit_for_bit(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    for folder, count in (("few", 40), ("many", 2000)):
        for number in range(count):
            file = tmp_path / folder / "ab"[number % 2] / f"{number}.ppm"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, 48, dtype=np.uint8)
            file.write_bytes(b"P6 4 4 255\n" + pixels.tobytes())
    decoded = 2000 * 3 * 128 * 128
    child = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(decoded // 4)],
        cwd=tmp_path,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # others would take addresses
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    few, in_memory, *on_disk = child.stdout.splitlines()
    assert few.endswith("in memory (--cache auto)") and "Unable to allocate" in in_memory
    assert len(on_disk) == 3 and all("they lie on disk" in line for line in on_disk)
    whole, part = (newest(tmp_path / name / "checkpoints", "last")[0] for name in ("whole", "part"))
    assert whole.manifest.step == part.manifest.step == 20
    assert all(torch.equal(tensor, part.tensors[name]) for name, tensor in whole.tensors.items())
