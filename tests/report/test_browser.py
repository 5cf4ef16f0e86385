"""The page in a browser: drawn, quiet, filtered, sorted from the keyboard, dark, and on a phone."""

import csv
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srcr.report import build_report, load_runs, write_report
from srcr.report.runs import load_searches
from srcr.report.searches import search_history

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install playwright"
)
CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
NO_BROWSER = "needs a chromium on the PATH, or named by the variable CHROMIUM"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)]
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def url(dozen: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(dozen, out)
    return out.as_uri()


@pytest.fixture
def page(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An open report; whatever a test does, nothing may be fetched and nothing may complain."""
    context = browser.new_context(
        **getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    )
    page = context.new_page()
    messages: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda call: fetched.append(call.url))
    page.goto(url)
    page.wait_for_selector("#plot-kl .scatterlayer .point")
    yield page
    context.close()
    assert messages == []
    assert [call for call in fetched if not call.startswith(("data:", "blob:"))] == [url]


def expect_points(page: Any, n: int, *plots: str) -> None:
    """Plotly draws a little later than the page changes."""
    for plot in plots:
        sync_api.expect(page.locator(f"{plot} .scatterlayer .point")).to_have_count(n)


def test_every_plot_is_drawn(page: Any) -> None:
    expect_points(page, 13, "#plot-sr", "#plot-kl")  # and the base
    assert page.locator("#plot-sr .errorbar").count() == 12
    assert page.locator(".map .cell:visible").count() == 8
    assert page.locator("#plot-layers .scatterlayer .point").count() == 3 * 28
    assert page.locator("#plot-layers .legend .traces").count() == 7
    assert page.locator("#plot-tasks .bars .point").count() == 9
    assert page.locator("#plot-histogram .bars .point").count() == 16


def test_plots_are_in_the_pages_own_typeface(page: Any) -> None:
    font = page.evaluate("document.querySelector('#plot-kl')._fullLayout.font.family")
    assert font == page.evaluate("getComputedStyle(document.body).fontFamily")
    assert font.endswith("sans-serif")


def test_ticks_of_logarithms_are_plain_numbers(page: Any) -> None:
    for plot in ("#plot-kl .yaxislayer-above", "#plot-layers .xy .yaxislayer-above"):
        texts = page.locator(f"{plot} .ytick text").all_text_contents()
        assert len(texts) >= 2
        assert all(re.fullmatch(r"0?\.?0*[125]0*", text) for text in texts), texts


def test_the_base_stands_at_the_foot_and_can_go(page: Any) -> None:
    base = "document.querySelector('#plot-kl').data.find(t => t.meta.base)"
    x, y = page.evaluate(f"[{base}.x[0], {base}.y[0]]")
    low = page.evaluate("document.querySelector('#plot-kl')._fullLayout.yaxis.range[0]")
    assert x == pytest.approx(4.436216)
    assert y == pytest.approx(10**low)
    page.get_by_label("with the base").uncheck()
    expect_points(page, 12, "#plot-sr", "#plot-kl")


def saved(page: Any, button: Any) -> tuple[str, bytes]:
    """The name and content of what a button saves."""
    with page.expect_download() as download:
        button.click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_plots_and_the_table_can_be_saved(page: Any) -> None:
    name, image = saved(page, page.locator('[data-plot="plot-kl"][data-save="png"]'))
    assert name == "srcr-plot-kl.png"
    assert image.startswith(b"\x89PNG")
    name, text = saved(page, page.locator('[data-plot="plot-kl"][data-save="csv"]'))
    assert name == "srcr-plot-kl.csv"
    lines = list(csv.DictReader(text.decode("utf-8-sig").splitlines()))
    assert len(lines) == 13
    assert {"w4", "models/tiny-llama"} < {line["label"] for line in lines}
    assert [line["y"] for line in lines if line["series"] == "base"] == ["0"]
    assert all(float(line["low"]) < float(line["y"]) for line in lines if line["low"])
    page.get_by_label("Search").fill("s25-w4")
    name, text = saved(page, page.locator('[data-save="table"]'))
    assert name == "srcr-runs.csv"
    lines = list(csv.DictReader(text.decode("utf-8-sig").splitlines()))
    assert [line["Run"] for line in lines] == ["s25-w4", "s25-w4-case-a", "s25-w4-case-b"]
    assert float(lines[0]["KL"]) > 0
    assert lines[0]["KL, detail"].startswith("[")


def test_a_search_and_hostile_names(browser: Any, searched: Path, tmp_path: Path) -> None:
    """One run alone, with what its search measured; a name that a spreadsheet would run."""
    (run,) = load_runs([searched])
    history = search_history("=1+1", load_searches([searched])[0][1])
    out = tmp_path / "page.html"
    out.write_text(build_report([replace(run, name="=cmd()")] * 2, searches=[history]), "utf-8")
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(out.as_uri())
    expect_points(page, 4, "#plot-search-1-history", "#plot-search-1-predicted")
    _, text = saved(page, page.locator('[data-save="table"]'))
    assert text.decode("utf-8-sig").splitlines()[1].startswith("'=cmd(),")
    _, text = saved(page, page.locator('[data-plot="plot-search-1-history"][data-save="csv"]'))
    assert "measured,candidate 2," in text.decode("utf-8-sig")
    out.write_text(build_report([run], searches=[history]), "utf-8")
    page.goto(out.as_uri())
    expect_points(page, 3 * 28, "#plot-layers")
    _, text = saved(page, page.locator('[data-save="table"]'))
    assert "\r\nKL,0.0" in text.decode("utf-8-sig")
    assert errors == []
    page.close()


def test_filters_reach_table_and_plots(page: Any) -> None:
    page.locator("#f-mode").select_option("sequential-a")
    assert page.locator("#table tbody tr:visible").count() == 1
    assert page.locator("#count").inner_text() == "1 of 12 runs"
    expect_points(page, 2, "#plot-sr", "#plot-kl")
    assert page.locator(".map .cell:visible small").all_inner_texts() == ["s25-w4-case-a"]
    page.get_by_role("button", name="Clear").click()
    expect_points(page, 13, "#plot-kl")
    page.locator("#f-structure").select_option("2:4")
    assert page.locator("#table tbody tr:visible").count() == 1
    page.locator("#f-structure").select_option("")
    page.get_by_label("TCr from, %").fill("81.25")
    page.get_by_label("to, %").last.fill("81.25")
    page.get_by_label("Search").fill("joint w4")
    names = page.locator("#table tbody tr:visible .pick").all_inner_texts()
    assert names == ["s25-w4", "6of8-w4"]
    page.get_by_label("Search").fill("no such run")
    expect_points(page, 1, "#plot-kl")


def test_the_front_is_that_of_the_runs_shown(page: Any) -> None:
    front = "document.querySelector('#plot-kl').data.find(t => t.meta.front)"
    assert page.evaluate(f"{front}.x.length") > 2
    page.get_by_label("Search").fill("sequential")
    shown = page.evaluate(f"{front}.y")
    values = page.evaluate(
        "document.querySelector('#plot-kl').data.flatMap(t => t.meta.series >= 0 ? t.y : [])"
    )
    assert shown == [min(values)]


def test_each_size_can_be_the_axis(page: Any) -> None:
    for name in ("theoretical", "loaded", "stored"):
        page.get_by_label(name, exact=True).check()
        title = page.locator("#plot-kl .xtitle")
        sync_api.expect(title).to_contain_text(re.compile(f"^{name}"))


def test_hover_names_the_run_and_its_interval(page: Any) -> None:
    page.locator("#plot-kl").scroll_into_view_if_needed()
    box = page.locator("#plot-kl .scatterlayer .point").nth(-2).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = page.locator("#plot-kl .hoverlayer .hovertext").first.text_content()
    assert "s50-dense" in text  # the last trace but the base: pruning only
    assert "95 % interval [" in text


def test_the_table_sorts_from_the_keyboard(page: Any) -> None:
    heading = page.locator("#table thead th", has_text="KL")
    heading.get_by_role("button").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    values = (
        "[...document.querySelectorAll('#table tbody tr')].map(r => Number(r.cells[1].dataset.v))"
    )
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    up = page.evaluate(values)
    assert up == sorted(up)
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.evaluate(values) == up[::-1]
    assert page.locator('#table thead th[aria-sort="none"]').count() == 15


def test_choosing_a_run_changes_the_details(page: Any) -> None:
    page.get_by_label("Details of run").select_option("w3")
    assert "runs/w3" in page.locator("#record .panel:visible pre").first.inner_text()
    page.get_by_role("button", name="s50-dense", exact=True).click()
    assert page.locator("#record .panel:visible").count() == 1
    assert "s50-dense" in page.locator("#record .panel:visible pre").first.inner_text()
    assert page.locator("#run").input_value() == "11"
    assert "same top-1" in page.locator("#summary").inner_text()


DARK = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}
LIGHT = {**DARK, "color_scheme": "light"}
GROUND = "getComputedStyle(document.body).backgroundColor"
INK = "document.querySelector('#plot-kl')._fullLayout.font.color"


@pytest.mark.parametrize("page", [DARK, LIGHT], indirect=True, ids=["dark", "light"])
def test_colours_follow_the_system_and_the_button(page: Any) -> None:
    before = page.evaluate(GROUND), page.evaluate(INK)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    after = page.evaluate(GROUND), page.evaluate(INK)
    assert {before[0], after[0]} == {"rgb(255, 255, 255)", "rgb(18, 21, 26)"}
    assert before[1] != after[1]
    page.keyboard.press("Enter")
    assert (page.evaluate(GROUND), page.evaluate(INK)) == before


PHONE = {"viewport": {"width": 375, "height": 760}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["375px"])
def test_a_phone_scrolls_only_the_table_sideways(page: Any) -> None:
    for name in page.locator("#run option").all_inner_texts()[:2]:
        page.get_by_label("Details of run").select_option(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    inner, outer = page.evaluate(
        "(() => { const box = document.querySelector('#runs .scroll');"
        " return [box.scrollWidth, box.clientWidth] })()"
    )
    assert inner > outer
    assert page.locator(".lead").bounding_box()["y"] < 400


def test_with_reduced_motion_nothing_glides(browser: Any, url: str) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(url)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    context.close()


def test_the_policy_stops_other_scripts_and_requests(browser: Any, url: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(url)
    page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        " document.body.append(script); const image = new Image(); image.src = 'nowhere.png'; }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("typeof window.ran") == "undefined"
    assert len([line for line in messages if "Content Security Policy" in line]) == 2
    context.close()
