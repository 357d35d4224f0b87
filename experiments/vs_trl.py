"""Time of GRPO here and with TRL's GRPOTrainer: the same model, prompts, reward, loss and number of updates.

    pip install trl==1.16.0                     # which nothing else needs
    python experiments/vs_trl.py --threads 1
    python experiments/vs_trl.py --threads 2

Both sides train tiny/ in fp32: 16 problems x 6 responses of at most 128 tokens per batch, one scoring pass
and two updates of 48 sequences, clipped ratio, KL to a reference model, no gradient checkpointing. Where
TRL's defaults differ, TRL is set to what is done here: loss per token of the minibatch (`loss_type="bnpo"`,
all 48 sequences in one forward pass), no importance weight on the KL, a constant learning rate, problems in
our order. Smaller forward passes made TRL slower.

Each measurement is a process of its own. The first batch is not counted, so that start-up and what loads at
first use are not. The sides draw different responses, so the ratio is of seconds per 1,000 generated tokens.
`train` is all that is neither sampling nor grading: scoring, both models' forward passes, updates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import Problem
from eval import grade
from plumbing import logs
from plumbing.grader import Grader
from plumbing.models import load_tokenizer
from plumbing.problems import load_data, stream
from train import build, parse_config

UPDATES = 2  # per batch of 16 x 6 sequences
FLAGS = (
    "--algo grpo --engine torch --autocast none --drop_zero_advantage false --batch_size 16 --group_size 6 "
    "--minibatch_sequences 48 --max_response_tokens 128"
).split()


def result(clock: logs.Clock, seconds: float, tokens: int, sequences: int, updates: int) -> dict:
    """Of one side, after the batch that is not counted."""
    parts = {name: clock.seconds[f"time_{name}"] for name in ("generate", "grade")}
    counts = {"tokens": tokens, "sequences": sequences, "updates": updates}
    return counts | parts | {"train": seconds - sum(parts.values()), "seconds": seconds}


def ours(run, cfg, rows: list[dict], tokenizer) -> dict:
    trainer = build(run, cfg, tokenizer, None)
    clock, tokens, sequences, n_updates, started = logs.Clock(), 0, 0, 0, time.perf_counter()
    for i in range(0, len(rows), cfg.batch_size):
        new = [Problem(p["problem"], p["answers"], p["prompt_ids"]) for p in rows[i : i + cfg.batch_size]]
        due, updates = trainer.step(new, clock)
        tokens += logs.n_generated(new, due)
        sequences += len(logs.sampled(new, due))
        n_updates += len(updates)
        if i == 0:
            clock.seconds.clear()
            tokens, sequences, n_updates, started = 0, 0, 0, time.perf_counter()
    return result(clock, time.perf_counter() - started, tokens, sequences, n_updates)


def trls(run, cfg, rows: list[dict], tokenizer) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from plumbing.models import PROMPT

    torch.set_num_threads(run.threads)
    clock, counts, ends, grader = logs.Clock(), {"tokens": 0, "sequences": 0}, [], Grader(grade)

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            batch = rows[len(ends) // UPDATES * cfg.batch_size :][: cfg.batch_size]
            same = prompt_ids == [p["prompt_ids"] for p in batch for _ in range(cfg.group_size)]
            assert same, "TRL samples from other prompts"
            with clock("generate"):
                completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            counts["tokens"] += sum(map(len, completion_ids))
            counts["sequences"] += len(completion_ids)
            return completion_ids, logps

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):  # after an optimiser step
            ends.append(time.perf_counter())
            if len(ends) == UPDATES:
                clock.seconds.clear()
                counts.update(tokens=0, sequences=0)

    def reward(completions, answers, **kwargs) -> list[float]:
        with clock("grade"):
            return grader.grade([completion[0]["content"] for completion in completions], answers)

    prompt = lambda p: [{"role": "user", "content": PROMPT.format(problem=p["problem"])}]
    data = Dataset.from_list([{"prompt": prompt(p), "answers": p["answers"]} for p in rows])
    sequences = cfg.batch_size * cfg.group_size
    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            **dict(output_dir=out, report_to="none", save_strategy="no", logging_strategy="no"),
            **dict(use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=run.seed),
            **dict(per_device_train_batch_size=sequences // UPDATES, steps_per_generation=UPDATES),
            **dict(num_generations=cfg.group_size, num_train_epochs=1, shuffle_dataset=False),
            **dict(max_completion_length=cfg.max_response_tokens, temperature=cfg.temperature),
            **dict(loss_type="bnpo", epsilon=cfg.clip_low, epsilon_high=cfg.clip_high, beta=cfg.kl_coef),
            **dict(use_bias_correction_kl=False, max_grad_norm=cfg.grad_clip),
            **dict(learning_rate=run.lr, lr_scheduler_type="constant", weight_decay=run.weight_decay),
        )
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
        how = dict(args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Ends()])
        Timed(model, reward, **how).train()
    return result(clock, ends[-1] - ends[UPDATES - 1], **counts, updates=len(ends) - UPDATES)


def measure(side: str, seed: int, args: argparse.Namespace) -> dict:
    """The result of one side, from a process of its own."""
    flags = ["--side", side, "--seed", seed, "--threads", args.threads, "--batches", args.batches]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}  # everything is in tiny/
    command = [sys.executable, __file__, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: {side} failed: {(done.stderr.strip() or 'it says nothing').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, r: dict) -> str:
    """A side in a line, times in seconds per 1,000 generated tokens."""
    per_1000 = {k: 1000 * r[k] / r["tokens"] for k in ("seconds", "generate", "grade", "train")}
    counts = f"{r['tokens']:,} tokens, {r['sequences']} sequences, {r['updates']} updates"
    times = ", ".join(f"{k} {s:.3f}" for k, s in per_1000.items())
    return f"{name}: {counts} in {r['seconds']:.1f} s; per 1,000 tokens {times}"


def ratio(pairs: list[tuple[dict, dict]], part: str) -> str:
    """TRL's seconds per token over ours: above 1, TRL is slower."""
    found = [(b[part] / b["tokens"]) / (a[part] / a["tokens"]) for a, b in pairs]
    return f"{part} {median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=6, help="that count; one more comes before them")
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the next one has the next")
    parser.add_argument("--side", choices=["ours", "trl"], help="only measure this one, in this process")
    args = parser.parse_args()
    if min(args.threads, args.pairs, args.batches) < 1:
        parser.error("--threads, --pairs and --batches must be at least 1")
    try:
        import trl
    except ImportError:
        sys.exit("error: this needs TRL, which is not installed: pip install trl==1.16.0")

    if args.side:
        run, cfg = parse_config([*FLAGS, "--threads", str(args.threads), "--seed", str(args.seed)])
        tokenizer = load_tokenizer(run.model)
        problems, _ = load_data(run, cfg, tokenizer)
        rows = stream(problems, run.seed, 0, (args.batches + 1) * cfg.batch_size)
        return print(json.dumps({"ours": ours, "trl": trls}[args.side](run, cfg, rows, tokenizer)))
    pairs = []
    print(f"TRL {trl.__version__}, {args.threads} threads, {args.batches} batches")
    for seed in range(args.seed, args.seed + args.pairs):
        sides = ["ours", "trl"][:: -1 if seed % 2 else 1]  # in turns, as the machine may slow down
        measured = {side: measure(side, seed, args) for side in sides}
        pairs.append((measured["ours"], measured["trl"]))
        print(row("ours", pairs[-1][0]), row("TRL", pairs[-1][1]), sep="\n", flush=True)
        if any(pairs[-1][0][k] != pairs[-1][1][k] for k in ("sequences", "updates")):
            sys.exit("error: the sides did not sample or update equally often, so times say nothing")
    parts = ", ".join(ratio(pairs, part) for part in ("seconds", "generate", "train"))
    print(f"TRL / ours, median of {len(pairs)} pairs, per token: {parts}")


if __name__ == "__main__":
    main()
