"""The tables of docs/scaling.md: what a step sends, and how long it takes on many devices.

    python -m benchmarks.scaling

prints them. Nothing here is measured but the seconds of an epoch on one device, which are those of
``results/bench`` and of the systems that the project compares itself with; the rest is counted from
the topology and computed by the formulas of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsenet.architecture import STEMS, Architecture
from sparsenet.files import read_json
from sparsenet.graph import count
from sparsenet.summary import format_duration, markdown_table
from sparsenet.zoo import architecture

NUMBER = 4  # bytes of fp32
IMAGES = 50_000  # of an epoch of CIFAR-10
EPOCHS = 300  # of the paper
DEVICES = [2**power for power in range(11)]
BATCHES = (64, 1024, 8192)
NETWORKS = {
    "SparseNet-40-12": "sparsenet_40_12",
    "SparseNet-100-24": "sparsenet_100_24",
    "SparseNet-BC-100-24": "sparsenet_bc_100_24",
    "DenseNet-100-24": "densenet_100_24",
    "sparsenet121": "sparsenet121",
    "densenet121": "densenet121",
}
RECORD = Path(__file__).parent.parent / "results" / "bench" / "cpu-xeon-first-epoch" / "bench.json"


@dataclass(frozen=True)
class Traffic:
    """What the ranks add up in a training step of a network that concatenates."""

    parameters: int
    features: int  # each with statistics of its own
    channels: int  # of all features
    readers: int  # batch norms of the textbook network
    read_channels: int  # of all readers
    reads: int  # links: features that readers gather

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return NUMBER * self.parameters

    @property
    def statistics(self) -> int:
        """Bytes of sums: in forward and in backward two a channel of a feature, and a count."""
        return 2 * NUMBER * (2 * self.channels + self.features)

    @property
    def sync_batch_norm(self) -> int:
        """Bytes of what SyncBatchNorm shares: two numbers a channel each way, and a count once."""
        return NUMBER * (2 * 2 * self.read_channels + self.readers)

    @property
    def reductions(self) -> int:
        """How often ranks wait for each other for statistics: none of a feature's can join others.

        The next feature is made of it.
        """
        return 2 * self.features


def traffic(network: Architecture) -> Traffic:
    """Counts what a step of *network* sends from the topology of its stages."""
    assert network.aggregation == "concat"  # a sum has statistics of its own
    features = [width for stage in network.stages for width in stage.unit_widths]
    reads = [
        [stage.unit_widths[feature] for feature in read]
        for stage in network.stages
        for read in stage.reads
    ]
    if (
        STEMS[network.stem].stride > 1
    ):  # the stem has a batch norm, the only reader of what it reads
        stem = network.stages[0].in_width
        features, reads = [stem, *features], [[stem], *reads]
    return Traffic(
        parameters=count(network, image_size=224)[0],
        features=len(features),
        channels=sum(features),
        readers=len(reads),
        read_channels=sum(map(sum, reads)),
        reads=sum(map(len, reads)),
    )


@dataclass(frozen=True)
class Link:
    """What joins devices, as it is assumed: seconds of one hop, and bytes a second each way."""

    name: str
    hop: float
    bandwidth: float


ETHERNET = Link("100 Gb/s Ethernet", hop=20e-6, bandwidth=12.5e9)
NVLINK = Link("NVLink-class", hop=3e-6, bandwidth=300e9)


def ring(size: float, devices: int, link: Link) -> float:
    """Seconds in which a ring of devices adds up *size* bytes."""
    share = size / devices  # of which each is sent on to the next, around twice
    return 2 * (devices - 1) * (link.hop + share / link.bandwidth)


def tree(size: float, devices: int, link: Link) -> float:
    """Seconds in which a pipelined binary tree does, up to its root and down again."""
    levels = math.ceil(math.log2(devices))
    return 2 * levels * link.hop + (2 * size / link.bandwidth if levels else 0.0)


def all_reduce(size: float, devices: int, link: Link) -> float:
    """Seconds of the faster of both, as libraries choose."""
    return min(ring(size, devices, link), tree(size, devices, link))


@dataclass(frozen=True)
class Device:
    """Seconds that one device takes for an epoch of SparseNet-100-24."""

    name: str
    epoch: float


@dataclass(frozen=True)
class Epoch:
    train_seconds: dict[str, float]


@dataclass(frozen=True)
class Row:
    variant: str
    epoch: Epoch


@dataclass(frozen=True)
class Rows:
    rows: tuple[Row, ...]


def devices() -> tuple[Device, ...]:
    """Two that were published, in the middle of their ranges, and the fastest CPU measured."""
    [cpu] = [row for row in read_json(RECORD, Rows).rows if row.variant == "native-bf16"]
    return (
        Device("one GPU, published", 65.5),
        Device("one Ascend NPU, published", 60.5),
        Device("two Xeon cores, `native` in bf16", cpu.epoch.train_seconds["median"]),
    )


@dataclass(frozen=True)
class Cluster:
    """So many devices of a kind that are joined by a link."""

    device: Device
    link: Link
    count: int

    def step(self, network: Traffic, batch: int, synchronised: bool) -> float:
        """Seconds of a step of *batch* images in all, nothing sent while something is computed."""
        largest = math.ceil(batch / self.count)  # the part that all wait for
        seconds = largest * self.device.epoch / IMAGES
        seconds += all_reduce(network.gradients, self.count, self.link)
        if synchronised and self.count > 1:
            each = network.statistics / network.reductions
            seconds += network.reductions * all_reduce(each, self.count, self.link)
        return seconds

    def efficiency(self, network: Traffic, batch: int, synchronised: bool) -> float:
        """The share of what as many devices would do that need not wait for each other."""
        alone = batch * self.device.epoch / IMAGES
        return alone / (self.count * self.step(network, batch, synchronised))


def bytes_table() -> str:
    """What a step sends, for some networks."""
    rows = []
    for name, known in NETWORKS.items():
        sent = traffic(architecture(known))
        rows.append(
            {
                "network": name,
                "parameters": f"{sent.parameters:,}",
                "gradients": f"{sent.gradients / 1e6:.2f}",
                "features": f"{sent.features:,}",
                "channels": f"{sent.channels:,}",
                "readers": f"{sent.reads / sent.features:.2f}",
                "statistics": f"{sent.statistics / 1e3:,.1f}",
                "sync": f"{sent.sync_batch_norm / 1e3:,.1f}",
                "reductions": f"{sent.reductions:,}",
            }
        )
    return markdown_table(
        rows,
        {
            "network": "network",
            "parameters": "parameters",
            "gradients": "gradients, MB",
            "features": "features",
            "channels": "channels",
            "readers": "readers of a feature",
            "statistics": "statistics once a feature, kB",
            "sync": "once a reader, kB",
            "reductions": "reductions",
        },
    )


def step_table(device: Device, link: Link) -> str:
    """Milliseconds of a step and, with synchronised statistics, the efficiency in percent."""
    network = traffic(architecture("sparsenet_100_24"))
    headings, rows = {"devices": "devices"}, []
    for batch in BATCHES:
        headings |= {
            f"{batch} own": f"batch {batch:,}, ms",
            f"{batch} all": "synchronised",
            f"{batch} share": "efficiency",
        }
    for number in DEVICES:
        cells = {"devices": f"{number:,}"}
        for batch in BATCHES:
            if number > batch:
                continue
            cluster = Cluster(device, link, number)
            for name, synchronised in (("own", False), ("all", True)):
                seconds = cluster.step(network, batch, synchronised)
                cells[f"{batch} {name}"] = f"{1e3 * seconds:,.{0 if seconds > 0.1 else 1}f}"
            share = cluster.efficiency(network, batch, True)
            cells[f"{batch} share"] = f"{100 * share:.0f} %"
        rows.append(cells)
    return markdown_table([{key: row.get(key, "") for key in headings} for row in rows], headings)


def most(device: Device, link: Link, batch: int, synchronised: bool) -> Cluster:
    """The largest cluster of a power of two that still does half of what its devices could."""
    network = traffic(architecture("sparsenet_100_24"))
    clusters = [Cluster(device, link, number) for number in DEVICES if number <= batch]
    return [c for c in clusters if c.efficiency(network, batch, synchronised) >= 0.5][-1]


def limits_table() -> str:
    """Up to how many devices it pays, and how long the paper's 300 epochs then take."""
    network = traffic(architecture("sparsenet_100_24"))
    rows = []
    for device, link in pairs():
        for batch in BATCHES:
            cells = {"device": device.name, "link": link.name, "batch": f"{batch:,}"}
            for name, synchronised in (("own", False), ("all", True)):
                cluster = most(device, link, batch, synchronised)
                steps = EPOCHS * math.ceil(IMAGES / batch)
                cells[name] = f"{cluster.count:,}"
                seconds = steps * cluster.step(network, batch, synchronised)
                cells[f"{name} time"] = format_duration(seconds)
            rows.append(cells)
    return markdown_table(
        rows,
        {
            "device": "device",
            "link": "link",
            "batch": "batch",
            "own": "devices, statistics of their own",
            "own time": "300 epochs",
            "all": "devices, synchronised",
            "all time": "300 epochs",
        },
    )


def pairs() -> Iterator[tuple[Device, Link]]:
    """The devices with the links that join them."""
    gpu, npu, cpu = devices()
    yield from ((gpu, ETHERNET), (gpu, NVLINK), (npu, ETHERNET), (npu, NVLINK), (cpu, ETHERNET))


def tables() -> Iterator[str]:
    """All tables of the page, in its order."""
    gpu, _, cpu = devices()
    yield bytes_table()
    yield step_table(gpu, ETHERNET)
    yield step_table(gpu, NVLINK)
    yield step_table(cpu, ETHERNET)
    yield limits_table()


if __name__ == "__main__":
    print("\n\n".join(tables()))
