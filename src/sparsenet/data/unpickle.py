"""Reads the pickles of the CIFAR archives without trusting them.

A pickle is a program. This reader calls nothing that a pickle names: the few globals that arrays
need are replaced by stand-ins that note their arguments, and any other is refused. An array is made
of the bytes that are there, so no number in a pickle can ask for memory. A pickle has as many steps
as the largest real one needs, and each step takes time in proportion to the bytes that it reads.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from sparsenet.data.errors import DataError, decoding

MAX_STEPS = 1 << 20  # CIFAR-100's training pickle takes 250,000
INTEGER_BYTES, INTEGER_DIGITS = 8, 20  # of 64 bits; longer ones take long to compare


def load_pickle(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in a pickle up to protocol 4, Python 2's included, whose strings become bytes.

    Its values are integers, bytes, strings, dictionaries, lists, which tuples become, and integer
    arrays. Raises ``DataError`` with *name* for anything else and for a damaged pickle.
    """
    with decoding(name, "a pickle", pickle.UnpicklingError):
        loaded = _Reader(data, name).load()
    if not isinstance(loaded, dict):
        raise DataError(f"{name}: expected a pickled dictionary, found {type(loaded).__name__}")
    return {k: v.array if isinstance(v, _Array) else v for k, v in loaded.items()}


class _Dtype:
    """Stands for ``numpy.dtype(code, ...)``, whose state has the byte order."""

    def __init__(self, code: str | bytes, align: object = None, copy: object = None) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not re.fullmatch("[iu][1248]", text):
            raise ValueError(f"an array of type {text[:20]}, not of integers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] in (">", b">") else "<")


class _Array:
    """Stands for an array, whose state has version, shape, type, order and bytes."""

    array: np.ndarray | None = None

    def __init__(self, kind: object, shape: object, code: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _Bytes(bytes):
    """Stands for ``_codecs.encode``, by which protocols up to 2 make bytes."""

    def __new__(cls, text: str, encoding: str) -> _Bytes:
        return super().__new__(cls, text.encode("latin-1"))

    # Without this method, a pickle could set attributes of the class.
    def __setstate__(self, state: object) -> None:
        raise TypeError("bytes have no state")


_STAND_INS: dict[str, type] = {
    "_codecs.encode": _Bytes,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
}


# Python's unpickler, as the C one makes its memo as long as the largest index that a pickle names.
class _Reader(pickle._Unpickler):
    def __init__(self, data: bytes, name: str) -> None:
        file = BytesIO(data)
        super().__init__(file, encoding="bytes")
        self._unframer = pickle._Unframer(file.read, file.readline)  # type: ignore[attr-defined]
        self.read, self.readline = self._unframer.read, self._unframer.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.name = name
        self.encodable = len(data)  # characters that may become bytes: each that is there, once

    def load(self) -> Any:
        """Takes steps up to the one that ends a pickle."""
        for _ in range(MAX_STEPS):
            code = self.read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if code not in _STEPS:
                raise ValueError(f"the code {code!r}, which arrays of integers do not need")
            _STEPS[code](self)
        raise ValueError(f"more than {MAX_STEPS:,} steps")

    def find_class(self, module: str, name: str) -> type:
        if stand_in := _STAND_INS.get(f"{module}.{name}"):
            return stand_in
        call = f"a call of {module[:100]}.{name[:100]}"
        raise DataError(f"{self.name}: expected arrays and numbers only, found {call}: refused")

    def load_call(self) -> None:
        function, arguments = self.stack[-2:]
        if function is _Bytes:
            self.encodable -= len(arguments[0])
            if self.encodable < 0:
                raise ValueError("more bytes than the pickle has")
        self.stack[-2:] = [function(*arguments)]

    def load_digits(self) -> None:
        digits = self.readline().rstrip(b"L\n")
        if len(digits) > INTEGER_DIGITS:
            raise ValueError(f"an integer of {len(digits):,} digits")
        self.append(int(digits))

    def load_long_integer(self) -> None:
        size = self.read(1)[0]
        if size > INTEGER_BYTES:
            raise ValueError(f"an integer of {size} bytes")
        self.append(pickle.decode_long(self.read(size)))

    def load_last(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]


# Those of Python's steps that CIFAR's pickles may need. Tuples become lists, which cannot be keys
# of dictionaries, as a tuple of tuples of tuples takes for ever to hash.
_NEEDED = (
    *("PROTO", "FRAME", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "BUILD"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
)
_PYTHON = {bytes([code]): step for code, step in pickle._Unpickler.dispatch.items()}
_STEPS: dict[bytes, Callable[[Any], None]] = {
    **{code: _PYTHON[code] for code in (getattr(pickle, name) for name in _NEEDED)},
    pickle.INT: _Reader.load_digits,
    pickle.LONG: _Reader.load_digits,
    pickle.LONG1: _Reader.load_long_integer,
    pickle.TUPLE: _PYTHON[pickle.LIST],
    pickle.EMPTY_TUPLE: _PYTHON[pickle.EMPTY_LIST],
    pickle.TUPLE1: partial(_Reader.load_last, count=1),
    pickle.TUPLE2: partial(_Reader.load_last, count=2),
    pickle.TUPLE3: partial(_Reader.load_last, count=3),
    pickle.REDUCE: _Reader.load_call,
}
