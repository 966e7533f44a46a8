"""A folder for the Hugging Face hub holds what was measured, and comes back from there the same."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Call
from markdown_it import MarkdownIt
from safetensors.torch import save
from test_export import make

import sparsenet
from sparsenet import weights
from sparsenet.data.dataset import Images, Part
from sparsenet.data.selection import Known, Selection
from sparsenet.export import hf
from sparsenet.hub import HubNetwork
from sparsenet.results import ClassScores, Scores
from sparsenet.run import Run
from sparsenet.trained import Trained, load_trained

PICTURE = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits run as a folder for the hub. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "digits"
    done = subprocess.run(
        [sys.executable, "-m", "sparsenet", "export", trained, "--format", "hf", "--out", folder],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"},  # there is no need of a hub
    )
    assert done.stdout.startswith(f"{folder}: model.safetensors (") and not done.stderr
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "mine"))


def parts(card: str) -> tuple[Any, str]:
    """The metadata of a model card, and its text."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_folder_is_evaluated_to_what_its_card_states(
    call: Call, trained: Path, exported: Path
) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
    ]
    found = json.loads(call("eval", exported, "--dataset", "digits", "--json").out)
    metadata, text = parts((exported / "README.md").read_text())
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    (metric,) = result["metrics"]
    stated = f"| {found['precision']} | {found['error']:.2f} % | {found['top5_error']:.2f} % |"
    assert stated in text and found["stated_error"] == found["error"]
    fp32 = json.loads(
        call("eval", exported, "--dataset", "digits", "--json", "--precision", "fp32").out
    )
    assert metric == {"type": "accuracy", "value": pytest.approx(1 - fp32["error"] / 100)}
    for name, one in fp32["scores"]["classes"].items():
        row = f"| {name} | {one['images']} | {fp32['class_errors'][name]:.2f} % |"
        assert row in text
    assert f"The balanced accuracy is {fp32['scores']['balanced_accuracy']:.2f} %" in text
    assert metadata["library_name"] == "sparsenet" and "license" not in metadata
    parameters, macs = (
        f"{json.loads((trained / 'graph.json').read_text())[name]:,}"
        for name in ("parameters", "macs")
    )
    assert f"{parameters} parameters,\n{macs} multiply-accumulates" in text


def test_a_folder_is_a_network_wherever_weights_are(call: Call, folder: Path) -> None:
    network = sparsenet.load(folder)
    alone = sparsenet.load(folder / "model.safetensors")
    assert network.name == "mine" and network.classes == alone.classes
    assert network.predict(PICTURE) == alone.predict(PICTURE)
    model = sparsenet.create_model(
        "sparsenet_40_12", pretrained=folder, depth=7, growth_rate=4, in_chans=1
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, network.model.state_dict()[name])
    other = folder.parent / "bird-hf"
    call("export", folder, "--format", "hf", "--out", other, "--dataset", "digits")
    assert (other / "model.safetensors").read_bytes() == alone.path.read_bytes()
    assert sparsenet.load(other).name == "bird"


def test_a_report_takes_an_exported_network_for_no_run(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "mine")
    before = call("report", runs, "--markdown").out
    assert call("export", runs / "mine", "--format", "hf").code == 0
    assert (runs / "mine" / "mine-hf" / "model.safetensors").is_file()
    assert call("report", runs, "--markdown").out == before != ""
    assert "expected a run folder" in call("report", runs / "mine" / "mine-hf").err


def test_nothing_is_replaced(
    call: Call, trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere")
    before = {path: path.read_bytes() for path in [*folder.iterdir(), Path("file").absolute()]}
    for out in (folder, "file", "link", "missing/here", "model.onnx", trained):
        outcome = call("export", trained, "--format", "hf", "--out", out)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, out
    assert {path: path.read_bytes() for path in before} == before
    Path("empty").mkdir()
    Path("to empty").symlink_to("empty")
    assert call("export", trained, "--format", "hf", "--out", "to empty").code == 0
    assert Path("to empty").is_symlink() and Path("empty/README.md").is_file()
    outcome = call("export", trained, "--format", "onnx", "--out", "network.hf")
    assert outcome.code == 2 and "or --format hf" in outcome.err


@pytest.mark.parametrize("was_there", [False, True])
def test_what_cannot_be_written_leaves_nothing(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    folder = tmp_path / "there"
    if was_there:
        folder.mkdir()
    write = hf.write_atomic

    def full(path: Path, content: Any) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(hf, "write_atomic", full)
    outcome = call("export", trained, "--format", "hf", "--out", folder)
    assert outcome.code != 0 and "No space left on device" in outcome.err
    assert list(tmp_path.rglob("*")) == [folder] * was_there


def test_a_description_that_was_changed_is_refused(call: Call, folder: Path) -> None:
    config = folder / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"license": "mit"}))  # what somebody else has to say
    assert sparsenet.load(folder).classes == tuple(said["classes"])
    config.write_text(json.dumps(said | {"classes": said["classes"][::-1]}))
    outcome = call("eval", folder, "--dataset", "digits")
    assert outcome.code == 2 and "found another 'classes'" in outcome.err
    for text in ("[]", "{", "3"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: [Ee]xpected"):
            HubNetwork.from_pretrained(folder)
    config.write_text(json.dumps(said | {"path": "/etc"}))
    assert HubNetwork.from_pretrained(folder).path == folder / "model.safetensors"
    config.unlink()
    assert sparsenet.load(folder).classes == tuple(said["classes"])


def test_a_folder_of_an_older_version_is_as_good_as_its_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors, said = weights.parse(file.read_bytes())
    for name in ("grey_range", "max_megapixels"):
        del said["preprocessing"][name]
    file.write_bytes(save(tensors, {"sparsenet": json.dumps(said)}))
    (folder / "config.json").write_text(json.dumps(said))
    assert sparsenet.load(folder).preprocessing == sparsenet.load(file).preprocessing


def test_a_run_is_a_run_whatever_is_exported_into_it(
    call: Call, trained: Path, exported: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "metrics.csv", "result.json"):  # as records are kept
            shutil.copy(trained / file, tmp_path / name)
    before = call("report", tmp_path, "--markdown").out
    shutil.copy(exported / "model.safetensors", tmp_path / "b")
    assert call("report", tmp_path, "--markdown").out == before != ""


# --- what a card admits ---------------------------------------------------------------------------


def limits(folder: Path) -> str:
    return parts((folder / "README.md").read_text())[1].partition("## Limits")[2]


def test_a_card_says_what_its_images_were_to_the_training(
    call: Call, trained_on_folder: Path, folder_data: Path, tmp_path: Path
) -> None:
    plain = ("export", trained_on_folder, "--format", "hf", "--out")
    assert call(*plain, tmp_path / "own").code == 0
    assert "trained on" not in limits(tmp_path / "own")
    assert call(*plain, tmp_path / "train", "--split", "train").code == 0
    assert "It was trained on 9 of the 9 images" in limits(tmp_path / "train")
    swapped = tmp_path / "swapped" / "test"  # what was trained on, as a test split
    shutil.copytree(folder_data, swapped)
    assert call(*plain, tmp_path / "swap", "--dataset_dir", swapped.parent).code == 0
    assert re.search(r"It was trained on 9 of the \d+ images", limits(tmp_path / "swap"))
    again = ("export", tmp_path / "own", "--format", "hf", "--out")
    assert call(*again, tmp_path / "unknown", "--dataset_dir", swapped.parent).code == 0
    assert "Whether it was trained on some of the" in limits(tmp_path / "unknown")


def test_a_weights_file_knows_the_very_images_that_it_was_trained_on(
    call: Call, trained_on_folder: Path, tmp_path: Path
) -> None:
    ids = Run.open(trained_on_folder).images()
    record = load_trained(trained_on_folder).about.data
    part = Part(
        Images(torch.empty(len(ids["train.ids"]), 0), ids["train.labels"]),
        ids["train.ids"],
        torch.arange(len(ids["train.ids"])),
    )
    known = Known({}, record)
    assert known.seen(part) == {"train": 9, "val": 0}
    assert known.warning(part) == ("warning: the network was trained on 9 of these images",)
    assert known.seen(part.pick(torch.arange(9) < 8)) is None
    assert Known({}, None).seen(part) is None


@pytest.mark.parametrize(
    ("changes", "name", "reads"),
    [
        ({}, "SparseNet", "some of the layers"),
        ({"fetch": "dense"}, "DenseNet", "all layers"),
    ],
)
def test_a_card_says_what_the_network_is(changes: Any, name: str, reads: str) -> None:
    network = make(blocks=(1, 1), **changes)
    measured = {"fp32": weights.Measured(25.0, 0.0, 8, "animals")}
    about = weights.About(**(vars(network.about) | {"measured": measured}))
    card = hf.card("birds", about)
    assert f"It is a {name}, a convolutional network\nwhose layers each read {reads} before" in card
    assert "top-5" not in card  # of four classes
    assert ("1608.06993" in card) == ("fetch" in changes)
    assert "began with" not in card
    began = weights.About(**(vars(about) | {"recipe": {"train": {"weights": "hf://a/b"}}}))
    assert "from the weights of hf://a/b" in hf.card("birds", began)
    assert "Whether the weights that it began with were trained" in hf.card("birds", began)


def test_a_card_names_the_classes_without_images() -> None:
    one = ClassScores(0, 0, 0, None, None, None)
    other = ClassScores(8, 8, 6, 75.0, 75.0, 75.0)
    scores = Scores(75.0, 75.0, 75.0, 80.0, 5.0, {"cat": other, "do|g": one}, {})
    network = make(blocks=(1, 1))
    measured = {"fp32": weights.Measured(25.0, 0.0, 8, "animals")}
    about = weights.About(**(vars(network.about) | {"measured": measured}))
    text = hf.card("birds", about, scores, {"train": 0, "val": 3})
    assert "No image of these classes was among them: do\\|g." in text
    assert "Its best epoch may have been chosen by 3 of the 8 images" in text


NAMES = ("a|b", "<b>bold</b>", "*stars* _and_ `ticks`", "[link](http://x) & $1$")


def test_names_mean_themselves_in_a_card() -> None:
    network = make(blocks=(1, 1))
    about = weights.About(**(vars(network.about) | {"classes": NAMES, "dataset": "# my | *data*"}))
    count = 4 * len(NAMES)
    images = Images(
        torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % len(NAMES)
    )
    data = Selection("# my | *data*", images, "test", "", ())
    recipe = {"data": {"test_fraction": 0.2, "skip_corrupt": False, "dataset_name": "```\n# no"}}
    about = weights.About(**(vars(about) | {"recipe": recipe}))
    _, about, evaluation = hf.measured(Trained(network.path, network.model, about), data)
    metadata, text = parts(hf.card("# *me*: 'yes'", about, evaluation.scores(about.classes)))
    assert metadata["model-index"][0]["name"] == "# *me*: 'yes'"
    page = MarkdownIt().enable("table").render(text)
    plain = [
        re.sub(
            "&(lt|gt|amp|quot);", lambda found: {"lt": "<", "gt": ">", "amp": "&"}[found[1]], each
        )
        for each in re.findall("<td>(.*?)</td>", page)
    ]
    assert set(NAMES) <= set(plain)
    assert "<b>" not in page and "<em>" not in page and 'href="http://x"' not in page
    assert page.count("<h1>") == 1 and page.count("<table>") == 2


# --- the hub --------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one small repository needs."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    revision = "1" * 40

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: Any, code: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/birds"})
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": each["path"], **modes} for each in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/birds/commit/1",
                    "commitOid": self.revision,
                }
            )
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path and name in self.files:
            content = self.files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=etag, X_Repo_Commit=self.revision)
        elif "/tree/" in self.path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(each), "oid": "0" * 40}
                    for name, each in self.files.items()
                ]
            )
        elif self.path.startswith("/api/models/me/birds"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/birds", "sha": self.revision, "siblings": siblings})
        else:
            self.answer({}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a hub with an empty repository ``me/birds``, and the files in that."""
    files: dict[str, bytes] = {}
    handler = type("OneHub", (Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


PUSHED_AND_PULLED = """
import sys
import numpy
from sparsenet.hub import HubNetwork

mine = HubNetwork.from_pretrained(sys.argv[1])
print(mine.push_to_hub("me/birds"))
back = HubNetwork.from_pretrained("me/birds", device="cpu", revision="main")
picture = numpy.arange(64, dtype=numpy.uint8).reshape(8, 8)
assert back.predict(picture) == mine.predict(picture)
print(back.name, back.about == mine.about)
back.save_pretrained("again", push_to_hub=True, repo_id="me/birds")
"""


def test_what_is_pushed_comes_back(
    hub: tuple[str, dict[str, bytes]], folder: Path, tmp_path: Path
) -> None:
    address, files = hub
    (folder / "README.md").write_bytes("---\r\nlicense: mit\r\n---\r\n8 × 8\r\n".encode())
    own = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "mine",
    }
    done = subprocess.run(
        [sys.executable, "-c", PUSHED_AND_PULLED, folder],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | own,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{address}/me/birds/commit/1", "birds True"]
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == expected
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == expected


def test_only_what_was_measured_is_given_away(folder: Path, trained: Path, tmp_path: Path) -> None:
    network = HubNetwork.from_pretrained(folder)
    (run := tmp_path / "run").mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="save_pretrained: expected a new or an empty folder"):
        network.save_pretrained(run)
    assert (run / "config.json").read_text() == "{}"
    with pytest.raises(ValueError, match="expected no config"):
        network.save_pretrained(tmp_path / "new", config={"mine": 1})
    with pytest.raises(ValueError, match="push_to_hub=True beside privat"):
        network.save_pretrained(tmp_path / "new", privat=True)
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes("8 × 8".encode("cp1252"))
    with pytest.raises(ValueError, match=r"README\.md: expected text in UTF-8"):
        network.push_to_hub("me/birds")
    (folder / "README.md").write_bytes(card)
    with torch.no_grad():
        network.model.classifier.bias += 1
    with pytest.raises(ValueError, match="found changed ones"):
        network.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="found changed ones"):
        network.push_to_hub("me/birds")  # before it asks for any hub
    with pytest.raises(ValueError, match="expected no config"):
        network.push_to_hub("me/birds", config={"mine": 1})
    with pytest.raises(ValueError, match="expected a folder that sparsenet export --format hf"):
        HubNetwork.from_pretrained(trained)
    with pytest.raises(TypeError, match="devise"):
        HubNetwork.from_pretrained(folder, devise="cpu")
    assert not (tmp_path / "new").exists()
