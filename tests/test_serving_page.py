"""The page of ``sparsenet serve``, used in a real browser as a person uses it."""

from __future__ import annotations

import shutil
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image
from test_serving import server_of

from sparsenet.predict import predict
from sparsenet.serving.limits import Limits
from sparsenet.serving.service import Service
from sparsenet.trained import Trained, load_trained

playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DROP = """([name, text]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    return transfer;
}"""

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on the path to open the page with")


@pytest.fixture(scope="module")
def network() -> Trained:
    return load_trained("sparsenet_40_12")


@pytest.fixture(scope="module")
def address(network: Trained) -> Iterator[str]:
    with server_of(Service(network, Limits(drain_seconds=1))) as server:
        yield f"{server.address}/"
        assert server.said == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        opened = library.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def drop(page: Any, path: Path, name: str = "") -> None:
    content = b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(DROP, [name or path.name, content])
    page.locator("main").dispatch_event("drop", {"dataTransfer": transfer})


def test_a_dropped_picture_shows_its_classes_and_its_heat_map(
    network: Trained, address: str, browser: Any, tmp_path: Path
) -> None:
    expect = playwright.expect
    picture, other = write_image(tmp_path / "a.png", 1, 40), write_image(tmp_path / "b.png", 2, 40)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for scheme, width in (("light", 1280), ("dark", 390)):
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
        page.on("console", lambda said, complaints=complaints: complaints.append(said.text))
        page.on("filechooser", lambda _: None)  # Playwright catches them from now on
        page.goto(address)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(background.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")

        drop(page, picture, "<img src=x onerror=alert(1)>" + "long" * 40)
        first = page.locator("li.card").first
        [right] = predict(network, [picture])
        expect(first.locator("ol li")).to_have_count(5)
        for place, (name, share) in enumerate(zip(right.classes, right.probabilities, strict=True)):
            expect(first.locator("ol li").nth(place)).to_have_text(f"{name}{100 * share:.1f} %")
        expect(first.locator("h2")).to_contain_text("<img src=x")
        expect(first.locator("img.map")).to_be_visible()
        assert first.locator("img.map").evaluate("each => each.naturalWidth") > 0

        page.keyboard.press("Tab")  # the keyboard is enough
        assert page.evaluate("document.activeElement.id") == "files"
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files([broken, other])
        expect(page.locator("li.card")).to_have_count(3)
        expect(page.get_by_role("alert")).to_contain_text("expected an image (BMP, GIF, JPEG")
        expect(page.locator("h2").first).to_have_text("broken.png")
        last = page.locator("li.card").last
        button = last.get_by_role("button", name="Heat map", pressed=True)
        button.focus()
        page.keyboard.press("Enter")
        expect(last.get_by_role("button", pressed=False)).to_be_visible()
        expect(last.locator("img.map")).to_be_hidden()

        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Clear all").click()
        expect(page.locator("li.card")).to_have_count(0)
        assert {each for each in asked if not each.startswith((address, "blob:", "data:"))} == set()
        assert [each for each in complaints if "422" not in each] == []
        page.close()
