"""Build the embedded reasoner: its world, tokenizer, problems and warm-started weights.

    python tiny/make.py            # rebuilds everything in this folder from one seed
    python tiny/make.py --base tiny --out few --n_train 64                 # problems alone: few of the same
    python tiny/make.py --base tiny --out hard --n_train 1000 --n_test 400 --hardest 0.15    # and hard ones

**The world.** A problem is a chain of variables modulo 7, `a=3, b=a+2, c=b*4, …, find k.` and a
solution computes one variable per step. Three kinds of step, mixed, as in natural chains of thought:

- *pivotal*: a multiplication, `c=b*4: 5*4 so c=6`. Later steps, at least `MIN_DISTANCE` variables away,
  copy its result, so an error here spreads. The teacher errs here and nowhere else;
- *local*: an addition of a constant, `d=c+2`, or of a pivotal variable, `h=g+c` (the distant copy);
- *filler*: two to six freely chosen words. They carry the highest entropy and change nothing.

**The teacher** is imperfect: a third of the 30 multiplication facts are usually wrong, mostly by one
fixed wrong result, so greedy decoding is wrong too and reinforcement learning has facts to change, not
just a temperature to lower. Now and then a `wait` step corrects the error. Problems that touch none of
those facts are solved always, those that touch one sometimes, those that touch three hardly ever.

**The tokenizer** is word-level with long words (a token for each label pair, operation, operand pair and
labelled result), so that a step has four tokens and the model learns to copy within minutes.
"""

import argparse
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

MOD = 7
LABELS = "abcdefghijklm"
MIN_STEPS, MAX_STEPS = 9, 12  # computed variables a problem
MIN_DISTANCE = 4  # variables between a pivotal step and the steps that copy it
N_TRAIN, N_TEST = 4000, 1000  # problems
P_FILLER = 0.45  # probability that a filler step precedes a computed one
P_WAIT = 0.1  # probability that the teacher notices a wrong result
P_FACT_WRONG = 1 / 3  # share of bad facts
P_RIGHT, P_FIXED = 0.2, 0.65  # how often a bad fact still comes out right, or as its fixed error
WORDS = "hm ok now then next let us see we go on keep the rest in mind carefully slowly note well fine good"
WORDS = (WORDS + " here so far").split()
# As in the paper's prompt.
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass
class Problem:
    start: int  # value of a
    ops: list[
        tuple[str, int | str]
    ]  # per computed variable: ("*", k), ("+", k) or ("+", label of a pivotal variable)

    @property
    def text(self) -> str:
        defs = [f"{LABELS[i + 1]}={LABELS[i]}{op}{x}" for i, (op, x) in enumerate(self.ops)]
        return ", ".join([f"a={self.start}", *defs]) + f", find {LABELS[len(self.ops)]}."

    def values(self) -> dict[str, int]:
        values = {"a": self.start}
        for i, (op, x) in enumerate(self.ops):
            operand = values[x] if isinstance(x, str) else x
            values[LABELS[i + 1]] = apply(values[LABELS[i]], op, operand)
        return values


def apply(v: int, op: str, operand: int) -> int:
    return (v * operand if op == "*" else v + operand) % MOD


def make_problem(rng: random.Random) -> Problem:
    while True:
        n = rng.randint(MIN_STEPS, MAX_STEPS)
        pivots = sorted(rng.sample(range(1, n - MIN_DISTANCE), 3))  # never the first computed step
        ops, used = [], set()
        for i in range(n):
            reachable = [p for p in pivots if i - p >= MIN_DISTANCE]
            if i in pivots:
                ops.append(("*", rng.randint(2, MOD - 1)))
            elif reachable and rng.random() < 0.75:
                pivot = rng.choice(reachable)
                used.add(pivot)
                ops.append(("+", LABELS[pivot + 1]))
            else:
                ops.append(("+", rng.randint(1, MOD - 1)))
        problem = Problem(rng.randint(1, MOD - 1), ops)
        values = list(problem.values().values())
        if used == set(pivots) and all(
            values[p] for p in pivots
        ):  # every pivot is copied; nothing is multiplied by 0
            return problem


class Teacher:
    """Writes worked solutions; knows some multiplication facts wrongly."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        facts = [(v, k) for v in range(1, MOD) for k in range(2, MOD)]
        bad = rng.sample(facts, round(P_FACT_WRONG * len(facts)))
        self.wrong = {(v, k): rng.choice([r for r in range(MOD) if r != v * k % MOD]) for v, k in bad}

    def facts_wrong(self, problem: Problem) -> list[tuple[int, int]]:
        """The problem's multiplications, value and factor, that the teacher has wrong."""
        values = problem.values()
        facts = [(values[LABELS[i]], x) for i, (op, x) in enumerate(problem.ops) if op == "*"]
        return [fact for fact in facts if fact in self.wrong]

    def product(self, v: int, k: int, rng: random.Random) -> int:
        u = rng.random()
        if (v, k) not in self.wrong or u < P_RIGHT:
            return v * k % MOD
        return self.wrong[v, k] if u < P_RIGHT + P_FIXED else rng.randrange(MOD)

    def solve(self, problem: Problem, rng: random.Random, filler: bool = True) -> str:
        values, steps = {"a": problem.start}, []
        for i, (op, x) in enumerate(problem.ops):
            if filler and rng.random() < P_FILLER:
                steps.append("".join(f" {rng.choice(WORDS)}" for _ in range(rng.randint(2, 6))))
            source, target = LABELS[i], LABELS[i + 1]
            v, operand = values[source], values[x] if isinstance(x, str) else x
            right = apply(v, op, operand)
            result = self.product(v, operand, rng) if op == "*" else right
            steps.append(f"{target}={source}{op}{x}: {v}{op}{operand} so {target}={result}")
            if result != right and rng.random() < P_WAIT:
                result = right
                steps.append(f" wait so {target}={result}")
            values[target] = result
        return "\n\n".join([*steps, "</think>", f"\\boxed{{{result}}}"])


def step_kind(step: str) -> str:
    """pivotal | local | filler | wait | answer, read off the text of a step."""
    if "boxed" in step or "</think>" in step:
        return "answer"
    if "wait" in step:
        return "wait"
    if "=" not in step:
        return "filler"
    return "pivotal" if "*" in step else "local"


def vocabulary() -> list[str]:
    digits = range(MOD)
    results = [f"{x}={v}" for x in LABELS for v in digits]
    return [
        "<pad>",
        "<unk>",
        "<bos>",
        "<eos>",
        "<user>",
        "<assistant>",
        "<think>",
        "</think>",
        INSTRUCTION,
        "\n\n",
        "\n",
        " ",
        ", ",
        ", find ",
        ".",
        *(f"a={v}" for v in digits),
        *(f"{y}={x}" for x, y in zip(LABELS, LABELS[1:])),
        *(f"*{k}" for k in range(2, MOD)),
        *(f"+{k}" for k in digits),
        *(f"+{x}" for x in LABELS),
        *LABELS,
        *(f": {v}{op}{k}" for v in digits for op in "+*" for k in digits),
        *(f" so {r}\n\n" for r in results),
        " wait",
        *dict.fromkeys(f" {w}" for w in WORDS),
        *(f"\\boxed{{{v}}}" for v in digits),
    ]


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys(vocabulary()))
    longest_first = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def make_model(tokenizer, seed: int):
    """A random Llama. Heads are 32 wide, the least that vLLM's kernels take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.08,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prompt_text(tokenizer, problem: Problem) -> str:
    content = f"{problem.text} {INSTRUCTION}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def warm_start(
    model, tokenizer, seed: int, updates: int = 1500, plain: float = 0.2, lr: float = 3e-3, batch: int = 32
):
    """Supervised learning on the teacher's solutions, for the share `plain` of the updates without filler
    steps."""
    rng, teacher = random.Random(seed), Teacher(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates, pct_start=0.05)
    started, pool = time.time(), []
    for step in range(updates):
        if not pool:  # sixteen batches at a time, each of similar lengths
            filler = step >= plain * updates
            examples = []
            for _ in range(16 * batch):
                problem = make_problem(rng)
                prompt = tokenizer(prompt_text(tokenizer, problem), add_special_tokens=False).input_ids
                solution = tokenizer(
                    teacher.solve(problem, rng, filler) + "<eos>", add_special_tokens=False
                ).input_ids
                examples.append((prompt, solution))
            examples.sort(key=lambda e: len(e[0]) + len(e[1]))
            pool = [examples[i : i + batch] for i in range(0, len(examples), batch)]
            rng.shuffle(pool)
        chunk = pool.pop()
        longest = max(len(p) + len(s) for p, s in chunk)
        ids = torch.full((batch, longest), tokenizer.pad_token_id)
        labels = torch.full((batch, longest), -100)
        for row, (prompt, solution) in enumerate(chunk):
            end = len(prompt) + len(solution)
            ids[row, :end] = torch.tensor(prompt + solution)
            labels[row, len(prompt) : end] = torch.tensor(solution)
        loss = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == updates:
            print(
                f"update {step + 1:5d}/{updates}  loss {loss.item():.3f}  {time.time() - started:5.0f} s",
                flush=True,
            )


def fresh_problems(rng: random.Random, count: int, wanted=lambda problem: True) -> dict[str, str]:
    """Answers of `count` problems by their texts."""
    found = {}
    while len(found) < count:
        problem = make_problem(rng)
        if wanted(problem):
            found[problem.text] = str(list(problem.values().values())[-1])
    return found


def hard_problems(count: int, base: Path, below: float, samples: int, seed: int) -> dict[str, str]:
    """`count` problems of which the model in `base` solves less than a share `below` of so many samples.

    Only problems with at least two of the facts that its teacher has wrong are sampled, at temperature 1:
    of tiny's, about one in ten problems that would pass has fewer.
    """
    sys.path.insert(0, str(ROOT))
    from eval import evaluate
    from plumbing.models import load_model, load_tokenizer
    from plumbing.torch_engine import TorchEngine

    tokenizer, teacher, rng = load_tokenizer(str(base)), Teacher(seed), random.Random(seed + 1)
    engine, kept = TorchEngine(load_model(str(base)), tokenizer), {}
    how = dict(samples=samples, temperature=1.0, budget=lambda n_prompt: 128)
    wanted = lambda problem: problem.text not in kept and len(teacher.facts_wrong(problem)) >= 2
    torch.manual_seed(seed)
    while len(kept) < count:
        new = fresh_problems(rng, count - len(kept), wanted)
        rows = [{"problem": text, "answers": [answer]} for text, answer in new.items()]
        solved = evaluate(engine, tokenizer, rows, **how)["per_problem"]
        kept |= {text: answer for (text, answer), share in zip(new.items(), solved) if share < below}
        print(f"{len(kept)} of {count} problems", flush=True)
    return kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="write problems alone, for the model in this folder")
    parser.add_argument("--n_train", type=int, default=N_TRAIN, help="training problems")
    parser.add_argument("--n_test", type=int, default=N_TEST, help="held-out problems")
    which = "with --base: only problems that it solves in less than this share of the samples"
    parser.add_argument("--hardest", type=float, help=which)
    parser.add_argument("--samples", type=int, default=32, help="of each problem, for --hardest")
    args = parser.parse_args()
    if args.hardest and not args.base:
        parser.error("--hardest needs --base, the model that finds them hard")

    torch.set_num_threads(1)  # the same sums in the same order on every machine
    args.out.mkdir(parents=True, exist_ok=True)
    if args.hardest:
        count = args.n_train + args.n_test
        problems = hard_problems(count, args.base, args.hardest, args.samples, args.seed)
    else:  # fewer training problems are the first of them, and the held-out ones stay
        problems = fresh_problems(random.Random(args.seed + 1), max(args.n_train, N_TRAIN) + args.n_test)
    rows = [json.dumps({"problem": text, "answer": answer}) for text, answer in problems.items()]
    (args.out / "train.jsonl").write_text("\n".join(rows[: args.n_train]) + "\n")
    (args.out / "test.jsonl").write_text("\n".join(rows[-args.n_test :]) + "\n")
    if args.base:
        return print(f"wrote train.jsonl and test.jsonl to {args.out}")

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    warm_start(model, tokenizer, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}; `python eval.py --model {args.out}` says what it solves")


if __name__ == "__main__":
    main()
