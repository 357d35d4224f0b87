"""report.html in a real browser: Chromium without a window, driven by playwright. Skips without them.

apt-get install chromium; pip install playwright     # no browser of playwright's own is needed
"""

import shutil

import pytest
from whole_runs import run

from plumbing import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
if not CHROMIUM:
    pytest.skip("needs apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of AttnRL and one of GRPO."""
    out = tmp_path_factory.mktemp("runs")
    run("--output_dir", out / "attnrl", "--steps", 3, "--group_size", 4)
    run("--output_dir", out / "grpo", "--steps", 2, "--algo", "grpo")
    return out / "attnrl", out / "grpo"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """open_page(path, ...) -> a page that has drawn itself; no error may be on its console, ever."""
    contexts, errors = [], []

    def open_it(path, width=1280, height=900, **how):
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: errors.append(r.url) if not r.url.startswith("file:") else None)
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def widest(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def numbers(locator):
    return [float(text) for text in locator.all_inner_texts() if text]


def test_a_click_lights_the_steps_that_attend_to_it(runs, open_page):
    page = open_page(runs[0] / "report.html")
    data = report.collect(runs[0], 10**7)
    tree = next(t for t in data["trees"] if t["problem"] == page.evaluate("treeNow().problem"))
    leaf = page.evaluate("view.leaf")
    row, k = tree["rollouts"][leaf], 2
    page.click(f'#pane li[data-step="{k}"]')
    later = len(row["steps"]) - k - 1
    near = min(3, later)  # Delta = 4
    assert page.locator("#pane li.near").count() == near
    assert page.locator("#pane li.lit").count() == later - near > 2
    lit = numbers(page.locator("#pane li.near .fci, #pane li.lit .fci"))
    assert lit == pytest.approx(row["attention"][k], abs=6e-4)
    assert float(page.inner_text("#eq5")) == pytest.approx(row["fci_again"][k], abs=2e-3)
    assert page.locator(f'.leaf[data-leaf="{leaf}"] .attends').count() == later + 1  # and the step itself
    strength = (
        "[...document.querySelectorAll('#pane li.lit')].map((x) => parseFloat(x.style.cssText.slice(4)))"
    )
    counted = row["attention"][k][near:]
    expected = [a / max(counted) for a in counted]  # the brighter, the more attention
    strengths = page.evaluate(strength)
    assert [x / max(strengths) for x in strengths] == pytest.approx(expected, abs=5e-3)


def test_it_says_why_a_step_was_branched(runs, open_page):
    page = open_page(runs[0] / "report.html")
    why = page.inner_text("#pane .why")
    assert "the run branched here" in why or "branched at an early step" in why
    page.click('#pane li[data-step="0"]')
    assert "FCI 0" in page.inner_text("#pane .why")


def test_a_token_shows_its_numbers_to_mouse_and_keyboard(runs, open_page):
    page = open_page(runs[0] / "report.html")
    token = page.locator("#pane li.picked .token").first
    token.scroll_into_view_if_needed()
    page.evaluate("new Promise((done) => setTimeout(done, 300))")  # what scrolls hides the numbers
    token.hover()
    shown = page.inner_text("#tip")
    for name in ("log-prob", "entropy", "advantage", "trainer ÷ engine"):
        assert name in shown
    page.focus("#pane li.picked .k")
    page.keyboard.press("ArrowDown")
    at = page.evaluate("view.step")
    page.keyboard.press("ArrowRight")
    assert page.locator("#pane .token.at").count() == 1 and "log-prob" in page.inner_text("#tip")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("view.step") == at - 1


def test_every_tree_can_be_chosen(runs, open_page):
    page = open_page(runs[0] / "report.html")
    trees = report.collect(runs[0], 10**7)["trees"]
    for step in sorted({t["step"] for t in trees}):
        page.select_option("#step", str(step))
        for i, tree in enumerate(trees):
            if tree["step"] == step:
                page.select_option("#problem", str(i))
                assert page.locator(".leaf").count() == len(tree["rollouts"])
                right = sum(r["reward"] > 0.5 for r in tree["rollouts"])
                assert page.locator(".leaf .who b", has_text="✓").count() == right
                full = "tokens" in tree["rollouts"][0]
                assert ("short form" in page.inner_text("#about")) == (not full)


def test_several_runs_and_a_run_without_branches(runs, open_page, tmp_path):
    report.write(list(runs), tmp_path / "both.html")
    page = open_page(tmp_path / "both.html")
    assert page.inner_text("h1") == "2 runs, side by side"
    assert page.locator(".chart").count() == 6 and page.locator("#legend li").count() == 2
    page.select_option('select[aria-label="run"]', "1")
    assert page.locator(".leaf.initial").count() == page.locator(".leaf").count() > 2
    page.click('#pane li[data-step="1"]')
    assert page.locator("#pane li.lit").count() > 0


def test_a_run_that_has_only_begun(runs, open_page, tmp_path):
    for name in ("config.json", "source.json"):
        shutil.copy(runs[0] / name, tmp_path / name)
    (tmp_path / "metrics.jsonl").write_text((runs[0] / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    report.write([tmp_path], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    assert "No tree has been logged yet" in page.inner_text("#about")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_both_colour_schemes_on_a_screen_and_a_phone(runs, open_page, scheme, width, tmp_path):
    page = open_page(runs[0] / "report.html", width, 844, color_scheme=scheme, has_touch=width < 500)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(",")))
    assert brightness > 600 if scheme == "light" else brightness < 150
    assert widest(page) <= 0  # nothing to scroll sideways
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert widest(page) <= 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000
