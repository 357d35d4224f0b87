"""A run's directory: its settings, checkpoints that are complete or not there, and going on from one."""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.memory_plan import shape_of
from plumbing.processes import on_rank_0, rank, union, world_size
from plumbing.settings import InputError, RunStopped, refuse_if

ROOT = Path(__file__).resolve().parent.parent
HELD = contextlib.ExitStack()  # locks of the directories that this process has opened


@contextlib.contextmanager
def closing_directories():
    """Releases the directories that were opened, at the end, for the next run in them."""
    with HELD:
        yield


def open_directory(out: Path, name: str, settings: dict, what: str, may_change: Collection[str] = ()) -> None:
    """Make the directory with the settings in file `name`, or check that it holds this run or evaluation.

    Keeps other processes out until this one ends, or `closing_directories` does. Raises InputError where it
    is in use, cannot be written to, or holds one with other settings, apart from those in `may_change`."""
    path, remedy = out / name, "choose another --output_dir"
    try:
        out.mkdir(parents=True, exist_ok=True)
        HELD.enter_context(FileLock(out / "lock", blocking=False))
        before = json.loads(path.read_text()) if path.exists() else settings
        changed = [key for key in settings if before.get(key) != settings[key] and key not in may_change]
        if not changed:  # in any case, since it shows that there is a place to write to
            write_whole(path, json.dumps(before | settings, indent=2))
    except Timeout:
        raise InputError(f"{out} is in use by another {what}: wait for it, or {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use {out} for the {what} ({error}): mend that, or {remedy}") from None
    shown = [f"{key} ({before.get(key)} -> {settings[key]})" for key in changed]
    if shown:
        found = f"{'an' if what[0] in 'aeiou' else 'a'} {what} with other settings, {', '.join(shown)}"
        raise InputError(f"{out} holds {found}: use them, or another --output_dir")


def prepare(out: Path, config: dict, may_change: Collection[str]) -> tuple[Path | None, dict]:
    """Make a run's directory, or find where to go on: (checkpoint, its state) or (None, {}). Writes
    source.json, and cuts logs off at the checkpoint. Raises InputError."""
    open_directory(out, "config.json", config, "run", may_change)
    found = checkpoints(out)
    state = read_state(found[-1]) if found else {}
    check_source(out / "source.json", config["same_run"], state.get("step", 0))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        cut_log(out / name, state.get("log_lines", {}).get(name, 0))
    return (found[-1] if found else None), state


def check_source(path: Path, same_run: bool, step: int) -> None:
    """Record in `path` which sources run from `step` on. InputError if some changed, unless `same_run`."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")])
    now = {file.relative_to(ROOT).as_posix(): digest(file) for file in files}
    entry = {"from_step": step, "files": now} | provenance()
    history = json.loads(path.read_text()) if path.exists() else [entry | {"from_step": 0}]
    before = history[-1]["files"]
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed and not same_run:
        remedy = "choose another --output_dir for the new code, or pass --same_run true to go on"
        raise InputError(f"{', '.join(changed)} changed since the run in {path.parent} began: {remedy}")
    if changed:
        history.append(entry)
    write_whole(path, json.dumps(history, indent=1))


def provenance() -> dict[str, str]:
    """The commit, with -dirty where files differ from it, and the machine. No commit without git."""
    git, commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.platform()
    return {"commit": commit, "machine": f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"}


def check_room(out: Path, run) -> None:
    """Raises ValueError unless the disk holds the checkpoints that will exist at once. run: RunConfig."""
    size = 12 * shape_of(run.model).parameters  # bytes: fp32 weights and two moments of AdamW
    # The oldest is deleted only after the new one is there.
    at_once = min(run.keep_checkpoints + 1, math.ceil(run.steps / run.save_every))
    needed, free = (at_once - len(checkpoints(out))) * size, shutil.disk_usage(out).free
    sizes = f"{needed / 1e9:.3g} GB for checkpoints and has {free / 1e9:.3g} GB"
    remedy = "make room, lower --keep_checkpoints, or choose another --output_dir"
    refuse_if(free < needed, f"{out} needs {sizes}: {remedy}")


def save_or_stop(out: Path, step: int, *what) -> None:
    """`save_checkpoint`; where that fails, the half-written one is removed, and RunStopped says why."""
    try:
        save_checkpoint(out, step, *what)
    except Exception as error:  # the file system, safetensors and torch.save each have their own kind
        shutil.rmtree(out / "checkpoint.partial", ignore_errors=True)
        reason = " ".join(str(error).split())
        raise RunStopped(f"cannot write checkpoint-{step} ({reason}): make room in {out}") from error


def save_checkpoint(out: Path, step: int, learner, tokenizer, state: dict, keep: int) -> None:
    """Write checkpoint-STEP aside, then rename it: under its final name a checkpoint is complete. Sharded
    tensors are saved whole. state: plain JSON, all but weights, optimiser and random state. Older
    checkpoints than the newest `keep` are deleted."""
    weights, optimizer = on_rank_0(learner.model.state_dict()), learner.optimizer.state_dict()
    optimizer["state"] = {i: on_rank_0(moments) for i, moments in optimizer["state"].items()}
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    rngs = union({rank(): rng})  # every process has drawn its own samples
    if rank() > 0:
        return
    aside, final = out / "checkpoint.partial", out / f"checkpoint-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    learner.model.save_pretrained(aside, state_dict=weights)
    tokenizer.save_pretrained(aside)
    saved = {"optimizer": optimizer, "rng": rngs, "layout": layout(learner)}
    torch.save(saved, aside / "optimizer.pt")
    state = state | {"step": step, "skipped_in_a_row": learner.skipped_in_a_row}
    (aside / "state.json").write_text(json.dumps(state))
    (aside / "digests.json").write_text(json.dumps({p.name: digest(p) for p in aside.iterdir()}))
    for path in (*aside.iterdir(), aside):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(out)  # only now the rename survives a power cut, and older checkpoints may go
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def layout(learner) -> str:
    """How processes share the sampling, and so which of them draw the same random numbers."""
    return f"{world_size()} processes, {learner.machine.tensor_parallel} per engine"


def write_whole(path: Path, text: str) -> None:
    """Write a file aside, then rename it: it is there with all of the text, or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    aside.rename(path)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def append(path: Path, *records: dict) -> None:
    """Add lines of JSON to a file, and force them onto the disk: a checkpoint counts on them."""
    with path.open("a", encoding="ascii") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file, if it is there, except a last one that is torn or just being written."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json, once every file is known to be as it was written. Raises InputError: a
    damaged checkpoint is reported, not silently replaced by the one before."""
    try:
        name = "digests.json"
        digests = json.loads((checkpoint / name).read_text())
        for name, expected in digests.items():
            refuse_if(digest(checkpoint / name) != expected, "it is not what digests.json says was written")
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        remedy = "delete it to resume from the one before, or the whole run to start again"
        raise InputError(f"{checkpoint} is damaged ({name}: {error}): {remedy}") from None


def cut_log(path: Path, n_lines: int) -> None:
    """Drop what follows the first n_lines of a file: written after a checkpoint, be it whole lines or not."""
    if path.exists():
        os.truncate(path, sum(map(len, whole_lines(path)[:n_lines])))


def restore(learner, checkpoint: Path, state: dict) -> None:
    """Optimiser and random state; the weights come with the model, and `verify_sync` pushes them."""
    shared = world_size() > 1  # the processes of a node map the file once
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, mmap=shared)
    for i, parameter in enumerate(learner.model.parameters()):
        if isinstance(parameter, DTensor):
            moments, placed = saved["optimizer"]["state"].get(i, {}), parameter.placements
            for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
                whole, mesh = moments[name], parameter.device_mesh
                moments[name] = distribute_tensor(whole, mesh, placed, src_data_rank=None)
    learner.optimizer.load_state_dict(saved["optimizer"])
    learner.skipped_in_a_row = state["skipped_in_a_row"]
    if saved["layout"] != layout(learner):
        found = f"was written by {saved['layout']}, and there are {layout(learner)}"
        print(f"{checkpoint} {found}: sampling goes on with new seeds")
        torch.manual_seed(torch.initial_seed() + 1000 * state["step"])
        return
    rng = saved["rng"][rank()]
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
