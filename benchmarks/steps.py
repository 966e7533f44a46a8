"""Where the time of a training step goes: its kernels by their seconds on the device, from PyTorch's profiler.

    python benchmarks/steps.py VARIANT... [--model NAME] [--batch_size N] [--image_size N] [--steps N] [--once]

A variant that fails is told and passed over; the exit code is then 1. With --once nothing is profiled: one training
step and one inference pass are made, which leaves what compiling them gave in the compilers' caches.
"""

import argparse
import sys

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench.measure import seconds, wait
from benchmarks.bench.variants import Variant, Workload
from sparsenet import zoo
from sparsenet.device import choose_device, tune_process

SHOWN = 25


def ceilings(device: torch.device) -> None:
    """What the device can do: the rates of a large copy and of a large product, the best of five."""
    source, matrix = (
        torch.randn(2**28, device=device),
        torch.randn(8192, 8192, device=device).bfloat16(),
    )
    target = torch.empty_like(source)
    acts = (lambda: target.copy_(source)), (lambda: matrix @ matrix)
    copied, multiplied = (min(seconds(act, device, 10) for _ in range(5)) for act in acts)
    print(
        f"copy {2 * 4 * 2**28 / copied / 1e12:.2f} TB/s, bf16 product {2 * 8192**3 / multiplied / 1e12:.0f} TFLOP/s"
    )


def profiled(work: Workload, steps: int) -> None:
    """The kernels of a training step (on a CPU its operators): share, milliseconds and launches a step, name."""
    device, own = work.device, DeviceType.CPU if work.device.type == "cpu" else DeviceType.CUDA
    wall = min(seconds(work.step, device, steps) for _ in range(3))
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as found:
        for _ in range(steps):
            work.step()
        wait(device)
    time = "self_cpu_time_total" if own == DeviceType.CPU else "self_device_time_total"
    events = [
        (getattr(event, time) / steps / 1e3, event)
        for event in found.key_averages()
        if event.device_type == own
        and not getattr(event, "is_user_annotation", False)  # a span of other events
    ]
    total = sum(ms for ms, _ in events) or 1.0
    launches = sum(event.count for _, event in events) / steps
    print(
        f"\n{work.variant}: {1e3 * wall:.3f} ms a step; profiled {total:.3f} ms in {launches:.0f} launches\n"
    )
    for ms, event in sorted(events, key=lambda each: -each[0])[:SHOWN]:
        print(f"{ms / total:6.1%} {ms:9.4f} ms {event.count / steps:7.1f}  {event.key[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", type=Variant.parse)
    parser.add_argument("--model", default="sparsenet_100_24")
    parser.add_argument("--once", action="store_true")
    for name, default in (("batch_size", 64), ("image_size", 32), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tune_process()
    device, failed = choose_device("auto"), 0
    if device.type == "cuda" and not args.once:
        ceilings(device)
    for variant in args.variants:
        try:
            work = Workload(
                variant, zoo.architecture(args.model), args.batch_size, args.image_size, device
            )
            work.mode(training=True)
            work.settle(work.step)
            if args.once:
                work.mode(training=False)
                work.infer()
            else:
                profiled(work, args.steps)
        except (RuntimeError, ValueError) as error:
            failed = 1
            print(f"\n{variant}: failed: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
