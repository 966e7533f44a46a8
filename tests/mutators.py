"""What makes other inputs of valid ones: values, tables, tensors, images, archives and bytes.

Every mutator is a function of a valid value and a ``random.Random``.
"""

from __future__ import annotations

import bz2
import contextlib
import copy
import csv
import gzip
import io
import json
import math
import pickle
import pickletools
import random
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

# --- JSON -----------------------------------------------------------------------------------------


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(NamedTuple):
    """An object whose keys may repeat."""

    pairs: list[tuple[str, Any]]


DEEP = 100_000
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 3.0, 0.5, -0.5, 1e308, -1e308, 5e-324, 1e-30, 10**9, 2**31, 2**32, 2**53 + 1,
    2**63 - 1, 2**63, 2**64, -(2**63), 10**19, 10**30, 10**400,
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e400", "-0", "-0.0", "1" * 5000, "0x10", "1e9")),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", "x", " ", "0", "1", "nan", "None", "auto", "../../x", "/", "\0", "a\0b", "\ud800", "é",
    "e\u0301", "a\nb\r\u2028\x85c", "\x1b[2J\x1b]0;x\x07", "\u202eabc", "{}", "%s{0}", "<b>|`$(x)`",
    "٣", "²", "x" * 300, "x" * DEEP, "\n" * 5000, "😀" * 3000, Raw("'x'"), Raw('"\\ud83d"'),
    Raw('"\\x"'),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": 0}, [0] * 300, list(range(DEEP)), ["x"] * 5000,
    {f"k{i}": i for i in range(5000)}, [[0] for _ in range(5000)], [1, "a", None, {}],
    Raw(""), Raw("["), Raw("[" * DEEP), Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("[" * 900 + "]" * 900), Raw('{"a":' * 200 + "1" + "}" * 200),
)  # fmt: skip


def encode(value: Any) -> str:
    """JSON text, also of ``Raw`` and ``Pairs``."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.pairs if isinstance(value, Pairs) else value.items()
        return "{" + ", ".join(f"{encode(str(key))}: {encode(each)}" for key, each in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(encode, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 10_000 else "1" + "0" * 4000
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below *value* with each of its keys."""
    found = []
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else []
    )
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def mutated_json(value: Any, rng: random.Random) -> Any:
    """*value* with one to three changes, for ``encode``."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not root:
            return Raw("")
        places = [place for place in _places(root) if place[0] is not root]
        if not places or rng.random() < 0.02:
            places = [(root, 0)]
        if len(places) > 40 and rng.random() < 0.5:  # as often what lies on top
            top = [place for place in places if place[0] is root[0]]
            places = top or places
        _change(*rng.choice(places), places, rng)
    return root[0] if root else Raw("")


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    value = owner[key]
    kind = rng.randrange(14)
    if kind < 3:
        owner[key] = rng.choice(NUMBERS)
    elif kind == 3:
        owner[key] = rng.choice(TEXTS)
    elif kind == 4:
        owner[key] = copy.deepcopy(rng.choice(OTHERS))
    elif kind == 5:
        del owner[key]
    elif kind == 6 and isinstance(owner, dict):
        owner[rng.choice((f"{key}_", key.upper(), *TEXTS[:20])) or "x"] = owner.pop(key)
    elif kind == 7 and isinstance(value, dict):
        pairs = [*value.items(), ("a", 1)]
        pairs.insert(rng.randrange(len(pairs)), rng.choice(pairs))
        owner[key] = Pairs(pairs)
    elif kind == 8:
        owner[key] = _swapped(value)
    elif kind == 9:  # of a likely kind, in another place
        other, place = rng.choice(places)
        owner[key] = copy.deepcopy(other[place])
    elif kind == 10 and isinstance(value, int | float) and not isinstance(value, bool):
        factor = rng.choice((-1, 2, 0.5, 10, 1e6, 1e-6, 1e300, 3))
        owner[key] = type(value)(value * factor) if value and abs(value) < 1e6 else value + 1
    elif kind == 11 and isinstance(value, list):
        times = 500 if len(encode(value)) < 500 else 2
        many = [copy.deepcopy(each) for _ in range(times) for each in value]  # each its own
        owner[key] = rng.choice((value[:-1], value[:1], value * 2, many, value[::-1]))
    elif kind == 12 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(value))
    else:
        owner[key] = rng.choice((str(value), [value], {"a": value}, not value))


def _swapped(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return {str(index): each for index, each in enumerate(value)}
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else 0
    return float(min(value, 10**300)) if isinstance(value, int) else {}


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A JSON file near *value*, one time in eight with other bytes."""
    data = encode(mutated_json(value, rng)).encode()
    return mutated_bytes(encode(value).encode(), rng, data) if rng.random() < 0.125 else data


# --- bytes ----------------------------------------------------------------------------------------


def mutated_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """*data* with some bytes changed, cut, put in, repeated or taken from *other*."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(result) + 1)
        if rng.random() < 0.5:  # headers
            place = min(place, rng.randrange(64))
        length = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
        kind = rng.randrange(8)
        if kind < 2 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[place : place + length]
        elif kind == 3:
            result[place:place] = rng.randbytes(length)
        elif kind == 4:
            result[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 5:
            result[place:place] = bytes(result[place : place + length]) * rng.choice((1, 2, 50))
        elif kind == 6 and rng.random() < 0.4:
            del result[place:]
        elif kind == 7 and other:
            start = rng.randrange(len(other))
            result[place : place + length] = other[start : start + length]
    return bytes(result)


def mutated_csv(text: str, rng: random.Random) -> bytes:
    """A table with other cells, rows, columns, signs or bytes."""
    rows = list(csv.reader(io.StringIO(text)))
    for _ in range(rng.choice((1, 1, 2, 5))):
        row = rng.choice(rows) if rng.random() < 0.8 else rows[0]
        column = rng.randrange(len(row)) if row else 0
        kind = rng.randrange(10)
        if kind < 4 and row:
            cell = rng.choice(
                (*NUMBERS, *TEXTS, f"{row[column]}0", f" {row[column]} ", "1_000", "1,5")
            )
            row[column] = str(cell)
        elif kind == 4 and row:
            del row[column]
        elif kind == 5:
            row.insert(column, rng.choice(("", "x", "0", '"')))
        elif kind == 6 and len(rows) > 1:
            rows.remove(row)
        elif kind == 7:
            rows.insert(rng.randrange(len(rows)), list(rng.choice(rows)))
        elif kind == 8:
            rows += [list(row) for _ in range(rng.choice((1, 300)))]
        elif kind == 9:
            for each in rows:
                each[column : column + 1] = rng.choice(([], each[column : column + 1] * 2))
    table = io.StringIO()
    delimiter = rng.choice((",", ",", ",", ";", "\t", "|"))
    csv.writer(
        table, delimiter=delimiter, lineterminator=rng.choice(("\n", "\r\n", "\r"))
    ).writerows(rows)
    encoding = rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1"))
    data = table.getvalue().encode(
        encoding, "replace" if encoding == "latin-1" else "surrogatepass"
    )
    return mutated_bytes(data, rng) if rng.random() < 0.2 else data


# --- safetensors ----------------------------------------------------------------------------------


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_tensors(header: Any, body: bytes) -> bytes:
    text = encode(header).encode()
    return len(text).to_bytes(8, "little") + text + body


DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "U32", "U16",
    "F8_E4M3", "F8_E5M2", "C64", "F4", "F6_E2M3", "F8_E8M0", "X",
)  # fmt: skip


def mutated_header(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Another dtype, shape, place or name of a tensor, mostly such that the bytes still suffice."""
    header = copy.deepcopy(header)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:  # as many numbers
        entry["shape"] = rng.choice(
            (
                entry["shape"][::-1],
                [1, *entry["shape"]],
                [*entry["shape"], 1],
                [math.prod(entry["shape"])],
            )
        )
    elif kind == 2:
        entry["shape"] = rng.choice(
            ([], [0], [2**62, 4], [2**40, 2**40], [-1], [0, 2**63], [1] * 100)
        )
    elif kind == 3:
        other = rng.choice([each for each in header if each != "__metadata__"])
        entry["data_offsets"] = rng.choice(
            (
                header[other]["data_offsets"],
                [end, start],
                [start, end + 1],
                [start, 2**63],
                [-1, end],
                [0, 0],
            )
        )
    elif kind == 4:
        header[rng.choice(("", "x" * 5000, "a\nb", "model.x", name + ".x"))] = header.pop(name)
    elif kind == 5:
        header["__metadata__"] = rng.choice(
            ({}, {"sparsenet": "null"}, {"sparsenet": ""}, {"a": "b"})
        )
    elif kind == 6:
        del header[name]
    else:
        return mutated_json(header, rng)
    return header


def mutated_tensors(
    tensors: dict[str, torch.Tensor], rng: random.Random
) -> dict[str, torch.Tensor]:
    """A whole file of other tensors."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(9)
    if kind < 3:
        value = rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30, 3e38, -1e-30, 1e5))
        changed = tensor.clone()
        with contextlib.suppress(RuntimeError):
            changed.view(-1)[: rng.choice((1, changed.numel()))] = value
        tensors[name] = changed
    elif kind == 3:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
        more = (torch.complex64, torch.float8_e4m3fn, torch.int32, torch.uint64)
        tensors[name] = tensor.to(rng.choice(kinds + more))
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[
            rng.choice((f"{name}.x", "x", "", "optimizer.99", "optimizer.x", "optimizer.-1"))
        ] = tensor
    elif kind == 6:
        tensors[name] = rng.choice(
            (tensor[None], tensor.flatten(), tensor.flatten()[:0], torch.zeros(()))
        )
    elif kind == 7:
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensor
    return {key: each.contiguous().clone() for key, each in tensors.items()}


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A file with another description, header, tensor or other bytes."""
    kind = rng.randrange(10)
    header, body = split_tensors(data)
    metadata = header.get("__metadata__", {})
    if kind < 4 and "sparsenet" in metadata:
        text = encode(mutated_json(json.loads(metadata["sparsenet"]), rng))
        header["__metadata__"] = {**metadata, "sparsenet": text}
        return join_tensors(header, body)
    if kind < 6:
        return join_tensors(mutated_header(header, rng), body)
    if kind < 9:
        with contextlib.suppress(RuntimeError, ValueError, TypeError, KeyError):
            return serialise_tensors(mutated_tensors(parse_tensors(data), rng), metadata)
    return mutated_bytes(data, rng)


# --- parquet --------------------------------------------------------------------------------------


class ParquetTable:
    """The columns of a table of images, of types and cells that other programs may write."""

    def __init__(self, rng: random.Random, pictures: Mapping[str, bytes]):
        self.rows = rng.choice((0, 1, 6, 12, 12, 12, 30))
        small = [pictures[name] for name in sorted(pictures)]
        images: list[Any] = [rng.choice(small) for _ in range(self.rows)]
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            if images:
                images[rng.randrange(len(images))] = rng.choice((None, b"", b"x", b"\xff\xd8\xff"))
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        kind = rng.choice((struct,) * 4 + (pa.binary(), pa.large_binary(), pa.binary_view(), None))
        if kind == struct:
            cells: list[Any] = [
                {"bytes": image, "path": rng.choice(("a.png", None, "../x", "/dev/zero"))}
                if image is not None
                else None
                for image in images
            ]
        elif kind is None:
            kind = rng.choice(
                (
                    pa.string(),
                    pa.list_(pa.uint8()),
                    pa.dictionary(pa.int32(), pa.binary()),
                    pa.null(),
                    pa.struct([("path", pa.string())]),
                    pa.struct([("bytes", pa.string())]),
                    pa.struct([("bytes", pa.int64())]),
                )
            )
            cells = _cells_of(kind, images, rng)
        else:
            cells = images
        self.image = pa.array(cells, kind)
        kinds = (
            pa.int64(),
            pa.int64(),
            pa.int64(),
            pa.string(),
            pa.string(),
            pa.int8(),
            pa.uint64(),
            pa.bool_(),
        )
        more = (
            pa.large_string(),
            pa.string_view(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int32(), pa.int64()),
            pa.float64(),
            pa.null(),
            pa.date32(),
            pa.decimal128(5),
            pa.list_(pa.int64()),
            pa.float16(),
            pa.binary(),
            pa.duration("s"),
        )
        self.label = _labels(rng.choice(kinds * 2 + more), self.rows, rng)
        self.names = rng.choice(
            (("image", "label"),) * 6
            + (
                ("img", "fine_label"),
                ("image", "image"),
                ("", "label"),
                ("x\ny", "label"),
                ("image", "label.a"),
                ("picture", "y"),
            )
        )
        features = {
            "image": {"_type": "Image"},
            "label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"},
        }
        self.metadata: Any = {"info": {"features": features}}
        if rng.random() < 0.5:
            self.metadata = mutated_json(self.metadata, rng)
        self.has_metadata = rng.random() < 0.6
        self.extra = rng.choice((None,) * 4 + ("split", "id", "image2"))

    def write(self, path: Path, rng: random.Random) -> None:
        """Writes the table in one of the layouts that parquet has."""
        arrays, names = [self.image, self.label], list(self.names)
        if self.extra:
            arrays.append(pa.array([rng.choice(("train", "test", "x")) for _ in range(self.rows)]))
            names.append(self.extra)
        if rng.random() < 0.05:
            arrays, names = arrays[:1], names[:1]
        table = pa.table(arrays, names=names)
        if self.has_metadata:
            table = table.replace_schema_metadata({b"huggingface": encode(self.metadata).encode()})
        options = {
            "compression": rng.choice(("snappy", "none", "gzip", "zstd", "brotli", "lz4")),
            "row_group_size": rng.choice((None, 1, 4)),
            "use_dictionary": rng.random() < 0.5,
            "data_page_version": rng.choice(("1.0", "2.0")),
            "version": rng.choice(("1.0", "2.4", "2.6")),
            "store_schema": rng.random() < 0.7,
            "write_statistics": rng.random() < 0.7,
            "write_page_checksum": rng.random() < 0.3,
            "data_page_size": rng.choice((None, 64)),
        }
        with contextlib.suppress(pa.ArrowException):  # a type that parquet has not
            parquet.write_table(table, path, **options)
            return
        parquet.write_table(pa.table([pa.array([1])], names=["label"]), path)


def _cells_of(kind: Any, images: list[Any], rng: random.Random) -> list[Any]:
    if pa.types.is_null(kind):
        return [None] * len(images)
    if pa.types.is_list(kind):
        return [None if image is None else list(image[:50]) for image in images]
    if pa.types.is_dictionary(kind):
        return images
    text = rng.choice(
        ("a.png", "../../x.png", "/dev/zero", "/dev/zero.png", "", "x" * 5000 + ".png", "a\0b.png")
    )
    if pa.types.is_string(kind):
        return [None if image is None else text for image in images]
    field = kind.field(0)
    value = {"path": text, "bytes": "text"}[field.name] if pa.types.is_string(field.type) else 7
    return [None if image is None else {field.name: value} for image in images]


def _labels(kind: Any, rows: int, rng: random.Random) -> Any:
    numbers: list[Any] = [row % rng.choice((2, 3)) for row in range(rows)]
    if rows and rng.random() < 0.3:
        odd = rng.choice(
            (-1, None, None, 3, 100, 127, 2**16, 2**40, 2**63 - 1, 2**64 - 1, -(2**63), -2)
        )
        numbers[rng.randrange(rows)] = odd
    texts = ["ant" if number == 0 else "bee" if number is not None else None for number in numbers]
    if rows and rng.random() < 0.3:
        texts[rng.randrange(rows)] = rng.choice(
            ("", " ", "e\u0301", "a\nb", "x" * 5000, "\x1b[2J", None)
        )
    for cells in (
        numbers,
        texts,
        [bool(number) for number in numbers],
        [[1]] * rows,
        [b"x"] * rows,
    ):
        with contextlib.suppress(pa.ArrowException, OverflowError, TypeError):
            return pa.array(cells, kind)
    return pa.nulls(rows, kind)


def mutated_tail(data: bytes, rng: random.Random) -> bytes:
    """A parquet file with other bytes in its description, which lies at its end."""
    length = int.from_bytes(data[-8:-4], "little")
    start = max(len(data) - 8 - length, 0)
    tail = mutated_bytes(data[start:-8], rng)
    size = rng.choice((len(tail), len(tail), len(tail), 0, 2**31, 2**32 - 1))
    return data[:start] + tail + size.to_bytes(4, "little") + data[-4:]


# --- archives and pickles -------------------------------------------------------------------------


def mutated_tar(files: Mapping[str, bytes], folder: str, rng: random.Random) -> bytes:
    """A compressed archive of *files*, with odd members, headers or bytes."""
    table = io.BytesIO()
    kind = rng.randrange(12)
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=table, mode="w", format=form) as archive:
        if kind == 0 and form == tarfile.PAX_FORMAT:
            archive.pax_headers = {"comment": "x" * 10_000}
        items = list(files.items())
        if kind == 1:
            rng.shuffle(items)
        if kind == 2:
            items.append(rng.choice(items))
        for name, data in items:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            if kind == 3 and rng.random() < 0.3:
                member.name = rng.choice(
                    (
                        f"./{member.name}",
                        f"/{member.name}",
                        f"{folder}/../{member.name}",
                        f"{folder}//{name}",
                        name,
                    )
                )
            if kind == 4 and rng.random() < 0.4:
                member.type = rng.choice(
                    (
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.DIRTYPE,
                        tarfile.CHRTYPE,
                        tarfile.GNUTYPE_SPARSE,
                        tarfile.CONTTYPE,
                        b"9",
                    )
                )
                member.linkname = rng.choice((member.name, "/etc/passwd", f"{folder}/test", name))
            if kind == 5 and form == tarfile.PAX_FORMAT:
                key = rng.choice(
                    (
                        "size",
                        "path",
                        "mtime",
                        "GNU.sparse.size",
                        "GNU.sparse.map",
                        "GNU.sparse.major",
                        "hdrcharset",
                    )
                )
                member.pax_headers = {
                    key: rng.choice(
                        ("0", "-1", "x", "1" * 30, "1e400", "nan", "0,1", "1,2,3", member.name)
                    )
                }
            archive.addfile(member, io.BytesIO(data))
    data = bytearray(table.getvalue())
    if kind in (6, 7):  # headers
        for _ in range(rng.choice((1, 3))):
            header = 512 * rng.randrange(max(len(data) // 512, 1))
            field = rng.choice(
                ((124, 12), (148, 8), (156, 1), (257, 8), (100, 8), (0, 100), (345, 155), (386, 96))
            )
            content = rng.choice(
                (
                    b"\0",
                    b"7" * 12,
                    b"\x80" + b"\xff" * 11,
                    b"\xff" * 12,
                    b"x",
                    b"00000000000\0",
                    rng.randbytes(12),
                    b"S",
                    b"L",
                    b"g",
                    b"x",
                )
            )
            start = header + field[0]
            data[start : start + min(len(content), field[1])] = content[: field[1]]
            if rng.random() < 0.8 and header + 512 <= len(data):  # with a right checksum
                block = data[header : header + 512]
                total = sum(block[:148]) + sum(block[156:]) + 256
                data[header + 148 : header + 156] = b"%06o\0 " % total
    packed = gzip.compress(bytes(data), 1)
    if kind == 8:
        packed = mutated_bytes(packed, rng)
    elif kind == 9:
        packed = packed + rng.choice((b"\0" * 1000, packed, b"garbage", gzip.compress(b"x" * 100)))
    elif kind == 10:
        packed = rng.choice((bytes(data), bz2.compress(bytes(data)), b"", packed[:-4], packed[:40]))
    elif kind == 11:  # much of nothing, in headers or at the end
        zeros = gzip.compress(bytes(1 << 24)) * rng.choice((4, 200))
        header = tarfile.TarInfo("x")
        header.type, header.size = (
            rng.choice(
                (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE)
            ),
            rng.choice((1 << 26, 3 << 30)),
        )
        packed = rng.choice(
            (packed + zeros, gzip.compress(header.tobuf(tarfile.GNU_FORMAT)) + zeros)
        )
    return packed


def _numbered(count: int) -> bytes:
    """The opcodes of a tuple of *count* levels, each of which holds the next twice."""
    return b")" + b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(count))


PIECES = (
    b"N", b"0", b"1", b"2", b"(", b"t", b"l", b"d", b"}", b"]", b")", b"a", b"e", b"s", b"u", b"b",
    b"R", b".", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x90", b"\x91", b"\x92",
    b"\x93", b"\x94", b"\x8f", b"K\x01", b"J\xff\xff\xff\xff", b"h\x00", b"h\x01",
    b"j\xff\xff\xff\x7f", b"q\x00", b"r\xff\xff\xff\xff", b"p99999999999\n", b"g0\n",
    b"I" + b"1" * 5000 + b"\n", b"I01\n", b"Inan\n", b"L" + b"9" * 5000 + b"L\n", b"Fnan\n",
    b"Finf\n", b"F1e400\n", b"G\x7f\xf8\0\0\0\0\0\0", b"\x8a\x02\xff\xff", b"\x8b\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\xff", b"\x8a\x00", b"T\xff\xff\xff\x7f", b"T\xff\xff\xff\xff",
    b"X\xff\xff\xff\xff", b"B\xff\xff\xff\xff", b"U\xffx", b"C\xff",
    b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x8e" + b"\xff" * 8, b"\x96" + struct.pack("<Q", 1 << 40),
    b"\x96" + struct.pack("<Q", 2 << 30), b"\x96" + b"\xff" * 8, b"\x95" + b"\xff" * 8,
    b"\x95" + b"\0" * 8, b"\x95\x03" + b"\0" * 7, b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"c_codecs\nencode\n", b"cos\nsystem\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cbuiltins\neval\n", b"c\n\n", b"c" + b"x" * 5000 + b"\ny\n", b"c\xff\n\xfe\n",
    b"i os\nsystem\n", b"\x82\x01", b"\x83\xff\xff", b"\x84\xff\xff\xff\x7f", b"P1\n", b"Q",
    b"\x97", b"\x98", b"\x80\x05", b"\x80\xff", b"S'x'\n", b"S'\\'\n", b"V\\ud800\n",
    b"V" + b"x" * 300 + b"\n", b"(" * 3000, b"]" * 3000, b"(" * 20_000 + b"t" * 20_000,
    b"]2" * 200 + b"a" * 199,
)  # fmt: skip
# Dictionaries with a key whose hash takes 2^40 steps.
BOMBS = b"}" + _numbered(40) + b"Ns.", b"\x80\x02}U\x01x" + _numbered(40) + b"s."


def mutated_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle with other opcodes, numbers or bytes."""
    kind = rng.randrange(6)
    if rng.random() < 0.003:
        return rng.choice(BOMBS)
    if kind == 0:
        return mutated_bytes(data, rng)
    if kind == 1:
        return (
            b"\x80\x02" + b"".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 30))) + b"."
        )
    if kind == 2:  # other values in the dictionary
        values = pickle.loads(data)
        key = rng.choice(sorted(values, key=repr))
        value = values[key]
        choices = [
            None,
            1,
            [],
            b"",
            "x",
            {},
            [1.5],
            [True],
            [None],
            value,
            [value],
            np.zeros(3),
            np.zeros((0, 3072), np.uint8),
            [10**30],
            np.array([[1]]),
            [b"x" * 5000] * 3,
            [-1] * 4,
            np.zeros((4, 3072), np.int8),
            np.zeros((4, 3072), ">i8"),
        ]
        values[rng.choice((key, key, key, b"x"))] = rng.choice(choices)
        return pickle.dumps(values, rng.choice((0, 1, 2, 3, 4, 5)))
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    result = data
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.choice(places)
        end = min((other for other in places if other > place), default=len(result))
        piece = rng.choice(PIECES)
        result = result[:place] + piece + result[rng.choice((place, end)) :]
    return result


# --- images ---------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    """Files of every format that is read, and of two that are not, in many modes and layouts."""
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    deep = generator.integers(0, 65536, (12, 10)).astype(np.uint16)
    exif = Image.Exif()
    exif[274] = 6
    plans: dict[str, tuple[Any, dict[str, Any]]] = {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        plans[f"{mode}.png"] = colours.convert(mode), {}
    plans["deep.png"] = Image.fromarray(deep), {}
    plans["trns.png"] = colours.convert("P"), {"transparency": 3}
    plans["text.png"] = colours, {"exif": exif, "dpi": (72, 72)}
    for mode in ("L", "RGB", "CMYK"):
        plans[f"{mode}.jpg"] = colours.convert(mode), {}
    plans["progressive.jpg"] = colours, {"progressive": True, "exif": exif, "comment": "x"}
    plans["one.gif"] = colours.convert("P"), {}
    plans["many.gif"] = (
        colours.convert("P"),
        {"save_all": True, "append_images": [colours.convert("P")] * 3, "transparency": 0},
    )
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        plans[f"{mode}.bmp"] = colours.convert(mode), {}
    for mode in ("1", "L", "RGB"):
        plans[f"{mode}.ppm"] = colours.convert(mode), {}
    plans["deep.pgm"] = Image.fromarray(deep), {"format": "PPM"}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        base = Image.merge("LAB", colours.split()) if mode == "LAB" else colours.convert(mode)
        plans[f"{mode}.tif"] = base, {}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        plans[f"{compression}.tif"] = colours, {"compression": compression}
    plans["group4.tif"] = colours.convert("1"), {"compression": "group4"}
    plans["deep.tif"] = Image.fromarray(deep), {}
    plans["float.tif"] = Image.fromarray(deep.astype(np.float32)), {}
    plans["int.tif"] = Image.fromarray(deep.astype(np.int32)), {}
    plans["many.tif"] = colours, {"save_all": True, "append_images": [colours] * 2}
    plans["lossy.webp"] = colours, {}
    plans["lossless.webp"] = colours.convert("RGBA"), {"lossless": True, "exif": exif}
    plans["many.webp"] = colours, {"save_all": True, "append_images": [colours.rotate(90)]}
    plans["two.mpo.jpg"] = colours, {"format": "MPO", "save_all": True, "append_images": [colours]}
    plans["x.ico"] = colours, {}
    files = {}
    for name, (image, options) in plans.items():
        file = io.BytesIO()
        options.setdefault("format", Image.registered_extensions()[Path(name).suffix])
        image.save(file, **options)
        files[name] = file.getvalue()
    return files


def mutated_image(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """An image file with other sizes, fields or bytes."""
    kind = rng.randrange(8)
    if data.startswith(b"\x89PNG") and kind < 4:
        return _mutated_png(data, rng)
    if data[:2] in (b"II", b"MM") and kind < 4:
        return _mutated_tiff(data, rng)
    if data[:1] == b"P" and kind < 3:
        number = rng.choice(
            (b"0", b"-1", b"65535", b"65536", b"99999999999", b"1e9", b"", b"1" * 5000, b"255")
        )
        words = data.split(None, 4)[:4]
        words[rng.randrange(len(words))] = number
        return b"\n".join(words) + b"\n" + data[15:]
    if data[:2] == b"BM" and kind < 3:
        place = rng.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46, 50))
        value = struct.pack(
            "<i", rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 40_000, 65536, 12, 64, 124, 3, 6))
        )
        return data[:place] + value + data[place + 4 :]
    if data[:3] == b"GIF" and kind < 2:
        place = rng.choice((6, 8, 10, 11))
        return data[:place] + rng.choice((b"\xff\xff", b"\0\0", b"\1\0")) + data[place + 2 :]
    return mutated_bytes(data, rng, other)


def _mutated_png(data: bytes, rng: random.Random) -> bytes:
    """Other chunks, whose checksums are right."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    kind = rng.randrange(6)
    if kind == 0:
        width, height = (
            rng.choice((0, 1, 10, 12, 1500, 2047, 65535, 2**31 - 1, 2**32 - 1)) for _ in range(2)
        )
        chunks[0] = chunks[0][0], struct.pack(">II", width, height) + chunks[0][1][8:]
    elif kind == 1:
        header = bytearray(chunks[0][1])
        header[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0] = chunks[0][0], bytes(header)
    elif kind == 2:
        chunks[index] = name, mutated_bytes(content, rng)
    elif kind == 3:
        added = rng.choice(
            (
                b"zTXt",
                b"iTXt",
                b"tEXt",
                b"iCCP",
                b"eXIf",
                b"tRNS",
                b"PLTE",
                b"gAMA",
                b"acTL",
                b"fcTL",
                b"IDAT",
                b"IEND",
                b"sRGB",
                b"pHYs",
            )
        )
        text = rng.choice(
            (
                b"",
                b"x\0\0" + zlib.compress(bytes(100)),
                b"x\0\0" + zlib.compress(bytes(1 << 26)),
                rng.randbytes(20),
                b"x" * 70_000,
            )
        )
        chunks.insert(rng.randrange(len(chunks) + 1), (added, text))
    elif kind == 4:
        chunks.insert(index, chunks.pop(rng.randrange(len(chunks))))
    else:
        del chunks[index]
    result = data[:8]
    for name, content in chunks:
        checksum = zlib.crc32(name + content) ^ (rng.random() < 0.02)
        result += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    return result


def _mutated_tiff(data: bytes, rng: random.Random) -> bytes:
    """Another type, count or value of a tag, or another place of the tags."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack(order + "I", data[4:8])
    if start + 2 > len(data) or rng.random() < 0.05:
        return (
            data[:4] + struct.pack(order + "I", rng.choice((0, 4, 8, 2**32 - 1, start))) + data[8:]
        )
    (count,) = struct.unpack(order + "H", data[start : start + 2])
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        place = start + 2 + 12 * rng.randrange(max(count, 1))
        field, form = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
        numbers = (
            0,
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            16,
            32,
            255,
            256,
            257,
            258,
            259,
            262,
            273,
            277,
            278,
            279,
            284,
            317,
            320,
            339,
            1500,
            40_000,
            65535,
            2**31 - 1,
            2**32 - 1,
        )
        value = rng.choice(numbers)
        if form == "H":
            value &= 0xFFFF
        result[place + field : place + field + (2 if form == "H" else 4)] = struct.pack(
            order + form, value
        )
    return bytes(result)
