"""Downloads of data sets."""

from __future__ import annotations

from pathlib import Path

from sparsenet import downloads
from sparsenet.data.errors import DataError, reason
from sparsenet.extras import require

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def download(url: str, target: Path, md5: str, timeout: float = 30.0) -> Path:
    """Fetches *url* into *target* by ``sparsenet.downloads.download``.

    Of several processes one does, and the others wait for it. Raises ``DataError``, also for a file
    with another MD5.
    """
    filelock = require("filelock", "train")
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(lock)):
            try:
                if not target.exists():
                    downloads.download(url, target, f"md5={md5}", timeout=timeout)
            finally:
                lock.unlink(missing_ok=True)  # who waits for it looks for it by its name again
        return target
    except downloads.ChecksumError as error:
        raise DataError(f"--download: {error}; run again") from error
    except (OSError, downloads.DownloadError) as error:
        remedy = f"run again to resume, or put {target.name} into --dataset_dir"
        raise DataError(f"--download: expected {url}, found {reason(error)}: {remedy}") from error
