"""The processes that train one network together, and what they tell each other.

Who starts them (torchrun, srun, Kubernetes) says by environment variables which one this is.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sparsenet.ops.synchronised import UnreachableError

T = TypeVar("T")

READING_TIMEOUT = timedelta(days=1)  # with others that read or decode their images
SIGNS = 3.0  # seconds in which those that still run say so, or why they do not


class LostError(RuntimeError):
    """Another process failed or gives no sign."""

    def __init__(self, message: str):
        super().__init__(message)
        _lost.add(message)


@dataclass(frozen=True)
class Ranks:
    """This process, *rank*, of *size* that train together; by default it is alone."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False)  # which all can write to and read
    control: Any = field(default=None, repr=False)  # the group that tensors on CPUs go through
    patient: Any = field(default=None, repr=False)  # the same, with ``READING_TIMEOUT``

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> Tensor:
        """The positions of this process in a batch of *count* images, ascending, int64.

        With each position *p* it has ``count - 1 - p``, the one that ``mix`` pairs it with. A batch
        with fewer pairs than processes is computed whole by each.
        """
        pairs = count // 2
        if pairs < self.size:
            return torch.arange(count)
        first, end = (pairs * number // self.size for number in (self.rank, self.rank + 1))
        middle = torch.arange(pairs, count - pairs if self.rank == self.size - 1 else pairs)
        return torch.cat(
            [torch.arange(first, end), middle, torch.arange(count - end, count - first)]
        )

    def shares(self, count: int) -> tuple[float, float]:
        """What means and sums over this process's part count in those over *count* images."""
        if self.size == 1:
            return 1.0, 1.0
        copies = self.size if count // 2 < self.size else 1
        return len(self.part(count)) / count / copies, 1 / copies

    def piece(self, count: int) -> slice:
        """The images of this process in a pass over *count* that are evaluated once each."""
        first, end = (count * number // self.size for number in (self.rank, self.rank + 1))
        return slice(first, end)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces floating-point *tensors*, on one device, by their sums over all processes."""
        if self.size == 1 or not tensors:
            return
        wide = [tensor.float() if tensor.element_size() < 4 else tensor for tensor in tensors]
        flat = torch.cat([tensor.flatten() for tensor in wide])
        with self.talking(RuntimeError):
            torch.distributed.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        views = [each.view(tensor.shape) for each, tensor in zip(sums, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), views)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Replaces *tensors* by those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            whole = tensor.contiguous()
            with self.talking(RuntimeError):
                torch.distributed.broadcast(whole, 0)
            if whole is not tensor:
                tensor.copy_(whole)

    def tell(self, value: T) -> T:
        """The *value* of the first process; those of the others are not looked at."""
        return self.gather(value, patient=True)[0]

    def gather(self, value: T, patient: bool = False) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.talking(RuntimeError):
            group = self.patient if patient else self.control
            torch.distributed.all_gather_object(values, value, group=group)
        return values

    def words(self, word: str | None) -> list[str]:
        """What any process has to say, which mostly is nothing; the same list for all."""
        if self.size == 1:
            return [word] if word else []
        flag = torch.tensor([int(bool(word))])
        with self.talking(RuntimeError):
            torch.distributed.all_reduce(flag, group=self.control)
        return [each for each in self.gather(word) if each] if flag.item() else []

    def look(self) -> None:
        """Raises ``LostError`` where another process says that it failed."""
        if self.size == 1:
            return
        with self.talking(RuntimeError):
            if self.store.check(["failed"]):
                raise RuntimeError("it failed")

    def stopped(self, asked: str | None = None) -> str | None:
        """Why this process is *asked* to stop, or another one was that has called this.

        ``None`` where one failed: launchers stop the others then, and the failure is to be said.
        """
        if self.size == 1:
            return asked

        def ask() -> str | None:
            if asked:
                self.store.set("stopped", asked)
            if self.store.check(["failed"]):
                return None
            return self.store.get("stopped").decode() if self.store.check(["stopped"]) else None

        return _asked(ask, asked)

    @contextmanager
    def talking(self, kind: type[Exception] = UnreachableError) -> Iterator[None]:
        """Raises ``LostError`` for errors of this *kind*: another process does not answer."""
        try:
            yield
        except kind as error:
            raise LostError(self._cause(error)) from None

    def _cause(self, error: Exception) -> str:
        """Why processes no longer hear each other: what another one said, or who is silent."""
        nothing: tuple[str, list[int]] = "", []
        said, silent = _asked(self._signs, nothing)
        if said:
            return said
        who = f"rank {', '.join(map(str, silent))}" if silent else "another process"
        found = f"{who} that was killed, hangs or cannot be reached ({_first_words(error)})"
        return f"rank {self.rank}: expected the {self.size} processes of the run, found {found}"

    def _signs(self) -> tuple[str, list[int]]:
        """What a process said that failed, and who says nothing."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.store.set("said" if self.is_first else f"alive/{self.rank}", "")
        failed = _wait_for(lambda: [r for r in others if self.store.check([f"error/{r}"])])
        said = (
            f"rank {failed[0]}: {self.store.get(f'error/{failed[0]}').decode()}" if failed else ""
        )
        signs = {rank: f"alive/{rank}" if rank else "said" for rank in others}
        return said, [rank for rank, sign in signs.items() if not self.store.check([sign])]


def _asked(ask: Callable[[], T], otherwise: T) -> T:
    """What *ask* finds in the store, which may be gone or frozen with the process that holds it."""
    found = [otherwise]

    def work() -> None:
        with suppress(RuntimeError):
            found[0] = ask()

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(2 * SIGNS)
    return found[0]


def _wait_for(find: Callable[[], T]) -> T:
    """What *find* finds, at the latest after ``SIGNS`` seconds."""
    end = time.monotonic() + SIGNS
    while not (found := find()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _first_words(error: Exception) -> str:
    """What an error of PyTorch says, without the place in its source and its advice."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"\[[^]]*/[^]]*\] ?", "", line).split(". ")[0]


ALONE = Ranks()
_heard = threading.Event()  # that the first process says why the run ended
_lost: set[str] = set()  # what ``LostError`` said
_joined = ALONE  # for ``is_said``, which is asked when the run has ended


def have_joined() -> bool:
    """Whether this process has met others."""
    return _joined.size > 1


def started_by_others() -> bool:
    """Whether this process is one of several, as its environment says."""
    return _number("WORLD_SIZE", 1) > 1


def local_processes() -> int:
    """How many processes torchrun has started on this machine; 1 where nobody says."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, least: int) -> int:
    """What a launcher says by the variable *name*; *least* where it says nothing."""
    found = os.environ.get(name, str(least))
    if not found.isdecimal() or int(found) < least:
        expected = f"{name}: expected a number of {least} or more, which launchers set"
        raise ValueError(f"{expected}, found {found!r}; unset it for one process")
    return int(found)


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """Meets the other processes, with a device of its own where there are accelerators.

    *timeout* is in seconds. Raises ``ValueError`` where a machine has fewer accelerators than
    processes, and ``LostError`` where the others do not come.
    """
    global _joined
    if not started_by_others():
        yield ALONE
        return
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if rank >= size:
        raise ValueError(f"RANK: expected one below WORLD_SIZE, {size}, found {rank}")
    _choose_accelerator(_number("LOCAL_RANK", 0))
    from torch.distributed import distributed_c10d

    dist = torch.distributed
    store, restarts = _agent_store(), os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    known: dict[str, Any] = {}
    if store is not None:  # which still holds the addresses of processes that were killed
        own = distributed_c10d.PrefixStore(f"{restarts}/{size}", store)
        known = {"store": own, "world_size": size, "rank": rank}
    try:
        dist.init_process_group(timeout=timedelta(seconds=timeout), **known)
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        patient = dist.new_group(backend="gloo", timeout=READING_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        expected = f"expected {size} processes that reach each other"
        raise LostError(f"{expected}, found: {_first_words(error)}") from None
    store = distributed_c10d.PrefixStore("sparsenet", distributed_c10d._get_default_store())
    _joined = Ranks(dist.get_rank(), dist.get_world_size(), store, control, patient)
    if not _joined.is_first:
        threading.Thread(target=_listen, args=(_joined,), daemon=True).start()
    try:
        yield _joined
    finally:  # so that others that wait for this one learn that it ended
        # That torchrun sends when another has ended: this one may be about to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _choose_accelerator(local_rank: int) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ValueError(
            f"expected at most {count} processes on a machine, one for each device of type "
            f"{accelerator.type}, found {local_rank + 1}"
        )
    torch.accelerator.set_device_index(local_rank)


def is_said(message: str) -> bool:
    """Whether the first process says why the run ended, so that this one need not.

    It is told *message*, unless that only says that others were lost.
    """
    return _joined.size > 1 and _asked(lambda: _tell_and_ask(_joined, message), False)


def _tell_and_ask(joined: Ranks, message: str) -> bool:
    if joined.is_first:
        joined.store.set(f"error/{joined.rank}", message)
        joined.store.set("failed", "")
        joined.store.set("said", "")
        others = [f"heard/{other}" for other in range(1, joined.size)]
        _wait_for(lambda: joined.store.check(others))  # this process may hold the store
        return False
    if message in _lost:
        return _wait_for(_heard.is_set)
    joined.store.set(f"error/{joined.rank}", message)
    joined.store.set("failed", "")
    return True


def _listen(joined: Ranks) -> None:
    """Waits until the first process says why the run ended: later the store may be gone."""
    with suppress(RuntimeError):
        while not joined.store.check(["said"]):
            time.sleep(0.5)
        _heard.set()
        joined.store.set(f"heard/{joined.rank}", "")


def previous_out(asked: str | None) -> str | None:
    """The run folder of the same command before a launcher started it again, if one did.

    *asked* is the folder that the command names.
    """
    store = _agent_store()
    if store is not None:
        return cast(str, store.get("out").decode()) if store.check(["out"]) else None
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT"))
    return asked if int(restarts or 0) else None


def remember_out(path: str) -> None:
    """Keeps the run folder for when torchrun starts the command again."""
    if store := _agent_store():
        store.set("out", path)


def _agent_store() -> Any:
    """What torchrun keeps while it starts processes again; ``None`` for other launchers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import distributed_c10d

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=60)
    store: Any = torch._C._distributed_c10d.TCPStore(address, port, is_master=False, timeout=wait)
    return distributed_c10d.PrefixStore("sparsenet/run", store)
