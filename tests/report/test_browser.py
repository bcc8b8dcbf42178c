"""The report in a real browser: every view, by mouse and by keyboard alone, light and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegraph.compiler.compile import build
from cachegraph.plan.action import Refresh
from cachegraph.report.data import Extras, report_data
from cachegraph.report.figures import read_figures
from cachegraph.report.page import page as page_text
from cachegraph.show.view import view_build
from cachegraph.zoo import load_model
from tests.report.test_report import HOSTILE, bench_file
from tests.show.test_fold import view

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")

VIEWS = ["plan", "graphs", "compare", "cost", "tokens", "quality"]
SIZES = [
    (1280, "light"),
    (390, "dark"),
    pytest.param(1280, "dark", marks=pytest.mark.slow),
    pytest.param(390, "light", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every view, and names that would be markup anywhere else."""
    folder = tmp_path_factory.mktemp("report")
    measured, quality = read_figures(bench_file(folder / "b.json"), "fast")
    tokens = {
        "what": "Sampled.",
        "grid": [2, 2],
        "image": [[0.0, 1.0], [0.5, 0.25]],
        "shares": [[1.0] * 4] + [[0.0, 0.5, 0.0, 1.0]] * 7,
    }
    data = report_data(view(), f"a model {HOSTILE}", Extras(measured, quality, tokens))
    data["plan"]["sites"][0]["name"] = "<img src=x onerror=alert(1)>"
    data["plan"]["groups"][0]["label"] = "<b>bold</b>"
    path = folder / "report.html"
    path.write_text(page_text(data))
    return path


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report; afterwards nothing was complained about and nothing was asked for."""
    contexts, told, asked = [], [], []

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert told == []
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


def test_every_view_opens(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.title().startswith("a model </script>")
    assert page.eval_on_selector_all("[role=tab]", "all => all.map(one => one.id)") == [
        f"tab-{name}" for name in VIEWS
    ]
    for name in VIEWS:
        page.click(f"#tab-{name}")
        assert page.is_visible(f"#{name}")
        assert len(page.inner_text(f"#{name}")) > 100
        assert [page.is_visible(f"#{other}") for other in VIEWS].count(True) == 1
    assert page.query_selector("img") is None
    assert page.query_selector("#plan b") is None


def test_pointing_and_clicking_in_the_plan(opened: Callable[..., Any]) -> None:
    page = opened()
    cell = 'td[data-step="4"][data-name="blocks.1-3.mlp"]'
    page.hover(cell)
    assert "Step 4, blocks.1-3.mlp: refresh 5 tokens from step 3" in page.inner_text("#cell")
    assert "FLOPs; keeps" in page.inner_text("#cell")
    page.click(cell)
    assert "Step 4" in page.inner_text("#step h3")
    said = page.inner_text("#step")
    assert "variant2" in said
    assert "refresh 5 tokens" in said
    kept = json.loads(page.evaluate("JSON.stringify(data.cost.cache_bytes)"))[4]
    assert f"{kept / 1024:.1f} KiB" in said
    page.click('button[aria-label="unfold blocks.1-3.attn"] >> nth=0')
    assert page.is_visible('td[data-name="blocks.2.attn"] >> nth=0')
    page.click('button[aria-label="unfold blocks.1-3.attn"] >> nth=0')
    assert page.query_selector('td[data-name="blocks.2.attn"]') is None


def test_keyboard_alone(opened: Callable[..., Any]) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-plan"
    focused = "document.activeElement.dataset.step"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(focused):
            break
    assert page.evaluate(focused) == "0"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate(focused) == "1"
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert "Step 7" in page.inner_text("#step h3")
    page.focus("#tab-plan")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#graphs")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#quality")


def test_searching_a_folded_module(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click("#tab-graphs")
    page.fill("#query", "blocks.3.attn.qkv")
    rows = page.eval_on_selector_all(
        "#results tbody tr", "all => all.map(row => row.innerText.replaceAll('\\n', ' '))"
    )
    assert len(rows) == 3
    assert "1 operation" in rows[0]
    assert "blocks.3.attn.qkv removed by drop-dead" in rows[2]
    page.click("#results button >> nth=0")
    found = page.inner_text("tr.found")
    assert "aten.linear" in found
    page.fill("#query", "blocks.3.norm1")  # a module without weights is in no operation's text
    assert "1 operation" in page.inner_text("#results tbody tr >> nth=0")
    page.fill("#query", "nothing like it")
    assert page.inner_text("#results tbody").count("not in it") == 3


def test_inputs_of_a_variant_are_explained(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click('td[data-step="4"] >> nth=0')
    page.click("#step button")
    assert page.is_visible("#graphs")
    row = page.inner_text("#graphs tr:has(code:text-is('tokens0'))")
    assert "How many tokens blocks.0-3.mlp recompute" in row


def test_what_a_variant_leaves_out(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click("#tab-compare")
    page.select_option("#second", "2")
    row = page.inner_text("#compare tr:has(code:text-is('blocks.*.attn.qkv'))").split()
    assert row[1:3] == ["4", "0"]
    change = page.locator("#compare details", has_text="blocks.1-3").first
    change.locator("summary").click()
    text = change.locator("pre").inner_text()
    assert "- %linear_" in text
    assert "+ %linear_" in text
    page.select_option("#second", "0")
    assert "They do not differ" in page.inner_text("#compare")


def test_stepping_through_tokens(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click("#tab-tokens")
    assert "Step 0 (variant0): every token is computed" in page.inner_text("#frame-words")
    page.click("text=next")
    assert "Step 1 (variant1): 2 of 4 tokens" in page.inner_text("#frame-words")
    page.focus("#frame")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#frame-words").startswith("Step 2")


def test_measured_beside_predicted(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click("#tab-cost")
    said = page.inner_text("#cost")
    assert "3.00 times as fast as uncached" in said
    assert page.locator("#cost svg").count() == 3


def test_printing_shows_every_view(opened: Callable[..., Any]) -> None:
    page = opened()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert all(page.is_visible(f"#{name} h2") for name in VIEWS)
    assert not page.is_visible("#tabs")


def test_a_person_finds_the_answers(browser: Any, tmp_path: Path) -> None:
    """Four questions about ToCa on digits, answered from the page alone."""
    model = load_model("digits")
    example = (torch.zeros(2, 1, 16, 16), torch.zeros(2).long(), torch.tensor([0, 10]))
    made = view_build(build(model, "toca-n3", example))
    path = tmp_path / "digits.html"
    path.write_text(page_text(report_data(made, "digits, toca-n3", Extras())))
    page = browser.new_page()
    page.goto(path.as_uri())
    # What does step 17 compute?
    page.click('td[data-step="17"] >> nth=0')
    said = page.inner_text("#step")
    assert "Step 17" in said
    assert made.plan.variants[made.plan.variant_of[17]].name in said
    tokens = [action.tokens for action in made.plan.rows[17] if isinstance(action, Refresh)]
    assert f"refresh {min(tokens)} to {max(tokens)} tokens" in said
    # How much is kept after step 20?
    page.click('td[data-step="20"] >> nth=0')
    kept = made.cost.cache_bytes[20]
    assert f"{kept / 2**20:.2f} MiB" in page.inner_text("#step")
    # Why has variant3 an input tokens0?
    page.click("#tab-graphs")
    page.select_option("#variant", "variant3")
    row = page.inner_text("#graphs tr:has(code:text-matches('^tokens0'))")
    assert "How many tokens blocks.0-11.mlp recompute" in row
    # Which pass removed blocks.3.attn.qkv?
    page.fill("#query", "blocks.3.attn.qkv")
    assert "blocks.3.attn.qkv removed by drop-dead" in page.inner_text("#results")
    page.close()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_serious_in_the_way_of_assistive_tools(
    opened: Callable[..., Any], width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core")
    page, pictures = opened(width, scheme), request.config.getoption("--pictures")
    for name in VIEWS:
        page.click(f"#tab-{name}")
        if name == "graphs":
            page.click("text=unfold all")
        found = axe.Axe().run(page).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"]) for one in serious] == []
        if pictures:
            page.screenshot(path=Path(pictures, f"{name}-{width}-{scheme}.png"), full_page=True)
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) <= 0, name
