"""What programs and notebooks call gives what the command line gives."""

from __future__ import annotations

import io
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call, newest, signals_put_back, write_classes, write_image
from PIL import Image, ImageSequence
from test_data_images import TAG, deep

import sparsenet
import sparsenet.library
from sparsenet.config import RunConfig, TrainConfig, changed, replace
from sparsenet.config import load as load_config
from sparsenet.events import EpochDone, Event, Step
from sparsenet.predict import predict
from sparsenet.run import Run
from sparsenet.schedule import OptimConfig
from sparsenet.signals import Signals

SETTINGS = {"depth": 7, "growth_rate": 4, "max_epoch": 2, "batch_size": 4, "precision": "fp32"}
FLAGS = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]


def test_fit_trains_the_run_that_the_command_trains(call: Call) -> None:
    write_classes(Path("data"))
    outcome = call("train", "--dataset_dir", "data", *FLAGS, "--out", "command")
    seen: list[Event] = []
    with signals_put_back():
        fit = sparsenet.fit(dataset_dir=Path("data"), out="program", events=seen.append, **SETTINGS)
        quiet = sparsenet.fit(Run(fit.path).config(), out=Path("quiet"), quiet=True)
    assert fit.path == Path("program") and fit.stopped is None
    assert [event.metrics for event in seen if isinstance(event, EpochDone)] == list(fit.metrics)
    assert any(isinstance(event, Step) for event in seen)
    assert fit.result is not None and fit.error == fit.result.error == quiet.error
    runs = [
        newest(Path(name) / "checkpoints", "last")[0] for name in ("command", "program", "quiet")
    ]
    for other in runs[1:]:
        assert all(torch.equal(t, other.tensors[name]) for name, t in runs[0].tensors.items())
    said = call("models", "sparsenet_40_12")  # takes what was printed meanwhile
    assert said.code == 0
    assert outcome.lines[-2] in Path("program/train.log").read_text()
    network = fit.load("cpu")
    assert network.classes == ("ant", "bee") and not network.model.training


def test_fit_prints_as_the_command_does_unless_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))
    with signals_put_back():
        sparsenet.fit(dataset_dir="data", **(SETTINGS | {"max_epoch": 1}), out="loud")
        assert "epoch 1/1" in capsys.readouterr().out
        sparsenet.fit(resume="loud", quiet=True, max_epoch=2)
        assert capsys.readouterr().out == ""
    assert "epoch 2/2" in Path("loud/train.log").read_text()
    assert load_config(Path("loud/config.json"), Run(Path("loud")).config()).train.max_epoch == 2


def test_a_signal_saves_and_what_a_callback_raises_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))

    def interrupt(event: Event) -> None:
        if isinstance(event, Step):
            signal.raise_signal(signal.SIGINT)

    def fail(event: Event) -> None:
        if isinstance(event, EpochDone):
            raise KeyError("mine")

    with signals_put_back():
        before = signal.getsignal(signal.SIGINT)
        fit = sparsenet.fit(dataset_dir="data", out="run", events=interrupt, quiet=True, **SETTINGS)
        assert (fit.stopped, fit.result, fit.error) == ("SIGINT", None, None)
        assert signal.getsignal(signal.SIGINT) == before
        with pytest.raises(KeyError, match="mine"):
            sparsenet.fit(resume="run", events=fail, quiet=True)
        fit = sparsenet.fit(resume=Path("run"), quiet=True)
    assert [row.epoch for row in fit.metrics] == [1, 2] and fit.result is not None


def test_wrong_words_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))
    for settings, words in (
        ({"epochs": 3}, "epochs: expected a setting"),
        ({"max_epochs": 3}, "max_epochs: expected a setting.* did you mean '?max_epoch"),
        ({"max_epoch": "3"}, "max_epoch: expected"),
        ({"max_epoch": -1}, "max_epoch: expected at least 0"),
        ({"preset": "fast"}, "--preset: expected one of"),
        ({"model": "resnet18"}, "model: expected a name"),
        ({"resume": "data"}, "data: expected a run folder"),
        ({"resume": "data", "out": "x"}, "expected resume without"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            sparsenet.fit(dataset_dir="data", **settings)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert not Path("runs").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sparsenet train runs under torchrun"):
        sparsenet.fit(dataset_dir="data")


@pytest.mark.parametrize(
    ("component", "settings", "words"),
    [
        ("network", {"blocks": (1,), "bottleneck": 1}, "true or false, found 1"),
        ("data", {"mirror": 0}, "true or false, found 0"),
        ("train", {"max_epoch": 1.0}, r"a whole number, found 1\.0"),
        ("optim", {"lr": True}, "a number, found True"),
    ],
)
def test_a_whole_configuration_is_checked_before_anything_is_read(
    component: str, settings: dict[str, Any], words: str, copied: Path
) -> None:
    name = list(settings)[-1]
    wrong = replace(RunConfig(), {component: settings})
    with pytest.raises(ValueError, match=f"^{name}: expected {words}"):
        sparsenet.fit(wrong, out=copied.parent / "new", dataset_dir="none")
    wrong = replace(Run(copied).config(), {component: settings})
    with pytest.raises(ValueError, match=f"^{name}: expected {words}"):
        sparsenet.fit(wrong, resume=copied)
    assert not (copied.parent / "new").exists()


def test_numbers_of_numpys_are_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))
    optim = OptimConfig(lr=np.float32(0.25), ema=np.float64(0.5))  # type: ignore[arg-type]
    config = RunConfig(optim=optim, train=TrainConfig(capture=np.True_))  # type: ignore[arg-type]
    given = {
        "depth": 7,
        "fetch": lambda i: np.arange(i),
        "growth_rate": np.int64(4),
        "seed": np.int64(3),
        "max_epoch": np.int32(1),
        "weight_decay": np.float64(1e-3),
        "mean": np.array([0.5]),
        "std": [np.float32(0.25)],
        "mirror": np.False_,
    }
    with signals_put_back():
        fit = sparsenet.fit(config, dataset_dir="data", out="run", quiet=True, **given)
        assert fit.load("cpu").about.recipe["optim"]["weight_decay"] == 1e-3
        sparsenet.fit(resume="run", quiet=True, max_epoch=np.int64(2))
    network, optim = Run(fit.path).config().network, Run(fit.path).config().optim
    assert network.topology(1).is_dense and (optim.lr, optim.ema) == (0.25, 0.5)


def test_an_empty_text_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dataset_dir", "labels", "label_column", "weights", "out", "resume"):
        with pytest.raises(ValueError, match=f"^{name}: expected a value, found an empty text$"):
            sparsenet.fit(**{name: ""}, max_epoch=1)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_settings_of_other_data_than_the_named_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))
    table = {"dataset_dir": "table", "labels": "table.csv", "label_column": "kind"}
    first = changed(RunConfig(), {**table, "dataset_name": "of a table", **SETTINGS})
    digits = changed(RunConfig(), {"dataset": "digits", **SETTINGS})
    for number, config in enumerate((first, digits)):
        with signals_put_back():
            fit = sparsenet.fit(config, dataset_dir="data", out=f"run{number}", quiet=True)
        assert fit.result is not None and fit.result.dataset == "data"
    for wrong in ({"labels": 3}, {"dataset": ["c10"]}):
        with pytest.raises(ValueError, match="expected a text"):
            sparsenet.fit(first, **wrong)  # type: ignore[arg-type]


def test_load_takes_whatever_names_a_network(trained_on_folder: Path) -> None:
    for source in (trained_on_folder, str(trained_on_folder), "sparsenet_40_12"):
        network = sparsenet.load(source, device="cpu")
        images = torch.zeros(2, 3, network.preprocessing.size, network.preprocessing.size)
        assert network.model(images).shape == (2, len(network.classes))
        assert repr(network).startswith(f"{network.name}: {len(network.classes)} classes (a")
    with pytest.raises(ValueError, match="device"):
        sparsenet.load(trained_on_folder, device="gpu")


@pytest.fixture(scope="module")
def network(trained_on_folder: Path) -> sparsenet.library.Network:
    return sparsenet.load(trained_on_folder, device="cpu")


def turned_and_transparent(folder: Path) -> Path:
    """A picture that only the whole of the rule makes right: turned, and transparent in places."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


def test_a_picture_is_the_same_whatever_holds_it(
    network: sparsenet.library.Network, tmp_path: Path
) -> None:
    turned = turned_and_transparent(tmp_path)
    levels = np.random.default_rng(1).integers(0, 60000, (9, 8)).astype(np.uint16)
    levels[0, 0] = 60000
    deep = tmp_path / "deep.png"
    Image.fromarray(levels).save(deep)
    for path in (turned, deep):
        with Image.open(path) as image:
            before = image.tobytes()
            by = [network.transform(each) for each in (path, str(path), path.read_bytes(), image)]
            assert image.tobytes() == before  # it is the caller's
            found = network.predict([path, path.read_bytes(), image])
        assert all(torch.equal(by[0], each) for each in by)
        assert by[0].dtype == torch.float32 and by[0].shape == (3, 8, 8)
        assert len({each.probabilities for each in found}) == 1
        seen = network.predict(path.read_bytes(), explained=True)[0]
        assert seen.explanation is not None and seen.drawn.startswith(b"\x89PNG")
        assert [each.path for each in found] == [str(path), "image 1", "image 2"]
    array = np.asarray(Image.open(turned))
    plain = Image.fromarray(array)
    assert torch.equal(network.transform(array), network.transform(plain))
    grey = array[..., 0]
    assert torch.equal(network.transform(grey), network.transform(grey[..., None]))


def test_the_transform_is_what_the_network_is_evaluated_with(
    network: sparsenet.library.Network, folder_data: Path
) -> None:
    paths = sorted(folder_data.rglob("*.png"))
    with torch.inference_mode():
        logits = network.model(torch.stack([network.transform(path) for path in paths]))
    best = logits.softmax(1).max(1)
    found = network.predict(folder_data, top=1)
    assert [each.path for each in found] == [str(path) for path in paths]
    for prediction, label, probability in zip(found, best.indices, best.values, strict=True):
        assert prediction.classes == (network.classes[label],)
        assert prediction.probabilities[0] == pytest.approx(float(probability), abs=1e-6)
    assert network.predict(str(paths[0])) == network.predict([paths[0]])
    assert len(network.predict(str(folder_data / "*" / "1.png"))) == 2


def test_what_is_no_picture_is_told(network: sparsenet.library.Network, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    found = network.predict([tmp_path / "no.png", b"no image", tmp_path / "none.png"])
    assert [each.error is not None for each in found] == [True] * 3
    assert "image 1: expected an image (" in str(found[1].error)
    for wrong, words in (
        (torch.zeros(3, 8, 8), "found Tensor"),
        (np.zeros((8, 8), np.float32), r"uint8 \(H, W\) .*, found float32 \(8, 8\)"),
        (np.zeros((3, 8, 9), np.uint8), r"found uint8 \(3, 8, 9\)"),
        (np.zeros((0, 8, 3), np.uint8), "found uint8"),
        (7, "found int"),
    ):
        with pytest.raises(ValueError, match=rf"^image 0: expected .*{words}"):
            network.transform(wrong)
        with pytest.raises(ValueError, match=rf"^image 0: expected .*{words}"):
            network.predict([wrong])


@pytest.mark.parametrize("explained", [False, True])
def test_a_network_in_training_predicts_nothing_and_stays_as_it_is(
    trained_on_folder: Path, folder_data: Path, explained: bool
) -> None:
    network = sparsenet.load(trained_on_folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    with_dropout = network.model.stages[0].layers[0]  # and with norms that do not train
    for part in (network.model, network.model.stages[0], with_dropout):
        part.train()
        with pytest.raises(ValueError, match=r"^model: expected one in evaluation mode, found tr"):
            network.predict(folder_data, explained=explained)
        network.model.eval()
    assert all(before[name].equal(tensor) for name, tensor in network.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_predicts(
    trained_on_folder: Path, folder_data: Path, dtype: torch.dtype
) -> None:
    network = sparsenet.load(trained_on_folder, device="cpu")
    expected = network.predict(folder_data)
    network.model.to(dtype)
    steps = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of rounding
    for found, one in zip(network.predict(folder_data), expected, strict=True):
        assert found.error is None
        by_class = dict(zip(found.classes, found.probabilities, strict=True))
        for name, probability in zip(one.classes, one.probabilities, strict=True):
            assert by_class[name] == pytest.approx(probability, abs=steps)


def test_what_predicts_something_else_than_it_says_is_refused(
    trained_on_folder: Path, folder_data: Path
) -> None:
    network = sparsenet.load(trained_on_folder, device="cpu")
    for precision in ("fp16", "bfloat16", "BF16", "", None):
        for explained in (False, True):
            with pytest.raises(ValueError, match=r"^--precision: expected auto.* fp32 .*, found "):
                network.predict(folder_data, explained=explained, precision=precision)  # type: ignore[arg-type]
    size = network.preprocessing.size
    for wrong in (torch.rand(1, 3, size, size), torch.zeros(3, size, size, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"^images: expected uint8 \(N, 3, H, W\)"):
            network.preprocessing.normalise(wrong)
    for outputs in (0, 1, 7):
        network.model.reset_classifier(outputs)
        with pytest.raises(ValueError, match=r"^model: expected logits of \d classes, those that"):
            network.predict(folder_data)


def test_evaluate_says_what_the_command_says(
    trained_on_folder: Path, folder_data: Path, call: Call
) -> None:
    outcome = call("eval", trained_on_folder, "--split", "test", "--json")
    said = json.loads(outcome.out)
    report = sparsenet.evaluate(trained_on_folder, split="test", predictions="out.csv")
    assert (report.error, report.images) == (said["error"], said["images"])
    assert len(Path("out.csv").read_text().splitlines()) == 1 + report.images
    other = sparsenet.evaluate(trained_on_folder, dataset_dir=folder_data, split="train")
    assert other.images == 9  # those that are not held out
    both = sparsenet.evaluate(trained_on_folder, mirror=True, split="test")
    assert both.mirrored and not report.mirrored and both.loss != report.loss
    with pytest.raises(ValueError, match="mirror: expected True or False, found 'false'"):
        sparsenet.evaluate(trained_on_folder, mirror="false")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown argument .--splits=test.*--split"):
        sparsenet.evaluate(trained_on_folder, splits="test")


def test_a_picture_of_pillows_is_refused_for_what_its_file_is_refused_for(
    network: sparsenet.library.Network, tmp_path: Path
) -> None:
    path = tmp_path / "inverted.tif"
    path.write_bytes(deep(1).replace(TAG.pack(262, 3, 1, 1), TAG.pack(262, 3, 1, 0)))
    with Image.open(path) as image:
        for picture in (path, path.read_bytes(), image):
            with pytest.raises(ValueError, match="white to black"):
                network.transform(picture)
    with pytest.raises(ValueError, match="expected config or preset"):
        sparsenet.fit(RunConfig(), preset="short")


def test_a_second_interrupt_does_what_it_did_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))

    def interrupt_twice(event: Event) -> None:
        if isinstance(event, Step):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with signals_put_back(), pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sparsenet.fit(dataset_dir="data", events=interrupt_twice, quiet=True, **SETTINGS)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_open_tiff_is_turned_as_its_file_is(
    network: sparsenet.library.Network, tmp_path: Path, mode: str, orientation: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.tif", exif=exif)
    with Image.open(tmp_path / "x.tif") as image:
        found = network.transform(image)
        assert image.filename
    assert torch.equal(found, network.transform(tmp_path / "x.tif"))


def test_a_network_has_the_name_of_its_folder(
    network: sparsenet.library.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(network.path)
    assert sparsenet.load(".").name == network.path.name


def test_a_signal_that_comes_as_they_are_asked_for_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install = signal.signal

    def at_once(number: int, handler: object) -> object:
        before = install(number, handler)  # type: ignore[arg-type]
        if isinstance(handler, MethodType) and number == signal.SIGINT:
            signal.raise_signal(number)
        return before

    with signals_put_back():
        monkeypatch.setattr(signal, "signal", at_once)
        with Signals(ends_program=False) as signals:
            assert signals.received() == "SIGINT"


@pytest.mark.parametrize("by_command", [True, False])
def test_signals_are_the_run_s_until_its_folder_is_free(
    by_command: bool, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []

    def look(run: Run) -> None:
        found.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(Run, "_discard_if_unused", look)
    nothing = {"dataset_dir": str(tmp_path / "none"), "out": str(tmp_path / "run")}
    if by_command:
        assert call("train", *(f"--{name}={value}" for name, value in nothing.items())).code == 2
    else:
        with pytest.raises(ValueError, match="none"):
            sparsenet.fit(**nothing)
    assert isinstance(found[0], MethodType) and found[0].__func__ is Signals._receive


def test_a_display_that_fails_ends_what_follows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(Path("data"))
    ended = []

    def followed(events: Iterator[Event], *given: object) -> Iterator[Event]:
        try:
            yield from events
        finally:
            ended.append(True)

    def fails(self: Run, line: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(sparsenet.library, "tracked", followed)
    monkeypatch.setattr(Run, "log", fails)
    with pytest.raises(OSError, match="No space") as caught:
        sparsenet.fit(dataset_dir="data", quiet=True, **SETTINGS)
    assert caught.value.__traceback__ and ended == [True]


def test_an_open_file_is_one_picture(network: sparsenet.library.Network, folder_data: Path) -> None:
    path = next(folder_data.rglob("*.png"))
    content = path.read_bytes()
    expected = network.predict(path)[0].probabilities
    for held in (bytearray(content), memoryview(content), io.BytesIO(content)):
        assert [each.probabilities for each in network.predict(held)] == [expected]
    with path.open("rb") as file:
        assert [each.probabilities for each in network.predict([file])] == [expected]
    with tempfile.NamedTemporaryFile() as named, tempfile.SpooledTemporaryFile() as spooled:
        for file in (named, spooled):
            file.write(content)
            file.seek(0)
            assert [each.probabilities for each in network.predict(file)] == [expected]
            file.seek(0)
            assert torch.equal(network.transform(file), network.transform(path))


def test_an_open_file_of_text_is_refused_in_one_line(
    network: sparsenet.library.Network, folder_data: Path
) -> None:
    with next(folder_data.rglob("*.png")).open(encoding="utf-8") as file:
        for text in (file, io.StringIO("a.png")):
            with pytest.raises(
                ValueError, match=r"^image 1: expected an open file of bytes.*text$"
            ):
                network.predict([b"", text])


def test_a_picture_of_pillows_that_is_named_often_is_loaded_once(
    network: sparsenet.library.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsenet.data.images._threads", lambda: 8)
    path = write_image(tmp_path / "large.png", size=700)
    expected = [each.probabilities for each in network.predict([path] * 32)]
    pixels = np.asarray(Image.open(path))
    with Image.open(path) as image:
        found = network.predict([image] * 32)
        assert [each.probabilities for each in found] == expected
        assert np.array_equal(np.asarray(image), pixels)
    path.write_bytes(path.read_bytes()[:1000])
    for limit, words in ((128.0, "damaged"), (0.4, "too large")):
        with Image.open(path) as image:
            bad = list(predict(network, [image] * 2, max_megapixels=limit))
        assert all(words in str(each.error) for each in bad), bad


def test_pictures_that_come_in_one_buffer_are_told_apart(
    network: sparsenet.library.Network, folder_data: Path, tmp_path: Path
) -> None:
    paths = sorted(folder_data.rglob("*.png"))
    expected = [each.probabilities for each in network.predict(folder_data)]
    assert len(set(expected)) > 1
    buffer = np.empty((8, 8, 3), np.uint8)

    def filled() -> Iterator[np.ndarray]:
        for path in paths:
            buffer[:] = np.asarray(Image.open(path))
            yield buffer

    assert [each.probabilities for each in network.predict(filled())] == expected
    frames = [Image.open(path) for path in paths]
    frames[0].save(tmp_path / "all.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "all.tif") as film:
        found = network.predict(ImageSequence.Iterator(film))
    assert [each.probabilities for each in found] == expected


def test_pictures_are_taken_a_batch_at_a_time(
    network: sparsenet.library.Network, folder_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    ranked = sparsenet.predict.ranked

    def pictures() -> Iterator[bytes]:
        for path in sorted(folder_data.rglob("*.png"))[:4]:
            order.append("taken")
            yield path.read_bytes()

    def told(*given: Any) -> Any:
        order.append("looked at")
        return ranked(*given)

    monkeypatch.setattr("sparsenet.predict.ranked", told)
    network.predict(pictures(), batch_size=2)
    assert order == ["taken", "taken", "looked at"] * 2


def test_a_damaged_checkpoint_in_whose_place_another_is_taken_is_told(
    call: Call, copied: Path
) -> None:
    best = "best-99999999: damaged"
    (copied / "checkpoints/last-00000046.safetensors").write_bytes(b"")
    (copied / "checkpoints/best-99999999.json").write_text("{}")
    with pytest.warns(UserWarning, match=f"{copied}: last-00000046: damaged") as told:
        network = sparsenet.load(copied, "last", device="cpu")
    assert network.step == 23 and len(told) == 1
    assert f"sparsenet report: {copied}: {best}" in call("report", copied, "--filters").error
    started = call("train", "--weights", copied, "--dataset", "digits", "--max_epoch", 1)
    assert f"warning: {copied}: {best}" in started.out

    def damage(event: Event) -> None:
        if isinstance(event, EpochDone):
            Path("run/checkpoints/best-99999999.json").write_text("{}")

    write_classes(Path("data"))
    with signals_put_back():
        sparsenet.fit(dataset_dir="data", out="run", events=damage, quiet=True, **SETTINGS)
    assert f"warning: {best}" in Path("run/train.log").read_text()
