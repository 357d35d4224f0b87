"""The floors of the house: who may import whom, how long files may be, and which words machines may know."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = ["fci", "tree", "sampler"]
BUDGETS = {"fci": 190, "tree": 190, "sampler": 110, "attnrl": 340, "train": 260, "eval": 240}  # lines
PLUMBING = sorted(path.stem for path in ROOT.glob("plumbing/*.py"))
OURS = {*BUDGETS, "plumbing", "experiments", "tests", "tiny"}
MACHINES = ["nouns", "learner", "torch_engine", "vllm_engine", "engines", "processes", "projection"]


def path_of(name: str) -> Path:
    return ROOT / f"{name}.py" if name in BUDGETS else ROOT / "plumbing" / f"{name}.py"


def our_imports(path: Path) -> set[str]:
    """What a file imports of the project, at its top or inside functions: "tree", "plumbing.logs", ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "plumbing":
            found |= {f"plumbing.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


def test_no_other_python_file_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(BUDGETS)


@pytest.mark.parametrize("name", CONCEPTS)
def test_concepts_import_nothing_of_ours(name):
    assert our_imports(path_of(name)) == set()


@pytest.mark.parametrize("name", ["tree", "sampler"])
def test_tree_and_sampler_need_numpy_only(name):
    imports = re.findall(r"^(?:from|import) (\w+)", path_of(name).read_text(), re.MULTILINE)
    assert set(imports) <= {"numpy", "math", "collections", "dataclasses"}


@pytest.mark.parametrize("name", PLUMBING)
def test_plumbing_imports_fci_and_itself_only(name):
    for imported in our_imports(path_of(name)):
        assert imported == "fci" or imported.startswith("plumbing."), imported


def test_plumbing_has_no_cycle():
    graph = {
        name: {i.removeprefix("plumbing.") for i in our_imports(path_of(name))} - {"fci"} for name in PLUMBING
    }
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_nouns_import_nothing_of_ours():
    assert our_imports(path_of("nouns")) == set()


def test_attnrl_needs_concepts_nouns_and_small_checks():
    allowed = {*CONCEPTS, "plumbing.nouns", "plumbing.agreement", "plumbing.settings"}
    assert our_imports(path_of("attnrl")) <= allowed


def test_eval_knows_no_training():
    assert not our_imports(path_of("eval")) & {"attnrl", "train", "tree", "sampler"}


def test_only_tests_import_experiments():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("tiny/*.py")]:
        assert not any(name.startswith("experiments") for name in our_imports(path)), path
    for path in ROOT.glob("experiments/*.py"):
        assert not any(name.startswith("tests") for name in our_imports(path)), path


def test_imports_inside_functions_are_of_libraries():
    """One of ours would hide a cycle."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                inside = ast.Module(function.body, [])
                for node in ast.walk(inside):
                    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                    names += [node.module] if isinstance(node, ast.ImportFrom) else []
                    assert not any(n.split(".")[0] in OURS for n in names), f"{path}: {function.name}"


# --- Budgets


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_concept_fits_its_budget(name):
    assert lines(path_of(name)) <= BUDGETS[name], (
        "move the cut between the floors; a fork may raise its budget"
    )


def test_the_six_files_together():
    assert sum(lines(path_of(name)) for name in BUDGETS) <= 1300


def test_plumbing_fits_its_budget():
    sizes = {name: lines(path_of(name)) for name in PLUMBING}
    assert max(sizes.values()) <= 250 and sum(sizes.values()) <= 2400, sizes


def test_readme_fits_its_budget():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2200


def test_every_file_of_plumbing_has_its_line():
    listed = (ROOT / "plumbing/README.md").read_text()
    assert all(f"{name}.py" in listed for name in PLUMBING)


# --- Words


def names_in(path: Path) -> set[str]:
    """All identifiers of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.add(value)
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_machines_know_no_problem_tree_or_advantage(name):
    words = {word for identifier in names_in(path_of(name)) for word in identifier.lower().split("_")}
    assert not words & {
        "problem",
        "problems",
        "tree",
        "leaf",
        "leaves",
        "advantage",
        "advantages",
        "rollout",
        "branch",
    }


def test_attnrl_has_no_machinery():
    """No packing, process, thread, chunk or autocast code beside the method."""
    words = {word for identifier in names_in(path_of("attnrl")) for word in identifier.lower().split("_")}
    assert not words & {
        "pack",
        "rank",
        "world",
        "thread",
        "threads",
        "chunk",
        "autocast",
        "cuda",
        "distributed",
        "fsdp",
    }
