"""What a user would write instead of our networks: two ResNets in plain PyTorch, channels-last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAYOUT = torch.channels_last


class ChannelsLast(nn.Module):
    """Lays images out as the convolutions here read them fastest."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(memory_format=_LAYOUT)


class Residual(nn.Module):
    """The sum of a body and of a shortcut past it, with a ReLU behind it on request."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, relu: bool):
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, relu

    def forward(self, images: Tensor) -> Tensor:
        summed = self.shortcut(images) + self.body(images)
        return F.relu(summed) if self.relu else summed


class Scale(nn.Module):
    """A product with a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * features


def resnet20(classes: int, strided: bool = False) -> nn.Module:
    """ResNet-20 for CIFAR-10 (arXiv:1512.03385, section 4.2), with projections as shortcuts."""
    parts: list[nn.Module] = [ChannelsLast(), _stem(16, strided)]
    width = 16
    for out in (16, 32, 64):
        for _ in range(3):
            stride = out // width
            body = nn.Sequential(
                _unit(width, out, stride=stride), _convolution(out, out), nn.BatchNorm2d(out)
            )
            shortcut: nn.Module = nn.Identity()
            if stride > 1:
                projection = _convolution(width, out, 1, stride)
                shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))
            parts.append(Residual(body, shortcut, relu=True))
            width = out
    network = nn.Sequential(
        *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network.to(memory_format=_LAYOUT)  # type: ignore[call-overload,no-any-return]


def resnet9(classes: int, strided: bool = False) -> nn.Module:
    """The ResNet-9 of David Page's DAWNBench entries ("How to train your ResNet", 2018)."""

    def residual(width: int) -> nn.Module:
        body = nn.Sequential(_unit(width, width), _unit(width, width))
        return Residual(body, nn.Identity(), relu=False)

    def halved(width: int, out: int) -> nn.Module:
        return nn.Sequential(_unit(width, out), nn.MaxPool2d(2))

    network = nn.Sequential(
        ChannelsLast(),
        _stem(64, strided),
        nn.Sequential(halved(64, 128), residual(128)),
        halved(128, 256),
        nn.Sequential(halved(256, 512), residual(512)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes, bias=False),
        Scale(0.125),
    )
    return network.to(memory_format=_LAYOUT)  # type: ignore[call-overload,no-any-return]


PLAIN: dict[str, Callable[[int], nn.Module]] = {  # by the number of classes
    "resnet20": resnet20,
    "resnet20_strided": lambda classes: resnet20(classes, strided=True),
    "resnet9": resnet9,
    "resnet9_strided": lambda classes: resnet9(classes, strided=True),
}


def _stem(out: int, strided: bool) -> nn.Module:
    """A unit, or for larger images that of ResNets for ImageNet, which quarters their side."""
    if not strided:
        return _unit(3, out)
    return nn.Sequential(_unit(3, out, 7, 2), nn.MaxPool2d(3, 2, 1))


def _unit(width: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    convolution = _convolution(width, out, kernel, stride)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def _convolution(width: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    return nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
