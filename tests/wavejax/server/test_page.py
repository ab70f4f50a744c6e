"""The page at `/` in headless Chromium: a file is dropped in, a question is answered."""

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wavejax.server.conftest import HTTP, WAVE, Running, make_engine
from tests.wavejax.server.test_limits import Slow
from wavejax import LanguageModel
from wavejax.engine.batching import BatchEngine
from wavejax.server.page import policy_of
from wavejax.server.service import Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
TEXT = "The number is 42. Größe: 1 µm.\n"
QUESTION = "Which number?"


def test_the_page_alone(server: Running) -> None:
    """One file, nothing from elsewhere, and only its own script may run."""
    got = HTTP.get(server.url + "/")
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", got.text)
    assert not re.search(r"url\(|@import|https?:", got.text)
    policy = got.headers["content-security-policy"]
    assert policy == policy_of(got.text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        # A container's root has no sandbox.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab in which nothing may go wrong unseen."""
    context = browser.new_context(viewport={"width": 900, "height": 800})
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: told.type == "error" and faults.append(told.text))
    page.faults = faults
    yield page
    context.close()


def wait_for_text(page: Any, selector: str, part: str) -> None:
    """Waits until an element's text has this part, 30 seconds at most."""
    end = time.monotonic() + 30
    while part not in (found := page.text_content(selector)):
        assert time.monotonic() < end, found
        page.wait_for_timeout(20)


def drop_file(page: Any, name: str, content: str) -> None:
    """Drops a file as a person does, by the events that a browser makes of it."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name, {type: "text/plain"}));
            return transfer;
        }""",
        [name, content],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})


def test_a_file_and_a_question(server: Running, page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda sent: sent.method == "POST" and asked.append(sent.post_data_json))
    page.goto(server.url)
    wait_for_text(page, "#model", "512 tokens")
    drop_file(page, "note.txt", TEXT)
    wait_for_text(page, "#about", "note.txt")
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    wait_for_text(page, "#usage", "answered")
    (body,) = asked
    assert body["messages"] == [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    prompt = len(server.model.encode(body["messages"])[0].ids)
    told = page.inner_text("#usage")
    used = re.fullmatch(
        r"(\d+) tokens read, (\d+) tokens? answered(, as many as it may have)?", told
    )
    assert used is not None
    assert int(used[1]) == prompt
    assert 1 <= int(used[2]) <= server.service.limits.new_tokens
    assert (used[3] is not None) == (int(used[2]) == server.service.limits.new_tokens)
    assert page.text_content("#error") == ""
    assert page.text_content("#answer") != ""
    assert page.get_by_role("button", name="Ask").is_enabled()
    assert page.get_attribute("#answer", "aria-busy") == "false"
    assert page.faults == []
    folder = os.environ.get("WAVEJAX_SCREENSHOTS")  # for the documentation
    if folder:
        page.screenshot(path=Path(folder) / "server-page.png")


def test_what_wave_attention_read_is_shown(
    start: Callable[..., Running], tiny_model: LanguageModel, page: Any
) -> None:
    audited = dataclasses.replace(WAVE, audit=0.5)
    model = dataclasses.replace(tiny_model, attention=audited)
    with make_engine(model) as engine:
        server = start(engine=engine)
        page.goto(server.url)
        drop_file(page, "note.txt", TEXT * 5)
        page.get_by_label("Question").fill(QUESTION)
        page.get_by_role("button", name="Ask").click()
        wait_for_text(page, "#usage", "answered")
        told = page.inner_text("#usage")
    share = r"\d+\.\d %"
    errors = rf"true error of \d+ heads: median {share}, 99 % below {share}"
    assert re.search(
        rf"answered(, as many as it may have)?; {share} of the tokens retrieved; {errors}$", told
    ), told
    assert page.faults == []


def test_reading_is_seen_and_stop_ends(
    start: Callable[..., Running], tiny_engine: BatchEngine, page: Any
) -> None:
    server = start(engine=Slow(tiny_engine), limits=Limits(new_tokens=400))
    page.goto(server.url)
    page.set_input_files("#file", {"name": "a.md", "mimeType": "", "buffer": b"x" * 80})
    page.get_by_label("Question").fill(QUESTION)
    page.keyboard.press("Control+Enter")
    while len(page.text_content("#answer")) <= 3:
        page.wait_for_timeout(20)
    assert int(page.get_attribute("#progress", "max")) > 80
    assert "Reading" in page.text_content("#state")
    before = server.service.engine.stats().finished.get("interrupted", 0)
    page.get_by_role("button", name="Stop").click()
    wait_for_text(page, "#error", "Stopped.")
    page.wait_for_timeout(500)
    stats = server.service.engine.stats()
    assert (stats.running, stats.finished["interrupted"]) == (0, before + 1)


def test_what_goes_wrong_is_said(start: Callable[..., Running], page: Any) -> None:
    server = start(key="k3y")
    page.goto(server.url)
    wait_for_text(page, "#error", "no API key")
    page.get_by_label("API key").fill("k3y")
    page.set_input_files("#file", {"name": "b", "mimeType": "", "buffer": b"\xff"})
    wait_for_text(page, "#error", "UTF-8")
    page.set_input_files("#file", {"name": "b", "mimeType": "", "buffer": b"x" * 600})
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    wait_for_text(page, "#error", "512")
    assert page.get_by_role("alert").inner_text().startswith("Error: the prompt has ")
