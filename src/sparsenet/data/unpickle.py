"""Reads the pickles of the CIFAR archives without trusting them.

A pickle is a program. This reader calls nothing that a pickle names: the few globals that arrays
need are replaced by stand-ins that note their arguments, and any other is refused. An array is made
of the bytes that are there, so no number in a pickle can ask for memory.
"""

from __future__ import annotations

import pickle
import re
from io import BytesIO
from typing import Any

import numpy as np

from sparsenet.data.errors import DataError, decoding


def load_pickle(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in a pickle up to protocol 4, Python 2's included, whose strings become bytes.

    Its values are numbers, bytes, strings, containers and integer arrays. Raises
    ``DataError`` with *name* for anything else and for a damaged pickle.
    """
    with decoding(name, "a pickle", pickle.UnpicklingError):
        loaded = _Reader(BytesIO(data), name).load()
    if not isinstance(loaded, dict):
        raise DataError(f"{name}: expected a pickled dictionary, found {type(loaded).__name__}")
    return {k: v.array if isinstance(v, _Array) else v for k, v in loaded.items()}


class _Dtype:
    """Stands for ``numpy.dtype(code, ...)``, whose state has the byte order."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not re.fullmatch("[iu][1248]", text):
            raise ValueError(f"an array of type {text}, not of integers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] in (">", b">") else "<")


class _Array:
    """Stands for an array, whose state has version, shape, type, order and bytes."""

    array: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
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
    def __init__(self, file: BytesIO, name: str) -> None:
        super().__init__(file, encoding="bytes")
        self.name = name

    def find_class(self, module: str, name: str) -> type:
        if stand_in := _STAND_INS.get(f"{module}.{name}"):
            return stand_in
        call = f"a call of {module}.{name}"
        raise DataError(f"{self.name}: expected arrays and numbers only, found {call}: refused")
