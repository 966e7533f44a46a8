"""Declares the operators that torchvision's Python registers shapes for, when it is imported.

There may be no build of torchvision that fits this PyTorch. What timm and others need of it is its
Python alone, which can then be imported from a wheel that was installed without dependencies.
"""

import torch

_declared = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
