"""Where the time of a training step goes: its kernels by their time, from PyTorch's profiler.

    python -m benchmarks.steps VARIANT... [--model NAME] [--batch_size N] [--image_size N]
        [--steps N] [--once]

A variant that fails is named and passed over; the exit code is then 1. With --once nothing is
profiled: one training step and one inference pass fill the compilers' caches.
"""

import argparse
import sys

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench.measure import synchronize, time_calls
from benchmarks.bench.variants import Variant
from benchmarks.bench.workload import Case, Workload
from sparsenet import zoo
from sparsenet.device import choose_device, tune_process

SHOWN = 25


def print_ceilings(device: torch.device) -> None:
    """Prints how fast the device copies and multiplies at best."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device=device).bfloat16()
    copy = min(time_calls(lambda: target.copy_(source), device, 10) for _ in range(5))
    product = min(time_calls(lambda: matrix @ matrix, device, 10) for _ in range(5))
    print(
        f"copy {2 * 4 * 2**28 / copy / 1e12:.2f} TB/s, "
        f"bf16 product {2 * 8192**3 / product / 1e12:.0f} TFLOP/s"
    )


def print_profile(work: Workload, steps: int) -> None:
    """Prints the kernels (on a CPU the operators) of a step: share, time, launches, name."""
    device = work.device
    on_cpu = device.type == "cpu"
    wall = min(time_calls(work.step, device, steps) for _ in range(3))
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            work.step()
        synchronize(device)
    kind = DeviceType.CPU if on_cpu else DeviceType.CUDA
    time = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    events = [
        (getattr(event, time) / steps / 1e3, event)
        for event in profiler.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    total = sum(milliseconds for milliseconds, _ in events) or 1.0
    launches = sum(event.count for _, event in events) / steps
    print(
        f"\n{work.variant}: {1e3 * wall:.3f} ms a step; "
        f"profiled {total:.3f} ms in {launches:.0f} launches\n"
    )
    events.sort(key=lambda pair: -pair[0])
    for ms, event in events[:SHOWN]:
        print(f"{ms / total:6.1%} {ms:9.4f} ms {event.count / steps:7.1f}  {event.key[:110]}")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("variants", nargs="+", type=Variant.parse)
    parser.add_argument("--model", default="sparsenet_100_24")
    parser.add_argument("--once", action="store_true")
    for name, default in (("batch_size", 64), ("image_size", 32), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tune_process()
    device, code = choose_device("auto"), 0
    if device.type == "cuda" and not args.once:
        print_ceilings(device)
    network = zoo.architecture(args.model)
    for variant in args.variants:
        try:
            work = Workload(variant, Case(network, args.batch_size, args.image_size, device))
            work.set_training(True)
            work.warm_up(work.step)
            if args.once:
                work.set_training(False)
                work.infer()
            else:
                print_profile(work, args.steps)
        except (RuntimeError, ValueError) as error:
            code = 1
            print(f"\n{variant}: failed: {error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
