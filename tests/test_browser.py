"""report.html in a real browser: Chromium without a window, driven by playwright. Skips without them.

apt-get install chromium; pip install playwright     # no browser of playwright's own is needed
"""

import shutil

import numpy as np
import pytest
from whole_runs import run

from plumbing import report
from tree import Measured, branch_points

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


def shown_tree(page, run):
    """The data of the tree that the page shows, and its chosen row."""
    trees = report.collect(run, 10**7)["trees"]
    tree = next(t for t in trees if t["problem"] == page.evaluate("treeNow().problem"))
    return tree, tree["rollouts"][page.evaluate("view.leaf")]


@pytest.mark.parametrize("shown", ["head_attention", "attention"])
def test_a_click_lights_the_steps_that_attend_to_it(runs, open_page, shown):
    """In the head of Eq. 5, whose rows add up to the bold number; by the switch, the largest of all heads."""
    page = open_page(runs[0] / "report.html")
    _, row = shown_tree(page, runs[0])
    leaf, k = page.evaluate("view.leaf"), 2
    page.click(f'#pane li[data-step="{k}"]')
    if shown == "attention":
        page.click('#modes [data-mode="largest"]')
    later = len(row["steps"]) - k - 1
    near = min(3, later)  # Delta = 4
    assert page.locator("#pane li.near").count() == near
    assert page.locator("#pane li.lit").count() == later - near > 2
    lit = numbers(page.locator("#pane li.near .fci, #pane li.lit .fci"))
    assert lit == pytest.approx(row[shown][k], abs=1e-9)
    adds_up = sum(lit[near:]) == pytest.approx(float(page.inner_text("#eq5")), abs=1e-6)
    assert adds_up == (shown == "head_attention")
    assert float(page.inner_text("#eq5")) == pytest.approx(row["fci_again"][k], abs=2e-3)
    assert page.locator(f'.leaf[data-leaf="{leaf}"] .attends').count() == later + 1  # and the step itself
    strength = (
        "[...document.querySelectorAll('#pane li.lit')].map((x) => parseFloat(x.style.cssText.slice(4)))"
    )
    counted = row[shown][k][near:]
    expected = [a / max(counted) for a in counted]  # the brighter, the more attention
    strengths = page.evaluate(strength)
    assert [x / max(strengths) for x in strengths] == pytest.approx(expected, abs=5e-3)


def test_it_says_why_a_step_was_branched(runs, open_page):
    page = open_page(runs[0] / "report.html")
    tree, row = shown_tree(page, runs[0])
    points = [point for family, point in tree["branches"] if family == row["family"]]
    assert row["start"] == 0 and points
    for k, start in enumerate(row["step_starts"]):
        page.click(f'#pane li[data-step="{k}"] .k')
        if page.evaluate("view.step") is None:
            page.click(f'#pane li[data-step="{k}"] .k')
        reason = page.inner_text("#reason")
        assert ("Taken, " in reason) == (start in points)
        assert any(word in reason for word in ("Taken, ", "Skipped: ", "Not a candidate"))
    page.click('#pane li[data-step="0"]')
    assert "FCI 0: the first step is set to 0" in page.inner_text("#pane .why")


@pytest.mark.parametrize(
    "settings", [{}, {"n_branch_points": 4, "branch_quantile": 0.05}, {"min_branch_gap": 2048}]
)
def test_the_branch_points_replayed_on_the_page_are_those_of_the_rule(runs, open_page, settings):
    """Of every initial response: against tree.branch_points, and with the run's settings against the run."""
    page = open_page(runs[0] / "report.html")
    data = report.collect(runs[0], 10**7)
    config, compared = data["config"] | settings, 0
    n, quantile, gap = (config[name] for name in ("n_branch_points", "branch_quantile", "min_branch_gap"))
    for tree in data["trees"]:
        for row in (r for r in tree["rollouts"] if r["start"] == 0):
            ends = [k for k, text in enumerate(row["steps"]) if "</think>" in text]
            end = ends[-1] if ends else len(row["steps"])
            fci, entropies = np.array(row["fci"]), np.zeros(row["length"])
            seen = Measured(row["steps"], row["step_starts"], fci, entropies, 0.0, end)
            expected = branch_points("fci", seen, n, quantile, gap, None)
            taken = page.evaluate("([r, config]) => replay(r, config).taken", [row, config])
            assert sorted(row["step_starts"][k] for k in taken) == expected
            points = sorted(point for family, point in tree["branches"] if family == row["family"])
            assert settings or points in ([], expected)
            compared += len(expected)
    assert compared > 20


def test_it_says_which_responses_were_branched(runs, open_page):
    page = open_page(runs[0] / "report.html")
    config = report.collect(runs[0], 10**7)["config"]

    def said(rewards, branches, **settings):
        tree = {"rollouts": [{"start": 0, "family": i, "reward": r} for i, r in enumerate(rewards)]}
        arguments = [tree | {"branches": branches}, config | settings]
        return page.evaluate("([t, config]) => whichBranched(t, config)", arguments)

    five = [[family, 9] for family in range(5)]
    assert "so Round(6·e^(−1/6)) = 5 are branched (Eq. 9): the rarer outcome first" in said(
        [1, 0, 0, 0, 0, 0], five
    )
    assert "Eq. 8 filtered the problem (fci_filter: easy)" in said([1, 1], [])
    assert said([1, 0], [[0, 9], [1, 9]], expansion="uniform").startswith(
        "All 2 initial responses are branched"
    )
    assert said([1, 0], [], branching="none") == ""


def test_a_step_is_picked_and_unpicked_and_the_keyboard_keeps_its_place(runs, open_page):
    page = open_page(runs[0] / "report.html")
    focused = "document.activeElement.closest('[data-step]')?.dataset.step"
    page.click('#modes [data-mode="fci"]')
    assert page.evaluate("view.step") is None and "Candidates (Eq. 7): FCI ≥" in page.inner_text("#why")
    page.focus('#pane li[data-step="3"] .k')
    page.keyboard.press("Enter")
    assert page.evaluate("view.step") == 3 and page.evaluate(focused) == "3"
    page.keyboard.press("Enter")
    assert page.evaluate("view.step") is None and page.evaluate(focused) == "3"
    assert page.locator("[aria-live]").count() == page.locator("#why[aria-live]").count() == 1
    assert page.locator("#lanes [tabindex='0']").count() == 1  # one stop of the Tab key
    page.focus("#lanes [tabindex='0']")
    leaf = page.evaluate("view.leaf")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("view.step") == 2 and page.evaluate(focused) == "2"
    page.keyboard.press("ArrowDown")
    assert (
        page.evaluate("order(treeNow()).indexOf(view.leaf)")
        == page.evaluate(f"order(treeNow()).indexOf({leaf})") + 1
    )
    assert page.evaluate("document.activeElement.closest('.leaf').classList.contains('chosen')")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("view.leaf") == leaf and page.locator("#lanes [tabindex='0']").count() == 1


def test_a_finger_takes_the_nearest_step_and_finds_the_way_back(runs, open_page):
    page = open_page(runs[0] / "report.html", 390, 844, has_touch=True, is_mobile=True)
    row = page.locator(".leaf.initial .lane").first
    row.tap(position={"x": 30, "y": 30})
    assert page.evaluate("view.step") is not None and "tap a token" in page.inner_text("#pane")
    page.locator("#pane li").last.scroll_into_view_if_needed()
    back = page.locator("#pane .back").bounding_box()
    assert back["height"] >= 44 and 0 <= back["y"] < 844


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


def test_a_chart_says_at_which_step_a_number_was_measured(runs, open_page):
    """One error bar per evaluation; a curve that has no number at the step pointed at says whose it shows."""
    page = open_page(runs[0] / "report.html")
    tested = [m for m in report.collect(runs[0], 10**7)["metrics"] if "test_accuracy" in m]
    chart = page.locator(".chart svg").first
    assert chart.locator(".error").count() == len(tested)
    box, shown = chart.bounding_box(), []
    for share in (0.15, 0.4, 0.6, 0.8, 0.95):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
        shown.append(page.inner_text("#tip"))
    assert all(text.startswith("step ") for text in shown) and any(
        "measured at step" in text for text in shown
    )


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
