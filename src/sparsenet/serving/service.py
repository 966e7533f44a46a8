"""From the bytes of pictures to answers: read by several threads, computed in batches by one."""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from sparsenet.data.dataset import Example
from sparsenet.data.errors import BadImage, DataError
from sparsenet.data.images import decoded_image
from sparsenet.data.pixels import TooLarge, limits_of_our_own
from sparsenet.data.preprocessing import Form
from sparsenet.device import end_idle_threads
from sparsenet.explain import grid, maps_of
from sparsenet.memory import shortage
from sparsenet.pictures.heat_map import Grid, png, veil
from sparsenet.predict import Prediction, ranked
from sparsenet.serving.limits import LARGEST_REQUESTS, Limits, busy
from sparsenet.serving.measures import Measures
from sparsenet.texts import printable
from sparsenet.trained import Trained

Item = TypeVar("Item")
Result = TypeVar("Result")
DECODERS = min(4, os.cpu_count() or 1)  # threads
# Larger pictures are decoded one at a time: they take up to 16 bytes a pixel.
LARGE_MEGAPIXELS = 25.0
HEAT_MAP_PIXELS = 224  # of a side of a heat map; who shows it enlarges it


class Picture(NamedTuple):
    """A picture of a request."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Answer:
    """The most probable classes of a picture, best first, or the one-line error that it met.

    *heat_map* is a transparent PNG in base64, to be laid over the picture's central square: what
    speaks for the first class is orange, what speaks against it blue.
    """

    name: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()  # of these classes, from 0 to 1
    heat_map: str | None = None
    error: str | None = None
    status: int = 200  # of a request for this picture alone


class Asked(NamedTuple):
    """A picture that the network is to look at."""

    name: str
    pixels: np.ndarray  # uint8 (C, size, size)
    top: int
    with_heat_map: bool


class Seen(NamedTuple):
    """What the network made of it, and the map of its first class if that was asked for."""

    answer: Answer
    heat_map: np.ndarray | None = None  # float32 (h, w)


class Gate:
    """How many pictures and bytes are inside, none more than there is room for."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pictures = 0
        self.bytes = 0

    @contextmanager
    def room(self, pictures: int, size: int) -> Iterator[None]:
        """Room for so many pictures and bytes, given back at the end; ``Refused`` if there is none.

        The bytes of a request are counted as it says before it is read.
        """
        if self.pictures + pictures > self.limits.queue:
            raise busy(f"expected at most {self.limits.queue} pictures at a time; ask again")
        most = LARGEST_REQUESTS * self.limits.max_bytes
        if self.bytes + size > most:
            raise busy(f"expected at most {most / 1e6:g} MB of requests at a time; ask again")
        self.pictures += pictures
        self.bytes += size
        try:
            yield
        finally:
            self.pictures -= pictures
            self.bytes -= size


class Batches(Generic[Item, Result]):
    """Items that arrive together are worked on together, *size* at most, by one thread.

    A batch waits up to *seconds* for more as long as some are *coming*, and else not at all.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        size: int,
        seconds: float,
        coming: Callable[[], int],
    ) -> None:
        self.work, self.size, self.seconds, self.coming = work, size, seconds, coming
        self.queue: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1)

    async def result(self, item: Item) -> Result:
        """What the work makes of *item*; what it raised for a batch is raised for each of it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, future))
        return await future

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            if not batch:
                continue
            items = [item for item, _ in batch]
            work = loop.run_in_executor(self.thread, self.work, items)
            [found] = await asyncio.gather(work, return_exceptions=True)
            for place, (_, future) in enumerate(batch):
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(found, BaseException):
                    future.set_exception(found)
                else:
                    future.set_result(found[place])

    async def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch = [await self.queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                while len(batch) < self.size and (self.queue.qsize() or self.coming()):
                    batch.append(await self.queue.get())
        return [(item, future) for item, future in batch if not future.done()]


class Service:
    """A network and what it takes to ask it; ``running`` it needs an event loop."""

    def __init__(
        self, trained: Trained, limits: Limits, max_megapixels: float | None = None
    ) -> None:
        self.trained, self.limits = trained, limits
        self.name = printable(trained.name)
        self.form = trained.preprocessing.form(max_megapixels)
        self.gate = Gate(limits)
        self.measures = Measures(lambda: self.gate.pictures)
        self.decoders = ThreadPoolExecutor(DECODERS)
        self.large_decoder = ThreadPoolExecutor(1)
        self.decoding = 0  # pictures
        self.batches = Batches(
            self._measured_look, limits.batch_size, limits.wait_ms / 1000, lambda: self.decoding
        )
        self.grid: Grid = grid(trained.model, trained.preprocessing.size)

    def warm_up(self) -> None:
        """Computes the largest batch and the smallest, which compiles what is compiled.

        To be called by the thread that has made the network: it computes no more.
        """
        end_idle_threads()
        about = self.trained.preprocessing
        blank = np.zeros((about.channels, about.size, about.size), np.uint8)
        for count in (min(self.limits.batch_size, self.limits.queue), 1):
            asked = [Asked("", blank, 1, True)] * count
            self.batches.thread.submit(self._look, asked).result()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers as long as the block lasts."""
        with limits_of_our_own():  # they belong to the process, and so are set once
            task = asyncio.create_task(self.batches.run())
            try:
                yield
            finally:
                task.cancel()
                for threads in (self.decoders, self.large_decoder, self.batches.thread):
                    threads.shutdown(wait=True, cancel_futures=True)

    async def answers(
        self, pictures: Sequence[Picture], top: int, with_heat_map: bool
    ) -> list[Answer]:
        """Answers in the order of *pictures*. ``Refused`` where there is no time or memory."""
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                work = [self._answer(picture, top, with_heat_map) for picture in pictures]
                tasks = [*map(asyncio.ensure_future, work)]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:  # where one has failed, the others are of no use
                        task.cancel()
        except TimeoutError:
            seconds = self.limits.answer_seconds
            raise busy(f"expected an answer within {seconds:g} s, found none; ask again") from None
        except (DataError, MemoryError, RuntimeError, OSError) as error:
            if not shortage(error):
                raise
            raise busy("expected more memory than is left; ask again") from error

    async def _answer(self, picture: Picture, top: int, with_heat_map: bool) -> Answer:
        try:
            pixels = await self._pixels(picture)
        except BadImage as error:
            status = 413 if isinstance(error, TooLarge) else 422
            answer = Answer(picture.name, error=str(error), status=status)
        else:
            asked = Asked(picture.name, pixels, top, with_heat_map)
            answer, heat_map = await self.batches.result(asked)
            if heat_map is not None:
                loop = asyncio.get_running_loop()
                drawn = await loop.run_in_executor(self.decoders, self._draw, heat_map)
                answer = replace(answer, heat_map=drawn)
        self.measures.pictures.labels("refused" if answer.error else "answered").inc()
        return answer

    async def _pixels(self, picture: Picture) -> np.ndarray:
        self.decoding += 1
        try:
            loop, limit = asyncio.get_running_loop(), self.form.max_megapixels
            with suppress(TooLarge):
                small = replace(self.form, max_megapixels=min(limit, LARGE_MEGAPIXELS))
                return await loop.run_in_executor(self.decoders, _decoded, picture, small)
            return await loop.run_in_executor(self.large_decoder, _decoded, picture, self.form)
        finally:
            self.decoding -= 1

    def _draw(self, heat_map: np.ndarray) -> str:
        drawn = veil(heat_map, self.grid, HEAT_MAP_PIXELS)
        return b64encode(png(drawn)).decode()

    def _measured_look(self, asked: Sequence[Asked]) -> list[Seen]:
        with self.measures.batch_seconds.time():
            seen = self._look(asked)
        self.measures.batches.observe(len(asked))
        return seen

    @torch.inference_mode()
    def _look(self, asked: Sequence[Asked]) -> list[Seen]:
        model, about = self.trained.model, self.trained.preprocessing
        pixels = torch.from_numpy(np.stack([each.pixels for each in asked]))
        images = about.normalise(pixels.to(next(model.parameters()).device))
        features = model.forward_features(images)
        logits = model.forward_head(features)  # (N, classes)
        names, top = [each.name for each in asked], max(each.top for each in asked)
        predictions = ranked(logits, names, self.trained.classes, top)
        wanted = [
            place
            for place, (each, found) in enumerate(zip(asked, predictions, strict=True))
            if each.with_heat_map and found.error is None
        ]
        labels = [self.trained.classes.index(predictions[place].classes[0]) for place in wanted]
        maps = maps_of(model, features[wanted], torch.tensor(labels, dtype=torch.int64))
        by_place = dict(zip(wanted, maps.cpu().numpy(), strict=True))
        return [
            Seen(_answer_of(found, each), by_place.get(place))
            for place, (found, each) in enumerate(zip(predictions, asked, strict=True))
        ]


def _decoded(picture: Picture, form: Form) -> np.ndarray:
    # A JPEG that is larger still is not decoded smaller, as that may take much more memory.
    return decoded_image(Example(picture.name, picture.content, 0), form, jpeg_factor=1)


def _answer_of(found: Prediction, asked: Asked) -> Answer:
    if found.error:
        return Answer(asked.name, error=found.error, status=500)
    classes, probabilities = found.classes[: asked.top], found.probabilities[: asked.top]
    return Answer(asked.name, classes, probabilities)
