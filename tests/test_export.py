"""An exported file does alone what the model does, or it is neither written nor run."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Call
from PIL import Image
from torch import Tensor

from sparsenet.architecture import Architecture
from sparsenet.data.preprocessing import RULE, Preprocessing
from sparsenet.export import RUNTIMES, runtimes
from sparsenet.export import onnx as export_module
from sparsenet.export.onnx import Exported, ExportReport, export_onnx, metadata, onnx_file
from sparsenet.export.runtimes import Runtime
from sparsenet.extras import MissingExtra
from sparsenet.model import SparseNet
from sparsenet.predict import predict
from sparsenet.trained import Trained, load_trained
from sparsenet.weights import About, Measured, pack, rounded

CLASSES = ("cat", "dog", "größer", '"quoted"')


def make(**options: Any) -> Trained:
    torch.manual_seed(0)
    model = SparseNet(
        Architecture(depth=0, growth_rate=4, num_classes=len(CLASSES), **options)
    ).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):  # as if trained: statistics that are not the identity
            value.uniform_(0.5, 2)
    preprocessing = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    architecture = model.architecture.to_dict()
    about = About("0.1.0", architecture, preprocessing, CLASSES, "animals", recipe={}, epoch=3)
    return Trained(Path("run"), model, about)


def packed(trained: Trained) -> bytes:
    """A weights file of a network that was never measured."""
    recipe = {"data": {"test_fraction": 0.2, "skip_corrupt": False}}
    measured = {"fp32": Measured(50.0, 0.0, 8, "animals")}
    about = dataclasses.replace(trained.about, recipe=recipe, measured=measured)
    return pack(rounded(trained.model.state_dict()), about)


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, ExportReport]:
    trained = make(blocks=(2, 1, 1))
    return trained, export_onnx(trained, tmp_path_factory.mktemp("onnx") / "model.onnx", pixels(12))


def test_the_report_says_what_lies_on_disk(exported: tuple[Trained, ExportReport]) -> None:
    _, report = exported
    model = onnx.load(report.path)
    assert report.bytes == report.path.stat().st_size
    assert report.opset == model.opset_import[0].version
    assert report.max_difference <= 1e-4 * max(1, report.max_logit)
    assert report.real_images == 12
    assert list(report.path.parent.iterdir()) == [report.path]  # nothing left beside it
    assert "\n" not in report.summary()


def test_the_file_alone_classifies_as_the_model_does(
    exported: tuple[Trained, ExportReport],
) -> None:
    trained, report = exported
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["classes"])) == CLASSES
    assert about["layout"] == "NCHW"
    assert Architecture(**json.loads(about["architecture"])) == trained.model.architecture
    mean, std = (torch.tensor(json.loads(about[key])).view(1, -1, 1, 1) for key in ("mean", "std"))
    for count in (1, 3, 8):
        images = pixels(count)
        (logits,) = session.run(["logits"], {"images": ((images / 255 - mean) / std).numpy()})
        expected = trained.model(trained.preprocessing.normalise(images))
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_the_file_tells_nothing_of_its_makers_machine(
    exported: tuple[Trained, ExportReport],
) -> None:
    assert str(Path(export_module.__file__).parent).encode() not in exported[1].path.read_bytes()


def test_another_topology_and_opset_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = make(blocks=(1, 1), aggregation="sum", fetch="dense")
    target = tmp_path / "model.onnx"
    # PyTorch itself writes none as early; compilers such as Ascend's know no later one.
    assert export_onnx(trained, target, opset=15).opset == 15
    assert capfd.readouterr() == ("", "")
    model = onnx.load(target)
    assert model.opset_import[0].version == 15 and model.ir_version <= 8
    assert len(model.metadata_props) == len(metadata(trained))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter whose file computes something else."""
    right = export_module._program

    def off(model: SparseNet, images: Tensor, opset: int | None) -> Any:
        changed = copy.deepcopy(model)
        changed.state_dict()["classifier.bias"].add_(0.01)
        return right(changed, images, opset)

    monkeypatch.setattr(export_module, "_program", off)


@pytest.mark.usefixtures("wrong")
def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"within 1\.\de-04 of the model's, found a difference of 1\.0e-02"
    ):
        export_onnx(make(blocks=(1, 1)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "preprocess.md"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of many sizes and kinds."""
    folder, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)

    def save(name: str, image: Image.Image, **options: Any) -> None:
        image.save(folder / name, **options)

    def noise(height: int, width: int, *channels: int) -> Image.Image:
        """Smooth enough that it is not grey once it is small."""
        coarse = chance.integers(0, 256, (5, 7, *channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    for height, width in ((20, 333), (417, 31), (3, 5), (1, 1), (16, 16), (17, 16), (1001, 700)):
        save(f"{height}x{width}.png", noise(height, width, 3))
        save(f"{height}x{width}.jpg", noise(height, width, 3))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"turned{orientation}.jpg", noise(40, 90, 3), exif=exif)
    save("large.jpg", noise(2400, 3300, 3), quality=90)
    save("grey.jpg", noise(50, 60))
    save("rgba.png", noise(50, 60, 4))
    save("grey_and_alpha.png", noise(50, 60, 4).convert("LA"))
    save("rgba.webp", noise(50, 60, 4), lossless=True)
    save("palette.png", noise(50, 60, 3).quantize(30))
    save("palette.gif", noise(50, 60, 3).quantize(30), transparency=3)
    save("bits.png", noise(50, 60).convert("1"))
    save("cmyk.jpg", noise(50, 60, 3).convert("CMYK"))
    levels = np.asarray(noise(50, 60), np.float32) * 20
    for kind in ("png", "tif", "pgm"):
        save(f"deep.{kind}", Image.fromarray(levels.astype(np.uint16)))
    save("float.tif", Image.fromarray(levels - 300))
    save("turned_deep.tif", Image.fromarray(levels.astype(np.uint16)), tiffinfo={0x0112: 6})
    return sorted(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grey_range", [(0.0, 4095.0), (100.0, 2500.0)])
def test_the_page_and_the_metadata_alone_repeat_predict(
    photos: list[Path], channels: int, grey_range: tuple[float, ...], tmp_path: Path
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    kept = [
        node
        for node in ast.parse(code).body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
    ]
    page: dict[str, Any] = {}
    exec(compile(ast.Module(kept, []), str(PAGE), "exec"), page)
    trained = make(blocks=(2, 1, 1), in_chans=channels)
    statistics = (0.5, 0.4, 0.3)[:channels], (0.2, 0.2, 0.25)[:channels]
    preprocessing = Preprocessing(16, channels, *statistics, grey_range)
    about = dataclasses.replace(trained.about, preprocessing=preprocessing)
    trained = dataclasses.replace(trained, about=about)
    export_onnx(trained, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    said = session.get_modelmeta().custom_metadata_map
    assert said["preprocessing"] == RULE
    assert said["channel_order"] == ("RGB" if channels == 3 else "grey")
    answers = set()
    for prediction in predict(trained, photos, top=len(CLASSES)):
        assert prediction.error is None
        images = page["prepare"](prediction.path, said)
        (logits,) = session.run(None, {"images": images})
        found = torch.from_numpy(logits[0]).softmax(0)
        expected = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        for label, name in enumerate(json.loads(said["classes"])):
            assert abs(expected[name] - found[label].item()) < 1e-5, prediction.path
        answers.add(prediction.probabilities)
    assert len(answers) > 20  # they are not all one


def test_a_network_that_knows_no_deep_greys_says_sixteen_bits() -> None:
    assert json.loads(metadata(make(blocks=(1, 1)))["grey_range"]) == [0, 65535]


@pytest.mark.parametrize("opset", [0, 14, 1000])
def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(
        ValueError, match=f"--opset: expected a number from 15 to .*, found {opset}"
    ):
        export_onnx(make(blocks=(1, 1)), tmp_path / "model.onnx", opset=opset)


@pytest.mark.parametrize("target", [".", "missing/model.onnx"])
def test_a_target_that_cannot_be_written_is_refused_at_once(tmp_path: Path, target: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a file in a folder that exists"):
        export_onnx(make(blocks=(1, 1)), tmp_path / target)


def test_weights_are_not_replaced_by_another_format(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := Path("runs #2")).mkdir()
    weights = folder / "birds.safetensors"
    weights.write_bytes(packed(make(blocks=(1, 1))))
    before = weights.read_bytes()
    for target in (weights, folder / "other.safetensors"):
        outcome = call("export", weights, "--out", target)
        assert outcome.code == 2 and "--out: expected" in outcome.err
    assert weights.read_bytes() == before and list(folder.iterdir()) == [weights]
    Path("link.onnx").symlink_to(folder / "model.onnx")
    assert call("export", weights, "--out", "link.onnx").code == 0
    assert Path("link.onnx").is_symlink() and (folder / "model.onnx").is_file()
    assert call("export", weights).code == 0 and Path("birds.onnx").is_file()
    assert load_trained(weights).name == "birds"


# --- engines --------------------------------------------------------------------------------------


@pytest.fixture(params=RUNTIMES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine that is installed."""
    if (
        find_spec(request.param) is None
    ):  # not importorskip, whose import of OpenVINO would be reported
        pytest.skip(f"no {request.param}")
    return str(request.param)


def test_an_engine_computes_what_the_model_does(engine: str) -> None:
    trained = make(blocks=(2, 1, 1))
    module = Exported(trained, Runtime(engine), pixels(12))
    for count in (1, 5, 12):
        images = trained.preprocessing.normalise(pixels(count))
        expected = trained.model(images)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = module(images.contiguous(memory_format=layout))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(
        module(images), module(images + 1)
    )  # and an output is not overwritten by the next


@pytest.mark.usefixtures("wrong")
def test_an_engine_that_computes_something_else_is_not_used(engine: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{engine}'s logits within .* of the model's, found a difference of 1\.0e-02",
    ):
        Exported(make(blocks=(1, 1)), Runtime(engine), pixels(3))


def test_an_engine_computes_in_the_precisions_it_has_or_says_so(engine: str) -> None:
    able = runtimes.precisions(engine)
    assert able[0] == "fp32" and Runtime(engine, "auto").precision == able[-1]
    if "bf16" not in able:
        with pytest.raises(
            ValueError, match=f"--precision: expected fp32 for {engine} on this CPU, found bf16"
        ):
            Runtime(engine, "bf16")
        return
    trained = make(blocks=(2, 1, 1))
    images = trained.preprocessing.normalise(pixels(12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = trained.model(images).float()
    exact = trained.model(images)
    found = Exported(trained, Runtime(engine, "bf16"), pixels(12))(images)
    error = (found - exact).abs().max()
    assert (
        1e-4 < error <= 2 * (own - exact).abs().max() + 1e-4 * exact.abs().max()
    )  # it is bf16, and no worse


def test_an_engine_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("onnxruntime", "export"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            MissingExtra, match=rf"expected the package {name}, found none: .*\[{extra}\]"
        ):
            Runtime(name)


def test_no_engine_loads_what_would_report_its_use(engine: str) -> None:
    code = f"import sys; from sparsenet.export.runtimes import Runtime; Runtime({engine!r})\n"
    code += (
        "print([n for n, module in sys.modules.items() if 'openvino_telemetry' in n and module])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_file_that_an_engine_cannot_run_is_one_line(engine: str) -> None:
    trained = make(blocks=(1, 1))
    file, _ = onnx_file(trained)
    model = onnx.load_from_string(file)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(
        ValueError, match=rf"^onnx: {engine} \S+ cannot run the file: .*NoSuchOperator"
    ) as found:
        Runtime(engine).start(model.SerializeToString())
    assert "\n" not in str(found.value)
