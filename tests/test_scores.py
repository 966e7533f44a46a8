"""What the error hides: scores are scikit-learn's, a class is named only with reason, names fit."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import warnings
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY, Call
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from sparsenet import conclusion
from sparsenet.commands import evaluate as evaluate_command
from sparsenet.commands.evaluate import _as_text
from sparsenet.data.preprocessing import Preprocessing
from sparsenet.evaluation import CALIBRATION_BINS, Evaluation, EvaluationStep, calibration
from sparsenet.pictures import draw_reliability
from sparsenet.pictures.training import _split_names
from sparsenet.results import Scores, _tail, likely, likely_range


def test_the_error_of_few_images_comes_with_what_it_would_be_of_many() -> None:
    assert likely_range(10.0, 1000) == likely_range(0.0, 10_000) == ""
    low, high = likely(0.1, 999)
    assert likely_range(10.0, 999) == f", likely {100 * low:.1f} to {100 * high:.1f} %"
    assert likely_range(0.0, 1) == ", likely 0.0 to 79.3 %"


def test_among_equal_logits_what_is_right_is_among_the_top_five() -> None:
    def tied(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 40)

    preprocessing = Preprocessing(4, 3, (0.5,) * 3, (0.5,) * 3)
    step = EvaluationStep(tied, preprocessing, "fp32")  # type: ignore[arg-type]
    labels = torch.arange(40)
    _, predicted, _, in_top5 = step(torch.zeros(40, 3, 4, 4, dtype=torch.uint8), labels)
    assert in_top5[predicted == labels].all() and 1 <= in_top5.sum() <= 6


def evaluated(labels: Tensor, predicted: Tensor, confidence: Tensor | None = None) -> Evaluation:
    sure = torch.ones(len(labels)) if confidence is None else confidence
    return Evaluation(0.0, 0.0, labels, predicted, sure, predicted == labels)


def names(classes: int) -> list[str]:
    return [f"class {number}" for number in range(classes)]


ANSWERS = st.integers(1, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=40
    )
)


@given(ANSWERS)
@settings(max_examples=25)
def test_scores_are_those_of_scikit_learn(answers: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, predicted = map(torch.tensor, zip(*answers, strict=True))
    found = evaluated(labels, predicted).scores(names(7))  # of one there is never an image

    def expected(among: list[int], average: str | None) -> Any:
        return metrics.precision_recall_fscore_support(
            labels, predicted, labels=among, average=average, zero_division=0
        )

    columns = zip(*expected(list(range(7)), None), strict=True)
    for (precision, recall, f1, images), one in zip(columns, found.classes.values(), strict=True):
        assert 100 * precision == pytest.approx(one.precision or 0)
        assert 100 * recall == pytest.approx(one.recall or 0)
        assert 100 * f1 == pytest.approx(one.f1 or 0)
        assert images == one.images == one.correct + one.wrong
        assert (one.precision is None) == (not one.predicted)
        assert (one.recall is None) == (not one.images)
        assert (one.f1 is None) == (not one.images + one.predicted)
    precision, recall, f1, _ = expected(labels.unique().tolist(), "macro")
    assert found.macro_precision == pytest.approx(100 * precision)
    assert found.macro_f1 == pytest.approx(100 * f1)
    assert found.balanced_accuracy == pytest.approx(100 * recall)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are only predicted
        accuracy = metrics.balanced_accuracy_score(labels, predicted)
    assert found.balanced_accuracy == pytest.approx(100 * accuracy)
    matrix = metrics.confusion_matrix(labels, predicted, labels=range(7))
    ours = [
        [found.confusion.get(true, {}).get(other, 0) for other in names(7)] for true in names(7)
    ]
    assert matrix.tolist() == ours
    assert all(number for row in found.confusion.values() for number in row.values())


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=50)
def test_the_calibration_error_is_its_formula(answers: list[tuple[float, bool]]) -> None:
    expected, total = 0.0, 0
    for number in range(CALIBRATION_BINS):
        low, high = number / CALIBRATION_BINS, (number + 1) / CALIBRATION_BINS
        inside = [each for each in answers if low < each[0] <= high or (number == 0 == each[0])]
        total += len(inside)
        expected += abs(sum(sure - right for sure, right in inside))
    assert total == len(answers)
    confidence, right = (torch.tensor(each) for each in zip(*answers, strict=True))
    labels = torch.zeros(len(answers)).long()
    found = evaluated(labels, (~right).long(), confidence).scores(names(2))
    assert found.calibration_error == pytest.approx(100 * expected / len(answers), abs=1e-5)
    assert found.confidence == pytest.approx(100 * np.mean([sure for sure, _ in answers]), abs=1e-5)


@pytest.mark.parametrize("count", [1, 500])
def test_confidence_of_any_images_is_drawn(tmp_path: Path, count: int) -> None:
    confidence = torch.rand(count, generator=torch.Generator().manual_seed(0))
    draw_reliability(confidence, confidence > 0.5, tmp_path / "reliability.png")
    with Image.open(tmp_path / "reliability.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 3
    assert calibration(confidence, confidence > 0.5)[0].sum() == count


# --- the class that is far worse ------------------------------------------------------------------


def scores(*classes: tuple[int, int]) -> Scores:
    """Of classes with so many images, of which so many are taken for the next one."""
    pairs = [
        (label, (label + (number < wrong)) % len(classes))
        for label, (images, wrong) in enumerate(classes)
        for number in range(images)
    ]
    labels, predicted = map(torch.tensor, zip(*pairs, strict=True))
    return evaluated(labels, predicted).scores(names(len(classes)))


@pytest.mark.parametrize(
    ("classes", "worst"),
    [
        ([(100, 2), (100, 3), (8, 8)], 2),  # 6 % of all
        ([(100, 2), (100, 3), (3, 3)], 2),
        ([(100, 2), (100, 30)], 1),
        ([(100, 2), (100, 3), (1, 1)], None),  # as chance may have it
        ([(1000, 30), (1000, 60), (1000, 35)], None),  # twice as many, but not far
        ([(1000, 400), (1000, 550)], None),  # not twice as many
        ([(20, 2)] * 9 + [(20, 6)], None),
        ([(20, 0)] * 9 + [(20, 12)], 9),
        ([(50, 50)], None),
        ([(50, 0), (0, 0), (50, 20)], 2),
        ([(50, 0), (50, 0)], None),
    ],
)
def test_a_class_is_named_that_is_far_worse(
    classes: list[tuple[int, int]], worst: int | None
) -> None:
    assert scores(*classes).worst == (None if worst is None else f"class {worst}")


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_ten_equally_hard_classes_of_20_images_cry_no_wolf(error: float) -> None:
    """In 600 runs, at most as often as 1 of 100 runs may, and some more by chance."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    named = 0
    for _ in range(600):
        wrong = torch.rand(200, generator=generator) < error
        named += evaluated(labels, (labels + wrong) % 10).scores(names(10)).worst is not None
    assert named <= 600 * 0.01 + 3 * math.sqrt(600 * 0.01)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 3)))
def test_chance_is_the_hypergeometric_distribution(given: tuple[int, int, int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    images, wrong, drawn, least = given
    expected = stats.hypergeom.sf(least - 1, images, wrong, drawn)
    assert _tail(*given) == pytest.approx(expected, abs=1e-9)


# --- what a user sees -----------------------------------------------------------------------------

GREYS = {"dark": (0, 90), "bright": (140, 256), "rare": (200, 256)}  # rare ones look as bright ones


def write_greys(root: Path, numbers: dict[str, int], seed: int) -> Path:
    """Images of one grey each; a file's name begins with its grey."""
    random = np.random.default_rng(seed)
    number = count()
    for name, images in numbers.items():
        (root / name).mkdir(parents=True)
        for grey in random.integers(*GREYS[name], images):
            image = Image.fromarray(np.full((8, 8), grey, np.uint8))
            image.putpixel((0, 0), next(number) % 256)  # or they would be copies
            image.save(root / name / f'{grey}, {seed} "{next(number)}".png')
    return root


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def test_a_rare_class_is_named_and_balancing_finds_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_greys(Path("d/train"), {"dark": 80, "bright": 80, "rare": 8}, 0)
    write_greys(Path("d/test"), {"dark": 40, "bright": 40, "rare": 10}, 1)
    data = ("--dataset_dir", "d", "--max_epoch", 6, "--batch_size", 16, "--shift", 0)
    plain = call("train", *TINY, *data, "--out", "plain")
    assert plain.code == 0
    assert plain.lines[-2].endswith("; far worse than the others: rare, 10 of 10 images wrong")
    found = result(Path("plain"))["scores"]
    assert found["classes"]["rare"]["recall"] == 0
    assert found["confusion"]["rare"] == {"bright": 10}
    monkeypatch.setattr(conclusion, "pictures", Mock())  # which take the longest
    for name in ("class_weights", "sampler"):
        assert call("train", *TINY, *data, f"--{name}", "balanced", "--out", name).code == 0
        assert result(Path(name))["scores"]["classes"]["rare"]["recall"] > 50
    recipes = call("report", "class_weights", "sampler", "--markdown").out
    assert "class weights balanced" in recipes and "sampler balanced" in recipes
    said = call("eval", "plain").out
    assert "rare: 100.00 % of 10 images wrong, taken for bright (10)" in said
    assert json.loads(call("eval", "plain", "--json").out)["scores"] == found
    old = result(Path("plain"))  # as older versions wrote it
    del old["scores"]
    Path("plain/result.json").write_text(json.dumps(old))
    Path("plain/reliability.png").unlink()
    outcome = call("report", "plain")
    assert outcome.code == 0 and "missing" not in outcome.out + outcome.err


def test_settings_that_make_no_sense_together_are_refused(call: Call) -> None:
    for flags, words in (
        (("--patience", 3), "--patience: expected validation images"),
        (
            ("--sampler", "balanced", "--class_weights", "balanced"),
            "--class_weights: expected none with --sampler balanced",
        ),
        (("--sampler", "fair"), "expected one of shuffled, balanced"),
    ):
        outcome = call("train", *TINY, "--max_epoch", 1, *flags, "--out", "run")
        assert outcome.code == 2 and words in outcome.error and not Path("run").exists()


def test_predictions_are_those_of_the_images_they_name(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_greys(Path("=d"), {"dark": 30, "bright": 30}, 0)
    for name in ("dark", "bright"):
        (root / name / "100 damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "dark" / next((root / "dark").iterdir()).name).rename(root / "dark" / '-a\nb,".png')
    exact = ("--precision", "fp32")
    drawn: list[tuple[str, ...]] = []
    monkeypatch.setattr(conclusion.pictures, "draw_samples", lambda *given: drawn.append(given[-1]))
    data = ("--dataset_dir", root, "--skip_corrupt", "--cache", "disk", "--val_fraction", 0.2)
    assert call("train", *TINY, *data, "--max_epoch", 1, "--out", "run").code == 0
    for split in ("test", "val", "train"):
        outcome = call(
            "eval", "run", "--split", split, "--predictions", "out.csv", "--json", *exact
        )
        assert outcome.code == 0, outcome.err
        with Path("out.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["path", "true", "predicted", "p(bright)", "p(dark)"]
        paths = [row[0] for row in rows]
        assert len(set(paths)) == len(rows) == json.loads(outcome.out)["images"]
        if split == "test":
            assert [str(Path(each).absolute()) for each in drawn[0]] == paths
        predicted = json.loads(call("predict", "run", *paths, "--json").out)
        for (path, true, best, *row), one in zip(rows, predicted, strict=True):
            assert Path(path).parent.name == true and Path(path).is_absolute()
            assert one["path"] == path and one["classes"][0] == best
            shares = dict(zip(one["classes"], one["probabilities"], strict=True))
            assert [float(each) for each in row] == pytest.approx(
                [shares["bright"], shares["dark"]], abs=1e-5
            )
    outcome = call("eval", "run", "--predictions", "no/folder/out.csv")
    assert outcome.code == 2 and "--predictions: expected a file in a folder" in outcome.error


def test_predictions_replace_predictions_and_nothing_else(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = Path("labels.csv")
    labels.write_text("image,label\na.png,ant\n")
    refused = call("eval", trained, "--predictions", labels)
    assert refused.code == 2 and labels.read_text() == "image,label\na.png,ant\n"
    expected = "--predictions: expected a new file, or predictions to replace, found labels.csv"
    assert expected in refused.error
    Path("folder").mkdir()
    (kept := Path("folder/out.csv")).touch()
    (link := Path("link.csv")).symlink_to(kept)
    for _ in range(2):
        assert call("eval", trained, "--predictions", link).code == 0
        assert link.is_symlink() and kept.read_text().startswith("path,true,predicted,")
    os.mkfifo("pipe")
    for place in ("pipe", "/dev/stdout", "/proc/self/comm"):
        refused = call("eval", trained, "--predictions", place)
        assert refused.code == 2 and "found: a device or pipe" in refused.error, place


def test_predictions_are_written_though_nobody_reads_the_lines(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*given: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sparsenet.commands.evaluate.print_result", gone)
    with pytest.raises(BrokenPipeError):
        call("eval", trained, "--predictions", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().startswith("path,true,predicted,")


def test_cells_come_back_whatever_is_in_them() -> None:
    cells = ["a\rb", "c\nd", 'e,"f', "", "g\r\nh", " "]
    line = evaluate_command._csv_line(*cells)
    assert line.endswith("\n") and not line.endswith("\r\n")
    assert list(csv.reader(io.StringIO(line, newline=""))) == [cells]


def test_an_evaluation_outlives_predictions_that_cannot_be_written(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, found in (("/proc/out.csv", "No such file"), ("/dev/null", "a device")):
        if not Path(target).parent.is_dir():  # /proc is Linux's
            continue
        refused = call("eval", trained, "--predictions", target)
        assert (refused.code, refused.out) == (2, "")
        assert f"--predictions: expected to write {target}, found: {found}" in refused.error

    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{path}.1a2b3c4d")

    monkeypatch.setattr("sparsenet.commands.evaluate.write_atomic", full)
    for flags in ((), ("--json",)):
        outcome = call("eval", trained, "--predictions", "out.csv", *flags)
        assert outcome.code == 1 and "error" in outcome.out
        assert outcome.error == (
            "sparsenet: --predictions: expected to write out.csv, found: No space left on device"
        )
    assert not list(Path().iterdir())


def test_cells_are_no_formulas() -> None:
    cells = {"=1+1": "'=1+1", "@home": "'@home", "-a": "'-a", "+": "'+", "-1": "-1", "a=b": "a=b"}
    for cell, expected in cells.items():
        assert _as_text(cell) == expected


def test_names_in_pictures_keep_what_tells_them_apart() -> None:
    assert _split_names(["/a/b/c.png", "/a/bb/d.png"]) == ("/a", ["b/c.png", "bb/d.png"])
    assert _split_names(["/a/t.parquet row 3"]) == ("/a", ["t.parquet row 3"])
    assert _split_names(["image 3", "image 4"]) == ("", ["image 3", "image 4"])
    assert _split_names([]) == ("", [])
    folder, (one, _) = _split_names(["/a/" + 20 * "bc" + "1.png", "/a/d.png"])
    assert folder == "/a" and one.startswith("…c") and one.endswith("bc1.png") and len(one) == 29


@given(st.integers(1, 10**6), st.floats(0, 1))
@example(320, 1.0)  # whose upper end rounds to just below 1
def test_likely_shares_solve_wilsons_equation(count: int, part: float) -> None:
    share = round(part * count) / count
    low, high = likely(share, count)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
    for end in (low, high):  # at which the share is 1.96 standard deviations off
        if 0 < end < 1:
            variance = end * (1 - end) / count
            assert (share - end) ** 2 == pytest.approx(1.96**2 * variance, rel=1e-6, abs=1e-14)


# --- mirror images --------------------------------------------------------------------------------


def test_mirrored_probabilities_are_means_of_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 7, bias=False)).eval()
    preprocessing = Preprocessing(6, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    pixels = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    labels = torch.arange(5)
    with torch.no_grad():
        losses, predicted, confidence, top5, probabilities = EvaluationStep(
            model, preprocessing, "fp32", tell_all=True, mirrored=True
        )(pixels, labels)
        each = [
            model(preprocessing.normalise(images)).double().softmax(1)
            for images in (pixels, torch.from_numpy(pixels.numpy()[..., ::-1].copy()))
        ]
    mean = (each[0] + each[1]) / 2
    torch.testing.assert_close(probabilities.double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.double(), -mean[labels, labels].log(), rtol=1e-5, atol=1e-6)
    assert torch.equal(predicted, mean.argmax(1))
    torch.testing.assert_close(confidence.double(), mean.max(1).values, rtol=1e-5, atol=1e-7)
    assert top5.tolist() == [label in row.topk(5).indices for label, row in enumerate(mean)]
    assert not torch.allclose(each[0].float(), probabilities)


def test_a_logit_that_is_no_number_of_a_mirror_image_is_told() -> None:
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            broken = torch.where(images[:, 0, 0, 0] > 0, 0.0, -torch.inf)
            return torch.stack([broken, torch.ones(len(images))], 1)

    pixels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    pixels[0, :, :, 0] = pixels[1] = 255  # of the first, only the mirror image is dark on the left
    step = EvaluationStep(Half(), Preprocessing(2, 1, (0.5,), (0.25,)), "fp32", mirrored=True)
    losses = step(pixels, torch.tensor([1, 1]))[0]
    assert losses.isnan().tolist() == [True, False]


def test_eval_says_that_it_took_mirror_images(call: Call, trained_on_folder: Path) -> None:
    plain = json.loads(call("eval", trained_on_folder, "--json").out)
    outcome = call("eval", trained_on_folder, "--json", "--mirror", "--predictions", "out.csv")
    found = json.loads(outcome.out)
    assert (plain["mirrored"], found["mirrored"]) == (False, True)
    with Path("out.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [-math.log(float(row[f"p({row['true']})"])) for row in rows]
    assert sum(losses) / len(losses) == pytest.approx(found["loss"], rel=1e-4)
    assert found["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    said = call("eval", trained_on_folder, "--mirror")
    assert f"loss {found['loss']:.4f} (with mirror images)" in said.out and not said.err
    assert "mirror" not in call("eval", trained_on_folder).out


def test_eval_warns_of_mirror_images_that_were_never_trained_on(call: Call, trained: Path) -> None:
    outcome = call("eval", trained, "--mirror")  # digits are not mirrored
    assert outcome.code == 0 and "trained without mirror images" in outcome.err
