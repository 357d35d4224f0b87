"""docs/walkthrough.ipynb runs from top to bottom and prints what is committed, as do the solutions of its
exercises."""

import json
import re
import sys

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?```text\n(.*?)```.*?</details>", re.DOTALL)
SOLUTIONS = [found for cell in CELLS for found in SOLUTION.findall("".join(cell["source"]))]


def is_check(cell) -> bool:
    """Whether a cell asserts an equation, and prints the same on every machine."""
    return "check" in cell["metadata"].get("tags", [])


def printed(cell) -> str:
    """What a cell, as committed or as executed, wrote to stdout."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


# --- As committed -----------------------------------------------------------------------------------------


def test_cells_are_few_and_small():
    assert 25 <= len(CELLS) <= 40
    assert all(len("".join(cell["source"]).splitlines()) <= 15 for cell in CODE)
    assert len(SOLUTIONS) == 3
    assert NOTEBOOK.stat().st_size < 600_000


def test_every_equation_is_shown_and_asserted():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    code = "".join("".join(cell["source"]) for cell in CODE if "assert" in "".join(cell["source"]))
    for number in range(1, 11):
        assert re.search(rf"Eq\. {number}\b", text), number
    assert {int(n) for n in re.findall(r"# Eq\. (\d+)", code)} == set(range(1, 11))


def test_committed_outputs_are_of_one_clean_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {o["output_type"] for o in outputs} == {"stream", "display_data"}
    assert {o["name"] for o in outputs if o["output_type"] == "stream"} == {"stdout"}
    assert not re.search(r"/(home|tmp|root|Users|usr|work)/", NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", [".", "docs", "docs/figures"])
def test_the_root_is_found_from_any_folder_below(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / folder)
    namespace = {}
    exec("".join(CODE[0]["source"]), namespace)
    assert namespace["ROOT"] == ROOT and sys.path[0] == str(ROOT)


# --- Executed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed():
    """The code cells after a run in docs/, and after them the solutions, as cells in the same namespace."""
    why = "the notebook is executed by nbclient and ipykernel: pip install nbclient ipykernel"
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code, _ in SOLUTIONS]
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.holds_the_paper("Eq. 1 to 10")
def test_it_runs_and_its_checks_print_what_is_committed(executed):
    compared = 0
    for old, new in zip(CODE, executed):
        if is_check(old):
            assert printed(new) == printed(old), "".join(old["source"])
            compared += 1
    assert compared >= 10


@pytest.mark.slow
@pytest.mark.holds_the_paper("Eq. 4 to 7")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_solution_prints_what_the_exercise_says(executed, number):
    assert printed(executed[len(CODE) + number]) == SOLUTIONS[number][1] != ""
