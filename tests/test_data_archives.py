"""CIFAR archives as people have them; hostile, damaged and downloaded ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import random
import socket
import tarfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from sparsenet import downloads
from sparsenet.data import cifar as cifar_module
from sparsenet.data import unpickle
from sparsenet.data.config import DataConfig
from sparsenet.data.dataset import Dataset
from sparsenet.data.download import CIFAR_URL, download
from sparsenet.data.errors import DataError
from sparsenet.data.load import load_dataset
from sparsenet.data.unpickle import load_pickle

PIXELS = 3072
KINDS = ["c10-python", "c10-binary", "c100-python", "c100-binary"]


class Cifar:
    """A small data set in the real format: *files* of the folder *folder*, and what they hold."""

    def __init__(self, kind: str, count: int = 4, protocol: int = 2) -> None:
        self.dataset, form = kind.split("-")
        self.count, self.protocol, self.binary = count, protocol, form == "binary"
        self.classes = int(self.dataset[1:])
        self.names = [f"thing {i}" for i in range(self.classes)]
        self.archive = f"cifar-{self.classes}-{form}.tar.gz"
        ten = "cifar-10-batches-bin" if self.binary else "cifar-10-batches-py"
        self.folder = ten if self.classes == 10 else f"cifar-100-{form}"
        stems = (
            [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
            if self.classes == 10
            else ["train", "test"]
        )
        rng = np.random.default_rng(0)
        self.pixels = [rng.integers(0, 256, (count, PIXELS), dtype=np.uint8) for _ in stems]
        self.labels = [rng.integers(0, self.classes, count) for _ in stems]
        parts = zip(stems, self.pixels, self.labels, strict=True)
        self.files = {self.file(stem): self.batch(pixels, labels) for stem, pixels, labels in parts}
        self.files |= self.meta()

    def file(self, stem: str) -> str:
        return f"{stem}.bin" if self.binary else stem

    def batch(self, pixels: np.ndarray, labels: Any) -> bytes:
        if self.binary:
            rows = [
                [0] * (self.classes == 100) + [label, *row]
                for label, row in zip(labels, pixels.tolist(), strict=True)
            ]
            return np.array(rows, np.uint8).tobytes()
        fine = (
            {b"labels": list(map(int, labels))}
            if self.classes == 10
            else {b"coarse_labels": [0] * len(labels), b"fine_labels": list(map(int, labels))}
        )
        return pickle.dumps({b"batch_label": b"x", b"data": pixels, **fine}, self.protocol)

    def meta(self) -> dict[str, bytes]:
        if self.binary:
            text = "\n".join(self.names) + "\n\n"
            return {
                "batches.meta.txt" if self.classes == 10 else "fine_label_names.txt": text.encode()
            }
        key = b"label_names" if self.classes == 10 else b"fine_label_names"
        name = "batches.meta" if self.classes == 10 else "meta"
        return {name: pickle.dumps({key: [n.encode() for n in self.names]}, self.protocol)}

    def pack(self, root: Path) -> Path:
        path = root / self.archive
        with tarfile.open(path, "w:gz") as archive:
            for name, data in {"readme.html": b"hello", **self.files}.items():
                member = tarfile.TarInfo(f"{self.folder}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    def unpack(self, root: Path) -> Path:
        folder = root / self.folder
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def check(self, loaded: Dataset) -> None:
        assert loaded.name == f"CIFAR-{self.classes}" and loaded.classes == tuple(self.names)
        for split, parts in ((loaded.train, slice(0, -1)), (loaded.test, slice(-1, None))):
            pixels = np.concatenate(self.pixels[parts]).reshape(-1, 3, 32, 32)
            assert np.array_equal(split.pixels.numpy(), pixels)
            assert split.labels.tolist() == np.concatenate(self.labels[parts]).tolist()


def load(root: Path, dataset: str = "auto", **options: Any) -> Dataset:
    return load_dataset(DataConfig(dataset=dataset, dataset_dir=str(root), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unpacked_archives_are_read_alike(kind: str, tmp_path: Path) -> None:
    cifar = Cifar(kind)
    (tmp_path / "packed").mkdir()
    archive = cifar.pack(tmp_path / "packed")
    folder = cifar.unpack(tmp_path / "unpacked")
    for root in (archive, archive.parent, folder, folder.parent):
        for dataset in ("auto", cifar.dataset):
            cifar.check(load(root, dataset))
    assert list(archive.parent.iterdir()) == [archive]  # nothing was extracted
    other = "c100" if cifar.dataset == "c10" else "c10"
    with pytest.raises(DataError, match=r"--dataset_dir: expected cifar-.*--download"):
        load(folder.parent, other)


@pytest.mark.parametrize("protocol", range(5))
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    cifar = Cifar("c10-python", protocol=protocol)
    cifar.check(load(cifar.pack(tmp_path)))


def test_pickles_of_numpy_1_and_python_2_are_read(tmp_path: Path) -> None:
    cifar = Cifar("c10-python", count=2)
    pixels, labels = cifar.pixels[0], cifar.labels[0]
    text = b"U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    text += b"(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    text += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    text += b"\x89T" + (2 * PIXELS).to_bytes(4, "little") + pixels.tobytes() + b"tb"
    text += b"U\x06labels]" + b"".join(b"K" + bytes([label]) + b"a" for label in labels)
    cifar.files["data_batch_1"] = b"\x80\x02}(" + text + b"u."
    cifar.check(load(cifar.pack(tmp_path)))


def test_arrays_in_other_orders_and_types_are_read() -> None:
    values = {b"f": np.asfortranarray(np.arange(6).reshape(2, 3)), b"b": np.arange(4, dtype=">i4")}
    for protocol in range(5):
        loaded = load_pickle(pickle.dumps(values, protocol), "x")
        assert all(np.array_equal(loaded[key], value) for key, value in values.items())


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(5))
def test_malicious_pickles_are_refused_and_named(protocol: int, tmp_path: Path) -> None:
    import os

    witness = tmp_path / "witness"
    attacks = {
        "system": Call(os.system, f"touch {witness}"),
        "eval": Call(eval, f"open({str(witness)!r}, 'w')"),
        "getattr": Call(getattr, "x", "upper"),
        "import_module": Call(__import__("importlib").import_module, "this"),
    }
    for name, attack in attacks.items():
        root = tmp_path / f"{name}{protocol}"
        root.mkdir()
        cifar = Cifar("c10-python")
        cifar.files["data_batch_3"] = pickle.dumps({b"data": attack, b"labels": []}, protocol)
        with pytest.raises(DataError, match=rf"data_batch_3: .*{name}: refused") as caught:
            load(cifar.pack(root))
        assert "\n" not in str(caught.value)
    assert not witness.exists()


HOSTILE = {
    "objects": pickle.dumps({b"data": np.array([{}], object)}, 2),
    "attribute of a module": b"\x80\x04}(C\x04data\x8c\x05numpy\x8c\x0bndarray.sort\x93u.",
    "state for a class": b"\x80\x02c_codecs\nencode\nN}X\x01\x00\x00\x00aK\x01s\x86b}.",
    "huge array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    b"(J\xff\xff\xff\x7ftU\x01btR(K\x01"
    b"(J\xff\xff\xff\x7ftcnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x01atb.",
    "huge byte array": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "name of two lines": b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.",
    "persistent id": b"\x80\x02Pidea\n.",
    "extension": b"\x80\x02\x82\x01.",
    "no dictionary": pickle.dumps([1, 2]),
    "nothing": b"",
}


PAIR = b"K\x01" + b"q\x00h\x00\x86" * 60  # pairs of pairs of pairs
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\nq\x00"
LONG_TEXT = b"X" + (10**5).to_bytes(4, "little") + b"a" * 10**5 + b"X\x06\0\0\0latin1\x86"
HOSTILE |= {
    "endless marks": b"\x80\x02" + b"(" * 500_000,
    "endless dictionaries": b"\x80\x02(" + b"}" * 500_000,
    "a text encoded again and again": b"\x80\x02c_codecs\nencode\nq\x00"
    + LONG_TEXT
    + b"q\x01"
    + b"h\x00h\x01R" * 100_000
    + b"}.",
    "a call of many arguments": ARRAY + b"(" + b"N" * 60_000 + b"tq\x01h\x00h\x01R}.",
    "a key that takes for ever to hash": b"\x80\x02}" + PAIR + b"Ns.",
    "a key that is too deep to hash": b"\x80\x02}N" + b"\x85" * 60_000 + b"Ns.",
    "an integer of many digits": b"\x80\x02}I0x" + b"f" * 10**6 + b"\nNs.",
    "an integer of many bytes": b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
    "a large integer of many bytes": b"\x80\x02}\x8b\0\0\1\0" + b"\x7f" * (1 << 16) + b"Ns.",
    "a byte array to be cleared": b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",
    "a set": b"\x80\x04\x8f(K\x01\x90.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_other_hostile_pickles_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_STEPS", 100_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"^file: expected ") as caught:
        load_pickle(HOSTILE[name], "file")
    assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_memo_index_asks_for_no_memory() -> None:
    tracemalloc.start()
    assert load_pickle(b"\x80\x02}r\xff\xff\xff\x7f.", "x") == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_damaged_pickles_are_read_or_refused_but_nothing_else() -> None:
    chance = random.Random(0)
    whole = pickle.dumps(
        {b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2], "n": ((7,), None, "s")}, 4
    )
    for start in (whole, pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2]}, 0)):
        for _ in range(2000):
            damaged = bytearray(start)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            with suppress(DataError):
                assert isinstance(load_pickle(bytes(damaged), "x"), dict)


def broken(cifar: Cifar, name: str, data: bytes | None) -> Cifar:
    if data is None:
        del cifar.files[name]
    else:
        cifar.files[name] = data
    return cifar


def damages() -> Iterator[tuple[str, Cifar, str]]:
    def fresh(form: str) -> Cifar:
        return Cifar(f"c10-{form}", count=2)

    python, binary = fresh("python"), fresh("binary")
    pixels = python.pixels[0]
    for form, label in (("python", 10), ("python", -1), ("binary", 11)):
        data = fresh(form).batch(pixels, [1, label % 256 if form == "binary" else label])
        yield (
            f"{form} label {label}",
            broken(fresh(form), fresh(form).file("data_batch_2"), data),
            rf"data_batch_2\S* image 1: .* found {label}",
        )
    yield (
        "short record",
        broken(binary, "data_batch_1.bin", bytes(3000)),
        r"data_batch_1.bin: expected records of 3073",
    )
    yield (
        "empty",
        broken(fresh("binary"), "test_batch.bin", b""),
        r"test_batch.bin: expected records",
    )
    yield "missing batch", broken(fresh("python"), "data_batch_4", None), r"found no data_batch_4$"
    yield "missing meta", broken(fresh("python"), "batches.meta", None), r"found no batches.meta$"
    yield (
        "few names",
        broken(fresh("binary"), "batches.meta.txt", b"cat\ndog\n"),
        r"expected 10 class names, found 2",
    )
    yield (
        "few labels",
        broken(fresh("python"), "test_batch", python.batch(pixels, [1])),
        r"test_batch: expected 2 integers",
    )
    yield (
        "narrow",
        broken(fresh("python"), "test_batch", python.batch(pixels[:, 1:], [1, 1])),
        r"test_batch: expected data",
    )
    wide = python.batch(pixels.astype(np.int64), [1, 1])
    yield "wide", broken(fresh("python"), "test_batch", wide), r"test_batch: expected data"
    no_pickle = broken(fresh("python"), "data_batch_1", b"no pickle")
    yield "no pickle", no_pickle, r"data_batch_1: expected a pickle"


@pytest.mark.parametrize(("cifar", "message"), [pytest.param(c, m, id=i) for i, c, m in damages()])
@pytest.mark.parametrize("packed", [True, False])
def test_damage_is_one_line_that_names_the_file(
    cifar: Cifar, message: str, packed: bool, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(cifar.pack(tmp_path) if packed else cifar.unpack(tmp_path))
    assert "\n" not in str(caught.value)


def test_truncated_and_tampered_archives_are_one_line(tmp_path: Path) -> None:
    archive = Cifar("c10-python", count=20).pack(tmp_path)
    whole = archive.read_bytes()
    inner = gzip.decompress(whole)
    tampered = bytearray(whole)
    tampered[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    flipped = bytearray(gzip.compress(inner, 0))
    flipped[-20000] ^= 1  # one bit of one pixel
    cut = (
        whole[:10],
        whole[: len(whole) // 2],
        whole[:-4],
        b"",
        b"no archive",
        gzip.compress(inner[:90000]),
    )
    for damaged in (*cut, bytes(tampered), bytes(flipped)):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: .*expected") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_member_that_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    for kind, size, message in (
        (tarfile.SYMTYPE, 0, "found no data_batch_1"),
        (tarfile.REGTYPE, 1 << 40, "at most"),
    ):
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
            member.type, member.size, member.linkname = kind, size, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(DataError, match=message):
            load(tmp_path)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def extended_sparse() -> bytes:
    first = bytearray(header("data_batch_1", 512, tarfile.GNUTYPE_SPARSE))
    first[482:495] = b"\x0100000000100\0"
    first[148:156] = b"%06o\0 " % (256 + sum(first[:148]) + sum(first[156:]))
    return bytes(first) + (b"%011o\0%011o\0" % (0, 1) * 21 + bytes([1] + [0] * 7)) * 2000


BACK = bytearray(header("x", 0))
BACK[124:136] = b"\xff" * 10 + b"\xf8\0"  # a size of -2048
BACK[148:156] = b"%06o\0 " % (256 + sum(BACK[:148]) + sum(BACK[156:]))
TOO_MUCH = {
    "a long header": header("x", 1 << 30, tarfile.XHDTYPE) + bytes(1 << 22),
    "a long name": header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 22),
    "many members": b"".join(header(f"{i}", 0) for i in range(2000)),
    "a sparse member": extended_sparse(),
    "members before others": bytes(BACK) * 3,
    "a member that ends far off": header("x", 1 << 40),
    "a large member": header("data_batch_1", 1 << 29),
    "much after the members": bytes(1 << 24),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_an_archive_of_too_much_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_module, "LIMIT", 1 << 23)
    monkeypatch.setattr(cifar_module, "HEADER_LIMIT", 1 << 19)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(TOO_MUCH[name], 1))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"\.tar\.gz: .*expected .* found") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "found no" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_what_follows_an_archive_is_not_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_module, "READ_LIMIT", 1000)
    cifar = Cifar("c10-python")
    path = cifar.pack(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(500))  # as a tape has them
    cifar.check(load(tmp_path))
    for more in (bytes(20_000), gzip.compress(b"") * 2000):
        path.write_bytes(whole + more)
        with pytest.raises(DataError, match="too many streams or zeros after them"):
            load(tmp_path)


def test_an_unpacked_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = Cifar("c10-python").unpack(tmp_path)
    os.truncate(folder / "data_batch_2", 1 << 40)
    with pytest.raises(DataError, match=r"data_batch_2: expected at most 268,435,456 bytes, found"):
        load(tmp_path)


def test_labels_of_too_many_are_no_list(tmp_path: Path) -> None:
    cifar = Cifar("c10-python")
    labels = np.zeros(10**7, np.uint8)
    cifar.files["data_batch_1"] = pickle.dumps({b"data": cifar.pixels[0], b"labels": labels}, 2)
    cifar.unpack(tmp_path)
    tracemalloc.start()
    with pytest.raises(DataError, match="data_batch_1: expected 4 integers as labels"):
        load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_other_size_and_channels_go_through_the_image_path(tmp_path: Path) -> None:
    cifar = Cifar("c10-binary")
    loaded = load(cifar.pack(tmp_path), image_size=16, in_chans=1)
    assert loaded.train.pixels.shape == (20, 1, 16, 16)
    grey = torch.from_numpy(cifar.pixels[0][0].reshape(3, 32, 32)).double().mean(
        (1, 2)
    ) @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert abs(float(loaded.train.pixels[0].double().mean()) - float(grey)) < 2


class Server:
    """Serves *content*; *ranges*: honours Range; *limit*: hangs up after so many bytes."""

    def __init__(self, content: bytes) -> None:
        self.content, self.ranges, self.limit, self.asked = (
            content,
            True,
            len(content),
            list[str | None](),
        )

    @contextmanager
    def url(self) -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                outer.asked.append(asked)
                start = int(asked[6:-1]) if asked and outer.ranges else 0
                if start >= len(outer.content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header(
                        "Content-Range",
                        f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}",
                    )
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start : outer.limit])

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def served() -> Server:
    return Server(random.Random(0).randbytes(100_000))


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def test_download_is_whole_checked_and_leaves_nothing_else(served: Server, tmp_path: Path) -> None:
    with served.url() as url:
        target = download(url, tmp_path / "new" / "file", md5(served.content))
    assert target.read_bytes() == served.content
    assert list(target.parent.iterdir()) == [target]


def test_of_several_that_download_one_does(served: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(served.content[:1000])
    with served.url() as url, ThreadPoolExecutor(3) as pool:
        found = [pool.submit(download, url, target, md5(served.content)) for _ in range(3)]
        assert [each.result().read_bytes() for each in found] == 3 * [served.content]
    assert served.asked == ["bytes=1000-"] and [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_download_says_so_and_is_resumed(
    served: Server, ranges: bool, tmp_path: Path
) -> None:
    target = tmp_path / "file"
    served.limit, served.ranges = 30_000, ranges
    with served.url() as url:
        with pytest.raises(DataError, match=r"30000 of 100000 bytes: run again to resume"):
            download(url, target, md5(served.content))
        assert not target.exists()
        served.limit = len(served.content)
        download(url, target, md5(served.content))
    assert target.read_bytes() == served.content
    assert served.asked == [None, "bytes=30000-"]


def test_part_that_is_whole_already_is_taken(served: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(served.content)
    with served.url() as url:
        assert download(url, tmp_path / "file", md5(served.content)).read_bytes() == served.content


def test_nothing_is_downloaded_into_a_pipe(served: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file.part")
    with served.url() as url, pytest.raises(DataError, match=r"a pipe or device at .*file.part"):
        download(url, tmp_path / "file", md5(served.content))
    assert served.asked == []


@contextmanager
def dripping(start: bytes, drop: bytes) -> Iterator[str]:
    """The address of a server that sends *start* and then *drop* again and again."""
    ended = Event()

    def drip() -> None:
        with server.accept()[0] as connection, suppress(OSError):
            connection.sendall(start)
            while not ended.wait(0.01):
                connection.sendall(drop)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=drip)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}/"
        ended.set()
        thread.join()


ANSWER = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("scheme", "start", "drop"),
    [
        ("http", b"", b"H"),
        ("http", ANSWER + b"X-", b"y"),
        ("http", ANSWER, b"X-Y: z\r\n"),
        ("http", ANSWER + b"Content-Length: 100000\r\n\r\n", b"z"),
        ("http", ANSWER + b"Content-Length: 100000\r\n\r\n" + bytes(50_000), b"z"),
        ("http", ANSWER + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nz\r\n"),
        ("http", ANSWER + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        ("https", b"\x16\x03\x03\x40\0", b"\x02"),
    ],
)
def test_a_server_that_sends_next_to_nothing_is_left(
    scheme: str, start: bytes, drop: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.15)
    monkeypatch.setattr(downloads, "LEAST_RATE", 10_240)
    with dripping(start, drop) as address, pytest.raises(DataError) as caught:
        download(f"{scheme}://{address}", tmp_path / "file", "0")
    assert "found less than 10 KiB a second in 0.15 seconds: run again" in str(caught.value)


def test_a_slow_server_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 1.0)
    monkeypatch.setattr(downloads, "LEAST_RATE", 1)
    start = ANSWER + b"Content-Length: 120\r\n\r\n"
    with dripping(start, b"z") as address:
        target = download(f"http://{address}", tmp_path / "file", md5(b"z" * 120))
    assert target.read_bytes() == b"z" * 120


def test_an_address_of_which_the_first_do_not_answer_is_waited_for(
    served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.05)
    connect = downloads.create_connection

    def late(*arguments: Any) -> Any:
        sleep(0.2)
        return connect(*arguments)

    monkeypatch.setattr(downloads, "create_connection", late)
    with served.url() as url:
        target = download(url, tmp_path / "file", md5(served.content))
    assert target.read_bytes() == served.content


@pytest.mark.parametrize("length", ["Content-Length: 1000000000000000\r\n", ""])
def test_the_page_of_a_redirection_is_not_read(length: str, tmp_path: Path) -> None:
    with Server(b"file").url() as end:
        start = f"HTTP/1.1 302 Found\r\nLocation: {end}\r\n{length}\r\n".encode()
        tracemalloc.start()
        with dripping(start, bytes(1 << 20)) as address:
            target = download(f"http://{address}", tmp_path / "file", md5(b"file"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
        tracemalloc.stop()
    assert target.read_bytes() == b"file"


def test_wrong_checksum_deletes_the_part(served: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"something else")
    with served.url() as url:
        with pytest.raises(DataError, match=r"expected MD5 \w+ of .*deleted; run again"):
            download(url, tmp_path / "file", md5(served.content))
        assert not list(tmp_path.iterdir())
        download(url, tmp_path / "file", md5(served.content))


def test_server_that_is_not_there_is_one_line(served: Server, tmp_path: Path) -> None:
    with served.url() as url:
        pass
    with pytest.raises(DataError, match=r"^--download: expected http.*put file into --dataset_dir"):
        download(url, tmp_path / "file", md5(b""), timeout=5)


def test_download_flag_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar, root = Cifar("c10-python"), tmp_path / "data"
    content = cifar.pack(tmp_path).read_bytes()
    served = Server(content)
    with served.url() as url:
        fake = dataclasses.replace(cifar_module.CIFAR10[0], md5=md5(content))
        monkeypatch.setattr(cifar_module, "CIFAR_URL", url)
        monkeypatch.setattr(
            cifar_module, "download_cifar10", partial(cifar_module.download_first, [fake])
        )
        for _ in range(2):
            cifar.check(load(root, "c10", download=True))
    assert len(served.asked) == 1
    assert CIFAR_URL.startswith("https://")
