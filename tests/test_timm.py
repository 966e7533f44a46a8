"""The networks among timm's: what timm's own tests ask of a model, for four kinds of network."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torchvision_operators  # noqa: F401 - which timm needs
from torch import Tensor, nn

import sparsenet
from sparsenet.extras import MissingExtra

timm = pytest.importorskip("timm", exc_type=ImportError)
import sparsenet.timm  # noqa: E402 - timm first, or this is skipped

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse": ("sparsenet_40_12", {}),
    "bottleneck": ("sparsenet_bc_100_24", {}),
    "dense": ("densenet_40_12", {}),
    "sum": ("sparsenet_40_12", {"aggregation": "sum"}),
    "strided": ("sparsenet121", {"blocks": (2, 2, 2)}),
}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def create(kind: str, **settings: Any) -> Any:
    name, changes = MODELS[kind]
    torch.manual_seed(0)
    return timm.create_model(name, **changes, **settings)


def side(kind: str) -> int:
    return 64 if kind == "strided" else 32


def images(kind: str, count: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, side(kind), side(kind), generator=generator)


def test_timm_lists_them_and_keeps_its_own() -> None:
    assert set(timm.list_models("sparsenet*")) == set(sparsenet.list_models("sparsenet*"))
    pretrained = timm.list_models("sparsenet*", pretrained=True)
    assert set(pretrained) == set(sparsenet.list_models("sparsenet*", pretrained=True))
    assert type(timm.create_model("densenet121")).__module__.startswith("timm")


def test_without_timm_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str, *_: object) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("sparsenet.extras.import_module", missing)
    with pytest.raises(MissingExtra, match=r"expected the package timm, found none: pip install"):
        importlib.reload(sparsenet.timm)


def test_forward(kind: str) -> None:
    model = create(kind).eval()
    output = model(images(kind))
    assert output.shape == (2, model.num_classes) and output.isfinite().all()


def test_backward(kind: str) -> None:
    model = create(kind, num_classes=42).train()
    model(images(kind)).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.num_classes == 42


def test_default_configuration(kind: str) -> None:
    model = create(kind).eval()
    config: Mapping[str, Any] = model.default_cfg
    state, x = model.state_dict(), images(kind)
    assert f"{config['first_conv']}.weight" in state and f"{config['classifier']}.weight" in state
    assert model.get_classifier() is model.classifier and config["num_classes"] == model.num_classes
    whole = torch.randn(1, *config["input_size"])
    if not MODELS[kind][1].get("blocks"):
        assert model.forward_features(whole).shape[-2:] == config["pool_size"]
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == model.head_hidden_size
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert not any(name.startswith(config["classifier"]) for name in model.state_dict())
    made = create(kind, num_classes=0, global_pool="").eval()
    assert made(x).shape == features.shape
    assert create(kind, num_classes=0).eval()(x).shape == (2, model.num_features)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)


def test_other_channels(kind: str) -> None:
    model = create(kind, in_chans=5).eval()
    assert model(images(kind, channels=5)).shape == (2, model.num_classes)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_weights_for_other_channels_are_those_timm_makes(channels: int) -> None:
    (name, *_) = sparsenet.list_models("sparsenet_*", pretrained=True)
    theirs = timm.create_model(name, pretrained=True, in_chans=channels, num_classes=3)
    ours = sparsenet.create_model(name, pretrained=True, in_chans=channels, num_classes=3)
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    x = torch.randn(2, channels, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-3)
    whole = sparsenet.create_model(name, pretrained=True)
    if channels == 1:
        torch.testing.assert_close(ours.stem[0].weight, whole.stem[0].weight.sum(1, keepdim=True))


def test_weights(kind: str) -> None:
    name, changes = MODELS[kind]
    if changes or name not in sparsenet.list_models(pretrained=True):
        pytest.skip("no weights of it come with the package")
    model, ours = (
        timm.create_model(name, pretrained=True),
        sparsenet.create_model(name, pretrained=True),
    )
    torch.testing.assert_close(model.eval()(images(kind)), ours.eval()(images(kind)))
    about = sparsenet.weights.load(name).about
    assert model.pretrained_cfg["mean"] == about.preprocessing.mean


def test_features(kind: str) -> None:
    model = create(kind, features_only=True).eval()
    found = model(images(kind))
    assert [each.shape[1] for each in found] == model.feature_info.channels()
    assert [side(kind) // each.shape[-1] for each in found] == model.feature_info.reduction()
    some = create(kind, features_only=True, out_indices=(0, -2)).eval()
    for each, expected in zip(some(images(kind)), (found[0], found[-2]), strict=True):
        assert each.shape == expected.shape
    assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in model.parameters())


def test_intermediates(kind: str) -> None:
    model = create(kind).eval()
    x = images(kind)
    final, found = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(found[-1], final)
    assert [each.shape[1] for each in found] == [row["num_chs"] for row in model.feature_info]
    seen: dict[str, Tensor] = {}
    for row in model.feature_info:  # what the modules that it names give
        name = row["module"]
        hook = lambda m, i, o, name=name: seen.__setitem__(name, o)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(x)
    torch.testing.assert_close(found, list(seen.values()))
    for indices, expected in ((1, found[-1:]), ([0, -1], [found[0], found[-1]]), ([1], found[1:2])):
        for early in (False, True):
            given = {"indices": indices, "intermediates_only": True, "stop_early": early}
            torch.testing.assert_close(model.forward_intermediates(x, **given), list(expected))
    for wrong in ({"indices": [9]}, {"indices": []}, {"indices": 9}, {"output_fmt": "NLC"}):
        with pytest.raises(ValueError, match=r"^(indices|output_fmt): expected .* found"):
            model.forward_intermediates(x, **wrong)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(pruned(x), found[1])
    assert pruned.num_features == pruned.forward_features(x).shape[1]
    assert [row["num_chs"] for row in pruned.feature_info] == [each.shape[1] for each in found[:2]]
    pruned.reset_classifier(5, "avg")
    assert pruned(x).shape == (len(x), 5)


def test_symbolic_features(kind: str) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction", exc_type=ImportError)
    model = create(kind).eval()
    x = images(kind)
    _, nodes = extraction.get_graph_node_names(model)
    traced = extraction.create_feature_extractor(model, {nodes[-1]: "logits", "stages.1.relu": "f"})
    found = traced(x)
    torch.testing.assert_close(found["logits"], model(x), rtol=1e-3, atol=1e-2)
    assert found["f"].shape[1] == model.feature_info[2]["num_chs"]
    trained = extraction.create_feature_extractor(create(kind).train(), {nodes[-1]: "logits"})
    trained(x)["logits"].mean().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_checkpointing_keeps_less_and_computes_the_same(kind: str) -> None:
    models = [create(kind, implementation="shared", num_classes=3) for _ in range(2)]
    models[1].set_grad_checkpointing()
    assert models[1].memory == "lean" and models[0].memory == "normal"
    gradients, kept = [], []
    for model in models:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
        ):
            loss = model.train()(images(kind)).square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(saved))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert kept[1] < kept[0] or kind in ("sparse", "dense", "sum")
    models[1].set_grad_checkpointing(False)
    assert models[1].memory == "normal" == models[1].stages[0].plan.memory
    with pytest.raises(ValueError, match=r"^memory: expected .* found 'lean'"):
        create(kind, implementation="reference").set_grad_checkpointing()


def test_dropped_features(kind: str) -> None:
    model = create(kind, drop_rate=0.5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    x = images(kind)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), create(kind).eval()(x))


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_of_layers(coarse: bool, kind: str) -> None:
    from timm.models._manipulate import group_with_matcher

    model = create(kind)
    named = list(model.named_parameters())
    groups = group_with_matcher(named, model.group_matcher(coarse))
    assert sorted(name for names in groups.values() for name in names) == sorted(
        n for n, _ in named
    )
    depth = {name: place for place, names in groups.items() for name in names}
    assert depth["stem.0.weight"] == 0
    assert depth["classifier.weight"] == max(depth.values())
    first, later = "stages.0.layers.0.0.conv.weight", "stages.1.layers.1.0.conv.weight"
    assert 0 < depth[first] <= depth["transitions.0.conv.weight"] < depth[later]


def test_rates_by_layer(kind: str) -> None:
    from timm.optim import create_optimizer_v2

    model = create(kind)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.7)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"global_pool": "max"}, {"global_pool": ""}):
        with pytest.raises(ValueError, match=r"^global_pool: expected 'avg'"):
            timm.create_model("sparsenet_40_12", **wrong)
