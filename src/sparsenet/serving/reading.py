"""From a request's body to pictures, within limits that hold while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from sparsenet.files import size_text
from sparsenet.serving.limits import Limits, Refused
from sparsenet.serving.service import Picture
from sparsenet.texts import one_line
from sparsenet.validation import LONGEST_NAME, Name

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.requests import Request

FIELDS = 100  # of a form that are read until it is refused
MOST_QUOTES = LONGEST_NAME + 10  # of a picture in JSON, with a name of nothing else
KINDS = "expected an image, multipart/form-data or application/json"


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """A picture in JSON, ``data`` in base64."""

    data: bytes
    name: Name = ""


class Pictures(msgspec.Struct, forbid_unknown_fields=True):
    """A request in JSON."""

    images: list[bytes | Named]


def stated_size(request: Request, limits: Limits) -> int:
    """The bytes that a body says it has, or the most it may have; ``Refused`` for more."""
    size = int(request.headers.get("content-length", limits.max_bytes))
    if size > limits.max_bytes:
        raise _too_many_bytes(limits, f"{size:,} bytes")
    return size


async def read_pictures(request: Request, limits: Limits) -> list[Picture]:
    """The pictures of a form, of JSON, or of a body that is one. Raises ``Refused``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = _limited(request, limits)
    try:
        async with asyncio.timeout(limits.receive_seconds):
            if kind == "multipart/form-data":
                pictures = await _of_form(request.headers, body, limits)
            elif kind == "application/json":
                pictures = _of_json(await _joined(body), limits)
            elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
                content = await _joined(body)
                pictures = [Picture("image", content)] if content else []
            else:
                hint = "; curl: -F image=@FILE, or -H 'Content-Type: image/jpeg' with --data-binary"
                raise Refused(415, f"Content-Type: {KINDS}, found {one_line(kind)}{hint}")
    except TimeoutError:
        expected = f"expected a request within {limits.receive_seconds:g} s"
        raise Refused(408, f"{expected}, found a part of one") from None
    if not pictures:
        raise Refused(400, "expected a picture, found none")
    if len(pictures) > limits.max_images:
        raise _too_many_pictures(limits, f"{len(pictures):,}")
    return pictures


def _too_many_pictures(limits: Limits, found: str) -> Refused:
    expected = f"expected at most {limits.max_images} pictures"
    return Refused(413, f"{expected}, found {found}; send several requests")


def _too_many_bytes(limits: Limits, found: str) -> Refused:
    return Refused(413, f"expected at most {size_text(limits.max_bytes)}, found {found}")


async def _limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.max_bytes:
            raise _too_many_bytes(limits, "more")
        yield chunk


async def _joined(body: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in body])


def _of_json(body: bytes, limits: Limits) -> list[Picture]:
    # Some millions of short texts would take seconds.
    if body.count(b'"') > MOST_QUOTES * (limits.max_images + 1):
        raise _too_many_pictures(limits, "more")
    try:
        images = msgspec.json.decode(body, type=Pictures).images
    except (ValueError, RecursionError) as error:  # ValueError: also of half a surrogate pair
        expected = 'expected {"images": ["base64", {"name": "a.png", "data": "base64"}, …]}'
        status = 422 if isinstance(error, msgspec.ValidationError) else 400
        raise Refused(status, f"{expected}, found: {one_line(str(error))}") from None
    return [
        Picture(_name(image.name, number), image.data)
        if isinstance(image, Named)
        else Picture(_name("", number), image)
        for number, image in enumerate(images, 1)
    ]


async def _of_form(
    headers: Headers, body: AsyncGenerator[bytes, None], limits: Limits
) -> list[Picture]:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    class Parser(MultiPartParser):
        # Nothing is written to a disk; the second name is that of older versions.
        spool_max_size = max_file_size = limits.max_bytes + 1
        has_ended = False
        parts = 0

        def on_part_begin(self) -> None:
            super().on_part_begin()
            self.parts += 1
            if self.parts > limits.max_images + FIELDS:  # more pictures than may be, or fields
                raise _too_many_pictures(limits, "more")

        def on_end(self) -> None:
            self.has_ended = True

    parser = Parser(headers, body, max_files=limits.max_images + FIELDS, max_fields=FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"expected a form with files, found: {error.message}") from None
    if not parser.has_ended:
        raise Refused(400, "expected a form with files, found a part of one")
    pictures = []
    for number, (field, value) in enumerate(form.multi_items(), 1):
        if not isinstance(value, UploadFile):
            expected = "expected files alone, and parameters in the address such as ?top=3"
            raise Refused(422, f"{expected}, found the field {one_line(field)!r}")
        pictures.append(Picture(_name(value.filename or "", number), await value.read()))
    await form.close()
    return pictures


def _name(name: str, number: int) -> str:
    """The name of a picture, for the answer and its messages; it leads to no file."""
    return one_line(name)[:LONGEST_NAME] or f"image {number}"
