"""Packages that work on modules do on this network what they do on the same one in plain modules.

``pip install '.[packages]'`` installs those that are tried here.
"""

from collections.abc import Callable

import pytest
import torch
import torchvision_operators  # noqa: F401 - which some need
from plain import Plain
from test_modules import IMPLEMENTATIONS, NETWORKS, close, gradients, images, network, pair
from torch import Tensor, nn

from sparsenet.graph import count

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_peft_trains_and_merges_low_rank_additions(implementation: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*layers.*conv", init_lora_weights=False)
    tuned = []
    for model in pair(implementation):
        torch.manual_seed(0)
        tuned.append(peft.get_peft_model(model.eval(), config))
    close(tuned[0](images()), tuned[1](images()))
    found = gradients(tuned[0], images())
    added = [name for name, p in tuned[0].named_parameters() if p.requires_grad]
    assert added and set(added) == found.keys()
    close(list(found.values()), list(gradients(tuned[1], images()).values()))
    before = tuned[0](images())
    merged = tuned[0].merge_and_unload()
    assert all(each.change() is None for each in merged.stages)  # plain modules again
    close(merged(images()), before)


def by_captum(implementation: str, explain: Callable[[nn.Module], Tensor]) -> None:
    ours, theirs = pair(implementation)
    close(explain(ours.eval()), explain(theirs.eval()))


def test_captum_guided_backpropagation(implementation: str) -> None:
    attr = pytest.importorskip("captum.attr")
    by_captum(implementation, lambda m: attr.GuidedBackprop(m).attribute(images(), target=1))


def test_captum_deep_lift(implementation: str) -> None:
    attr = pytest.importorskip("captum.attr")
    by_captum(
        implementation,
        lambda m: attr.DeepLift(m).attribute(images(), baselines=0 * images(), target=1),
    )


def test_captum_layers(implementation: str) -> None:
    attr = pytest.importorskip("captum.attr")
    layer = "stages.1.layers.1.1.conv"
    for method in (attr.LayerGradCam, attr.LayerActivation):
        by_captum(
            implementation,
            lambda m, method=method: method(m, m.get_submodule(layer)).attribute(
                images(), **({"target": 1} if method is attr.LayerGradCam else {})
            ),
        )


def test_grad_cam(implementation: str) -> None:
    grad_cam = pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    targets = [grad_cam.utils.model_targets.ClassifierOutputTarget(1)] * 3
    found = []
    for model in pair(implementation):
        layers = [model.eval().get_submodule("stages.1.layers.1.1.conv")]
        with grad_cam.GradCAM(model, layers) as explain:
            found.append(torch.from_numpy(explain(images(), targets)))
    assert found[0].any()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # it computes in fp32


@pytest.mark.parametrize("name", NETWORKS)
def test_torchinfo(name: str, implementation: str) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    ours = network(implementation, NETWORKS[name]).float()
    found = torchinfo.summary(ours, (1, 3, 32, 32), verbose=0, depth=9)
    parameters, macs = count(ours.architecture, 32)
    assert found.total_params == parameters
    # Norms and biases are multiplications to torchinfo.
    others = sum(p.numel() for p in ours.parameters() if p.ndim == 1)
    assert 0 <= found.total_mult_adds - macs <= others


@pytest.mark.parametrize("name", NETWORKS)
def test_ptflops(name: str, implementation: str) -> None:
    ptflops = pytest.importorskip("ptflops")
    ours = network(implementation, NETWORKS[name]).float().eval()
    plain = Plain(ours.double()).float().eval()
    found = []
    for model in (ours.float(), plain):
        found.append(
            ptflops.get_model_complexity_info(
                model, (3, 32, 32), as_strings=False, print_per_layer_stat=False, backend="aten"
            )
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05)
    assert found[0][0] >= count(ours.architecture, 32)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_fvcore(name: str, implementation: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    ours = network(implementation, NETWORKS[name]).float().eval()
    counted = fvcore.FlopCountAnalysis(ours, images(1, side=32).float())
    by_operator = counted.unsupported_ops_warnings(False).by_operator()
    assert by_operator["conv"] + by_operator["linear"] == count(ours.architecture, 32)[1]


def test_lightning_averages_weights(implementation: str, tmp_path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    ends = []
    for model in pair(implementation):
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)],
        )
        batches = [images(4, seed=seed) for seed in range(3)]
        module = Module(model)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        ends.append(module.model.eval()(images()))
    close(*ends)


def test_eager_quantisation_aware_training(implementation: str) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    trained = []
    for model in pair(implementation):
        model.float().train().qconfig = quantization.get_default_qat_qconfig("x86")
        prepared = quantization.prepare_qat(model)
        prepared(images().float()).sum().backward()
        fakes = [m for m in prepared.modules() if isinstance(m, quantization.FakeQuantizeBase)]
        weights = [m for n, m in prepared.named_modules() if n.endswith("weight_fake_quant")]
        assert weights and all(m.activation_post_process.min_val.numel() for m in weights)
        used = [m for m in fakes if torch.isfinite(m.activation_post_process.min_val).all()]
        trained.append(len(used) / len(fakes))
    assert trained[0] == 1
