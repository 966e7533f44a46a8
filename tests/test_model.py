"""The network as its users see it, and as other libraries compute it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsenet
from sparsenet import Architecture, SparseNet, create_model, list_models

EXACT = 1e-10


def scrambled(model, seed=0):
    """*model* in fp64 and evaluation mode with random affines and running statistics."""
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and ("norm" in name or "running" in name):
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
    """Feature i is residual branch i: the sum of all is the residual stream (arXiv:1603.05027)."""
    settings = {"fetch": "dense", "aggregation": "sum", "growth_rate": 8, "bottleneck": bottleneck}
    model = scrambled(SparseNet(Architecture(depth=31 if bottleneck else 22, **settings)))
    for training in (False, True):
        model.train(training)
        for number, stage in enumerate(model.stages):
            stream = torch.randn(4, 8, 8 >> number, 8 >> number, dtype=torch.float64)
            output = stage(stream)
            statistics = iter(stage.statistics)

            def normed(x, affine, statistics=statistics, training=training):
                running = next(statistics)
                mean, var = running.running_mean, running.running_var
                mean, var = (None, None) if training else (mean, var)
                return F.relu(F.batch_norm(x, mean, var, affine.weight, affine.bias, training))

            for layer in stage.layers:
                branch = stream
                for unit in layer:
                    branch = F.conv2d(
                        normed(branch, unit.norm), unit.conv.weight, padding=unit.conv.padding
                    )
                stream = stream + branch  # the identity shortcut
            difference = output - normed(stream, stage.norm)
            assert difference.abs().max() < EXACT * output.abs().max()


def test_sparse_summation_trains():
    model = SparseNet(Architecture(aggregation="sum", depth=22, growth_rate=(4, 8, 16)))
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pytorchcvs_sparsenet121_where_it_is_installed():
    peers = pytest.importorskip("pytorchcv.models.sparsenet", exc_type=ImportError)
    peer = peers.sparsenet121(pretrained=False)
    torch.manual_seed(0)
    with torch.no_grad():  # as training leaves running statistics: every reader has the same
        peer.double().train()(torch.randn(2, 3, 224, 224).double())
    model = create_model("sparsenet121").double()
    model.load_state_dict(from_pytorchcv(model, peer.eval()))
    images = torch.randn(2, 3, 224, 224).double()
    with torch.no_grad():
        expected, logits = peer(images), model.eval()(images)
    assert (logits - expected).abs().max() < EXACT * expected.abs().max()


def from_pytorchcv(model, peer):
    """Our state dict from the peer's modules, which execute in the same order as our readers."""
    norms = iter([m for m in peer.modules() if isinstance(m, nn.BatchNorm2d)])
    convs = iter([m for m in peer.modules() if isinstance(m, nn.Conv2d)])
    linear = next(m for m in peer.modules() if isinstance(m, nn.Linear))
    state = dict(model.state_dict())

    def copy(module, name):
        tensors = module.state_dict()
        state.update({f"{name}.{part}": tensors[part] for part in tensors if "num" not in part})

    copy(next(convs), "stem.0")
    copy(next(norms), "stem.1")
    for s, stage in enumerate(model.architecture.stages):
        depth, transition = stage.topology.depth, f"transitions.{s}"
        units = [f"stages.{s}.layers.{i}.{u}" for i in range(depth) for u in (0, 1)]
        for read, place in zip(stage.reads, [*units, f"stages.{s}"], strict=True):
            norm = next(norms)
            state[f"{place}.norm.weight"], state[f"{place}.norm.bias"] = norm.weight, norm.bias
            widths = [stage.unit_widths[j] for j in read]
            for part in ("running_mean", "running_var"):
                for j, piece in zip(read, getattr(norm, part).split(widths), strict=True):
                    state[f"stages.{s}.statistics.{j}.{part}"] = piece
            if place in units:
                copy(next(convs), f"{place}.conv")
            elif f"{transition}.conv.weight" in state:
                copy(next(convs), f"{transition}.conv")
    copy(linear, "classifier")
    return state


def test_the_public_names():
    assert all(hasattr(sparsenet, name) for name in sparsenet.__all__)


WRONG_IMAGES = {
    "one image": (torch.zeros(3, 32, 32), ValueError, r"found \(3, 32, 32\); image\[None\]"),
    "no image": (torch.zeros(32), ValueError, r"found \(32,\)"),
    "grey": (torch.zeros(2, 1, 32, 32), ValueError, r"\(N, 3, H, W\) tensor, found \(2, 1, 32"),
    "pixels": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "uint8; .*normalise first"),
    "counts": (torch.zeros(2, 3, 8, 8, dtype=torch.int64), ValueError, "found torch.int64"),
    "meta": (torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "on cpu, found one on meta"),
    "a list": ([[0.0]], TypeError, "tensor, found list"),
    "an array": (torch.zeros(2, 3, 8, 8).numpy(), TypeError, "tensor, found ndarray"),
}


@pytest.mark.parametrize(("images", "error", "words"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_what_is_no_batch_of_normalised_images_is_refused(images, error, words):
    model = SparseNet(Architecture(depth=7, growth_rate=4)).eval()
    for forward in (model, model.forward_features):
        with pytest.raises(error, match=f"^images: expected normalised ones.*{words}"):
            forward(images)


def test_a_model_without_memory_of_its_own_takes_images_without():
    with torch.device("meta"):
        model = SparseNet(Architecture(depth=7, growth_rate=4), "reference").eval()
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_a_stem_of_the_users_own_takes_what_it_likes():
    model = SparseNet(Architecture(depth=7, growth_rate=4)).eval()
    model.stem = nn.Conv2d(1, 8, 3, padding=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
