"""What people do with modules has the effect that it has on the same network in plain modules."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from plain import Plain
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils
from torch.utils.flop_counter import FlopCounterMode

from sparsenet import Architecture, SparseNet, stage
from sparsenet.graph import count
from sparsenet.ops import tracing

IMPLEMENTATIONS = ("reference", "shared", "native")
ENGINES = ("shared", "native")
EXACT = 1e-10
NETWORKS = {
    "sparse": Architecture(depth=10, growth_rate=4),
    "bottleneck": Architecture(depth=16, growth_rate=4, bottleneck=True),
    "dense": Architecture(depth=10, growth_rate=4, fetch="dense"),
    "sum": Architecture(depth=10, growth_rate=4, aggregation="sum"),
    "strided": Architecture(blocks=(2, 1), growth_rate=4, bottleneck=True, stem="imagenet"),
}
DROPPING = Architecture(depth=10, growth_rate=4, dropout=0.4)
TOLD = "sparsenet: .*, so the modules of its stage are called one by one"

pytestmark = pytest.mark.filterwarnings("ignore:sparsenet. .*called one by one:UserWarning")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def network(
    implementation: str, architecture: Architecture = NETWORKS["bottleneck"], seed: int = 0
) -> SparseNet:
    """A random network in fp64, scales and statistics away from 1 and 0."""
    torch.manual_seed(seed)
    model = SparseNet(architecture, implementation).double()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "running" in name:
            nn.init.uniform_(tensor.data, 0.5, 1.5)
    return model


def images(count: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=generator)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def convolutions(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Those of units, each as its unit and its name."""
    found = [
        (model.get_submodule(name.rpartition(".")[0]), "conv")
        for name, _ in model.named_modules()
        if name.endswith("conv") and ".layers." in name
    ]
    assert len(found) > 4
    return found


def gradients(model: nn.Module, x: Tensor, output: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(x) if output is None else output
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: nn.Module, theirs: nn.Module, steps: int = 2, side: int = 16) -> None:
    """Both compute the same in evaluation, train the same, and compute the same afterwards."""
    for number in range(steps):
        x = images(side=side, seed=number)
        close(ours.eval()(x), theirs.eval()(x))
        by_name = gradients(ours.train(), x), gradients(theirs.train(), x)
        total = [sum(g.square().sum() for g in each.values()) for each in by_name]
        close(*total)
        for model in (ours, theirs):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
    x = images(side=side, seed=steps)
    close(ours.eval()(x), theirs.eval()(x))


def pair(implementation: str, **settings: Architecture) -> tuple[SparseNet, Plain]:
    ours = network(implementation, **settings)
    return ours, Plain(ours)


# --- the modules themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_modules_compute_what_the_engines_compute(name: str, implementation: str) -> None:
    ours, theirs = pair(implementation, architecture=NETWORKS[name])
    called = copy.deepcopy(ours)
    for each in called.stages:
        each.forward = each.call_modules  # type: ignore[method-assign]
    x = images(side=32)
    for model in (theirs, called):
        assert_same(copy.deepcopy(ours), model, side=32)
    for training in (True, False):
        found = gradients(called.train(training), x), gradients(ours.train(training), x)
        ours.load_state_dict(called.state_dict())
    close(*found)
    ours.train()(x)
    called.train()(x)
    close(called.state_dict(), ours.state_dict())


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_unit_can_be_called_alone() -> None:
    unit = network("native").stages[1].layers[1][1]
    x = images(side=8)[:, :1].expand(-1, len(unit.norm.weight), -1, -1)
    scale, shift = unit.norm.weight.view(-1, 1, 1), unit.norm.bias.view(-1, 1, 1)
    expected = nn.functional.conv2d((x * scale + shift).relu(), unit.conv.weight, padding=1)
    close(unit(x), expected)


def test_a_change_is_told_once_with_the_name_of_the_module() -> None:
    ours = network("native")
    ours.stages[1].layers[1][1].conv.register_forward_hook(lambda *_: None)
    ours.stages[0].layers[0][0].conv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=TOLD) as told:
        ours(images())
        ours(images())
    assert len(told) == 1
    assert "sparsenet: layers.0.0.conv has hooks, so" in str(told[0].message)
    assert ours.implementation == "modules" and network("native").implementation == "native"


def test_what_is_not_changed_is_not_told(implementation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = network(implementation)
        for training in (True, False):
            ours.train(training)(images())
        copy.deepcopy(ours).float().requires_grad_(False)(images().float())
        functional_call(ours, dict(ours.named_parameters()), images())
        with torch.inference_mode():
            ours(images())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda stage: stage.layers.pop(1), "layers"),
        (lambda stage: stage.layers[1].pop(1), r"layers\.1"),
        (lambda stage: stage.statistics.append(nn.Identity()), "statistics"),
        (
            lambda stage: stage.layers.__setitem__(1, nn.Sequential(*stage.layers[1])),
            r"layers\.1",
        ),
    ],
)
def test_other_lists_of_modules_are_refused(
    change: Callable[[nn.Module], object], name: str, implementation: str
) -> None:
    ours = network(implementation)
    change(ours.stages[1])
    with pytest.raises(ValueError, match=f"^stage: expected {name} to be the .* create a network"):
        ours(images())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: torch.compile(model, backend="eager")(images()),
        lambda model: torch.fx.symbolic_trace(model)(images()),
        lambda model: torch.export.export(model, (images(),), strict=True),
        lambda model: model.stages[1].layers[0][0].register_forward_hook(print) and model(images()),
    ],
    ids=["compile", "fx", "export", "changed"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_missing_layers_are_refused_by_every_way(call: Callable[[nn.Module], object]) -> None:
    ours = network("native").eval()
    del ours.stages[1].layers[1]
    with pytest.raises(Exception, match="expected layers to be the ModuleList of 2") as error:
        call(ours)
    assert isinstance(error.value, ValueError) or "torch._dynamo" in type(error.value).__module__


def test_a_module_that_is_taken_away_is_named(implementation: str) -> None:
    ours = network(implementation)
    ours.stages[1].layers[1][0].relu = None
    found = ours.stages[1].change()
    assert found is not None and found.what == "has no relu"


def test_a_warning_that_is_an_error_is_one_each_time() -> None:
    ours = network("native")
    ours.stages[1].layers[1][1].conv.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=TOLD):
                ours(images())


def test_a_seed_drops_the_same_however_it_is_computed() -> None:
    found = []
    for implementation in (*IMPLEMENTATIONS, "modules"):
        for layout in (torch.contiguous_format, torch.channels_last):
            ours = network(implementation.replace("modules", "reference"), DROPPING)
            if implementation == "modules":
                for each in ours.stages:
                    each.forward = each.call_modules
            torch.manual_seed(1)
            found.append(ours(images().to(memory_format=layout)))
    for each in found:
        close(each, found[0])


def test_dropout_is_shown() -> None:
    assert "dropout=0.4" in repr(network("reference", DROPPING).stages[0].layers[0][0])
    assert "dropout=0.4" in repr(network("reference", DROPPING).transitions[0])


def test_hooks_on_a_list_are_told(implementation: str) -> None:
    ours = network(implementation)
    ours.stages[1].layers[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"^sparsenet: layers\.1 has hooks, but lists are not"):
        ours(images())
    assert ours.stages[1].change() is None


def test_features_of_another_width_are_refused(implementation: str) -> None:
    for width in (1, 9, 600):
        ours = network(implementation)
        before = ours.transitions[0].conv
        ours.transitions[0].conv = nn.Conv2d(before.in_channels, width, 1, bias=False).double()
        for training in (True, False):
            with pytest.raises(ValueError, match=r"^stage: expected features \(N, \d+, H, W\)"):
                ours.train(training)(images())


# --- modules in the place of others ---------------------------------------------------------------


class LowRank(nn.Module):
    """A convolution with an addition of low rank, as LoRA makes it."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base = base.requires_grad_(False)
        settings = base.kernel_size, base.stride, base.padding
        self.down = nn.Conv2d(base.in_channels, 2, *settings, bias=False)  # type: ignore[arg-type]
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def with_bias(conv: nn.Conv2d) -> nn.Module:
    return _like(conv, bias=True)


def _like(conv: nn.Conv2d, **changes: object) -> nn.Module:
    settings = {"padding": conv.padding, "bias": False} | changes
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **settings)  # type: ignore[arg-type]
    return made.double()


def with_other_padding(conv: nn.Conv2d) -> nn.Module:
    return _like(conv, padding_mode="circular") if conv.kernel_size == (3, 3) else conv


def with_dilation(conv: nn.Conv2d) -> nn.Module:
    return _like(conv, dilation=2, padding=2) if conv.kernel_size == (3, 3) else conv


def with_groups(conv: nn.Conv2d) -> nn.Module:
    return _like(conv, groups=2)


def wrapped(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.Tanh())


@pytest.mark.parametrize(
    "replacement", [LowRank, with_bias, with_other_padding, with_dilation, with_groups, wrapped]
)
@pytest.mark.parametrize("which", [slice(None), slice(3, 4)])
def test_convolutions_are_replaced(
    replacement: Callable[[nn.Conv2d], nn.Module], which: slice, implementation: str
) -> None:
    both = pair(implementation)
    before = both[0].eval()(images())
    for model in both:
        torch.manual_seed(0)
        for unit, name in convolutions(model)[which]:
            setattr(unit, name, replacement(getattr(unit, name)))
    with torch.no_grad():
        if replacement not in (with_other_padding, with_dilation) or which == slice(None):
            assert not torch.allclose(both[0](images()), before)
    assert_same(*both)


@pytest.mark.parametrize("name", ["sparse", "strided"])
def test_every_convolution_is_wrapped(name: str, implementation: str) -> None:
    """The first one too, which the check of images looks at."""
    both = pair(implementation, architecture=NETWORKS[name])
    for model in both:
        for module in list(model.modules()):
            for label, child in list(module.named_children()):
                if type(child) is nn.Conv2d:
                    setattr(module, label, wrapped(child))
    assert_same(*both, side=32)


def test_every_tensor_of_low_rank_has_a_gradient(implementation: str) -> None:
    ours = network(implementation)
    for unit, name in convolutions(ours):
        setattr(unit, name, LowRank(getattr(unit, name)))
    found = gradients(ours, images())
    added = [name for name, _ in ours.named_parameters() if ".up." in name or ".down." in name]
    assert added and set(added) <= found.keys()


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: object) -> Tensor:
        return 2 * self.inner(*inputs)


@pytest.mark.parametrize("kind", ["unit", "norm", "relu", "statistics"])
def test_other_modules_are_replaced(kind: str, implementation: str) -> None:
    ours = network(implementation).eval()
    before = ours(images())
    stage = ours.stages[1]
    owner, name = {
        "unit": (stage.layers[1], "1"),
        "norm": (stage.layers[1][1], "norm"),
        "relu": (stage, "relu"),
        "statistics": (stage.statistics, "2"),
    }[kind]
    setattr(owner, name, Doubled(getattr(owner, name)))
    assert not torch.allclose(ours(images()), before)


def _circular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    side = weight.shape[-1] // 2
    return torch.conv2d(nn.functional.pad(x, 4 * (side,), mode="circular"), weight, bias)


def _give(module: nn.Module, name: str, tensor: Tensor, buffer: bool = False) -> None:
    """Instead of the parameter of this *name*."""
    delattr(module, name)
    if buffer:
        module.register_buffer(name, tensor)
    else:
        setattr(module, name, tensor)


def _bias(conv: nn.Module) -> Tensor:
    return torch.ones(len(conv.weight), dtype=torch.float64)  # type: ignore[arg-type]


ATTRIBUTES: dict[str, Callable[[Any], object]] = {
    "_conv_forward": lambda conv: setattr(conv, "_conv_forward", _circular),
    "_call_impl": lambda conv: setattr(conv, "_call_impl", lambda x: conv.forward(2 * x)),
    "forward": lambda conv: setattr(conv, "forward", lambda x: 0 * nn.Conv2d.forward(conv, x)),
    "bias": lambda conv: _give(conv, "bias", _bias(conv)),
    "buffer": lambda conv: _give(conv, "bias", _bias(conv), buffer=True),
    "hidden": lambda conv: conv.__dict__.update(weight=2 * conv.weight.detach()),
    "computed": lambda conv: _give(conv, "weight", conv.weight.detach().sin()),
}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_of_one_module(attribute: str, implementation: str) -> None:
    both = pair(implementation)
    before = both[0].eval()(images())
    for model in both:
        change = ATTRIBUTES[attribute]
        change(model.stages[1].layers[1][1].conv)
    assert not torch.allclose(both[0](images()), before)
    assert_same(*both)


def test_a_function_in_the_place_of_a_module(implementation: str) -> None:
    both = pair(implementation)
    for model in both:
        for unit in model.stages[1].layers[1]:
            del unit.relu
            unit.relu = torch.sin
    assert_same(*both)


def test_a_scale_of_the_norm_of_a_feature(implementation: str) -> None:
    ours, alike = network(implementation), network("reference")
    norm = ours.stages[1].statistics[0]
    norm.weight = nn.Parameter(torch.full_like(norm.running_mean, 3), requires_grad=False)
    norms = [m for m in alike.stages[1].modules() if isinstance(m, stage.Affine)]
    for read, norm in zip(alike.stages[1].plan.reads, norms, strict=True):
        if 0 in read:
            before = sum(alike.stages[1].widths[j] for j in read[: read.index(0)])
            norm.weight.data[before : before + alike.stages[1].widths[0]] *= 3
    for training in (True, False):
        close(ours.train(training)(images()), alike.train(training)(images()))


def test_another_dropout(implementation: str) -> None:
    ours = network(implementation, DROPPING)
    for module in ours.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    close(ours(images()), network(implementation, NETWORKS["sparse"])(images()))


def test_norms_of_another_precision(implementation: str) -> None:
    ours = network(implementation).bfloat16()
    expected = ours(images().bfloat16())
    for norm in norms_of(ours):
        norm.float()
    torch.testing.assert_close(ours(images().bfloat16()), expected, rtol=0.1, atol=0.1)
    assert all(norm.running_mean.dtype == torch.float32 for norm in norms_of(ours))


def test_norms_without_counters(implementation: str) -> None:
    ours, alike = network(implementation), network(implementation)
    for norm in norms_of(ours):
        norm.num_batches_tracked = None
    assert_same(ours, alike)


def test_all_parameters_are_reset(implementation: str) -> None:
    ours = network(implementation).to("meta").to_empty(device="cpu")
    for tensor in [*ours.parameters(), *ours.buffers()]:
        tensor.data.fill_(7)
    for module in ours.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any((tensor == 7).any() for tensor in [*ours.parameters(), *ours.buffers()])
    scales = [p for name, p in ours.named_parameters() if name.endswith("norm.weight")]
    assert scales and all((scale == 1).all() for scale in scales)


# --- weights that are computed --------------------------------------------------------------------


@pytest.mark.parametrize(
    "computed",
    [
        lambda unit, name: prune.l1_unstructured(getattr(unit, name), "weight", 0.3),
        lambda unit, name: prune.ln_structured(getattr(unit, name), "weight", 0.5, 2, 0),
        lambda unit, name: nn.utils.weight_norm(getattr(unit, name)),
        lambda unit, name: nn.utils.spectral_norm(getattr(unit, name)),
        lambda unit, name: parametrizations.weight_norm(getattr(unit, name)),
        lambda unit, name: parametrizations.spectral_norm(getattr(unit, name)),
    ],
    ids=["prune", "prune rows", "old weight", "old spectral", "weight", "spectral"],
)
@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm:FutureWarning")
def test_computed_weights(
    computed: Callable[[nn.Module, str], object], implementation: str
) -> None:
    both = pair(implementation)
    for model in both:
        torch.manual_seed(0)
        for unit, name in convolutions(model):
            computed(unit, name)
    assert_same(*both)
    for model in both:  # other weights are loaded into them
        state = {name: 0.9 * tensor for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            before = model(images())
        model.load_state_dict(state)
        assert not torch.allclose(model(images()), before)
    close(both[0](images()), both[1](images()))


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_of_every_kind_fire_on_every_module(implementation: str) -> None:
    for architecture in NETWORKS.values():
        ours = network(implementation, architecture)
        fired: dict[str, set[str]] = {}
        for name, module in ours.named_modules():
            is_list = isinstance(module, nn.ModuleList)
            if is_list:
                continue
            seen = fired.setdefault(name, set())
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.add("before"))
            module.register_forward_hook(lambda *_, seen=seen: seen.add("after"))
            module.register_full_backward_pre_hook(lambda *_, seen=seen: seen.add("backward"))
            module.register_full_backward_hook(lambda *_, seen=seen: seen.add("gradients"))
        gradients(ours, images(side=32).requires_grad_())
        lacking = {name for name, seen in fired.items() if len(seen) < 4}
        assert not lacking


@pytest.mark.parametrize("kind", ["output", "input", "gradient"])
def test_hooks_that_replace_something(kind: str, implementation: str) -> None:
    both = pair(implementation)
    for model in both:
        conv = model.get_submodule("stages.1.layers.1.0.conv")
        if kind == "output":
            conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
        elif kind == "input":
            conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
        else:
            conv.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    assert_same(*both)


def test_hooks_on_all_modules(implementation: str) -> None:
    ours, fired = network(implementation), set[nn.Module]()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: fired.add(m))
    try:
        ours(images())
    finally:
        handle.remove()
    assert {m for m in ours.modules() if not isinstance(m, nn.ModuleList)} == fired


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Module, "_call_impl"),
        (nn.Conv2d, "__call__"),
        (stage.Unit, "forward"),
        (stage.Affine, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.functional, "conv2d"),
        (nn.functional, "batch_norm"),
        (nn.functional, "relu"),
    ],
)
def test_what_all_modules_do_is_replaced(
    owner: type, name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packages do that count, rescale or fake the operations of every module."""
    ours = network(implementation).eval()
    called = []
    before = getattr(owner, name)

    def replaced(*inputs: Any, **settings: Any) -> Any:
        called.append(name)
        return before(*inputs, **settings)

    monkeypatch.setattr(owner, name, replaced)
    ours(images())
    units = sum(len(layer) for each in ours.stages for layer in each.layers)
    assert len(called) >= units
    monkeypatch.undo()
    assert ours.stages[0].change() is None


# --- batch norms ----------------------------------------------------------------------------------


def test_update_bn_takes_the_mean_of_the_batches(implementation: str) -> None:
    both = pair(implementation)
    batches = [images(seed=seed) for seed in range(4)]
    for model in both:
        swa_utils.update_bn(batches, model)
    close(both[0].eval()(images()), both[1].eval()(images()))
    norms = norms_of(both[0])
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 4 for norm in norms)


def test_norms_are_reset(implementation: str) -> None:
    ours = network(implementation)
    for norm in norms_of(ours):
        norm.reset_running_stats()
    fresh = dict(SparseNet(ours.architecture).double().named_buffers())
    close(dict(ours.named_buffers()), fresh)


@pytest.mark.parametrize("which", [slice(None), slice(2, 4)])
def test_frozen_norms(which: slice, implementation: str) -> None:
    ours, theirs = pair(implementation, architecture=NETWORKS["sum"])  # a norm for each reader
    before = copy.deepcopy(ours.state_dict())
    for model in (ours, theirs):
        model.train()
        for norm in norms_of(model)[which]:
            norm.eval()
    x = images()
    close(ours(x), theirs(x))
    close(
        sum(g.sum() for g in gradients(ours, x).values()),
        sum(g.sum() for g in gradients(theirs, x).values()),
    )
    frozen = {id(norm) for norm in norms_of(ours)[which]}
    for name, norm in ours.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            same = torch.equal(norm.running_mean, before[f"{name}.running_mean"])
            assert same == (id(norm) in frozen)


def test_all_frozen_norms_are_computed_by_the_engine() -> None:
    ours = network("native")
    for norm in norms_of(ours.train()):
        norm.eval()
    assert all(each.change() is None for each in ours.stages)
    dropping = network("native", Architecture(depth=7, growth_rate=4, dropout=0.5)).train()
    for norm in norms_of(dropping):
        norm.eval()
    assert all(each.change() is not None for each in dropping.stages)
    torch.manual_seed(0)
    assert not torch.allclose(dropping(images()), dropping(images()))  # it still drops


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_other_momentum(momentum: float | None, implementation: str) -> None:
    both = pair(implementation, architecture=NETWORKS["dense"])
    for model in both:
        for norm in norms_of(model):
            norm.momentum = momentum
    assert_same(*both)


def test_norms_without_running_statistics(implementation: str) -> None:
    both = pair(implementation)
    for model in both:
        for norm in norms_of(model):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = None
    assert_same(*both)


def test_all_norms_become_synchronised(implementation: str) -> None:
    ours = network(implementation).eval()
    number, before = len(norms_of(ours)), ours(images())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == number
    assert len(norms_of(converted)) == 0
    close(converted(images()), before)
    close(converted.train()(images()), network(implementation)(images()))


def test_state_dicts_without_numbers_of_batches_load(implementation: str) -> None:
    ours = network(implementation).train()
    ours(images())
    state = {name: t for name, t in ours.state_dict().items() if "num_batches" not in name}
    other = network(implementation, seed=1)
    other.load_state_dict(state)
    close(other.eval()(images()), ours.eval()(images()))


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(name: str, training: bool, implementation: str) -> None:
    both = pair(implementation, architecture=NETWORKS[name])
    results = []
    for model in both:
        model.train(training)
        x = images(side=32).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
        results.append((penalty, sorted(float(g.norm()) for g in found if g is not None)))
        assert len(results[-1][1]) > 10
    close(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("memory", ["normal", "lean"])
def test_hessian_products(dropout: float, engine: str, memory: str) -> None:
    """By the gradient of a gradient, against differences of gradients with the same masks."""
    architecture = Architecture(depth=16, growth_rate=4, bottleneck=True, dropout=dropout)
    model = network(engine, architecture)
    made = SparseNet(architecture, engine, memory).double()
    made.load_state_dict(model.state_dict())
    parameters = list(made.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    x = images()

    def slopes() -> list[Tensor]:
        torch.manual_seed(0)
        loss = made(x).square().sum()
        return list(torch.autograd.grad(loss, parameters, create_graph=torch.is_grad_enabled()))

    product = torch.autograd.grad(slopes(), parameters, directions)
    step = 1e-7  # which no ReLU is as near to 0
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
        torch.manual_seed(0)
        loss = made(x).square().sum()
        ends.append(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * step * d
    for found, high, low in zip(product, *ends, strict=True):
        difference = (high - low) / (2 * step)
        scale = float(difference.abs().max())
        torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("way", ["create_graph", "counted"])
@pytest.mark.parametrize("use", ["tied", "hooked", "twice"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_only_its_own_gradient_goes_through_a_stage(
    use: str, way: str, implementation: str
) -> None:
    """Whatever else a parameter is used for, and whatever hooks it has."""
    found = []
    for model in pair(implementation):
        units = model.stages[1].layers
        if use == "tied":
            units[1][1].conv.weight = units[0][1].conv.weight
        elif use == "hooked":
            units[0][1].conv.weight.register_hook(lambda gradient: gradient / 2)
        model.zero_grad()
        x = images()
        loss = model(x).square().sum()
        if use == "twice":
            loss = loss + model(2 * x + model(x).sum()).square().sum()
        with FlopCounterMode(display=False) if way == "counted" else nullcontext():
            loss.backward(create_graph=way == "create_graph")
        found.append(units[0][1].conv.weight.grad.detach().clone())
        model.zero_grad()
    close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_second_derivatives_under_autocast(dtype: torch.dtype, engine: str) -> None:
    penalties = []
    for implementation in (engine, "reference"):
        model = network(implementation).float()
        x = images().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(x)
        (slope,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        penalties.append(torch.stack(norms))
    bound = 1e-3 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(*penalties, rtol=bound, atol=bound * float(penalties[1].max()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode(implementation: str) -> None:
    both = pair(implementation)
    tangents = []
    for model in both:
        for keeps_graph in (False, True):
            with torch.set_grad_enabled(keeps_graph), forward_ad.dual_level():
                dual = forward_ad.make_dual(images(), images(seed=1))
                tangent = forward_ad.unpack_dual(model.eval()(dual)).tangent
            assert tangent is not None
            tangents.append(tangent)
    for tangent in tangents[1:]:
        close(tangent, tangents[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_functional_transforms(implementation: str) -> None:
    ours, theirs = pair(implementation)
    results = []
    for model in (ours.eval(), theirs.eval()):
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

        def loss(x: Tensor, model: nn.Module = model, state: dict[str, Tensor] = state) -> Tensor:
            return functional_call(model, state, (x[None],)).square().sum()

        x = images()
        each = torch.func.vmap(torch.func.grad(loss))(x)
        primal, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
        hessian = torch.func.jvp(torch.func.grad(loss), (x[0],), (x[1],))[1]
        results.append((each, primal, tangent, hessian))
    close(*results)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients(implementation: str) -> None:
    found = []
    for model in pair(implementation):
        x = images().requires_grad_()
        out = model.eval()(x)
        units = torch.eye(out.shape[1], dtype=out.dtype)[:, None].expand(-1, len(x), -1)
        found.append(torch.autograd.grad(out, x, units, is_grads_batched=True)[0])
    close(*found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_image_without_numbers_spoils_no_other(
    number: float, training: bool, implementation: str
) -> None:
    spoilt = []
    for model in pair(implementation):
        x = images()
        x[0, 0, 3, 3] = number
        x.requires_grad_()
        model.train(training)(x)[1:].sum().backward()
        names = {name for name, p in model.named_parameters() if not p.grad.isfinite().all()}
        spoilt.append((len(names), [not each.isfinite().all() for each in x.grad]))
    assert spoilt[0] == spoilt[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_output_of_a_stage_is_changed_in_place(engine: str) -> None:
    ours = network(engine)
    found = [
        gradients(ours, images(), change(ours.stages[0](ours.stem(images()))))
        for change in (torch.sin, torch.sin_)
    ]
    close(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_an_ensemble_is_trained(implementation: str) -> None:
    models = [network(implementation, seed=seed) for seed in range(2)]
    state = torch.func.stack_module_state(models)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,))  # type: ignore[no-any-return]

    found = torch.func.vmap(call, (0, 0, None))(*state, images())
    close(found, torch.stack([model(images()) for model in models]))


class HalvedTensor(Tensor):
    """Halves what convolutions make."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found / 2 if function is torch.conv2d else found


def test_subclasses_of_tensors(implementation: str) -> None:
    ours, theirs = pair(implementation)
    x = images().as_subclass(HalvedTensor)
    for training in (True, False):
        with (
            pytest.warns(UserWarning, match="sparsenet: stage is given a HalvedTensor")
            if training
            else nullcontext()
        ):
            found = ours.train(training)(x)
        assert type(found) is HalvedTensor
        close(found.as_subclass(Tensor), theirs.train(training)(x).as_subclass(Tensor))


# --- tracers, compilers and counters --------------------------------------------------------------


def test_make_fx(implementation: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    ours = network(implementation).eval()
    graph = make_fx(ours)(images())
    convolutions = [node for node in graph.graph.nodes if "convolution" in str(node.target)]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in ours.modules())
    close(graph(images(seed=1)), ours(images(seed=1)))


@pytest.mark.parametrize(
    ("name", "implementation", "training"),
    [
        ("bottleneck", "native", True),
        ("sum", "shared", True),
        ("sparse", "reference", False),
        ("strided", "native", False),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_as_one_graph(name: str, implementation: str, training: bool) -> None:
    ours = network(implementation, NETWORKS[name]).train(training)
    expected = copy.deepcopy(ours)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = images(side=32)
    close(compiled(x), expected(x))
    close(gradients(ours, x, compiled(x)), gradients(expected, x))
    close(ours.state_dict(), expected.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hooks_are_compiled_too() -> None:
    both = pair("native")
    for model in both:
        conv = model.get_submodule("stages.1.layers.1.0.conv")
        conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    torch.compiler.reset()
    compiled = torch.compile(both[0].eval(), backend="eager", fullgraph=True)
    close(compiled(images()), both[1].eval()(images()))


@pytest.mark.parametrize("name", NETWORKS)
def test_symbolic_trace(name: str, implementation: str) -> None:
    ours = network(implementation, NETWORKS[name])
    x = images(side=32)
    traced = torch.fx.symbolic_trace(copy.deepcopy(ours))
    for training in (True, False):
        close(traced.train(training)(x), ours.train(training)(x))
    close(gradients(traced, x), gradients(ours, x))


@pytest.mark.parametrize(
    ("hooked", "implementation"), [(False, "native"), (False, "shared"), (True, "native")]
)
def test_export(hooked: bool, implementation: str) -> None:
    both = pair(implementation)
    for model in both:
        if hooked:
            conv = model.get_submodule("stages.1.layers.1.0.conv")
            conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    for strict in (False, True):
        program = torch.export.export(both[0].eval(), (images(),), strict=strict)
        close(program.module()(images(seed=1)), both[1].eval()(images(seed=1)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit(implementation: str) -> None:
    ours = network(implementation).eval()
    traced = torch.jit.trace(ours, images())
    close(traced(images(5, seed=1)), ours(images(5, seed=1)))
    with pytest.raises(NotImplementedError, match=r"^torch\.jit\.script: .*torch\.export") as error:
        torch.jit.script(ours)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_accumulates_are_counted(name: str, implementation: str) -> None:
    architecture = NETWORKS[name]
    ours = network(implementation, architecture).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(images(1, side=32))
    assert counter.get_total_flops() == 2 * count(architecture, 32)[1]
    with FlopCounterMode(display=False) as counter:
        ours.train()(images(2, side=32).requires_grad_()).sum().backward()
    theirs = Plain(ours)
    with FlopCounterMode(display=False) as plain:
        theirs(images(2, side=32).requires_grad_()).sum().backward()
    assert counter.get_total_flops() == plain.get_total_flops()


class Halved(torch.overrides.TorchFunctionMode):
    """Convolutions give half of what they give elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        return found / 2 if function in (torch.conv2d, nn.functional.conv2d) else found


def test_images_without_memory(implementation: str) -> None:
    ours = network(implementation).to("meta")
    assert ours(images().to("meta")).shape == (3, 10)
    assert SparseNet(NETWORKS["sparse"]).to("meta")(images().float().to("meta")).shape == (3, 10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_autograd(engine: str) -> None:
    from torch._dynamo import compiled_autograd

    ours = network(engine, Architecture(blocks=(1,), growth_rate=4))
    expected = gradients(ours, images())
    output = ours(images())
    ours.zero_grad()
    with compiled_autograd._enable(torch.compile(backend="eager")):  # type: ignore[no-untyped-call]
        output.square().sum().backward()
    close({name: p.grad for name, p in ours.named_parameters()}, expected)


def test_function_modes(implementation: str) -> None:
    ours, theirs = pair(implementation)
    with Halved():
        close(ours.eval()(images()), theirs.eval()(images()))
    with torch.device("cpu"):
        assert not tracing.is_watched(images())


@pytest.fixture(autouse=True)
def compiler_reset() -> Iterator[None]:
    yield
    torch.compiler.reset()
