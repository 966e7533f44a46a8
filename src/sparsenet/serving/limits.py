"""What a server takes, for how long, and how it refuses the rest. Nothing here loads PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from sparsenet.validation import expect, setting

MAX_HEADERS = 1 << 14  # bytes
LARGEST_REQUESTS = 8  # as many of the largest requests are held at a time; of smaller ones more


@dataclass(frozen=True)
class Limits:
    """The settings of a server."""

    batch_size: int = setting(32, "pictures computed at a time")
    wait_ms: float = setting(2.0, "milliseconds a batch waits for pictures that are on their way")
    queue: int = setting(128, "pictures read or computed at a time; more are refused (503)")
    max_images: int = setting(16, "pictures of a request (413)")
    max_mb: float = setting(32.0, "megabytes of a request (413)")
    connections: int = setting(800, "open at a time; more are refused (503)")
    receive_seconds: float = setting(20.0, "for a request to arrive, else 408 or a closed door")
    answer_seconds: float = setting(30.0, "for its answer, else 503")
    drain_seconds: int = setting(8, "for requests that are under way when the server is to end")

    def __post_init__(self) -> None:
        expected = f"at least --max_images ({self.max_images})"
        expect(self.queue >= self.max_images, "--queue", expected, self.queue)

    @property
    def max_bytes(self) -> int:
        """Of a request's body."""
        return int(self.max_mb * 1e6)


class Refused(Exception):
    """A request that is answered with an error: its status, and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status
        self.line = line


def busy(line: str) -> Refused:
    """The refusal of what may be asked again a little later."""
    return Refused(503, line)
