"""Other libraries' DenseNets: their networks, and their weights, on this engine.

Nothing here imports those libraries. A module is read by what it is made of: its leaves in the order of
registration, against the grammar of a DenseNet-BC (arXiv:1608.06993) for large images,

    Conv7x7/2 BN ReLU MaxPool3x3/2  layer+ (transition layer+)*  BN [ReLU] [AvgPool [Flatten]] [Linear]
    layer = BN ReLU Conv1x1 BN ReLU Conv3x3        transition = BN ReLU Conv1x1 AvgPool2x2/2

and what leaves cannot show, how ``forward`` joins them, is compared in numbers.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.ops.plan import EPS, MOMENTUM

NORM = {"eps": EPS, "momentum": MOMENTUM, "affine": True, "bias": True, "track_running_stats": True}
CONV = {"dilation": 1, "groups": 1, "bias": False, "padding_mode": "zeros"}
MAX_POOL = {
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
AVERAGE_POOL = {
    "kernel_size": 2,
    "stride": 2,
    "padding": 0,
    "ceil_mode": False,
    "divisor_override": None,
}
HEAD: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.ReLU, {}), (nn.AdaptiveAvgPool2d, {"output_size": 1}), (nn.Flatten, {"start_dim": 1, "end_dim": -1}),
)  # fmt: skip
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
TOLERANCE = 1e-8  # of a probe in fp64, relative to the largest value: far above rounding, far below any difference
WIDTHS = ", for layers of a stage add as much as its first, bottlenecks have one factor and transitions halve"

# Of a convolution or the classifier, and of the batch norm beside it; pairs in order of execution.
Names = list[tuple[str, str]]


def adopt(model: nn.Module, implementation: str = "auto", memory: str = "normal") -> SparseNet:
    """The same network on this engine: a torchvision, timm or MONAI (2-D) DenseNet, weights included.

    Takes images ``(N, in_chans, H, W)`` to the same logits (pooled features without a classifier), in evaluation
    and in training. Tensors are copied and *model* is left as it is, so an optimizer must be made anew; dtype,
    device, training mode and each parameter's ``requires_grad`` are kept. Checkpointing (``memory_efficient``) is
    dropped: this engine recomputes by itself. It also updates some running statistics twice a step there. Where
    readers of a feature disagree on its statistics they are kept as by :func:`load_torchvision`: evaluation is
    the same, training not quite, and a ``UserWarning`` says so.

    Raises ``ValueError`` naming the first submodule that this library cannot represent (dropout other than 0
    among them, which here follows every convolution), or saying that ``forward`` does something else than the
    submodules show.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"adopt: expected a torch.nn.Module, found {type(model).__name__}")
    architecture, names = _read(model)
    device, dtype = _check_uniform(model)
    # Neither the caller's random state changes, nor do the caller's device and gradient mode matter.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        _check_behaviour(model, architecture, names)
        adopted = SparseNet(architecture, implementation, memory).to("cpu", torch.float64)
        theirs = {
            name: value.detach().to("cpu", torch.float64)
            for name, value in model.state_dict().items()
        }
        _load(adopted, names, theirs, "adopt", WIDTHS)
        _warn_of_absorbed(adopted, names, theirs)
        adopted = adopted.to(device, dtype)
    for place, name, _ in _parameters(adopted, names):
        adopted.get_parameter(place).requires_grad_(model.get_parameter(name).requires_grad)
    return adopted.train(model.training)


def load_torchvision(model: SparseNet, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the state dict of torchvision's DenseNet of the same shape; evaluation gives the same logits.

    torchvision keeps running statistics per reader. Here they belong to the feature: the first reader's are
    kept, and where another reader's differ its scale and shift absorb the difference, exactly. Raises
    ``ValueError`` naming a weight that is missing, left over, or of another shape.
    """
    found = model.architecture
    dense = all(stage.topology.is_dense for stage in found.stages)
    if not dense or found.aggregation != "concat" or found.stem != "imagenet":
        raise ValueError(
            "torchvision weights: expected a densely concatenating network with stem 'imagenet', found fetch "
            f"{found.fetch!r}, aggregation {found.aggregation!r}, stem {found.stem!r}"
        )
    theirs = {
        re.sub(r"(norm|conv)\.(\d)\.", r"\1\2.", name): value for name, value in state_dict.items()
    }
    names = [("features.conv0", "features.norm0")]
    for s, stage in enumerate(found.stages, start=1):
        for layer in range(1, stage.topology.depth + 1):
            prefix = f"features.denseblock{s}.denselayer{layer}."
            names += [
                (f"{prefix}conv{unit}", f"{prefix}norm{unit}")
                for unit in range(1, len(stage.branch) + 1)
            ]
        names.append((f"features.transition{s}.conv", f"features.transition{s}.norm"))
    names[-1] = ("classifier", "features.norm5")
    _load(model, names, theirs, "torchvision weights")


def _read(model: nn.Module) -> tuple[Architecture, Names]:
    """The architecture that *model* is made of, and its names of weights and batch norms; ``ValueError``."""
    leaves = _Leaves(model)
    stem, stem_conv = leaves.conv(7, stride=2)
    names = [(stem, leaves.norm())]
    leaves.take(nn.ReLU)
    leaves.take(nn.MaxPool2d, **MAX_POOL)
    stages: list[list[tuple[int, int]]] = [[]]  # widths of each layer's convolutions
    while leaves.hold(nn.Conv2d):
        norm, _, (name, narrow) = leaves.norm(), leaves.take(nn.ReLU), leaves.conv(1)
        names.append((name, norm))
        if leaves.next_is(nn.BatchNorm2d):
            norm, _, (name, wide) = leaves.norm(), leaves.take(nn.ReLU), leaves.conv(3)
            names.append((name, norm))
            stages[-1].append((narrow.out_channels, wide.out_channels))
        else:
            leaves.take(nn.AvgPool2d, **AVERAGE_POOL)
            stages.append([])
    norm, linear = leaves.norm(), leaves.head()
    names.append((linear[0] if linear else "", norm))
    if not all(stages):
        raise ValueError(
            f"adopt: expected layers before and after each transition, found {[len(s) for s in stages]}"
        )
    rates = tuple(layers[0][1] for layers in stages)
    architecture = Architecture(
        fetch="dense",
        blocks=tuple(len(layers) for layers in stages),
        growth_rate=rates[:1] if len(set(rates)) == 1 else rates,
        bottleneck=True,
        bottleneck_factor=stages[0][0][0] // rates[0],
        stem="imagenet",
        stem_width=stem_conv.out_channels,
        in_chans=stem_conv.in_channels,
        num_classes=linear[1].out_features if linear else 0,
    )
    return architecture, names


class _Leaves:
    """The leaves of a module in the order of registration, taken one at a time; what does nothing is left out."""

    def __init__(self, model: nn.Module):
        # A batch norm may hold its activation, as timm's do: it comes first, then what it holds.
        named = model.named_modules(remove_duplicate=False)
        self.left = deque(
            (name, module)
            for name, module in named
            if _is_leaf(module) and not _does_nothing(module)
        )

    def next_is(self, kind: type[nn.Module]) -> bool:
        return bool(self.left) and isinstance(self.left[0][1], kind)

    def hold(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for _, module in self.left)

    def take(self, kind: type[nn.Module], **expected: Any) -> tuple[str, Any]:
        """Name and module of the next leaf; ``ValueError`` if it is not of *kind* with the settings *expected*."""
        if not self.left:
            raise ValueError(f"adopt: expected {kind.__name__}, found no more submodules")
        name, module = self.left.popleft()
        # Subclasses compute something else, but for batch norms with an activation, whose behaviour is compared.
        if type(module) is not kind and not (kind is nn.BatchNorm2d and isinstance(module, kind)):
            raise ValueError(
                f"adopt: {name or 'model'}: expected {kind.__name__}, found {_described(module)}"
            )
        for setting, value in expected.items():
            found = _setting(module, setting)
            if found != value:
                raise ValueError(
                    f"adopt: {name}: expected {kind.__name__} with {setting}={value}, found {found}"
                )
        return name, module

    def norm(self) -> str:
        return self.take(nn.BatchNorm2d, **NORM)[0]

    def conv(self, kernel: int, stride: int = 1) -> tuple[str, nn.Conv2d]:
        return self.take(nn.Conv2d, kernel_size=kernel, stride=stride, padding=kernel // 2, **CONV)

    def head(self) -> tuple[str, nn.Linear] | None:
        """The classifier, if there is one, and the end; libraries may activate, pool and flatten in ``forward``."""
        for kind, settings in HEAD:
            if self.next_is(kind):
                self.take(kind, **settings)
        linear = self.take(nn.Linear, bias=True) if self.next_is(nn.Linear) else None
        if self.left:
            name, module = self.left[0]
            raise ValueError(
                f"adopt: {name}: expected average pooling and one Linear at the end, found {_described(module)}"
            )
        return linear


def _is_leaf(module: nn.Module) -> bool:
    owned = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(owned) or next(module.children(), None) is None


def _does_nothing(module: nn.Module) -> bool:
    return type(module) in (nn.Identity, nn.Sequential) or (_is_dropout(module) and not module.p)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def _described(module: nn.Module) -> str:
    if next(module.children(), None) is not None:
        return f"{type(module).__name__} with parameters or buffers of its own"
    return " ".join(repr(module).split()) + " (p=0 would do)" * _is_dropout(module)


def _setting(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if name == "bias":
        return value is not None
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _check_uniform(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The one device and floating type of *model*; ``ValueError`` for what a copy of its tensors would lose."""
    for name, module in model.named_modules():
        place = f"adopt: {name or 'model'}: expected"
        rate = getattr(module, "drop_rate", 0)
        if isinstance(rate, int | float) and rate:
            raise ValueError(
                f"{place} drop_rate=0 (dropout here follows every convolution or none), found {rate}"
            )
        if any(getattr(module, kind) for kind in HOOKS):
            raise ValueError(f"{place} no hooks, found some; remove them first")
        if module.training != model.training:
            raise ValueError(
                f"{place} one mode for all submodules, found both; call train() or eval() first"
            )
    if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        raise ValueError(
            "adopt: expected parameters of their own for each submodule, found shared ones"
        )
    kinds = {
        (value.device, value.dtype)
        for value in model.state_dict().values()
        if value.is_floating_point()
    }
    device, dtype = next(iter(kinds))
    if len(kinds) > 1 or device.type == "meta":
        found = " and ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(f"adopt: expected values of one type on one device, found {found}")
    return device, dtype


def _check_behaviour(model: nn.Module, architecture: Architecture, names: Names) -> None:
    """``ValueError`` unless a copy of *model* with random weights computes what the architecture says.

    In fp64, outputs and gradients with respect to the input: in evaluation, with statistics that differ between
    the readers of a feature, and in training. The model's own weights could hide a difference, as the zeros of
    a new classifier would. Images are so wide that each pooling meets an odd number.
    """
    torch.default_generator.manual_seed(0)
    peer = copy.deepcopy(model).to("cpu", torch.float64)
    twin = SparseNet(architecture, "reference").to("cpu", torch.float64)
    size = 2 ** (len(architecture.blocks) + 1), 2 ** (len(architecture.blocks) + 3) - 5
    images = torch.randn(2, architecture.in_chans, *size, dtype=torch.float64)
    for training in (False, True):
        _randomise(peer, agree=training)
        _load(twin, names, peer.state_dict(), "adopt", WIDTHS)
        pairs = zip(
            _response(twin.train(training), images),
            _response(peer.train(training), images),
            strict=True,
        )
        for what, (ours, theirs) in zip(("outputs", "input gradients"), pairs, strict=True):
            if (
                ours.shape != theirs.shape
                or not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
            ):
                raise ValueError(
                    f"adopt: expected {type(model).__name__} to compute the DenseNet that its submodules make, found "
                    f"other {what} in {'training' if training else 'evaluation'}: its forward does something else"
                )


def _randomise(model: nn.Module, agree: bool) -> None:
    """Random weights; running statistics that *agree* between the readers of a feature, or random ones."""
    for name, value in model.state_dict().items():
        if agree and "running" in name:
            nn.init.constant_(value, float("var" in name))
        elif value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if value.dim() < 2 else nn.init.kaiming_normal_(value)


def _response(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and gradients of the sum of their squares with respect to *images*."""
    images = images.clone().requires_grad_()
    try:
        outputs = model(images)
        return outputs, torch.autograd.grad(outputs.square().sum(), images)[0]
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"adopt: expected {type(model).__name__} to take images of {list(images.shape)} to one differentiable "
            f"tensor, found {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None


def _warn_of_absorbed(model: SparseNet, names: Names, theirs: Mapping[str, Tensor]) -> None:
    changed = [
        name
        for place, name, _ in _parameters(model, names)
        if not torch.allclose(model.get_parameter(place), theirs[name], rtol=0.01, atol=0.01)
    ]
    if changed:
        warnings.warn(
            f"adopt: running statistics of a feature differ between its readers; {changed[0]} and {len(changed) - 1} "
            "more were changed so that evaluation stays equal, and outputs in training differ by as much",
            stacklevel=3,
        )


def _places(architecture: Architecture) -> Names:
    """Our names of what *Names* lists of theirs."""
    places = [("stem.0", "stem.1")]
    stages = architecture.stages
    for s, stage in enumerate(stages):
        units = [
            f"stages.{s}.layers.{i}.{u}"
            for i in range(stage.topology.depth)
            for u in range(len(stage.branch))
        ]
        places += [(f"{unit}.conv", f"{unit}.norm") for unit in units]
        places.append(
            ("classifier" if s + 1 == len(stages) else f"transitions.{s}.conv", f"stages.{s}.norm")
        )
    return places


def _parameters(model: SparseNet, names: Names) -> Iterator[tuple[str, str, torch.Size]]:
    """Our name, their name and the shape of every parameter."""
    for ours, theirs in zip(_places(model.architecture), names, strict=True):
        for place, name in zip(ours, theirs, strict=True):
            for part, parameter in model.get_submodule(place).named_parameters():
                yield f"{place}.{part}", f"{name}.{part}", parameter.shape


def _load(
    model: SparseNet, names: Names, theirs: Mapping[str, Tensor], what: str, why: str = ""
) -> None:
    """Loads tensors that go by *names* into *model*; ``ValueError`` before anything is changed."""
    take = _Taker(
        {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")},
        what,
        why,
    )
    ours = {place: take(name, shape) for place, name, shape in _parameters(model, names)}
    norms = (
        (place, name)
        for (_, place), (_, name) in zip(_places(model.architecture), names, strict=True)
    )
    stem, name = next(norms)
    for part in ("running_mean", "running_var"):
        ours[f"{stem}.{part}"] = take(f"{name}.{part}", ours[f"{stem}.weight"].shape)
    ours[f"{stem}.num_batches_tracked"] = torch.tensor(0)
    for s, stage in enumerate(model.architecture.stages):
        readers = zip(stage.reads, islice(norms, len(stage.reads)), strict=True)
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # mean and variance of each feature
        for read, (place, name) in readers:
            _share_statistics(
                take, ours, place, name, kept, {j: stage.unit_widths[j] for j in read}
            )
        for j, (mean, var) in kept.items():
            (
                ours[f"stages.{s}.statistics.{j}.running_mean"],
                ours[f"stages.{s}.statistics.{j}.running_var"],
            ) = mean, var
    if take.left:
        raise ValueError(f"{what}: this network has no place for {sorted(take.left)[0]!r}")
    model.load_state_dict(ours)


def _share_statistics(
    take: _Taker,
    ours: dict[str, Tensor],
    place: str,
    name: str,
    kept: dict[int, tuple[Tensor, Tensor]],
    widths: dict[int, int],
) -> None:
    """Makes a reader use the statistics *kept* of the features that it reads, or keeps its own where there are none."""
    mean, var = (
        take(f"{name}.{part}", ours[f"{place}.weight"].shape)
        for part in ("running_mean", "running_var")
    )
    split = list(widths.values())
    for j, own_mean, own_var in zip(widths, mean.split(split), var.split(split), strict=True):
        kept.setdefault(j, (own_mean, own_var))
    shared_mean, shared_var = (torch.cat([kept[j][part] for j in widths]) for part in (0, 1))
    scale, shift = ours[f"{place}.weight"], ours[f"{place}.bias"]
    ours[f"{place}.weight"] = scale * ((shared_var + EPS) / (var + EPS)).sqrt()
    ours[f"{place}.bias"] = shift + scale * (shared_mean - mean) * (var + EPS).rsqrt()


class _Taker:
    """Hands out tensors by name and remembers which are left."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str, why: str):
        self.tensors, self.left, self.what, self.why = tensors, set(tensors), what, why

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.what}: expected {name!r}, found no such tensor")
        self.left.discard(name)
        found = self.tensors[name]
        if found.shape != shape:
            raise ValueError(
                f"{self.what}: expected {name!r} of shape {list(shape)}{self.why}, found {list(found.shape)}"
            )
        return found
