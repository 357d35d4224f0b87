"""Train a reasoner with AttnRL, TreeRL or GRPO.

    python train.py                                                    # the embedded reasoner, on a laptop
    python train.py --algo grpo                                        # every constant is a flag, see --help
    python train.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B  # the paper's setting, one 80 GB GPU
    torchrun --nproc_per_node 8 train.py --model ...                   # on eight

Defaults are the paper's. A preset and an algorithm override some of them; flags override both. A run writes:

    config.json      every setting             metrics.jsonl    a line per step
    report.html      the run to look at        rollouts.jsonl   trees with text, FCI and advantages
    checkpoint-N/    weights in Hugging Face format, with all that is needed to go on

The same command again resumes from the last complete checkpoint (docs/recovery.md), with the plain engine on
a CPU to the same weights as a run that was never stopped. SIGTERM saves a checkpoint after the current step.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from attnrl import AttnRL, MethodConfig, Problem
from eval import average, evaluate, grade
from plumbing import checkpoints, logs, report
from plumbing.agreement import verify_sync
from plumbing.command import run_command
from plumbing.engines import SharedEngine, check_engine, make_engine
from plumbing.evaluations import percent
from plumbing.grader import Grader
from plumbing.learner import NonFiniteUpdates, make_learner
from plumbing.logs import Progress, ProgressBar
from plumbing.memory_plan import report as memory_plan
from plumbing.models import load_tokenizer
from plumbing.problems import load_data, stream
from plumbing.processes import any_process, fork_rng, once, rank, world_size
from plumbing.settings import MAY_CHANGE, MachineConfig, RunStopped, absolute, one_sentence, parse

HERE = Path(__file__).parent


@dataclass
class RunConfig(MachineConfig):
    """What is trained, on what, and how it is logged; defaults are the paper's where it has one."""

    model: str = HfArg(default=str(HERE / "tiny"), help="directory or hub name of a chat model")
    algo: Literal["attnrl", "treerl", "grpo"] = HfArg(default="attnrl", help="sets fields of the method")
    preset: Literal["auto", "paper", "tiny", "smollm2"] = HfArg(
        default="auto", help="defaults; auto: the one named like the model's directory, else paper"
    )
    train_data: str = HfArg(
        default="agentica-org/DeepScaleR-Preview-Dataset", help="hub name, or .jsonl, .json, .parquet file"
    )
    test_data: list[str] = HfArg(default_factory=lambda: ["math500"], help="held out; names as in eval.py")
    output_dir: str = HfArg(default="", help="where the run is written [runs/ALGO-MODEL-SEED]")
    seed: int = HfArg(default=0, help="of sampling, branching and data order")
    steps: int = HfArg(default=500, help="training steps")
    token_budget: int = HfArg(default=0, help="sample nothing new after so many tokens; 0: no limit")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate, constant")
    weight_decay: float = HfArg(default=0.01, help="of AdamW")
    eval_every: int = HfArg(default=50, help="steps between evaluations; there is one at both ends, too")
    eval_problems: int = HfArg(default=0, help="how many of the held-out problems; 0: all")
    eval_samples: int = HfArg(default=1, help="samples per held-out problem")
    eval_temperature: float = HfArg(default=0.6, help="of evaluation")
    save_every: int = HfArg(default=50, help="steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = HfArg(default=2, help="how many to keep")
    same_run: bool = HfArg(default=False, help="go on with a run although source files have changed since")


BASELINE = dict(off_policy=False, expansion="uniform", fci_filter="none", adaptive_batch=False)
BASELINE |= dict(drop_zero_advantage=False, steps=800)
ALGORITHMS = {  # rows of the paper's Table 1
    "attnrl": {},
    "treerl": dict(branching="entropy", min_branch_gap=0) | BASELINE,
    # The paper does not state GRPO's group size. 30, the leaves of a tree, is inferred from its token counts.
    "grpo": dict(branching="none", advantage="group", group_size=30) | BASELINE,
}
PRESETS = {  # "paper" changes nothing; smollm2: docs/real-model.md
    "tiny": dict(max_prompt_tokens=128, max_response_tokens=128, batch_size=12, min_batch_size=6)
    | dict(max_batch_size=36, target_sequences=180, minibatch_sequences=96, lr=4e-4, token_budget=400_000)
    | dict(train_data=str(HERE / "tiny/train.jsonl"), test_data=[str(HERE / "tiny/test.jsonl")])
    | dict(eval_every=10, save_every=20, gradient_checkpointing=False)
    | dict(engine="torch", threads=1, microbatch_tokens=4096, logit_chunk=512, eval_problems=400),
    "smollm2": dict(max_prompt_tokens=192, max_response_tokens=192, batch_size=4, min_batch_size=2)
    | dict(max_batch_size=12, target_sequences=64, minibatch_sequences=32, lr=5e-6, microbatch_tokens=2048)
    | dict(eval_every=5, eval_problems=200, save_every=5, gradient_checkpointing=False),
    "tiny grpo": dict(batch_size=6),  # of 30 responses each: about as many tokens as a step of a tree
}


def parse_config(argv: list[str]) -> tuple[RunConfig, MethodConfig]:
    """Defaults < preset < algorithm < preset for the algorithm < flags. Raises InputError."""

    def overrides(run: RunConfig, _) -> dict:
        preset = Path(run.model).name if run.preset == "auto" else run.preset
        return PRESETS.get(preset, {}) | ALGORITHMS[run.algo] | PRESETS.get(f"{preset} {run.algo}", {})

    run, method = parse((RunConfig, MethodConfig), argv, __doc__.split("\n")[0], overrides)
    run.output_dir = run.output_dir or f"runs/{run.algo}-{Path(run.model).name}-{run.seed}"
    run.model, run.train_data, *run.test_data = map(absolute, [run.model, run.train_data, *run.test_data])
    with one_sentence():
        run.check(may_be_zero={"seed", "token_budget", "weight_decay", "eval_problems", "eval_temperature"})
        method.check()
    return run, method


# --- Building a run ---------------------------------------------------------------------------------------


def engine_seed(run: RunConfig) -> int:
    """Engines must not all draw the same random numbers; the processes that hold one together must."""
    return run.seed + rank() // run.tensor_parallel


def build(run: RunConfig, method: MethodConfig, tokenizer, checkpoint: Path | None) -> AttnRL:
    """The three machines and the method on top; weights from the checkpoint, if there is one."""
    torch.manual_seed(engine_seed(run))
    if run.threads:
        torch.set_num_threads(run.threads)
    learner = make_learner(run, method, str(checkpoint or run.model))
    longest = method.max_prompt_tokens + method.max_response_tokens
    how = dict(max_tokens=longest, seed=engine_seed(run), autocast=learner.autocast)
    sampled = learner.model if world_size() == 1 else None  # a sharded model generates nothing
    engine = SharedEngine(make_engine(run, run.model, tokenizer, sampled, **how), run.tensor_parallel)
    return AttnRL(method, engine, learner, Grader(grade), tokenizer.decode, run.seed)


def held_out(run: RunConfig, method: MethodConfig, engine, tokenizer, problems: dict[str, list]) -> dict:
    """Metrics of the held-out problems; every evaluation uses the same random numbers, none of training's."""
    budget = lambda n_prompt: method.max_response_tokens if n_prompt <= method.max_prompt_tokens else 0
    how = dict(samples=run.eval_samples, temperature=run.eval_temperature, budget=budget)
    with fork_rng():
        torch.manual_seed(engine_seed(run))
        results = {name: evaluate(engine, tokenizer, rows, **how) for name, rows in problems.items()}
    measured = {"": average(list(results.values()))}
    measured |= {f"_{name}": r for name, r in results.items() if len(results) > 1}
    names = {"accuracy": "pass@1", "stderr": "stderr", "tokens": "mean_tokens", "truncated": "truncated"}
    return {f"test_{new}{file}": r[old] for file, r in measured.items() for new, old in names.items()}


# --- The run ----------------------------------------------------------------------------------------------


@dataclass
class Ready:
    """A run that may start, or go on: everything checked, loaded and restored."""

    trainer: AttnRL
    tokenizer: object
    train_problems: list[dict]
    test_problems: dict[str, list[dict]]  # by file
    progress: Progress
    log: logs.Log


def get_ready(run: RunConfig, method: MethodConfig) -> Ready | None:
    """Check the input, then load; None if the run is complete. InputError, EngineMismatch."""
    out = Path(run.output_dir)
    with one_sentence():
        check_engine(run)
        tokenizer = load_tokenizer(run.model)
        train_problems, test_problems = load_data(run, method, tokenizer)
        checkpoint, state = once(lambda: checkpoints.prepare(out, asdict(run) | asdict(method), MAY_CHANGE))
        progress = Progress(**state.get("progress", {}))
        if checkpoint and not state["method"]["pending"] and progress.enough(run):
            remedy = "raise the budget to go on, or choose another --output_dir"
            print(f"{out} is complete after {progress.step} steps: {remedy}")
            return None
        once(lambda: checkpoints.check_room(out, run))
        trainer = build(run, method, tokenizer, checkpoint)
    model = trainer.learner.model
    about = f"{Path(run.model).name}, {model.num_parameters():,} parameters on {model.device}"
    print(f"{run.algo}: {about}; {len(train_problems)} problems")
    if checkpoint:
        print(f"resuming from {checkpoint}")
        checkpoints.restore(trainer.learner, checkpoint, state)
        trainer.load_state(state["method"])
    few, n_tokens = [p["prompt_ids"] for p in train_problems[:8]], min(16, method.max_response_tokens)
    # The engine starts from `run.model`: verify_sync also pushes the weights of a checkpoint.
    verify_sync(trainer.engine.own, trainer.learner, few, method.max_engine_gap, n_tokens)
    log = logs.Log(out, state.get("log_lines", {}), run.track)
    return Ready(trainer, tokenizer, train_problems, test_problems, progress, log)


@checkpoints.closing_directories()
def train(run: RunConfig, method: MethodConfig, stop=lambda: False) -> None:
    """One run, from checked input to the last checkpoint, or to one after the step in which `stop()` is true.

    InputError comes before anything is trained; later errors cost the steps after the last checkpoint.
    """
    if run.plan:
        return print(memory_plan(run, method))
    ready = get_ready(run, method)
    if ready is None:
        return
    out, trainer, progress, log = Path(run.output_dir), ready.trainer, ready.progress, ready.log
    solved = lambda tested: percent(tested["test_accuracy"], tested["test_stderr"]) + "%"
    test = lambda: held_out(run, method, trainer.engine, ready.tokenizer, ready.test_problems)
    sampling_ended = lambda: progress.enough(run, pending=bool(trainer.pending))
    finished = lambda: sampling_ended() and not trainer.pending
    if not log.lines:
        tested = test()
        progress.first_accuracy = tested["test_accuracy"]
        n = sum(map(len, ready.test_problems.values()))
        print(f"before training: {solved(tested)} of {n} held-out problems solved")
        log.add("metrics.jsonl", {"step": 0, **tested, "total_tokens": 0})
        report.draw(out)
    bar, stopping = ProgressBar(run, progress), any_process(stop())
    while not finished() and not stopping:
        # ---- next problems
        count = 0 if sampling_ended() else trainer.sampler.batch_size
        rows = stream(ready.train_problems, run.seed, progress.position, progress.position + count)
        new = [Problem(p["problem"], p["answers"], p["prompt_ids"]) for p in rows]

        # ---- step
        clock, timeouts = logs.Clock(), trainer.grader.timeouts
        try:
            with clock("step"):
                due, updates = trainer.step(new, clock)
        except NonFiniteUpdates as error:
            raise logs.stopped(error, out / f"nonfinite-{progress.step + 1}.json") from None
        progress.count(new, due, updates)

        # ---- log, evaluate
        record = {"step": progress.step} | logs.step_metrics(new, due, updates) | clock.seconds
        record |= progress.totals() | {"next_batch_size": trainer.sampler.batch_size}
        record |= {"grader_timeouts": trainer.grader.timeouts - timeouts}
        if evaluated := bool(due) and (progress.step % run.eval_every == 0 or finished()):
            record |= test()
            progress.test_accuracy = record["test_accuracy"]
            bar.write(f"step {progress.step:4d}: {solved(record)}")
        log.add("metrics.jsonl", record)
        log.add("rollouts.jsonl", *report.describe_trees(due, progress.step, trainer if evaluated else None))

        # ---- save
        stopping = any_process(stop())  # one answer for here and the loop: a run that stops has saved
        if stopping or due and (progress.step % run.save_every == 0 or finished()):
            state = {"progress": asdict(progress), "method": trainer.state(), "log_lines": log.lines}
            what = trainer.learner, ready.tokenizer, state, run.keep_checkpoints
            checkpoints.save_or_stop(out, progress.step, *what)
        if evaluated or stopping:
            report.draw(out)
        bar.show(progress, record.get("reward"), count)
    bar.close()
    trainer.engine.close()
    if not finished():
        raise RunStopped(f"SIGTERM ended the run after step {progress.step}")
    gain = f"{progress.first_accuracy:.1%} -> {progress.test_accuracy:.1%} of the held-out problems solved"
    print(f"{gain} after {progress.step} steps and {progress.tokens:,} generated tokens")
    print(f"see {out}/report.html, curves.png, metrics.jsonl and checkpoint-{progress.step}/")


def main() -> None:
    run_command(parse_config, train)


if __name__ == "__main__":
    main()
