"""Other libraries' DenseNets on this engine: the same network, or one line that says why not."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsenet import Architecture, SparseNet, adopt, create_model, load_torchvision
from sparsenet.graph import count

EXACT = 1e-10
STYLES = ("torchvision", "checkpointed", "timm", "monai", "pytorchcv", "pytorchcv cifar")


class NormAct(nn.BatchNorm2d):
    """A batch norm that holds its activation, as timm's does."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def normed(style, width):
    return [NormAct(width)] if style == "timm" else [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class Layer(nn.Module):
    """BN-ReLU-Conv1x1-BN-ReLU-Conv3x3, its output joined to its input; factor 0: no Conv1x1."""

    def __init__(self, style, width, growth, factor):
        super().__init__()
        self.narrow = nn.Sequential()
        if factor:
            conv = nn.Conv2d(width, factor * growth, 1, bias=False)
            self.narrow = nn.Sequential(*normed(style, width), conv)
            width = factor * growth
        self.wide = nn.Sequential(
            *normed(style, width), nn.Conv2d(width, growth, 3, 1, 1, bias=False)
        )
        self.saves_memory = style == "checkpointed"

    def forward(self, x):
        narrow = (
            checkpoint(self.narrow, x, use_reentrant=False) if self.saves_memory else self.narrow(x)
        )
        return torch.cat([x, self.wide(narrow)], 1)


class Peer(nn.Module):
    """A DenseNet by its definition (arXiv:1608.06993), its parts as modules of each library."""

    def __init__(
        self,
        style="torchvision",
        blocks=(2, 3, 1),
        growth=4,
        stem=6,
        factor=4,
        classes=3,
        chans=3,
        reduction=0.5,
        stride=1,
    ):
        super().__init__()
        self.size = {"pytorchcv": (29, 44), "pytorchcv cifar": (8, 11)}.get(style, (40, 33))
        rates = growth if isinstance(growth, tuple) else (growth,) * len(blocks)
        parts = [nn.Conv2d(chans, stem, 7, 2, 3, bias=False), *normed(style, stem)]
        parts.append(nn.MaxPool2d(3, 2, 1))
        if "cifar" in style:
            parts = [nn.Conv2d(chans, stem, 3, 1, 1, bias=False)]
        width = stem
        for number, (depth, rate) in enumerate(zip(blocks, rates, strict=True)):
            if number:
                conv = nn.Conv2d(width, int(width * reduction), 1, bias=False)
                parts.append(nn.Sequential(*normed(style, width), conv, nn.AvgPool2d(2, 2)))
                width = int(width * reduction)
            parts.append(
                nn.Sequential(*(Layer(style, width + i * rate, rate, factor) for i in range(depth)))
            )
            width += depth * rate
        last = normed(style, width)
        self.features = nn.Sequential(*parts, last[0])
        self.pool = {
            "timm": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(0.0)),
            "monai": nn.Sequential(*last[1:], nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
        }.get(style)
        if style.startswith("pytorchcv"):
            self.pool = nn.Sequential(*last[1:], nn.AvgPool2d(2, stride), nn.Flatten())
        self.classifier = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, x):
        x = self.features(x)
        return self.classifier(F.relu(x).mean((2, 3)) if self.pool is None else self.pool(x))


def peer(*args, seed=0, **settings):
    """A peer in fp64 with random affines; its running statistics agree between readers."""
    torch.manual_seed(seed)
    model = Peer(*args, **settings).double()
    for norm in norms_of(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    with torch.no_grad():
        model(images(model))
    return model


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def disagree(model):
    """*model* with running statistics that differ between the readers of a feature."""
    for norm in norms_of(model):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def images(model, size=None):
    like = next(model.parameters())
    return torch.randn(4, like.shape[1], *(size or model.size), dtype=like.dtype)


def close(found, expected, tolerance=EXACT):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_the_adopted_network_is_the_same(style, training):
    theirs = peer(style).train(training)
    ours = adopt(theirs)
    batch = images(theirs)
    responses = []
    for model in (theirs, ours):
        x = batch.clone().requires_grad_()
        out = model(x)
        responses.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for found, expected in zip(responses[1], responses[0], strict=True):
        close(found, expected)
    assert isinstance(ours, SparseNet) and ours.training == training


@pytest.mark.parametrize("style", [style for style in STYLES if style != "checkpointed"])
def test_a_training_step_is_the_same(style):
    """What follows a step shows the gradients; each reader's running statistics are compared."""
    theirs = peer(style).train()
    ours, batch = adopt(theirs), images(theirs)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
        F.cross_entropy(model(batch), torch.arange(4) % 3).backward()
        optimizer.step()
    norms = iter(norms_of(theirs)["cifar" not in style :])
    for stage, made in zip(ours.architecture.stages, ours.stages, strict=True):
        for read in stage.reads:
            norm = next(norms)
            close(torch.cat([made.statistics[j].running_mean for j in read]), norm.running_mean)
            close(torch.cat([made.statistics[j].running_var for j in read]), norm.running_var)
    close(ours.eval()(batch), theirs.eval()(batch), 1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": (1,)},
        {"blocks": (1, 2, 1, 1), "growth": 3, "stem": 16},
        {"growth": (2, 3, 5), "factor": 2},
        {"classes": 0, "chans": 1},
        {"classes": 1, "chans": 5, "factor": 1},
        {"style": "pytorchcv cifar", "factor": 0, "reduction": 1},
        {"style": "pytorchcv cifar", "factor": 0, "growth": (2, 3, 5), "reduction": 0.3},
        {"reduction": 0.6},
        {"reduction": 1, "growth": 3},
        {"factor": 0, "reduction": 49 / 83, "growth": 83, "blocks": (1, 1), "stem": 83},
    ],
)
def test_any_width_depth_and_number_of_classes(settings):
    theirs = peer(**{"style": "monai", **settings}).eval()
    ours = adopt(theirs)
    batch = images(theirs)
    close(ours(batch), theirs(batch))
    assert count(ours.architecture, 64)[0] == sum(p.numel() for p in theirs.parameters())
    assert ours.num_classes == settings.get("classes", 3)


@pytest.mark.parametrize("style", ["pytorchcv", "pytorchcv cifar"])
def test_a_window_is_equal_for_the_images_that_fill_it_and_no_others(style):
    theirs = peer(style).eval()
    ours = adopt(theirs)
    least, most = theirs.size
    for side in range(least, most + 1):
        batch = images(theirs, (side, side))
        close(ours(batch), theirs(batch))
    for side in (least - 1, most + 1):
        with pytest.raises(RuntimeError):
            theirs(images(theirs, (side, side)))


@pytest.mark.parametrize("settings", [{"stride": 2}, {"classes": 0}])
def test_a_window_that_takes_larger_images_too_is_told(settings):
    theirs = peer("pytorchcv cifar", **settings).eval()
    with pytest.warns(UserWarning, match="equal for images of 8 to 11 pixels a side; of larger"):
        ours = adopt(theirs)
    batch = images(theirs)
    close(ours(batch), theirs(batch))
    larger = images(theirs, (12, 12))
    assert not torch.equal(ours(larger), theirs(larger))


def distributed(model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.DataParallel, distributed, nn.Sequential])
def test_wrappers_are_taken_off(wrap):
    theirs = peer().eval()
    wrapper = wrap(theirs).eval()
    ours, batch = adopt(wrapper), images(theirs)
    close(ours(batch), theirs(batch))
    assert set(ours.state_dict()) == set(adopt(theirs).state_dict())
    wrapper.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^adopt: model: expected no hooks"):
        adopt(wrapper)


@pytest.mark.parametrize("scale", [1, 0.004])
def test_statistics_that_differ_between_readers_are_absorbed_and_told(scale):
    theirs = disagree(peer().eval())
    for norm in norms_of(theirs):
        nn.init.constant_(norm.weight, scale)
        nn.init.zeros_(norm.bias)
    with pytest.warns(UserWarning, match="differ between its readers") as told:
        ours = adopt(theirs)
    assert told[0].filename == __file__
    batch = images(theirs)
    close(ours(batch), theirs(batch))
    for norm in norms_of(theirs):  # as rounding makes them
        nn.init.constant_(norm.running_mean, 0.1 + 1e-7 * torch.rand(1).item())
        nn.init.ones_(norm.running_var)
    adopt(theirs)  # warns of nothing


def test_what_is_kept():
    theirs = peer("timm").float().eval()
    theirs.features[0].requires_grad_(False)
    theirs.classifier.bias.requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    drawn = torch.get_rng_state()
    with torch.inference_mode():
        ours = adopt(theirs, implementation="reference")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    assert ours.implementation == "reference" and not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {name for name, p in ours.named_parameters() if not p.requires_grad} == {
        "stem.0.weight",
        "classifier.bias",
    }
    with torch.no_grad():
        ours.stem[0].weight.zero_()
    assert theirs.features[0].weight.any()
    theirs.train()
    assert adopt(theirs).training


def replaced(path, new):
    def edit(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)

    return edit


def setting(path, **settings):
    return lambda model: vars(model.get_submodule(path)).update(settings)


def hooked(model):
    model.features.register_forward_hook(lambda *_: None)


def shared(model):
    model.features[4][0].wide[2].weight = model.features[4][1].wide[2].weight


def doubled(model):
    model.classifier.register_buffer("mean", torch.zeros(3))


def conv(out, kernel=3, padding=1):
    return nn.Conv2d(16, out, kernel, padding=padding, bias=False)


NARROW, WIDE, NORM = "features.4.1.narrow.2", "features.4.1.wide.2", "features.4.1.narrow.0"
HALVING, POOL = "features.5.2", "features.5.3"
EMPTY = nn.Parameter(torch.zeros(0, 16, 3, 3))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (setting(NORM, eps=1e-3), f"{NORM}: expected BatchNorm2d with eps=1e-05, found 0.001"),
        (setting(NORM, momentum=0.01), f"{NORM}: expected .* momentum=0.1, found 0.01"),
        (setting(NORM, momentum=None), "momentum=0.1, found None"),
        (replaced(NORM, nn.BatchNorm2d(10, affine=False)), "affine=True, found False"),
        (replaced(NORM, nn.BatchNorm2d(10, track_running_stats=False)), "stats=True, found False"),
        (replaced(NORM, nn.GroupNorm(2, 10)), f"{NORM}: expected BatchNorm2d, found GroupNorm"),
        (replaced("features.4.1.narrow.1", nn.SiLU()), "narrow.1: expected ReLU, found SiLU"),
        (replaced("features.2", nn.ReLU6()), "features.2: expected ReLU, found ReLU6"),
        (replaced(NARROW, nn.Conv3d(10, 16, 1)), f"{NARROW}: expected Conv2d, found Conv3d"),
        (setting(WIDE, groups=2), "groups=1, found 2"),
        (setting(WIDE, stride=(2, 2)), "stride=1, found 2"),
        (setting(WIDE, dilation=(2, 2), padding=(2, 2)), "padding=1, found 2"),
        (setting(WIDE, padding_mode="reflect"), "padding_mode=zeros, found reflect"),
        (replaced(WIDE, nn.Conv2d(16, 4, 3, padding=1)), "bias=False, found True"),
        (replaced(WIDE, conv(4, (3, 5), padding=(1, 2))), r"kernel_size=3, found \(3, 5\)"),
        (replaced(WIDE, conv(3)), r"shape \[4, 16, 3, 3\].* found \[3, 16, 3, 3\]"),
        (replaced(WIDE, nn.Sequential(conv(4), nn.Dropout2d(0.2))), "Dropout2d"),
        (setting("features.4.1", drop_rate=0.2), "4.1: expected drop_rate=0 .*, found 0.2"),
        (replaced("features.0", conv(6)), "features.3: expected Conv2d, found MaxPool2d"),
        (replaced("features.0", conv(6, 5, 2)), "expected .* kernel_size=7, found 5"),
        (replaced("features.0", nn.Conv3d(3, 6, 7)), "features.0: expected Conv2d, found Conv3d"),
        (replaced("features.3", nn.Identity()), "expected MaxPool2d, found BatchNorm2d"),
        (setting("features.3", ceil_mode=True), "ceil_mode=False, found True"),
        (replaced(POOL, nn.MaxPool2d(2)), f"{POOL}: expected AvgPool2d, found MaxPool2d"),
        (setting(POOL, stride=1), f"{POOL}: expected AvgPool2d with stride=2, found 1"),
        (replaced(HALVING, nn.Conv2d(14, 20, 1, bias=False)), r"by one factor, found \[\(14, 20\)"),
        (replaced(HALVING, nn.Conv2d(14, 3, 1, bias=False)), r"found \[\(14, 3\), \(19, 9\)\]"),
        (lambda model: setattr(model.features[4][1].wide[2], "weight", EMPTY), ".* with weights"),
        (replaced("features.4.1.narrow", nn.Sequential()), "wide.2: .*kernel_size=1, found 3"),
        (replaced("features.6", nn.Identity()), "expected layers before and after each transition"),
        (replaced("classifier", nn.Sequential(nn.Dropout(0.5))), "classifier.0: .*p=0 would do"),
        (replaced("classifier", nn.Linear(13, 3, bias=False)), "expected Linear with bias=True"),
        (replaced("classifier", nn.Conv2d(13, 3, 1)), "expected ReLU"),
        (replaced("pool", nn.AdaptiveMaxPool2d(1)), "pool: expected average .*AdaptiveMaxPool2d"),
        (lambda model: model.features[1].eval(), "features.1: expected one mode"),
        (lambda model: model.features[1].half(), "one device, found torch.float16 on cpu and"),
        (lambda model: model.to("meta"), "on meta"),
        (hooked, "features: expected no hooks"),
        (shared, "found shared ones"),
        (doubled, "no place for 'classifier.mean'"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_line(edit, expected):
    theirs = Peer()
    edit(theirs)
    with pytest.raises(ValueError, match=f"^adopt: .*{expected}") as refused:
        adopt(theirs)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.AvgPool2d((2, 3)), r"expected .*kernel_size, found \(2, 3\)"),
        (nn.AvgPool2d(0), "expected .*positive kernel_size, found 0"),
        (nn.AvgPool2d(64), "expected .*at most 640 pixels a side, found kernel_size=64, for 1036"),
        (nn.AvgPool2d(2, padding=1), "expected .*padding=0, found 1"),
        (nn.AvgPool2d(2, divisor_override=3), "expected .*divisor_override=None, found 3"),
        (nn.MaxPool2d(2), "expected average pooling .*, found MaxPool2d"),
    ],
)
def test_other_windows_are_refused(pool, expected):
    theirs = Peer("pytorchcv")
    theirs.pool[1] = pool
    with pytest.raises(ValueError, match=f"^adopt: pool.1: {expected}"):
        adopt(theirs)


class Scaled(Peer):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-6)


class Dropping(Peer):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class Detached(Peer):
    def forward(self, x):
        return super().forward(x / 2 + x.detach() / 2)


class Unpooled(Peer):
    def forward(self, x):
        return self.features(x)


class Paired(Peer):
    def forward(self, x):
        return super().forward(x), x


class Asserting(Peer):
    def forward(self, x):
        assert x.shape[2] == x.shape[3], "square images"
        return super().forward(x)


class OneSize(Peer):
    def forward(self, x):
        return self.classifier(F.avg_pool2d(F.relu(self.features(x)), 7).flatten(1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Scaled, "outputs in evaluation"),
        (Unpooled, "outputs in evaluation"),
        (Dropping, "outputs in training"),
        (Detached, "input gradients in evaluation"),
        (Paired, "one differentiable tensor"),
        (OneSize, "one differentiable tensor"),
        (Asserting, "AssertionError: square images"),
    ],
)
def test_a_forward_that_does_something_else_is_refused(kind, expected):
    """The name of the class and its submodules may promise a DenseNet; the numbers decide."""
    model = kind()
    nn.init.zeros_(model.classifier.weight)  # a new classifier must not hide the difference
    with pytest.raises(ValueError, match=f"adopt: expected {kind.__name__} to .*{expected}"):
        adopt(model)


@pytest.mark.parametrize(
    "thing", [{}, None, nn.Sequential(), nn.ReLU(), SparseNet, create_model("densenet_40_12")]
)
def test_other_things_are_refused(thing):
    with pytest.raises(ValueError, match=r"^adopt: "):
        adopt(thing)


def torchvision_names(blocks):
    """torchvision's names of convolutions, norms and the classifier, in order of registration."""
    yield from ("features.conv0", "features.norm0")
    for number, depth in enumerate(blocks, start=1):
        for layer in range(1, depth + 1):
            for part in ("norm1", "conv1", "norm2", "conv2"):
                yield f"features.denseblock{number}.denselayer{layer}.{part}"
        if number < len(blocks):
            yield from (f"features.transition{number}.norm", f"features.transition{number}.conv")
    yield from ("features.norm5", "classifier")


def torchvision_state(theirs, blocks):
    leaves = [m for m in theirs.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    return {
        f"{name}.{key}": tensor
        for name, leaf in zip(torchvision_names(blocks), leaves, strict=True)
        for key, tensor in leaf.state_dict().items()
    }


@pytest.mark.parametrize("agree", [True, False])
def test_torchvision_weights_give_torchvisions_logits(agree):
    blocks = (6, 12, 24, 16)
    theirs = peer(blocks=blocks, growth=32, stem=64, classes=1000).eval()
    if not agree:
        disagree(theirs)
    ours = create_model("densenet121").double().eval()
    load_torchvision(ours, torchvision_state(theirs, blocks))
    batch = images(theirs, (64, 64))
    with torch.no_grad():
        close(ours(batch), theirs(batch))


TWO_STAGES = Architecture(
    fetch="dense", blocks=(2, 2), growth_rate=4, bottleneck=True, stem="imagenet", num_classes=3
)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_old_torchvision_names_and_those_of_wrappers(prefix):
    theirs = disagree(peer(blocks=(2, 2), stem=8).eval())
    state = {
        prefix + name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor
        for name, tensor in torchvision_state(theirs, (2, 2)).items()
    }
    ours = SparseNet(TWO_STAGES).double().eval()
    load_torchvision(ours, state)
    batch = images(theirs)
    close(ours(batch), theirs(batch))


@pytest.mark.parametrize(
    ("changes", "edit", "expected"),
    [
        ({}, dict.clear, r"expected 'features\.conv0\.weight'"),
        ({}, lambda state: state.update({"features.conv9.weight": 0}), "no place for"),
        ({}, lambda state: state.update({f"module.{n}": 0 for n in state}), "found two for"),
        ({"num_classes": 7}, len, r"of shape \[7, 16\], found \[3, 16\]"),
        ({"fetch": "sparse"}, len, "densely concatenating"),
        ({"fetch": lambda i: range(i - 1, -1, -1)}, len, "densely concatenating"),
        ({"stem": "cifar"}, len, "densely concatenating"),
        ({"aggregation": "sum", "depth": 0}, len, "densely concatenating"),
    ],
)
def test_wrong_torchvision_weights_are_refused(changes, edit, expected):
    state = torchvision_state(peer(blocks=(2, 2), stem=8), (2, 2))
    edit(state)
    ours = SparseNet(dataclasses.replace(TWO_STAGES, **changes)).double()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=f"^torchvision weights: .*{expected}"):
        load_torchvision(ours, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "made",
    [
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        lambda tensor: tensor.to(torch.float8_e5m2),
        lambda tensor: tensor.long(),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.tolist(),
    ],
)
@pytest.mark.parametrize("place", ["features.norm0.running_var", "features.conv0.weight"])
def test_tensors_that_are_not_computed_with_are_refused(place, made):
    state = torchvision_state(peer(blocks=(2, 2), stem=8), (2, 2))
    state[place] = made(state[place])
    expected = f"expected {place!r} to be an ordinary tensor of floats"
    with pytest.raises(ValueError, match=re.escape(f"torchvision weights: {expected}, found")):
        load_torchvision(SparseNet(TWO_STAGES), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_tensors_are_combined_in_a_wider_type(dtype):
    theirs = disagree(peer(blocks=(2, 2), stem=8).eval())
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in torchvision_state(theirs, (2, 2)).items()
    }
    ours, same = SparseNet(TWO_STAGES).eval(), SparseNet(TWO_STAGES).double().eval()
    load_torchvision(ours, state)
    load_torchvision(same, {name: tensor.double() for name, tensor in state.items()})
    batch = images(theirs)
    torch.testing.assert_close(ours(batch.float()).double(), same(batch), rtol=1e-4, atol=1e-4)


def same_as_the_peer(theirs, chans, side=64):
    theirs = theirs.double()
    ours = adopt(theirs)
    batch = torch.randn(2, chans, side, side, dtype=torch.float64)
    for training in (True, False):
        close(ours.train(training)(batch), theirs.train(training)(batch))


def small(**names):
    return {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2, **names}


@pytest.mark.filterwarnings("ignore")
def test_torchvisions_own():
    densenet = pytest.importorskip("torchvision.models.densenet", exc_type=ImportError)
    same_as_the_peer(densenet.densenet121(), 3)
    theirs, ours = disagree(densenet.densenet121().double().eval()), create_model("densenet121")
    load_torchvision(ours.double().eval(), theirs.state_dict())
    batch = images(theirs, (64, 64))
    close(ours(batch), theirs(batch))
    same_as_the_peer(
        densenet.DenseNet(**small(num_init_features=6, num_classes=3, memory_efficient=True)), 3
    )
    with pytest.raises(ValueError, match="drop_rate=0"):
        adopt(densenet.DenseNet(**small(drop_rate=0.1)))


@pytest.mark.filterwarnings("ignore")
def test_timms_own():
    timm = pytest.importorskip("timm", exc_type=ImportError)
    same_as_the_peer(timm.create_model("densenet121", in_chans=1, num_classes=0), 1)
    densenet = pytest.importorskip("timm.models.densenet").DenseNet
    same_as_the_peer(densenet(**small(num_classes=3)), 3)
    for settings in (
        {"stem_type": "deep"},
        {"proj_drop_rate": 0.1},
        {"act_layer": "silu"},
        {"global_pool": "max"},
    ):
        with pytest.raises(ValueError, match=r"^adopt: "):
            adopt(densenet(**small(**settings)))


@pytest.mark.filterwarnings("ignore")
def test_monais_own():
    densenet = pytest.importorskip("monai.networks.nets.densenet", exc_type=ImportError)
    same_as_the_peer(densenet.DenseNet121(2, 1, 5), 1)
    same_as_the_peer(densenet.DenseNet(2, 2, 3, **small(init_features=6)), 2)
    for dims, settings in (
        (3, {}),
        (2, {"dropout_prob": 0.1}),
        (2, {"act": "prelu"}),
        (2, {"norm": "instance"}),
    ):
        with pytest.raises(ValueError, match=r"^adopt: "):
            adopt(densenet.DenseNet(dims, 1, 2, **small(**settings)))


@pytest.mark.filterwarnings("ignore")
def test_pytorchcvs_own():
    cifar = pytest.importorskip("pytorchcv.models.densenet_cifar", exc_type=ImportError)
    densenet = pytest.importorskip("pytorchcv.models.densenet").DenseNet
    same_as_the_peer(cifar.densenet40_k12_cifar10(), 3, 32)
    same_as_the_peer(cifar.densenet40_k12_bc_cifar100(), 3, 32)
    same_as_the_peer(densenet([[10, 14], [11, 15, 19]], 6, in_channels=1, num_classes=3), 1, 56)
    with pytest.raises(ValueError, match=r"dropout: .*Dropout\(p=0.1.*p=0 would do"):
        adopt(cifar.densenet40_k12_cifar10(dropout_rate=0.1))
