"""Downloads of data sets."""

from __future__ import annotations

from pathlib import Path

from sparsenet import downloads
from sparsenet.data.errors import DataError, reason

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def download(url: str, target: Path, md5: str, timeout: float = 30.0) -> Path:
    """Fetches *url* into *target* by ``sparsenet.downloads.download``.

    Raises ``DataError``, also for a file with another MD5.
    """
    try:
        return downloads.download(url, target, f"md5={md5}", timeout=timeout)
    except downloads.ChecksumError as error:
        raise DataError(f"--download: {error}; run again") from error
    except (OSError, downloads.DownloadError) as error:
        remedy = f"run again to resume, or put {target.name} into --dataset_dir"
        raise DataError(f"--download: expected {url}, found {reason(error)}: {remedy}") from error
