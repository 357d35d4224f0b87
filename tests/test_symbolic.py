"""The symbolic checker: limits on time and memory, threads and processes, and workers that stay in step."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from eval import grade, verdict
from experiments.grader_parity import hostile
from plumbing import symbolic
from plumbing.symbolic import CHECKER, SymbolicChecker

TOWER = "9^{9^{9^{9}}}"


@pytest.mark.slow
@pytest.mark.parametrize("answer, gold", [(TOWER, "3"), (f"(1, {TOWER})", "(1,2)")])
def test_a_tower_of_powers_costs_one_worker_and_is_counted(answer, gold):
    timeouts = CHECKER.timeouts
    assert verdict(f"\\boxed{{{answer}}}", [gold, gold, gold]) == "timeout" and not grade("\\boxed{x}", ["3"])
    assert CHECKER.timeouts == timeouts + 1  # not one for each gold answer
    assert grade(r"\boxed{\sqrt{12}}", [r"2\sqrt{3}"]) and not grade(r"\boxed{\sqrt{13}}", [r"2\sqrt{3}"])
    assert CHECKER.timeouts == timeouts + 1


@pytest.fixture
def stopped():
    """A checker and its only worker, which is stopped: its own alarm clock stands still."""
    checker = SymbolicChecker()
    assert checker.equal("x+1", "1+x")
    os.kill(checker._idle[0].pid, signal.SIGSTOP)
    return checker, checker._idle[0]


def test_a_stopped_worker_is_given_up(stopped, monkeypatch):
    checker, worker = stopped
    with monkeypatch.context() as patch:
        patch.setattr(symbolic, "TIME_LIMIT", 1)
        with pytest.raises(TimeoutError, match="no verdict on '1\\+x' within 1 s"):
            checker.equal("x+1", "1+x")
    assert checker.timeouts == 1 and worker.poll() is not None and checker.equal("x+1", "1+x")


def test_an_answer_that_hangs_blocks_no_other(stopped, monkeypatch):
    checker, worker = stopped
    monkeypatch.setattr(symbolic, "TIME_LIMIT", 600)
    with ThreadPoolExecutor(8) as pool:
        hung = pool.submit(checker.equal, "x+1", "1+x")
        while checker._idle:
            pass  # until the stopped worker is taken
        answers = list(pool.map(checker.equal, ["x+1", "x+2"] * 20, ["1+x", "1+x"] * 20))
        assert answers == [True, False] * 20 and not hung.done()
        worker.kill()
        assert isinstance(hung.exception(), TimeoutError)
    assert len(checker._idle) <= symbolic.WORKERS and checker.timeouts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit on address space")
def test_workers_have_a_memory_limit():
    import resource

    checker = SymbolicChecker()
    assert not checker.equal("3", "x")
    assert resource.prlimit(checker._idle[0].pid, resource.RLIMIT_AS)[0] == symbolic.MEMORY_LIMIT


SCRIPT = r"""
import multiprocessing, os, threading
from eval import grade
from plumbing.symbolic import CHECKER

def right():
    return grade(r"\boxed{\sqrt{12}}", [r"2\sqrt{3}"]) and not grade(r"\boxed{\sqrt{13}}", [r"2\sqrt{3}"])

if __name__ == "__main__":
    assert right()
    child = os.fork()
    if child == 0:
        # A worker that both asked would mix up their answers.
        os._exit(0 if CHECKER._idle == [] and right() else 1)
    assert right() and os.waitpid(child, 0)[1] == 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(right)
    found = []
    thread = threading.Thread(target=lambda: found.append(right()))
    thread.start(); thread.join()
    assert found == [True]
    print("all right")
"""


@pytest.mark.slow
def test_grading_in_threads_forked_and_spawned_processes_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(tmp_path / "script.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("all right") == 2, result.stderr


def test_long_answers_and_plain_numbers_never_reach_a_worker(monkeypatch):
    monkeypatch.setattr(CHECKER, "_take", lambda: pytest.fail("a worker was asked"))
    assert not CHECKER.equal("x", "y" * (symbolic.MAX_ANSWER_CHARS + 1))
    assert not grade(r"\boxed{12}", ["13"]) and grade(r"\boxed{1/2}", [r"\frac12"])
    assert not grade(r"\boxed{(1,2)}", ["(1,3)"])
    # The second gold answer matches before the first is asked about.
    assert grade(r"\boxed{y + 2}", ["x+1", "y+2"])
    assert grade(r"\boxed{0.50}", ["1/2"]) and not grade(r"\boxed{0.51}", ["1/2"])
    assert grade(r"\boxed{x + 1}", ["x+1"])


def test_a_worker_that_does_not_start_is_an_error_not_a_wrong_answer(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"  # what a worker does without Math-Verify
    program.write_text("raise SystemExit('no math_verify')")
    monkeypatch.setattr(symbolic, "__file__", str(program))
    with pytest.raises(RuntimeError, match="math-verify"):
        SymbolicChecker().equal("x", "y")


def test_the_program_of_a_worker_does_not_import_torch():
    """Neither do answers.py and symbolic.py as modules; sympy comes with Math-Verify, in workers alone."""
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'sympy'}"
    code = (
        f"import sys; import plumbing.answers, plumbing.symbolic; print(sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_hostile_questions_leave_the_workers_in_step():
    for response in hostile(60, seed=2):
        verdict(response, ["2x+1"])
        assert CHECKER.equal(r"x+1", "1+x") and not CHECKER.equal("x+1", "x+2"), repr(response)
