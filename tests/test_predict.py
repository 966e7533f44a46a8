"""Whatever is named gets one answer in its place, the right one or one line of error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Call, write_image
from PIL import Image

from sparsenet.architecture import Architecture
from sparsenet.data import tree
from sparsenet.data.images import read_image
from sparsenet.data.preprocessing import Form, Preprocessing
from sparsenet.device import autocast
from sparsenet.model import SparseNet
from sparsenet.predict import find_images, predict
from sparsenet.records import run_folders
from sparsenet.trained import Trained, load_trained
from sparsenet.weights import About

CLASSES = tuple("abcdef")


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    model = SparseNet(Architecture(depth=7, growth_rate=4, num_classes=len(CLASSES))).eval()
    preprocessing = Preprocessing(16, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    architecture = model.architecture.to_dict()
    about = About("0.1.0", architecture, preprocessing, CLASSES, "colours", recipe={}, epoch=1)
    return Trained(Path("run"), model, about)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.png", "a.webp", "deep/c.jpg", "deep/er/d.BMP", ".hidden/e.png", ".f.png"):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_folder_gives_its_images_sorted_without_hidden_ones(folder: Path) -> None:
    expected = ["a.webp", "b.png", "broken.png", "deep/c.jpg", "deep/er/d.BMP"]
    assert names(find_images([str(folder)]).images, folder) == expected


@pytest.mark.parametrize("pattern", ["loop", "loop/**", "loop/**/*.png", "loop/**/a/**/x.*"])
def test_links_back_and_deep_folders_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(Path("loop/a/b/x.png"))
    Path("loop/notes.txt").write_text("")
    for name in ("again", "a/again"):
        Path("loop", name).symlink_to(tmp_path / "loop")
    inner = Path("loop/a/b")
    for _ in range(1200):
        inner /= "d"
        inner.mkdir()
    try:
        found = find_images([pattern])
        assert run_folders(Path("loop")) == []
    finally:  # Python's own removal goes as deep as functions may call each other
        while inner.name == "d":
            inner.rmdir()
            inner = inner.parent
    assert Path("loop/a/b/x.png") in found.images
    assert (Path("loop/notes.txt") in found.others) == (pattern in ("loop", "loop/**"))


def test_folders_with_more_ways_through_them_than_can_be_gone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "MAX_FOLDERS", 2000)
    for name in "abcdefg":
        (tmp_path / name).mkdir()
        for other in "abcdefg":
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    for find in (lambda: find_images([str(tmp_path)]), lambda: run_folders(tmp_path)):
        with pytest.raises(ValueError, match="expected at most 2,000 folders"):
            find()


def test_globs_and_names_keep_the_order_given(folder: Path) -> None:
    (folder / "[1].png").write_bytes((folder / "b.png").read_bytes())
    patterns = [str(folder / p) for p in ("deep/*", "[1].png", "b.*", "**/*.jpg", "nothing*")]
    found = names(find_images(patterns).images, folder)
    assert found == ["deep/c.jpg", "deep/er/d.BMP", "[1].png", "b.png", "nothing*"]


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*"])
def test_an_image_that_is_named_several_times_comes_once(folder: Path, pattern: str) -> None:
    (folder / "notes.txt").unlink()
    found = [
        path.resolve()
        for path in find_images([str(folder / pattern), str(folder / "b.png")]).images
    ]
    assert sorted(names(list(set(found)), folder)) == sorted(names(found, folder))
    assert set(names(found, folder)) == {
        "a.webp",
        "b.png",
        "broken.png",
        "deep/c.jpg",
        "deep/er/d.BMP",
    }


@pytest.mark.parametrize("pattern", ["*", "*.png", "?.*", "**/*.png"])
def test_globs_leave_out_what_explain_has_drawn(folder: Path, pattern: str) -> None:
    drawn = folder / "b.png.explained.png"
    drawn.write_bytes((folder / "b.png").read_bytes())
    found = find_images([str(folder / pattern)])
    assert folder / "b.png" in found.images
    assert drawn not in found.images and drawn in found.others
    assert find_images([str(folder / "*.explained.png")]).images == (drawn,)


def test_predictions_are_the_models(trained: Trained, folder: Path) -> None:
    paths = [folder / "b.png", folder / "deep/c.jpg"]
    pixels = torch.stack([torch.from_numpy(read_image(path, Form(16, 3))) for path in paths])
    expected = trained.model(trained.preprocessing.normalise(pixels)).softmax(1)
    for prediction, row in zip(predict(trained, paths, top=6), expected, strict=True):
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
        assert sum(prediction.probabilities) == pytest.approx(1)
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            assert probability == pytest.approx(row[CLASSES.index(name)].item(), rel=1e-5)


def test_one_bad_file_spoils_no_other(trained: Trained, folder: Path) -> None:
    (folder / "empty").mkdir()
    patterns = ["b.png", "broken.png", "gone.png", "notes.txt", "none/*.png", "empty", "a.webp"]
    found = list(
        predict(
            trained, find_images([str(folder / p) for p in patterns]).images, top=2, batch_size=3
        )
    )
    assert [Path(p.path) for p in found] == [folder / p for p in patterns]
    assert [p.error is None for p in found] == [True, False, False, False, False, False, True]
    for prediction in found[1:-1]:
        assert prediction.error is not None
        assert prediction.path in prediction.error
        assert "expected" in prediction.error
        assert "\n" not in prediction.error
        assert prediction.to_dict() == {"path": prediction.path, "error": prediction.error}
    best = json.loads(json.dumps(found[0].to_dict()))
    assert set(best) == {"path", "classes", "probabilities"}
    assert len(best["classes"]) == len(best["probabilities"]) == 2


def test_the_precision_is_the_one_that_was_asked_for(trained: Trained, folder: Path) -> None:
    paths = [folder / "b.png"]
    pixels = torch.from_numpy(read_image(paths[0], Form(16, 3)))[None]
    image = trained.preprocessing.normalise(pixels)
    found = {}
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            expected = trained.model(image).float().softmax(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):  # of the caller
            (one,) = predict(trained, paths, precision=precision)
        found[precision] = one.probabilities
        assert one.probabilities == tuple(expected.topk(5).values[0].tolist())
    assert found["fp32"] != found["bf16"]
    (fastest,) = predict(trained, paths, precision="auto")
    assert fastest.probabilities in found.values()
    with pytest.raises(ValueError, match="--precision: expected fp32 for what is to be explained"):
        predict(trained, paths, explained=True, precision="bf16")
    (shown,) = predict(trained, paths, explained=True, precision="auto")
    assert shown.probabilities == found["fp32"]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing(trained: Trained, folder: Path, batch_size: int) -> None:
    paths = find_images([str(folder)]).images
    for one, other in zip(
        predict(trained, paths), predict(trained, paths, batch_size=batch_size), strict=True
    ):
        assert (one.path, one.classes, one.error) == (other.path, other.classes, other.error)
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)


def test_images_are_read_a_batch_at_a_time(trained: Trained, folder: Path) -> None:
    taken = []

    def paths():  # type: ignore[no-untyped-def]
        for number in range(100):
            taken.append(number)
            yield folder / "b.png"

    next(predict(trained, paths(), batch_size=4))
    assert len(taken) == 4


def test_what_is_too_large_is_one_error(trained: Trained, folder: Path) -> None:
    paths = [folder / "a.webp", folder / "deep/c.jpg"]  # 480 pixels each
    large, photo = predict(trained, paths, max_megapixels=479e-6)
    assert photo.error is None
    assert large.error is not None and f"{paths[0]}: too large: " in large.error


def write_deep(root: Path, dtype: type = np.uint16, offset: int = 0) -> Path:
    """Two classes of greys of 12 significant bits in files of more."""
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for number in range(5):
            levels = np.random.default_rng([label, number]).integers(0, 2048, (8, 8))
            levels += 2048 * label + offset
            Image.fromarray(levels.astype(dtype)).save(root / name / f"{number}.tif")
    return root


def as_eight_bits(path: Path, low: int, high: int) -> Path:
    """The same picture on that range of levels as an 8-bit file."""
    levels = np.asarray(Image.open(path), np.float64)
    pixels = ((levels - low) / (high - low) * 255).round().clip(0, 255)
    target = path.with_suffix(".png")
    Image.fromarray(pixels.astype(np.uint8)).save(target)
    return target


@pytest.mark.parametrize(
    ("options", "dtype", "offset", "grey_range"),
    [
        ((), np.uint16, 0, (0, 4095)),
        (("--grey_range", "1000,3000"), np.uint16, 0, (1000, 3000)),
        (("--grey_range=-1024,3071",), np.float32, -1024, (-1024, 3071)),
    ],
)
def test_deep_greys_mean_the_same_from_training_to_predicting(
    call: Call, options: tuple[str, ...], dtype: type, offset: int, grey_range: tuple[int, int]
) -> None:
    data = write_deep(Path("data"), dtype, offset)
    short = ("--max_epoch", 1, "--batch_size", 4, *TINY, "--in_chans", 1)
    outcome = call("train", "--dataset_dir", data, *short, *options, "--out", "run")
    assert outcome.code == 0, outcome
    file = Path("run/model.safetensors")
    outcome = call("export", "run", "--format", "safetensors", "--out", file)
    assert outcome.code == 0, outcome
    path = data / "light" / "3.tif"
    paths = [path, as_eight_bits(path, *grey_range)]
    for source in ("run", str(file)):
        trained = load_trained(source)
        assert trained.preprocessing.grey_range == grey_range
        deep, eight = predict(trained, paths)
        assert (deep.classes, deep.probabilities) == (eight.classes, eight.probabilities)
    losses = []
    for kind in ("deep", "eight"):  # test images that are all dark still have the range of training
        for name in ("dark", "light"):
            shutil.copytree(data / "dark", Path(kind, "test", name))
    for file in Path("eight").rglob("*.tif"):
        as_eight_bits(file, *grey_range)
        file.unlink()
    for kind in ("deep", "eight"):
        outcome = call("eval", "run", "--dataset_dir", kind, "--json")
        assert outcome.code == 0, outcome
        losses.append(json.loads(outcome.out)["loss"])
    assert losses[0] == losses[1]


def test_test_images_beyond_the_range_are_counted_aloud(call: Call) -> None:
    data = write_deep(Path("data/train"))
    shutil.copytree(data, "data/test")
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save("data/test/light/0.tif")
    short = ("--max_epoch", 1, "--batch_size", 4, *TINY, "--in_chans", 1)
    outcome = call("train", "--dataset_dir", "data", *short, "--out", "run")
    assert "warning: test has 1 image with greys beyond 0 to 4095" in outcome.out
    assert "greys beyond 0 to 4095" in call("eval", "run").err


@pytest.mark.parametrize("option", ["top", "batch_size"])
@pytest.mark.parametrize("value", [0, 1.5, True, "3"])
def test_options_that_are_no_whole_numbers_from_one_are_refused_by_name(
    trained: Trained, option: str, value: Any
) -> None:
    expected = f"--{option}: expected a whole number of at least 1, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        predict(trained, [], **{option: value})
