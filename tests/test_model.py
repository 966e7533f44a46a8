"""The network as its users see it, and as other libraries compute it."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsenet
from sparsenet import Architecture, SparseNet, create_model, list_models, load_torchvision

EXACT = 1e-10


def scrambled(model, seed=0):
    """*model* in fp64 and evaluation mode with random affines and running statistics."""
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (
            "norm" in name or "bn" in name or "running" in name or "features.0" in name
        ):
            nn.init.uniform_(tensor.data, 0.5, 1.5)
    return model.double().eval()


@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_any_size_from_8_and_any_channels(size, in_chans):
    model = create_model("sparsenet_40_12", num_classes=4, in_chans=in_chans).eval()
    images = torch.randn(2, in_chans, size, size)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, size // 4, size // 4)
    assert model(images).shape == (2, 4)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


def test_reset_classifier():
    model = create_model("sparsenet_40_12").double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if "classifier" not in k}
    model.reset_classifier(3)
    assert model.num_classes == model.architecture.num_classes == 3
    assert model(torch.randn(2, 3, 8, 8).double()).shape == (2, 3)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 8, 8).double()).shape == (2, model.num_features)


def test_list_and_create_by_name():
    assert "sparsenet_100_24" in list_models()
    assert set(list_models("densenet*")) == {n for n in list_models() if n.startswith("densenet")}
    with pytest.raises(ValueError, match="sparsenet_100_24"):
        create_model("sparsenet_100_42")
    assert create_model("sparsenet_40_12", dropout=0.2).architecture.dropout == 0.2


@pytest.mark.parametrize(
    "name", [n for n in list_models() if "100" not in n and "2" in n and "4" not in n]
)
def test_named_networks_run(name):
    model = create_model(name, num_classes=5).eval()
    size = 32 if name.split("_")[-1] == name else 8
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


def test_the_initialisation_is_the_papers():
    model = create_model("sparsenet_100_24")
    for conv in (
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000
    ):
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert conv.weight.mean().abs().item() < 5 * expected / conv.weight.numel() ** 0.5
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_dense_summation_is_the_pre_activation_resnet(bottleneck):
    """Feature i is residual branch i, so the sum of all earlier ones is the residual stream (arXiv:1603.05027)."""
    arch = Architecture(fetch="dense", aggregation="sum", depth=31 if bottleneck else 22, growth_rate=8,
                        bottleneck=bottleneck)  # fmt: skip
    model = scrambled(SparseNet(arch))
    for training in (False, True):
        model.train(training)
        for number, stage in enumerate(model.stages):
            stream = torch.randn(4, 8, 8 >> number, 8 >> number, dtype=torch.float64)
            found = stage(stream)
            statistics = iter(stage.statistics)

            def normed(x, affine, statistics=statistics, training=training):
                kept = next(statistics)
                mean, var = (None, None) if training else (kept.running_mean, kept.running_var)
                return F.relu(F.batch_norm(x, mean, var, affine.weight, affine.bias, training))

            for layer in stage.layers:
                branch = stream
                for unit in layer:
                    branch = F.conv2d(
                        normed(branch, unit.norm), unit.conv.weight, padding=unit.conv.padding
                    )
                stream = stream + branch  # the identity shortcut
            assert (found - normed(stream, stage.norm)).abs().max() < EXACT * found.abs().max()


def test_sparse_summation_trains():
    model = SparseNet(Architecture(aggregation="sum", depth=22, growth_rate=(4, 8, 16)))
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class _DenseLayer(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class TorchvisionDenseNet(nn.Module):
    """The peer's arithmetic under the peer's names: running statistics belong to every reader."""

    def __init__(self, blocks=(6, 12, 24, 16), growth=32, stem=64, classes=1000):
        super().__init__()
        f = self.features = nn.Module()
        f.conv0, f.norm0 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        width = stem
        for number, depth in enumerate(blocks, 1):
            block = nn.Module()
            for i in range(depth):
                block.add_module(f"denselayer{i + 1}", _DenseLayer(width + i * growth, growth))
            f.add_module(f"denseblock{number}", block)
            width += depth * growth
            if number < len(blocks):
                transition = nn.Module()
                transition.norm, transition.conv = (
                    nn.BatchNorm2d(width),
                    nn.Conv2d(width, width // 2, 1, bias=False),
                )
                f.add_module(f"transition{number}", transition)
                width //= 2
        f.norm5, self.classifier = nn.BatchNorm2d(width), nn.Linear(width, classes)
        self.blocks = len(blocks)

    def forward(self, x):
        f = self.features
        x = F.max_pool2d(F.relu(f.norm0(f.conv0(x))), 3, 2, 1)
        for number in range(1, self.blocks + 1):
            for layer in getattr(f, f"denseblock{number}").children():
                x = torch.cat([x, layer(x)], 1)
            if number < self.blocks:
                transition = getattr(f, f"transition{number}")
                x = F.avg_pool2d(transition.conv(F.relu(transition.norm(x))), 2)
        return self.classifier(F.relu(f.norm5(x)).mean((2, 3)))


@pytest.mark.parametrize("agree", [True, False])
def test_torchvision_weights_give_torchvisions_logits(agree):
    torch.manual_seed(0)
    peer = TorchvisionDenseNet()
    if agree:  # as training leaves them: every reader of a feature has seen the same
        peer.double().train()
        with torch.no_grad():
            peer(torch.randn(2, 3, 64, 64).double())
        peer.eval()
    else:
        peer = scrambled(peer)
    model = create_model("densenet121").double()
    load_torchvision(model, peer.state_dict())
    images = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        expected, found = peer(images), model.eval()(images)
    assert (found - expected).abs().max() < EXACT * expected.abs().max()


def test_old_torchvision_names_and_wrong_weights():
    peer = scrambled(TorchvisionDenseNet((2, 2), 4, 8, 3))
    arch = Architecture(
        fetch="dense", blocks=(2, 2), growth_rate=4, bottleneck=True, stem="imagenet", num_classes=3
    )
    model = SparseNet(arch).double()
    state = {
        k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for k, v in peer.state_dict().items()
    }
    load_torchvision(model, state)
    images = torch.randn(2, 3, 32, 32).double()
    assert (model.eval()(images) - peer(images)).abs().max() < 1e-9
    with pytest.raises(ValueError, match=r"expected 'features\.conv0\.weight'"):
        load_torchvision(model, {})
    with pytest.raises(ValueError, match="no place for"):
        load_torchvision(model, {**state, "features.conv9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="torchvision weights"):
        load_torchvision(
            SparseNet(Architecture(blocks=(2, 2), growth_rate=4, bottleneck=True)), state
        )
    with pytest.raises(ValueError, match=r"of shape \[7, 16\], found \[3, 16\]"):
        load_torchvision(SparseNet(dataclasses.replace(arch, num_classes=7)), state)
    wrong_order = dataclasses.replace(arch, fetch=lambda i: range(i - 1, -1, -1))
    with pytest.raises(ValueError, match="densely concatenating"):
        load_torchvision(SparseNet(wrong_order), state)


def test_torchvision_itself_where_it_is_installed():
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    peer = scrambled(torchvision.models.densenet121(weights=None))
    model = create_model("densenet121").double()
    load_torchvision(model, peer.state_dict())
    images = torch.randn(1, 3, 64, 64).double()
    assert (model.eval()(images) - peer(images)).abs().max() < 1e-9


def test_pytorchcvs_sparsenet121_where_it_is_installed():
    peers = pytest.importorskip("pytorchcv.models.sparsenet", exc_type=ImportError)
    peer = peers.sparsenet121(pretrained=False)
    torch.manual_seed(0)
    with (
        torch.no_grad()
    ):  # running statistics as training leaves them: the same for every reader of a feature
        peer.double().train()(torch.randn(2, 3, 224, 224).double())
    model = create_model("sparsenet121").double()
    model.load_state_dict(from_pytorchcv(model, peer.eval()))
    images = torch.randn(2, 3, 224, 224).double()
    with torch.no_grad():
        expected, found = peer(images), model.eval()(images)
    assert (found - expected).abs().max() < EXACT * expected.abs().max()


def from_pytorchcv(model, peer):
    """Our state dict from the peer's modules, which execute in the same order as our readers."""
    norms = [m for m in peer.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [m.weight for m in peer.modules() if isinstance(m, nn.Conv2d)]
    state = dict(model.state_dict())
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"stem.1.{part}"] = getattr(norms[0], part)
    conv, norm = iter(convs), iter(norms[1:])
    state["stem.0.weight"] = next(conv)
    for s, stage in enumerate(model.architecture.stages):
        places = [f"stages.{s}.layers.{i}.{u}" for i in range(stage.topology.depth) for u in (0, 1)]
        for r, read in enumerate(stage.reads):
            last = r == len(places)
            theirs, place = next(norm), f"stages.{s}.norm" if last else f"{places[r]}.norm"
            state[f"{place}.weight"], state[f"{place}.bias"] = theirs.weight, theirs.bias
            split = [stage.unit_widths[j] for j in read]
            for j, mean, var in zip(
                read, theirs.running_mean.split(split), theirs.running_var.split(split), strict=True
            ):
                state[f"stages.{s}.statistics.{j}.running_mean"] = mean
                state[f"stages.{s}.statistics.{j}.running_var"] = var
            if not last:
                state[f"{places[r]}.conv.weight"] = next(conv)
            elif s + 1 < len(model.architecture.stages):
                state[f"transitions.{s}.conv.weight"] = next(conv)
    linear = next(m for m in peer.modules() if isinstance(m, nn.Linear))
    state["classifier.weight"], state["classifier.bias"] = linear.weight, linear.bias
    return state


def test_the_public_names():
    assert all(hasattr(sparsenet, name) for name in sparsenet.__all__)
