"""Symbolic equality: Math-Verify in worker processes, whose program this is, with limits on time and memory.

The limits: Linux; macOS has the time limit alone. In the trainer itself only an alarm signal in the main
thread could stop a comparison that hangs. Nothing heavy is imported: workers must start fast and fit."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading

TIME_LIMIT = 5  # seconds of wall-clock time for one symbolic comparison
GRACE = 1  # seconds after which we end a worker whose own alarm clock did not: one that is stopped, say
START_LIMIT = 120  # seconds for a worker to import Math-Verify (a cold network disk is slow)
MEMORY_LIMIT = 2 << 30  # bytes of address space of a worker
WORKERS = 4  # at most: 16 hanging answers among 64 took 106 s with one, 34 s with four; more start when asked
MAX_ANSWER_CHARS = 2000  # a longer boxed answer is wrong; gold answers of the six benchmarks stay far below


class SymbolicChecker:
    """Math-Verify in worker processes, which start when needed and live as long as this one; for all threads.

    Subprocesses and not `multiprocessing`: its spawn runs the main module again in the child, and train.py
    imports torch. A worker ends by itself when its input closes, and its own alarm clock ends it when a
    question takes too long, so neither a hung comparison nor a killed trainer leaves a process behind."""

    def __init__(self) -> None:
        self.timeouts = 0  # questions given up because their worker ran into a limit or died
        self._idle: list[subprocess.Popen] = []
        self._free = threading.Semaphore(WORKERS)
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two LaTeX answers are equal. TimeoutError if the worker does not survive the question,
        RuntimeError if none starts, as without Math-Verify: grading all wrong would be worse."""
        if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
            return False
        with self._free:
            worker = self._take()
            question = json.dumps([gold, answer])  # ASCII: escapes lone surrogates and NUL too
            reply = self._ask(worker, question, TIME_LIMIT)
            with self._lock:
                self.timeouts += not reply
                if reply:
                    self._idle.append(worker)
        if not reply:
            limits = f"{TIME_LIMIT} s and {MEMORY_LIMIT >> 30} GiB"
            raise TimeoutError(f"no verdict on {answer[:60]!r} within {limits}")
        return reply == "1\n"

    def _take(self) -> subprocess.Popen:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.poll() is None:
                    return worker
        command = [sys.executable, "-P", __file__]  # -P: no file beside this one hides a library's
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii")
        pipes["start_new_session"] = True  # Ctrl-C in the terminal is not for it
        worker = subprocess.Popen(command, **pipes)
        if self._ask(worker, "", START_LIMIT) != "ready\n":
            remedy = "try `pip install math-verify`"
            raise RuntimeError(f"the grading worker did not start (its error is above); {remedy}")
        return worker

    @staticmethod
    def _ask(worker: subprocess.Popen, question: str, limit: float) -> str:
        """The worker's next line; "" if it dies, or is ended as it does not answer within limit and grace."""
        clock, reply = threading.Timer(limit + GRACE, worker.kill), ""
        clock.start()
        try:
            with contextlib.suppress(OSError):  # the worker has died
                worker.stdin.write(question + "\n")
                worker.stdin.flush()
                reply = worker.stdout.readline()
        finally:
            clock.cancel()
            if not reply:  # or Ctrl-C: a late reply must not answer the next question
                worker.kill()
                worker.communicate()  # closes the pipes, waits for the end
        return reply


def serve_symbolic() -> None:
    """A worker: reads a JSON line [gold, answer], writes "1" (equal) or "0", until its input closes."""
    import logging
    import resource
    import signal

    # SIGTERM is sent to a whole job: the trainer may save first, and then closes the pipes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, even inside C code
    with contextlib.suppress(ValueError, OSError):  # macOS refuses; the time limit still holds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # Math-Verify warns about every answer it cannot parse
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not write into the replies
    rules = dict(basic_latex=True, malformed_operators=True, nits=True, boxed="all", equations=False)
    keep_units = NormalizationConfig(**rules, units=False)
    literal = [LatexExtractionConfig(normalization_config=keep_units), ExprExtractionConfig()]
    sys.stdin.readline()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT)
        try:  # this alarm replaces Math-Verify's own timeouts
            gold, answer = (f"\\boxed{{{text}}}" for text in json.loads(line))
            golds, answers = (parse(text, literal, parsing_timeout=None) for text in (gold, answer))
            if re.search(r"[a-zA-Z]\W*$|\\(text|mbox|mathrm)", answer):  # its end may be a unit
                answers += parse(answer, parsing_timeout=None)
            equal = verify(golds, answers, timeout_seconds=None)  # not symmetric: the gold answer comes first
        except Exception:  # what sympy cannot read is not an answer
            equal = False
        signal.alarm(0)
        print(int(equal), file=replies, flush=True)


CHECKER = SymbolicChecker()
os.register_at_fork(after_in_child=CHECKER.__init__)  # a child shares no worker with its parent

if __name__ == "__main__":
    serve_symbolic()
