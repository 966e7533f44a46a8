"""The names of the implementations, and the modules that offer them. Nothing here needs PyTorch."""

from __future__ import annotations

# Each module offers what ``dispatch.Implementation`` lists; it is loaded when first asked for.
IMPLEMENTATIONS = {
    "reference": "sparsenet.ops.reference",
    "shared": "sparsenet.ops.shared",
    "native": "sparsenet.ops.native",
    "triton": "sparsenet.ops.triton",
}
# Kernels that a tracer (torch.compile, torch.export) cannot look into.
OPAQUE = ("native", "triton")
CHANNELS_LAST = ("native", "triton")  # whose features lie so
MEMORY = ("normal", "lean")  # what is kept for the backward pass: see SparseNet
