"""Train a reasoner with AttnRL, TreeRL or GRPO.

    python train.py                                                        # the embedded reasoner in tiny/, on a laptop
    python train.py --algo grpo                                            # a baseline; every constant is a flag, see --help
    python train.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B      # the paper's setting, on one 80 GB GPU
    torchrun --nproc_per_node 8 train.py --model ...                       # on eight

Defaults are the paper's. An algorithm and a preset override some of them; flags override both. A run writes a directory:

    config.json      every setting             metrics.jsonl    a line a step
    curves.png       the run at a glance       rollouts.jsonl   trees with text, FCI and advantages
    checkpoint-N/    weights in Hugging Face format, with all that is needed to go on

The same command again resumes from the last complete checkpoint, to the same weights as a run that was never stopped. SIGTERM, which
clusters send before they kill, makes a run save a checkpoint at the end of the current step and stop; a second SIGTERM kills it.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from attnrl import AttnRL, Group, MethodConfig, NonFiniteUpdates, Rollout, check_signs
from eval import CHECKER, evaluate, grade, load_problems
from experiments.memory_plan import report as memory_plan
from fci import split_steps
from sampler import (
    EngineMismatch,
    SharedEngine,
    context_length,
    fork_rng,
    load_model,
    load_tokenizer,
    make_engine,
    on_rank_0,
    once,
    prompt_ids,
    rank,
    resolve_engine,
    shard,
    union,
    verify_sync,
    world_size,
)

HERE = Path(__file__).parent


@dataclass
class RunConfig:
    """What is trained, on what, and how it is logged; defaults are the paper's where it has one."""

    model: str = HfArg(default=str(HERE / "tiny"), help="directory or hub name of a chat model; tiny/ is the embedded reasoner")
    algo: Literal["attnrl", "treerl", "grpo"] = HfArg(default="attnrl", help="a set of method fields, see ALGORITHMS")
    preset: Literal["auto", "paper", "tiny"] = HfArg(
        default="auto", help="a set of defaults, see PRESETS; auto: the one named like the model's directory, else paper"
    )
    train_data: str = HfArg(
        default="agentica-org/DeepScaleR-Preview-Dataset", help="hub name or .jsonl/.json/.parquet with `problem` and `answer`"
    )
    test_data: str = HfArg(default="HuggingFaceH4/MATH-500", help="held-out problems, likewise; its `test` split on the hub")
    output_dir: str = HfArg(default="", help="where the run is written [runs/ALGO-MODEL-SEED]")
    engine: Literal["auto", "torch", "vllm"] = HfArg(default="auto", help="what samples; auto is vllm where it and CUDA are there")
    gpu_memory: float = HfArg(default=0.4, help="share of the GPU that vllm may use")
    engine_sleep: bool = HfArg(default=False, help="vllm hands its GPU memory back during updates (its sleep mode); CUDA only")
    tensor_parallel: int = HfArg(default=1, help="neighbouring GPUs that hold one vllm engine together; needs torchrun")
    seed: int = HfArg(default=0, help="of sampling, branching and data order")
    steps: int = HfArg(default=500, help="training steps")
    token_budget: int = HfArg(default=0, help="stop sampling new problems after so many generated tokens; 0: never")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate, constant")
    weight_decay: float = HfArg(default=0.0, help="AdamW's")
    autocast: Literal["auto", "none", "bfloat16"] = HfArg(
        default="auto", help="dtype of forward passes over fp32 weights; auto is bfloat16 on CUDA"
    )
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations in backward; a memory knob")
    threads: int = HfArg(default=0, help="CPU threads; 0: torch's choice")
    eval_every: int = HfArg(default=50, help="steps between evaluations; the first and last step are always evaluated")
    eval_problems: int = HfArg(default=0, help="how many of the held-out problems; 0: all")
    eval_samples: int = HfArg(default=1, help="samples a held-out problem")
    eval_temperature: float = HfArg(default=0.6, help="of evaluation")
    save_every: int = HfArg(default=50, help="steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = HfArg(default=2, help="how many to keep")
    plan: bool = HfArg(default=False, help="print the GPU memory that this configuration needs, and stop; loads no weights")
    gpu_gb: float = HfArg(default=0, help="for --plan, memory of the GPU in GB; 0: of the one that is there, else 80")
    long_prompts: Literal["refuse", "skip"] = HfArg(default="refuse", help="what to do about prompts above max_prompt_tokens")


ALGORITHMS = {  # rows of the paper's Table 1
    "attnrl": {},
    "treerl": dict(branching="entropy", expansion="uniform", fci_filter="none", adaptive_batch=False, off_policy=False),
    "grpo": dict(branching="none", expansion="uniform", fci_filter="none", adaptive_batch=False, off_policy=False, advantage="group"),
}
PRESETS = {
    "paper": {},
    "tiny": dict(
        train_data=str(HERE / "tiny/train.jsonl"), test_data=str(HERE / "tiny/test.jsonl"),
        max_prompt_tokens=128, max_response_tokens=128, batch_size=16, min_batch_size=8, max_batch_size=48, target_sequences=240,
        minibatch_prompts=8, lr=4e-4, token_budget=400_000, gradient_checkpointing=False, eval_every=10, save_every=20,
    ),
}  # fmt: skip


MAY_CHANGE = set(  # fields with which a run may be resumed under another value: where, how long, on which engine, and memory knobs
    "output_dir steps token_budget save_every keep_checkpoints threads engine max_engine_gap gpu_memory engine_sleep tensor_parallel "
    "microbatch_tokens logit_chunk gradient_checkpointing max_skipped_updates plan gpu_gb".split()
)


PATIENCE = timedelta(minutes=30)  # of processes that wait for another, which may be sampling or writing a checkpoint


class InputError(ValueError):
    """Something the user gave cannot work; the message says what and how to mend it."""


class RunStopped(RuntimeError):
    """A run ended early; what it had done by its last checkpoint is safe."""


class Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_config(argv: list[str]) -> tuple[RunConfig, MethodConfig]:
    """Defaults < preset < algorithm < flags."""
    parser = Parser((RunConfig, MethodConfig), description=__doc__.split("\n")[0], allow_abbrev=False)
    run, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    name = Path(run.model).name if run.preset == "auto" else run.preset
    parser.set_defaults(**PRESETS.get(name, {}) | ALGORITHMS[run.algo])
    run, method = parser.parse_args_into_dataclasses(argv)
    run.output_dir = run.output_dir or f"runs/{run.algo}-{Path(run.model).name}-{run.seed}"
    for name in ("model", "train_data", "test_data"):  # a local path reads the same from every folder
        if Path(getattr(run, name)).exists():
            setattr(run, name, str(Path(getattr(run, name)).resolve()))
    try:
        check_signs(run, may_be_zero={"seed", "token_budget", "weight_decay", "threads", "eval_problems", "eval_temperature", "gpu_gb"})
        if run.gpu_memory > 1:
            raise ValueError(f"gpu_memory is a share of the GPU, at most 1, got {run.gpu_memory}")
        method.check()
    except ValueError as error:
        raise InputError(error) from None
    return run, method


# --- 1. Data ----------------------------------------------------------------------------------------------------------


def load_data(run: RunConfig, method: MethodConfig, tokenizer) -> tuple[list[dict], list[dict]]:
    """Training and held-out problems, with every prompt and response known to fit. Raises ValueError."""
    needed, context = method.max_prompt_tokens + method.max_response_tokens, context_length(run.model)
    if needed > context:
        raise ValueError(
            f"max_prompt_tokens + max_response_tokens = {needed} exceeds the model's context of {context} tokens: lower one of them"
        )
    train, test = load_problems(run.train_data, "train"), load_problems(run.test_data, "test")
    test = test[: run.eval_problems or None]
    for name, problems in (("train_data", train), ("test_data", test)):
        lengths = [len(prompt_ids(tokenizer, p["problem"])) for p in tqdm(problems, desc=name, delay=2, disable=rank() > 0)]
        too_long = sum(n > method.max_prompt_tokens for n in lengths)
        if too_long and run.long_prompts == "refuse":
            raise ValueError(
                f"{too_long} of {len(problems)} prompts of {name} are longer than max_prompt_tokens={method.max_prompt_tokens} "
                f"(the longest has {max(lengths)} tokens): raise it, or pass --long_prompts skip"
            )
        problems[:] = [p for p, n in zip(problems, lengths) if n <= method.max_prompt_tokens]
        if not problems:
            raise ValueError(f"no prompt of {name} fits into max_prompt_tokens={method.max_prompt_tokens}: raise it")
    return train, test


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def next_groups(problems: list[dict], tokenizer, position: int, count: int, seed: int) -> list[Group]:
    """Problems position .. position + count of an endless stream that visits all of them in a new order each epoch."""
    groups = []
    for i in range(position, position + count):
        epoch, index = divmod(i, len(problems))
        p = problems[epoch_order(len(problems), seed, epoch)[index]]
        groups.append(Group(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])))
    return groups


# --- 2. Checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(out: Path, step: int, trainer: AttnRL, state: dict, keep: int) -> None:
    """Write checkpoint-STEP aside, then rename it: a checkpoint under its final name is complete. Sharded tensors are saved whole."""
    weights, optimizer = on_rank_0(trainer.model.state_dict()), trainer.optimizer.state_dict()
    optimizer["state"] = {i: on_rank_0(moments) for i, moments in optimizer["state"].items()}
    rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    rngs = union({rank(): rng})  # every process has drawn its own samples
    if rank() > 0:
        return
    aside, final = out / "checkpoint.partial", out / f"checkpoint-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    trainer.model.save_pretrained(aside, state_dict=weights)
    trainer.tokenizer.save_pretrained(aside)
    torch.save({"optimizer": optimizer, "rng": rngs}, aside / "optimizer.pt")
    state = state | {
        "step": step, "sampler": vars(trainer.sampler), "totals": trainer.totals,
        "planner_rng": trainer.rng.bit_generator.state, "pending": [asdict(g) for g in trainer.pending],
        "skipped_in_a_row": trainer.skipped_in_a_row,
    }  # fmt: skip
    (aside / "state.json").write_text(json.dumps(state))
    (aside / "digests.json").write_text(json.dumps({p.name: digest(p) for p in aside.iterdir()}))
    for path in (*aside.iterdir(), aside):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(out)  # only now the rename survives a power cut, and older checkpoints may go
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json, once every file is known to be as it was written. Raises InputError.

    No falling back to the checkpoint before: a file that changed on the disk is something to know about, not to step over.
    """
    try:
        name = "digests.json"
        for name, expected in json.loads((checkpoint / name).read_text()).items():
            if digest(checkpoint / name) != expected:
                raise ValueError("it is not what digests.json says was written")
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint} is damaged ({name}: {error}): delete it to resume from the one before, or the whole run to start again"
        ) from None


def restore(trainer: AttnRL, checkpoint: Path, state: dict) -> None:
    """Everything but the weights, which `build` loads and `verify_sync` pushes to the engine."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, mmap=world_size() > 1)  # mapped: held once a node
    for i, parameter in enumerate(trainer.model.parameters()):
        if isinstance(parameter, DTensor):
            moments, mesh, placements = saved["optimizer"]["state"].get(i, {}), parameter.device_mesh, parameter.placements
            for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
                moments[name] = distribute_tensor(moments[name], mesh, placements, src_data_rank=None)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    vars(trainer.sampler).update(state["sampler"])
    trainer.totals, trainer.skipped_in_a_row = state["totals"], state["skipped_in_a_row"]
    trainer.rng.bit_generator.state = state["planner_rng"]
    trainer.pending = [Group(**g | {"rollouts": [Rollout(**r) for r in g["rollouts"]]}) for g in state["pending"]]
    if len(saved["rng"]) != world_size():
        print(f"{checkpoint} was written by {len(saved['rng'])} processes, and there are {world_size()}: sampling goes on with new seeds")
        torch.manual_seed(torch.initial_seed() + 1000 * state["step"])
        return
    rng = saved["rng"][rank()]
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


# --- 3. Logs ----------------------------------------------------------------------------------------------------------


def append(path: Path, record: dict) -> None:
    if rank() == 0:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint counts on the lines before it


def describe_tree(group: Group, step: int, trainer: AttnRL) -> dict:
    """A problem's tree as plain text and numbers, for rollouts.jsonl."""
    rollouts = []
    for r in group.rollouts:
        texts = [trainer.text_of(i) for i in r.ids]
        changes = [0, *(i for i in range(1, len(r.ids)) if r.advantages and r.advantages[i] != r.advantages[i - 1]), len(r.ids)]
        rollouts.append({
            "family": r.family, "start": r.start, "reward": r.reward, "finished": r.finished,
            "steps": ["".join(texts[a:b]) for a, b in split_steps(texts)], "step_starts": [a for a, _ in split_steps(texts)], "fci": r.fci,
            "advantages": [[a, b, r.advantages[a]] for a, b in zip(changes, changes[1:])] if r.advantages else [],  # token spans
        })  # fmt: skip
    return {"step": step, "problem": group.problem, "answers": group.answers, "branches": group.branches, "rollouts": rollouts}


def plot_curves(out: Path) -> None:
    """curves.png: accuracy, entropy and length, batch composition, and where the time goes."""
    if rank() > 0:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    panels = {
        "accuracy": ["test_accuracy", "reward"],
        "shares": ["valid_tokens", "mc_valid", "rescued", "filtered"],
        "entropy (nats a token)": ["entropy"],
        "prompts a batch": ["batch_size", "valid_problems"],
    }
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(r["total_tokens"] / 1000, r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if name == "test_accuracy" else None)
        axis.set(title=title, xlabel="thousand generated tokens", ylim=(0, None))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


# --- 4. The run -------------------------------------------------------------------------------------------------------


def train(run: RunConfig, method: MethodConfig, stop=lambda: False) -> None:
    """One run, from checked input to the last checkpoint, or to one after the step in which `stop()` became true.

    Raises InputError before anything is trained. What is raised later, RunStopped or another, costs the steps after the last checkpoint.
    """
    out = Path(run.output_dir)
    try:
        if run.plan:
            return print(memory_plan(run, method))
        chosen, _ = resolve_engine(run.engine)
        if run.engine_sleep and not (chosen == "vllm" and torch.cuda.is_available()):
            raise ValueError("engine_sleep hands vLLM's GPU memory back, and this run has no vLLM on a CUDA device: leave it out")
        if world_size() % run.tensor_parallel:
            raise ValueError(f"tensor_parallel={run.tensor_parallel} must divide the number of torchrun's processes, here {world_size()}")
        tokenizer = load_tokenizer(run.model)
        train_problems, test_problems = load_data(run, method, tokenizer)
        checkpoint, state = once(lambda: prepare_output(out, run, method))
        if state and not state["pending"] and budget_used(run, state["step"], state["totals"]["tokens"]):
            print(f"{out} is complete after {state['step']} steps: raise the budget to go on, or choose another --output_dir")
            return
        trainer = build(run, method, tokenizer, checkpoint)
    except ValueError as error:
        raise InputError(error) from None
    size = sum(p.numel() for p in trainer.model.parameters())
    once(lambda: check_room(out, run, 12 * size))  # bytes: fp32 weights and two moments of AdamW
    print(f"{run.algo}: {Path(run.model).name}, {size:,} parameters on {trainer.model.device}; {len(train_problems)} problems")
    if checkpoint:
        print(f"resuming from {checkpoint}")
        restore(trainer, checkpoint, state)
    few = [prompt_ids(tokenizer, p["problem"]) for p in train_problems[:8]]
    budget = min(16, method.max_response_tokens)
    verify_sync(trainer.engine.own, trainer.model, few, method.max_engine_gap, budget, method.temperature, trainer.autocast)
    step, position = state.get("step", 0), state.get("position", 0)  # position in the stream of training problems

    def test() -> dict:
        with fork_rng(), trainer.autocast():  # the same random numbers at every evaluation, none taken from training
            torch.manual_seed(engine_seed(run))
            settings = dict(samples=run.eval_samples, max_new_tokens=method.max_response_tokens, temperature=run.eval_temperature)
            result = evaluate(trainer.engine, tokenizer, test_problems, **settings)
        return {"test_accuracy": result["pass@1"], "test_tokens": result["mean_tokens"], "test_truncated": result["truncated"]}

    def sampling_ended() -> bool:  # a pending batch will be the step after this one
        return budget_used(run, step + bool(trainer.pending), trainer.totals["tokens"])

    def finished() -> bool:
        return sampling_ended() and not trainer.pending

    def told_to_stop() -> bool:
        return any(union({rank(): stop()}).values())  # one process is enough, and all must agree

    def so_far() -> int:
        return min(trainer.totals["tokens"], run.token_budget) if run.token_budget else step

    # ---- steps
    if not checkpoint:
        tested = test()
        print(f"before training: {tested['test_accuracy']:.1%} of {len(test_problems)} held-out problems solved")
        append(out / "metrics.jsonl", {"step": 0, **tested, "total_tokens": 0})
        state = {"first_accuracy": tested["test_accuracy"], "log_lines": 1, "tree_lines": 0}
    unit = "token" if run.token_budget else "step"
    style = dict(unit=unit, unit_scale=bool(run.token_budget), dynamic_ncols=True, disable=rank() > 0)
    progress = tqdm(total=run.token_budget or run.steps, initial=so_far(), **style)
    stopping = told_to_stop()
    while not finished() and not stopping:
        count = 0 if sampling_ended() else trainer.sampler.batch_size
        timeouts = CHECKER.timeouts
        try:
            metrics, batch = trainer.step(next_groups(train_problems, tokenizer, position, count, run.seed))
        except NonFiniteUpdates as error:
            (reason, groups), path = error.args, out / f"nonfinite-{step + 1}.json"
            if rank() == 0:
                path.write_text(json.dumps([asdict(g) for g in groups]))
            raise RunStopped(f"{reason}, see {path} for the last one's rollouts; to skip more, raise --max_skipped_updates") from None
        position += count
        step += bool(batch)

        # ---- log, evaluate, save
        record = {"step": step, **metrics, "grader_timeouts": CHECKER.timeouts - timeouts}
        if batch and (step % run.eval_every == 0 or finished()):
            record |= test()
            state["test_accuracy"] = record["test_accuracy"]
            progress.write(f"step {step:4d}: {record['test_accuracy']:.1%}")
        append(out / "metrics.jsonl", record)
        state["log_lines"] += 1
        if batch:
            append(out / "rollouts.jsonl", describe_tree(max(batch, key=lambda g: g.mixed() * len(g.rollouts)), step, trainer))
            state["tree_lines"] += 1
        stopping = told_to_stop()  # asked once, so that a run which stops has saved, if it has trained at all
        if batch and (step % run.save_every == 0 or finished() or stopping):
            try:
                save_checkpoint(out, step, trainer, state | {"position": position}, run.keep_checkpoints)
            except Exception as error:  # the file system, safetensors and torch.save each have their own kind
                shutil.rmtree(out / "checkpoint.partial", ignore_errors=True)
                raise RunStopped(f"cannot write checkpoint-{step} ({' '.join(str(error).split())}): make room in {out}") from error
            plot_curves(out)
        progress.set_postfix(step=step, reward=f"{record.get('reward', float('nan')):.2f}", prompts=count, refresh=False)
        progress.update(so_far() - progress.n)
    progress.close()
    trainer.engine.close()
    if not finished():
        raise RunStopped(f"SIGTERM ended the run after step {step}")
    gain = f"{state['first_accuracy']:.1%} -> {state['test_accuracy']:.1%} of the held-out problems solved"
    print(f"{gain} after {step} steps and {trainer.totals['tokens']:,} generated tokens")
    print(f"see {out}/curves.png, metrics.jsonl, rollouts.jsonl and checkpoint-{step}/")


def budget_used(run: RunConfig, steps: int, tokens: int) -> bool:
    return steps >= run.steps or 0 < run.token_budget <= tokens


def check_room(out: Path, run: RunConfig, size: int) -> None:
    """Raises InputError unless the disk holds the checkpoints to come, of `size` bytes each."""
    at_once = min(run.keep_checkpoints + 1, math.ceil(run.steps / run.save_every))  # the oldest goes when the newest is there
    needed, free = (at_once - len(checkpoints(out))) * size, shutil.disk_usage(out).free
    if free < needed:
        sizes = f"{needed / 1e9:.3g} GB for checkpoints and has {free / 1e9:.3g} GB"
        raise InputError(f"{out} needs {sizes}: make room, lower --keep_checkpoints, or choose another --output_dir")


def engine_seed(run: RunConfig) -> int:
    """Engines must not all draw the same random numbers; the processes that hold one together must."""
    return run.seed + rank() // run.tensor_parallel


def build(run: RunConfig, method: MethodConfig, tokenizer, checkpoint: Path | None) -> AttnRL:
    """Model, reference, optimiser and engine. Weights come from the checkpoint, if there is one."""
    torch.manual_seed(engine_seed(run))
    if run.threads:
        torch.set_num_threads(run.threads)
    on_gpu = torch.cuda.is_available()
    autocast = torch.bfloat16 if run.autocast == "bfloat16" or (run.autocast == "auto" and on_gpu) else None
    model = load_model(str(checkpoint or run.model))
    reference = load_model(run.model, autocast or torch.float32).requires_grad_(False) if method.kl_coef else None
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in filter(None, (model, reference)):
        shard(each)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay, fused=on_gpu)  # fused: no copy of the state
    longest = method.max_prompt_tokens + method.max_response_tokens
    knobs = dict(seed=engine_seed(run), gpu_memory=run.gpu_memory, sleep_mode=run.engine_sleep, tensor_parallel=run.tensor_parallel)
    own = make_engine(run.engine, run.model, tokenizer, model if world_size() == 1 else None, max_tokens=longest, **knobs)
    return AttnRL(method, model, reference, tokenizer, SharedEngine(own, run.tensor_parallel), optimizer, grade, run.seed, autocast)


def prepare_output(out: Path, run: RunConfig, method: MethodConfig) -> tuple[Path | None, dict]:
    """Make the run's directory, or find the checkpoint to resume from: (checkpoint or None, its state). Raises InputError."""
    config, path = asdict(run) | asdict(method), out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = out / "config.partial"
        aside.write_text(json.dumps(config, indent=2))  # in every run, since it shows that there is a place to write to
        aside.unlink() if path.exists() else aside.rename(path)
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use {out} for the run ({error}): mend that, or choose another --output_dir") from None
    changed = [
        f"{name} ({before.get(name)} -> {value})" for name, value in config.items() if before.get(name) != value and name not in MAY_CHANGE
    ]
    if changed:
        raise InputError(f"{out} holds a run with other settings, {', '.join(changed)}: use them, or another --output_dir")
    found = checkpoints(out)
    state = read_state(found[-1]) if found else {}
    for name, lines in (("metrics.jsonl", "log_lines"), ("rollouts.jsonl", "tree_lines")):
        if (out / name).exists():  # drop what a stopped run logged after its checkpoint, be it whole lines or not
            kept = (out / name).read_bytes().splitlines(keepends=True)[: state.get(lines, 0)]
            os.truncate(out / name, sum(map(len, kept)))
    return (found[-1] if found else None), state


def join_processes() -> None:
    """Meet the other processes of torchrun, each on a GPU of its own if there are any; only rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"{world_size()} processes")


def last_words(message: str) -> None:
    """Exit with one sentence. If all processes fail alike, rank 0 says it, and its end ends the others before they speak."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank() > 0:
        time.sleep(5)
    sys.exit(message)


def main() -> None:
    if torch.distributed.is_torchelastic_launched():
        join_processes()
    warnings.filterwarnings("ignore", message=".*use_reentrant.*")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: (told.set(), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    try:
        run, method = parse_config(sys.argv[1:])
        train(run, method, told.is_set)
    except (InputError, EngineMismatch) as error:
        last_words(f"error: {error}")
    except (RuntimeError, OSError) as error:  # what breaks at work: engine, grader, memory, disk; anything else is a bug
        out = Path(run.output_dir)
        reason = " ".join(str(error).split())
        if not isinstance(error, RunStopped):
            reason = f"{type(error).__name__}: {reason}, see {out}/traceback.txt"
            with contextlib.suppress(OSError):
                (out / "traceback.txt").write_text(traceback.format_exc())
        found = checkpoints(out)
        print(file=sys.stderr)  # below the progress bar
        last_words(f"stopped: {reason}; the same command {f'resumes from {found[-1]}' if found else 'starts the run again'}")
    if world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
