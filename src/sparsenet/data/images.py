"""From any image file to uint8 pixels, in one way for training and predicting."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsenet.data.dataset import Content, Example, Images, Part, Split
from sparsenet.data.errors import BadImage
from sparsenet.data.pixels import (
    JPEG_FACTOR,
    Greys,
    decode,
    file_content,
    limits_of_our_own,
    measured_range,
    opened,
)
from sparsenet.data.preprocessing import FULL_RANGE, Form
from sparsenet.events import drained
from sparsenet.ranks import local_processes

T = TypeVar("T")
READ_AHEAD = 1 << 26  # bytes of files that a table holds, and of pixels
TASK = 8  # images that a thread reads at a time, and that are waited for when reading is stopped
LARGEST_OWN, DEFAULT_SIZE = 224, 128  # sides of images in pixels: see ``common_size``
TASKS = 128  # that are begun before the first of them is needed


def read_image(source: Path | Content, form: Form, name: str = "") -> np.ndarray:
    """The pixels in *form* of an image, which is what an ``Example`` may be. ``BadImage``."""
    example = Example(name or (str(source) if isinstance(source, Path) else "image"), source, 0)
    with limits_of_our_own():
        example = example._replace(source=file_content(example))
        return decoded_image(example, form)


def decoded_image(example: Example, form: Form, jpeg_factor: int = JPEG_FACTOR) -> np.ndarray:
    """As ``read_image``, in any thread, within the caller's ``limits_of_our_own``."""
    found = decode(example, form, jpeg_factor)
    if isinstance(found, Greys):
        settled = settled_range(form.grey_range, [found]) or FULL_RANGE
        found = found.pixels(settled, form.channels).copy()
    return found


Read = tuple[np.ndarray | Greys, int]  # an image, and its id


class Decoded(NamedTuple):
    """The images of a split. Equal *ids*, int64 ``(N,)``, are images of the same bytes.

    *places*, int64 ``(N,)``, are their places in the split, some of which were left out. *skipped*
    are the lines that say what is wrong with those left out. *grey_range* are the levels of deep
    greys that became black and white, empty where nothing says which; *clipped* images have levels
    beyond it.
    """

    images: Images
    ids: Tensor
    places: Tensor
    skipped: tuple[str, ...] = ()
    grey_range: tuple[float, ...] = ()
    clipped: int = 0

    @property
    def part(self) -> Part:
        return Part(self.images, self.ids, self.places)


def read_images(split: Split, form: Form, skip_corrupt: bool = False) -> Decoded:
    """Does what ``reading_images`` does, at once."""
    return drained(reading_images(split, form, skip_corrupt))


def reading_images(
    split: Split, form: Form, skip_corrupt: bool = False
) -> Generator[int, None, Decoded]:
    """Reads a split's images in *form*, and yields how many it has read so far.

    They are read by several threads but stay in the split's order. Raises ``BadImage`` for the
    first image that cannot be read, unless *skip_corrupt*, and where a range of greys must be
    stated to be known.
    """
    grey_range = form.grey_range
    if isinstance(split, Images) and split.shape == form.shape:
        ids = [image_id(image) for image in split.pixels.numpy()]
        numbers = torch.tensor(ids, dtype=torch.int64), torch.arange(len(split))
        return Decoded(split, *numbers, (), grey_range or ())
    pixels = np.empty((len(split), *form.shape), np.uint8)
    labels: list[int] = []
    ids = []
    places: list[int] = []
    skipped: list[str] = []
    greys: dict[int, Greys] = {}  # until their range is known
    clipped = 0
    decoded = partial(decode, form=form)
    with limits_of_our_own(), closing(read_all(split, decoded, pixels[:1].nbytes)) as work:
        for example, image in work:
            if isinstance(image, BadImage):
                if not skip_corrupt:
                    raise BadImage(f"{image}; --skip_corrupt leaves such images out")
                skipped.append(str(image))
            else:
                found, number = image
                if not isinstance(found, Greys):
                    pixels[len(labels)] = found
                elif grey_range:
                    clipped += found.exceeds(grey_range)
                    pixels[len(labels)] = found.pixels(grey_range, form.channels)
                else:
                    greys[len(labels)] = found
                places.append(len(labels) + len(skipped))
                labels.append(example.label)
                ids.append(number)
            yield len(labels) + len(skipped)
    settled = settled_range(grey_range, greys.values())
    clipped += sum(grey.exceeds(settled or FULL_RANGE) for grey in greys.values())
    while greys:  # frees their memory
        index, grey = greys.popitem()
        pixels[index] = grey.pixels(settled or FULL_RANGE, form.channels)
    images = Images(torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels).long())
    numbers = torch.tensor(ids, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
    return Decoded(images, *numbers, tuple(skipped), settled, clipped)


def settled_range(
    grey_range: tuple[float, ...] | None, greys: Collection[Greys]
) -> tuple[float, ...]:
    """*grey_range*, or where it is ``None`` what it is measured to be; empty where nobody says."""
    if grey_range is None:
        return measured_range(greys) if greys else ()
    return grey_range


def image_id(content: Content) -> int:
    """64 bits that are a function of an image's bytes."""
    data = content if isinstance(content, bytes) else content.tobytes()
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def read_all(
    examples: Iterable[Example],
    decoded: Callable[[Example], np.ndarray | Greys],
    image_bytes: int,
) -> Generator[tuple[Example, Read | BadImage], None, None]:
    """What *decoded* makes of *examples* in several threads, and their ids, in their order.

    So much is read ahead as fits into ``READ_AHEAD`` bytes, an image taking *image_bytes* of them.
    """

    def read(example: Example) -> Read | BadImage:
        try:
            content = file_content(example)
            return decoded(example._replace(source=content)), image_id(content)
        except BadImage as error:
            return error

    def read_part(part: list[Example]) -> list[Read | BadImage]:
        return [read(example) for example in part]

    threads = _threads()
    ahead: deque[tuple[list[Example], int, Future[list[Read | BadImage]]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part, taken in _parts(examples, image_bytes):
                ahead.append((part, taken, pool.submit(read_part, part)))
                held += taken
                while len(ahead) > threads and (held > READ_AHEAD or len(ahead) > TASKS):
                    first, taken, result = ahead.popleft()
                    held -= taken
                    yield from zip(first, result.result(), strict=True)
            while ahead:
                first, _, result = ahead.popleft()
                yield from zip(first, result.result(), strict=True)
        finally:
            for _, _, result in ahead:
                result.cancel()


def _threads() -> int:
    """How many threads of this process decode images.

    Of several processes on a machine each takes its share of the processors: torchrun lets PyTorch
    have one thread in each, however many there are.
    """
    processes = local_processes()
    threads = torch.get_num_threads()
    return max(threads, (os.cpu_count() or 1) // processes) if processes > 1 else threads


def _parts(examples: Iterable[Example], image_bytes: int) -> Iterator[tuple[list[Example], int]]:
    """Examples in lists that are a thread's task, and how many bytes they take.

    A task costs more than a small image, so that each has several of them.
    """
    part: list[Example] = []
    taken = 0
    for example in examples:
        part.append(example)
        taken += image_bytes
        taken += len(example.source) if isinstance(example.source, bytes) else 0
        if len(part) == TASK or taken > READ_AHEAD // TASKS:
            yield part, taken
            part, taken = [], 0
    if part:
        yield part, taken


def common_size(split: Split) -> Generator[int, None, int]:
    """The images' own size where all have one square size of at most 224 pixels, else 128.

    With the strided stem that goes with it, a network takes a third of the time there that it
    takes at 64 with the stem of small images.

    It yields how many images it has looked at so far.
    """
    common = 0
    with limits_of_our_own():
        for number, example in enumerate(split, 1):
            yield number
            # A corrupt image is reported when it is decoded.
            with suppress(BadImage), opened(example) as image:
                width, height = image.size
                if width != height or width > LARGEST_OWN or common not in (0, width):
                    return DEFAULT_SIZE
                common = width
    return common or DEFAULT_SIZE
