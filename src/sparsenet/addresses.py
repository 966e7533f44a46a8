"""Files of weights at an address, fetched once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sparsenet.downloads import ChecksumError, DownloadError, download
from sparsenet.files import cache_folder, read_bytes

T = TypeVar("T")

SCHEME = "https://"
HUB = "hf://"  # of the Hugging Face hub
FILE = "model.safetensors"  # what is meant of a repository there
LIMIT = 512 * 2**20  # bytes of a file of weights, wherever it lies


def can_fetch(source: str) -> bool:
    """Whether *source* is an address that ``fetch`` takes."""
    return source.startswith((SCHEME, HUB))


def fetch(address: str, read: Callable[[Path, str], T]) -> tuple[T, Path]:
    """What *read* makes of a file and its *address*, and where in the user's cache the file lies.

    An address is ``https://…`` or ``hf://OWNER/NAME[@REVISION][/FILE]``, by default
    ``model.safetensors``, and may end in ``#sha256=HEX``. It is downloaded once, and stays in the
    cache where *read* raises nothing. Raises ``ValueError`` in one line.
    """
    url, _, fragment = _on_the_web(address).partition("#")
    checksum = fragment.lower()
    if not re.fullmatch(r"(sha256=[0-9a-f]{64})?", checksum):
        expected = "#sha256= and 64 hexadecimal digits at its end"
        raise ValueError(f"{address}: expected {expected}, found #{fragment}")
    # With what was asked for in the key, the file is of that, and with its own hash in its name, it
    # is found out when it is no longer what was downloaded.
    key = hashlib.sha256(address.encode()).hexdigest()[:32]
    folder = cache_folder() / "weights"
    for cached in folder.glob(f"{key}-*.safetensors"):
        with suppress(ValueError, OSError):
            content = read_bytes(cached, LIMIT)
            if hashlib.sha256(content).hexdigest() == cached.stem.removeprefix(f"{key}-"):
                return read(cached, address), cached
        with suppress(OSError):  # damaged meanwhile: downloaded again
            cached.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = download(url, Path(temporary) / "weights", checksum, LIMIT)
            found = read(file, address)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            return found, file.replace(folder / f"{key}-{digest}.safetensors")
    except ChecksumError as error:
        raise ValueError(f"{address}: {error}") from None
    except DownloadError as error:
        raise ValueError(f"{address}: expected a weights file, found: {error}") from None
    except OSError as error:
        raise ValueError(f"{address}: expected a writable cache, found: {error}") from None


def _on_the_web(address: str) -> str:
    """The address of a file on the Hugging Face hub as one that is downloaded.

    ``HF_ENDPOINT`` names a mirror of the hub, as it does for huggingface_hub.
    """
    if not address.startswith(HUB):
        return address
    path, _, fragment = address.removeprefix(HUB).partition("#")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not (owner and name):
        raise ValueError(f"{address}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    endpoint = os.environ.get("HF_ENDPOINT") or f"{SCHEME}huggingface.co"
    if not endpoint.startswith(SCHEME):
        expected = f"an address that begins with {SCHEME}"
        raise ValueError(f"HF_ENDPOINT: expected {expected}, found {endpoint}")
    place = f"{owner}/{name}/resolve/{revision or 'main'}/{file or FILE}"
    return f"{endpoint.rstrip('/')}/{place}" + f"#{fragment}" * bool(fragment)
