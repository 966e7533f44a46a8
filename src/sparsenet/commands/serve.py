"""``sparsenet serve``."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from urllib.parse import urlsplit

import torch

from sparsenet.commands.common import load_network
from sparsenet.device import choose_device
from sparsenet.display import say, warn
from sparsenet.extras import require
from sparsenet.serving.app import LOOPBACK, create_app
from sparsenet.serving.limits import Limits
from sparsenet.serving.server import address_of, listening, serve
from sparsenet.serving.service import Service
from sparsenet.signals import Signals


def run(args: argparse.Namespace) -> int:
    """Serves a network until it is asked to end; returns 0 once all is answered."""
    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        require(package, "serve")  # before anything takes time
    leave_a_core()
    limits = Limits(**{each.name: getattr(args, each.name) for each in fields(Limits)})
    with Signals() as signals, listening(args.host, args.port) as listener:
        trained = load_network(args, choose_device(args.device))
        service = Service(trained, limits, args.max_megapixels)
        service.warm_up()
        address, is_local = address_of(listener)
        own = (*LOOPBACK, args.host.lower(), urlsplit(address).netloc.rpartition(":")[0])
        hosts = args.allowed_hosts or (own if is_local else ("*",))

        def ready() -> None:
            say(f"{service.name} answers at {address}; Ctrl-C ends it", flush=True)

        def complain(line: str) -> None:
            warn(f"sparsenet serve: {line}")

        serve(create_app(service, hosts), listener, limits, signals.received, ready, complain)
    return 0


def leave_a_core() -> None:
    """Leaves a core to the threads that receive and decode.

    Threads of one computation wait for each other: where one of them has no core, all take many
    times as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
