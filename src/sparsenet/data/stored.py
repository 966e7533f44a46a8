"""Images whose pixels lie in a file: what is asked for is read, and nothing stays in memory."""

from __future__ import annotations

import math
import os
import tempfile
from io import FileIO
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Images


class Kept(FileIO):
    """A file that is open as long as something refers to it."""

    def __del__(self) -> None:
        self.close()  # FileIO would warn


class PixelFile:
    """A file of images uint8 ``(C, H, W)``, one behind the other. Threads may share it.

    It is read and not mapped: what the system keeps of it is the same, but a disk that fails is an
    ``OSError`` and does not end the process, and a limit of addresses holds the file as well.
    """

    def __init__(self, path: Path, file: Kept, shape: tuple[int, ...]):
        self.path, self.file, self.shape = path, file, shape
        self._lock = Lock()

    @property
    def stride(self) -> int:
        """Bytes of an image."""
        return math.prod(self.shape)

    def read(self, rows: Tensor) -> Tensor:
        """The images at *rows*, int64 ``(N,)``: uint8 ``(N, C, H, W)``."""
        pixels = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        places, content = rows.numpy(), pixels.numpy().reshape(-1).data
        # Neighbours in a row are read at once.
        starts = np.flatnonzero(np.diff(places, prepend=-2) != 1).tolist()
        for first, end in pairwise([*starts, len(places)]):
            part = content[first * self.stride : end * self.stride]
            self._fill(part, int(places[first]) * self.stride)
        return pixels

    def _fill(self, content: memoryview, offset: int) -> None:
        with self._lock:
            self.file.seek(offset)
            while len(content):
                count = self.file.readinto(content)
                if not count:
                    raise OSError(f"{self.path}: expected more images, found the end of the file")
                content = content[count:]

    def write(self, row: int, pixels: np.ndarray) -> None:
        """Puts one image or several behind each other in the place of *row* and following."""
        content = np.ascontiguousarray(pixels).reshape(-1).data
        with self._lock:
            self.file.seek(row * self.stride)
            while len(content):
                content = content[self.file.write(content) :]


class StoredImages(Images):
    """Images at *rows*, int64 ``(N,)``, of a file. To choose some of them reads nothing."""

    def __init__(self, file: PixelFile, rows: Tensor, labels: Tensor):
        for name, value in (("file", file), ("rows", rows), ("labels", labels)):
            object.__setattr__(self, name, value)

    file: PixelFile
    rows: Tensor

    def __repr__(self) -> str:
        return f"{len(self)} images of {self.shape} in {self.file.path}"

    @property
    def pixels(self) -> Tensor:
        return self.file.read(self.rows)

    def __getitem__(self, index: Tensor | slice) -> StoredImages:
        return StoredImages(self.file, self.rows[index], self.labels[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def labelled(self, labels: Tensor) -> StoredImages:
        return StoredImages(self.file, self.rows, labels)

    def like(self, size: int) -> StoredImages:
        # A file without a name, which ends with the process.
        with tempfile.TemporaryFile(dir=self.file.path.parent) as file:
            kept = Kept(os.dup(file.fileno()), "r+b")
        smaller = PixelFile(self.file.path, kept, (self.shape[0], size, size))
        return StoredImages(smaller, torch.arange(len(self)), self.labels)

    def write(self, first: int, pixels: Tensor) -> None:
        self.file.write(first, pixels.numpy())

    def to(self, device: torch.device) -> Images:
        if device.type == "cpu":
            return self
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8, device=device)
        there, first = Images(pixels, self.labels.to(device)), 0
        for part in self.parts():
            there.write(first, part.to(device))
            first += len(part)
        return there
