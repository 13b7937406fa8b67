"""Kills, stops and starves runs of random recipes at random and at every file operation; each is resumed and compared.

    TMPDIR=/dev/shm python -m tests.crash.soak --minutes 10

Damages caches, checkpoints and the files that commands read as well. Prints each deviation as it occurs, and a table
after every 20 trials. README.md in this folder holds the last ones.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.crash import damage, harness
from tests.crash.harness import YEAR, Child, Faults, copy, deviations, ended, outcome, prepare, ranks, torchrun, works

LENGTH = ({}, {"trainer.max_steps": -1, "trainer.max_epochs": 2, "val_every": None})
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"data.init_args.workers": 1},
    {"trainer.accumulate_grad_batches": 2},
    {"data.init_args.validation": None, "checkpoint.monitor": None, "val_every": None},
    {"checkpoint.monitor": None, "checkpoint.keep": 2},
    {"checkpoint.asynchronous": True},
    {"trainer.callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.5}}]},
    {"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "max"}}]},
    {"model.init_args.lora": {"r": 2}, "export.merge": True},
)
RESUME = ("fit", "--config", "r.yaml", "--resume", "auto")


class Recipe:
    """A recipe, a folder with warm caches to copy for each trial, and what its uninterrupted run leaves."""

    def __init__(self, root: Path, number: int, rng: random.Random) -> None:
        self.world = root / "world"
        self.folder = root / f"recipe-{number}"
        self.kind = rng.choice([*harness.KINDS])
        self.changes = rng.choice(VARIANTS) | rng.choice(LENGTH) | {"report": rng.random() < 0.1}
        prepare(self.folder, self.kind, self.changes)
        whole = copy(self.folder, root / f"whole-{number}")
        faults = Faults(whole)
        begin = time.monotonic()
        self.text = works(whole, *RESUME, faults=faults)
        self.seconds = time.monotonic() - begin
        self.operations = len(json.loads((whole / "operations.json").read_text()))
        self.expected = outcome(whole / "runs" / "r")
        self._of_two_ranks: tuple[dict[str, Any], float] | None = None
        if rng.random() < 0.5 and (whole / "cache").exists():  # else each trial fills the caches
            shutil.copytree(whole / "cache", self.folder / "cache")

    def of_two_ranks(self) -> tuple[dict[str, Any], float]:
        """What an uninterrupted run on two processes leaves, and how many seconds it takes."""
        if self._of_two_ranks is None:
            whole = self.folder.with_name(f"{self.folder.name}-two")
            shutil.rmtree(whole, ignore_errors=True)  # of a run that did not end in time on a busy machine
            copy(self.folder, whole)
            begin = time.monotonic()
            torchrun(whole, *RESUME)
            self._of_two_ranks = outcome(whole / "runs" / "r"), time.monotonic() - begin
        return self._of_two_ranks


def kill_at_operation(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Kills at one file operation."""
    Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations))).wait()
    return finish(recipe, folder)


def kill_often(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Kills at one file operation, and up to eight resumed runs, most of them at one of their first."""
    for last in (recipe.operations, *rng.choices([40, 40, recipe.operations // 2], k=rng.randrange(1, 9))):
        Child(folder, *RESUME, faults=Faults(folder, rng.randrange(last))).wait()
    return finish(recipe, folder)


def kill_at_random(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Kills the process group at a random moment."""
    child = Child(folder, *RESUME)
    time.sleep(rng.random() * recipe.seconds)
    child.kill(signal.SIGKILL)
    child.wait()
    return finish(recipe, folder)


def stop(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """SIGTERM to the process group, loader workers included, once the run has begun."""
    child = Child(folder, *RESUME)
    child.wait_until((folder / "runs" / "r" / "metrics.csv").exists, ends=True)
    time.sleep(rng.random() * recipe.seconds * 0.4)
    child.kill(signal.SIGTERM)
    code = child.wait()
    wrong = [] if code in (0, 143) else [f"exit code {code}: {child.text[-600:]}"]
    return wrong + finish(recipe, folder)


def full_disk(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """One file operation fails because the disk is full or was mounted read-only."""
    number = rng.choice([errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    error = OSError(number, os.strerror(number))
    child = Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations), error=error))
    code = child.wait()
    wrong = [] if code in (0, 2) else [f"exit code {code}: {child.text[-600:]}"]
    if "Traceback" in child.text:
        wrong.append(f"traceback: {child.text[-600:]}")
    return wrong + finish(recipe, folder)


def two_at_once(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """After a kill, two processes resume the run at the same time: one does, the other is refused or comes too late."""
    Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations // 2, recipe.operations))).wait()
    if not (folder / "runs" / "r").exists():
        return finish(recipe, folder)
    first = Child(folder, *RESUME)
    time.sleep(rng.random() * 0.5)
    second = Child(folder, *RESUME)
    codes = sorted((first.wait(), second.wait()))
    wrong = [] if codes in ([0, 2], [0, 0]) else [f"exit codes {codes}: {second.text[-600:]}"]
    return wrong + finish(recipe, folder)


def moved(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """After a kill, the run folder is moved and renamed, and resumed from another directory."""
    Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations // 2, recipe.operations))).wait()
    run = folder / "runs" / "r"
    if not run.exists():
        return finish(recipe, folder)
    (folder / "elsewhere").mkdir()
    run.rename(folder / "elsewhere" / "other")
    child = Child(folder, "fit", "--resume", "elsewhere/other")
    code = child.wait()
    finished = code == 2 and "is finished" in child.text
    wrong = [] if code == 0 or finished else [f"exit code {code}: {child.text[-600:]}"]
    expected = {name: value for name, value in recipe.expected.items() if name != "config"}
    return wrong + deviations(folder / "elsewhere" / "other", expected)


def clock_jumps(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """The wall clock jumps while a run is killed and resumed, and its files have times of the past and the future."""
    faults = Faults(folder, rng.randrange(recipe.operations), clock=rng.randrange(1 << 30))
    Child(folder, *RESUME, faults=faults).wait()
    for path in sorted(folder / name for name in ("runs", "cache")):
        for inner in sorted(path.rglob("*")):
            if rng.random() < 0.5:
                at = time.time() + rng.uniform(-YEAR, YEAR)
                os.utime(inner, (at, at))
    return finish(recipe, folder, Faults(folder, clock=rng.randrange(1 << 30)))


def two_ranks(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Kills one or both of two processes at a random moment, or stops both; they resume together."""
    expected, seconds = recipe.of_two_ranks()
    children = ranks(folder, *RESUME)
    time.sleep(rng.random() * seconds)
    how = rng.choice(["one", "both", "stop"])
    chosen = children if how != "one" else [rng.choice(children)]
    for child in chosen:
        child.kill(signal.SIGTERM if how == "stop" else signal.SIGKILL)
    codes = ended(children)
    # SIGTERM or SIGKILL of a rank that is left alone while it starts, and waits for the other, come from the launcher
    expected_codes = {"one": {-9, -15, 0, 2, 143}, "both": {-9, 0}, "stop": {0, 143, -15}}[how]
    wrong = [] if {*codes} <= expected_codes else [f"{how}: exit codes {codes}: {children[0].text[-400:]}"]
    wrong += [f"{how}: traceback" for child in children if "Traceback" in child.text]
    children = ranks(folder, *RESUME)
    codes = ended(children)
    wrong += [] if codes == [0, 0] else [f"{how}: resume: exit codes {codes}: {children[0].text[-600:]}"]
    return wrong + deviations(folder / "runs" / "r", expected)


def finish(recipe: Recipe, folder: Path, faults: Faults | None = None) -> list[str]:
    """Resumes until the run is finished; returns its differences from the uninterrupted run."""
    child = Child(folder, *RESUME, faults=faults)
    code = child.wait()
    wrong = [] if code == 0 else [f"resume: exit code {code}: {child.text[-600:]}"]
    if "Traceback" in child.text:
        wrong.append("resume: traceback")
    return wrong + deviations(folder / "runs" / "r", recipe.expected)


def damaged_cache(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Damages one or two files of the caches that a killed run has filled; the resumed run writes them again."""
    Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations))).wait()
    files = [path for path in sorted((folder / "cache").rglob("*")) if path.is_file()]
    for file in rng.sample(files, min(len(files), rng.choice([1, 1, 2]))):
        file.write_bytes(damaged(file, rng))
    return finish(recipe, folder)


def damaged_checkpoint(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Damages the newest checkpoint of a killed run, which is resumed from an older one, or from the start."""
    Child(folder, *RESUME, faults=Faults(folder, rng.randrange(recipe.operations // 2, recipe.operations - 1))).wait()
    directory = folder / "runs" / "r" / "checkpoints"
    if (newest := max(directory.glob("step-*.ckpt"), default=None)) and not is_finished(directory.parent):
        newest.write_bytes(damaged(newest, rng))
    child = Child(folder, *RESUME)
    if child.wait() == 2 and "all checkpoints in" in child.text:
        for checkpoint in directory.glob("step-*.ckpt"):
            checkpoint.unlink()
        child = Child(folder, *RESUME)
    code = child.wait()
    for aside in directory.glob("*.damaged"):
        aside.unlink()
    wrong = [] if code == 0 else [f"exit code {code}: {child.text[-600:]}"]
    return wrong + deviations(folder / "runs" / "r", recipe.expected)


def is_finished(run: Path) -> bool:
    """Whether nothing is left to do, so that a resume reads no checkpoint."""
    return json.loads((run / "run.json").read_text())["status"] == "finished"


def damaged(file: Path, rng: random.Random) -> bytes:
    """The content of a file with damage of a random kind."""
    content = file.read_bytes()
    return rng.choice([*damage.of_bytes(content, rng, 3)])[1] if content else b"\0"


def damaged_input(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Damages a file that a command reads."""
    case = rng.choice([*damage.CASES])
    what, content = rng.choice([*damage.damages(recipe.world / case.partition("#")[0], rng, 3)])
    return of_damage(recipe, folder, case, what, content)


def hostile_folder(recipe: Recipe, folder: Path, rng: random.Random) -> list[str]:
    """Puts a link, a pipe, a folder or code in the place of a file."""
    case = rng.choice([*damage.CASES])
    what, content = rng.choice([*damage.hostile(Path(case))])
    return of_damage(recipe, folder, case, what, content)


def of_damage(recipe: Recipe, folder: Path, case: str, what: str, content: Any) -> list[str]:
    """Runs the command of a case, in a folder of its own."""
    result, text = damage.trial(recipe.world, folder, case, content)
    return [] if result in ("success", "refused") else [f"{case}: {what!a}: {result}: {text[-1500:]!a}"]


TRIALS: tuple[Callable[[Recipe, Path, random.Random], list[str]], ...] = (
    *(kill_at_operation, *(kill_often,) * 4, kill_at_random, kill_at_random, stop, full_disk),
    *(two_at_once, moved, clock_jumps, two_ranks),
    *(damaged_cache, damaged_checkpoint, *(damaged_input,) * 12, *(hostile_folder,) * 4),
)
"""Those that are named more often are cheaper."""
PER_RECIPE = 30
SHOWN = 20
"""Trials from one table to the next."""


class Table:
    """Counts of trials, kills and deviations by kind."""

    def __init__(self) -> None:
        self.trials, self.kills, self.failed = Counter[str](), Counter[str](), Counter[str]()

    def __str__(self) -> str:
        rows = [
            f"| {name} | {n} | {self.kills[name]} | {self.failed[name]} |" for name, n in sorted(self.trials.items())
        ]
        total = f"| all | {self.trials.total()} | {self.kills.total()} | {self.failed.total()} |"
        return "\n".join(["| trial | trials | kills | deviations |", "|---|---:|---:|---:|", *rows, total])


def soak(minutes: float, seed: int, only: str | None = None) -> Table:
    """Runs trials for so many minutes."""
    rng, end, table = random.Random(seed), time.monotonic() + 60 * minutes, Table()
    torch.set_num_threads(1)
    harness.LIMIT = 60.0
    with tempfile.TemporaryDirectory() as temporary:
        root, number = Path(temporary), 0
        damage.world(root / "world")
        while time.monotonic() < end:
            recipe = Recipe(root, number, rng)
            number += 1
            for _ in range(PER_RECIPE):
                if time.monotonic() > end:
                    break
                trial = rng.choice([t for t in TRIALS if only in (None, t.__name__)])
                one(trial, recipe, copy(recipe.folder, root / "trial"), rng, table)
                if table.trials.total() % SHOWN == 0:
                    print(table, flush=True)
    return table


def one(trial: Callable[..., list[str]], recipe: Recipe, folder: Path, rng: random.Random, table: Table) -> None:
    """Runs a trial, counts it, and prints and keeps it if it deviates."""
    name, kills = trial.__name__, harness.codes[-signal.SIGKILL]
    try:
        wrong = trial(recipe, folder, rng)
    except TimeoutError as error:
        wrong = [f"hang: {error}"]
    table.trials[name] += 1
    table.kills[name] += harness.codes[-signal.SIGKILL] - kills
    if wrong:
        table.failed[name] += 1
        kept = Path(tempfile.mkdtemp(prefix="oumi_pl-soak-", dir="/tmp"))
        shutil.copytree(folder, kept / "trial", symlinks=True)
        print(f"{name} {recipe.kind} {recipe.changes}: {wrong} ({kept})", flush=True)
    shutil.rmtree(folder)


def main() -> int:
    """Parses the command line, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted({trial.__name__ for trial in TRIALS}))
    options = parser.parse_args()
    table = soak(options.minutes, options.seed, options.only)
    print(table)
    return int(table.failed.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
