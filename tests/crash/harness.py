"""Runs command lines in forked processes that are killed at a chosen file operation, and compares what runs leave.

A server process has imported everything once, so a run costs what its training costs.
"""

import atexit
import builtins
import contextlib
import csv
import faulthandler
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from oumi_pl.__main__ import main
from oumi_pl.models.export import read_checkpoint
from tests.conftest import free_port
from tests.tiny import LLAMA, conversations, feedback, pairs, write_jsonl

CHANGING = (
    *("train/tokens_per_second", "train/rows_per_second", "train/peak_memory_gb", "train/mfu"),
    *("train/seconds/generating", "train/seconds/rewarding", "train/seconds/training"),
)
"""Columns of `metrics.csv` that differ between two runs of the same recipe."""
CHANGING_CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "link", "symlink", "truncate", "utime")
"""Functions of `os` that change files; `open` for writing is counted as well."""
KINDS = {
    "SFT": ("SFTData", conversations),
    "DPO": ("DPOData", pairs),
    "KTO": ("KTOData", feedback),
    "Reward": ("RewardData", pairs),
    "GRPO": ("RolloutData", conversations),
    "Pretrain": ("PretrainData", lambda n, seed=0: [{"text": str(row)} for row in conversations(n, seed)]),
}
"""Trainer type -> its data module, and a function that makes rows for it."""
FURTHER = {
    "GRPO": {
        "reward": "own_rollouts.letters",
        "engine": {"class_path": "own_rollouts.Killed"},
        "completions": 3,
        "sampling": {"max_new_tokens": 6},
        "steps_per_rollout": 3,
        "prompts_per_call": 1,
    }
}
"""Further arguments of data modules."""
ROLLOUTS = """
import os
import signal

from oumi_pl.rollouts.sampling import Generate

def letters(completion, row):
    return sum(ord(letter) % 7 for letter in completion) / 10

class Killed(Generate):
    calls = 0

    def sample(self, *args, **kwargs):
        Killed.calls += 1
        if str(Killed.calls) == os.environ.get("KILL_IN_CALL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(*args, **kwargs)
"""
"""An engine that kills the process when it is called, and a reward that differs from one completion to the next."""


def recipe(kind: str = "SFT", changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe of 5 updates with dropout, two validations, two checkpoints, samples and an export."""
    tree: dict[str, Any] = {
        "seed_everything": 1,
        "model": {
            "class_path": kind,
            "init_args": {
                "config": LLAMA | {"num_hidden_layers": 1, "attention_dropout": 0.1},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
            },
        },
        "data": {
            "class_path": KINDS[kind][0],
            "init_args": {
                "train": "rows.jsonl",
                "validation": "held-out.jsonl",
                "tokenizer": {"class_path": "ByteTokenizer"},
                "max_length": 128,
                "batch_size": 2,
                **FURTHER.get(kind, {}),
            },
        },
        "trainer": {"max_steps": 5, "accelerator": "cpu"},
        "val_every": 3,
        "checkpoint": {"every": 2, "monitor": "val/loss"},
        "report": False,
        "samples": {"rows": 1, "max_new_tokens": 2, "temperature": 1.0},
    }
    for path, value in (changes or {}).items():
        *above, last = path.split(".")
        level = tree
        for key in above:
            level = level.setdefault(key, {})
        level[last] = value
    return tree


def prepare(folder: Path, kind: str = "SFT", changes: dict[str, Any] | None = None) -> None:
    """Writes recipe and rows to a new folder."""
    folder.mkdir(parents=True)
    rows = KINDS[kind][1]
    write_jsonl(folder / "rows.jsonl", rows(12))
    write_jsonl(folder / "held-out.jsonl", rows(2, seed=5))
    (folder / "own_rollouts.py").write_text(ROLLOUTS)
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe(kind, changes), sort_keys=False))


YEAR = 365 * 86_400.0


def jump(rng: random.Random) -> None:
    """Makes the wall clock of this process jump at one in fifty looks at it."""
    real, shift = time.time_ns, 0

    def now() -> int:
        nonlocal shift
        if rng.random() < 0.02:
            shift = int(rng.uniform(-YEAR, YEAR) * 1e9)
        return real() + shift

    time.time_ns = now
    time.time = lambda: now() / 1e9


class Faults:
    """Counts the operations that change files in a folder, and ends the process before one of them.

    Args:
        folder: Only operations on paths in it count.
        kill_at: Number of the operation, from 0.
        kill_on: Its name and the end of its path instead, as in `("replace", "model")`.
        error: Raise this error there instead of killing, once.
        clock: The wall clock jumps by up to a year, forwards and backwards, at moments that this seed chooses.
        thread: Only operations of the thread of this name count.
    """

    def __init__(
        self,
        folder: Path,
        kill_at: int = -1,
        kill_on: tuple[str, str] | None = None,
        error: OSError | None = None,
        clock: int | None = None,
        thread: str | None = None,
    ) -> None:
        self.clock, self.thread = clock, thread
        self.folder, self.kill_at, self.kill_on, self.error = str(folder.resolve()), kill_at, kill_on, error
        self.operations: list[str] = []

    def count(self, name: str, *paths: Any) -> None:
        """Counts an operation."""
        if self.thread not in (None, threading.current_thread().name):
            return
        texts = [os.path.abspath(os.fspath(path)) for path in paths if isinstance(path, str | Path)]  # noqa: PTH100
        if texts and not any(text.startswith(self.folder) for text in texts):
            return
        operation, suffix = self.kill_on or ("", "")
        is_chosen = operation == name and bool(texts) and texts[-1].endswith(suffix)
        if len(self.operations) == self.kill_at or is_chosen:
            self.kill_at, self.kill_on = -1, None
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)
        self.operations.append(f"{name} {' '.join(text.removeprefix(self.folder) for text in texts)}")

    def install(self) -> None:
        """Replaces the functions that change files, and those that read the clock, in this process."""
        if self.clock is not None:
            jump(random.Random(self.clock))
        for name in CHANGING_CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        opened = builtins.open

        def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+"):
                self.count("open", file)
            return opened(file, mode, *args, **kwargs)

        builtins.open = io.open = counted_open  # type: ignore[assignment]

    def _counted(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count(name, *args)
            return function(*args, **kwargs)

        return counted


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.crash.server"])
LIMIT = 120.0
"""Seconds after which a run counts as one that waits for ever. It takes two, on a machine that many tests share ten."""
OF_A_RUN = ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""Variables that a run sets for itself, and that another one must not inherit."""
STACKS = signal.SIGUSR2
"""Makes a run print the stacks of its threads."""
codes: Counter[int] = Counter()
"""How many runs ended with which exit code."""
_running: dict[int, "Child"] = {}


@atexit.register  # after `multiprocessing`, and so called before it waits for its processes
def _end_all() -> None:
    for child in _running.values():
        child.kill(signal.SIGKILL)


class Child:
    """A command line in a process of its own, in a folder.

    It is forked from a server process that has imported the package, and has one thread only. A fork of the tests'
    process would inherit the locks that its other threads (of OpenMP, tokenizers, progress bars) hold at that moment,
    and wait for ever.

    Args:
        folder: Its working directory, which also has its cache.
        args: The command line.
        faults: What happens to its file operations.
        environment: Variables to set, `RANK` for example.
    """

    def __init__(
        self, folder: Path, *args: str, faults: Faults | None = None, environment: dict[str, str] | None = None
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
        environment = {**inherited, "OUMI_PL_CACHE": str(folder / "cache"), **(environment or {})}
        self.folder, self.output = folder, folder / f"output-{len([*folder.glob('output-*')])}.txt"
        self.code: int | None = None
        self.process = CONTEXT.Process(target=_run, args=(folder, self.output, args, faults, environment))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        _running[self.pid] = self
        while self.poll() is None and not _leads_group(self.pid):
            time.sleep(0.001)

    def kill(self, signum: int) -> None:
        """Sends a signal to its process group, loader workers included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code; minus the signal that ended it.

        Raises:
            TimeoutError: it takes longer than `seconds`, or `LIMIT`. Its stacks are in the message.
        """
        self.wait_until(lambda: False, seconds, ends=True)
        assert self.code is not None
        return self.code

    def wait_until(self, condition: Callable[[], object], seconds: float | None = None, ends: bool = False) -> None:
        """Waits until a condition holds.

        Args:
            condition: Looked at every few milliseconds.
            seconds: Limit, instead of `LIMIT`. Time in which the system let others run does not count.
            ends: The run may end before.

        Raises:
            TimeoutError: it takes longer.
        """
        limit, begin = LIMIT if seconds is None else seconds, time.monotonic()
        while self.poll() is None and not condition():
            self.end_after(limit, begin)
            time.sleep(0.003)
        assert ends or self.code is None, f"exit code {self.code}\n{self.text}"

    def end_after(self, limit: float, begin: float) -> None:
        """Ends a run that has taken longer than `limit` seconds since `begin`.

        Raises:
            TimeoutError: it has.
        """
        if time.monotonic() < begin + limit or time.monotonic() < begin + limit + queued(self.pid):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS)
        time.sleep(1.0)
        self.kill(signal.SIGKILL)
        self.process.join()
        self.poll()
        raise TimeoutError(f"a run took longer than {limit} s:\n{self.text}")

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.code is None:
            self.code = self.process.exitcode
            if self.code is not None:
                _running.pop(self.pid, None)
                codes[self.code] += 1
        return self.code

    @property
    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def queued(pid: int) -> float:
    """Seconds that a process and its children were ready to run, and had to wait for others."""
    seconds = 0.0
    with contextlib.suppress(OSError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        seconds = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9 + sum(map(queued, children))
    return seconds


def _leads_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _run(
    folder: Path, output: Path, args: tuple[str, ...], faults: Faults | None, environment: dict[str, str]
) -> NoReturn:
    """Runs a command line in a child of the server, and ends it."""
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        threads = len([*Path(f"/proc/{os.getppid()}/task").iterdir()])
        assert threads == 1, f"the server has {threads} threads: a fork inherits the locks that they hold"
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        faulthandler.register(STACKS, file=2, all_threads=True)
        sys.path.insert(0, str(folder))
        os.setpgid(0, 0)  # signals to its process group reach its loader workers, and not the tests
        record = (folder / "operations.json").open("w") if faults is not None else None
        if faults is not None:
            faults.install()
        code = main([*args])
        if faults is not None and record is not None:  # opened before, so that this is no operation of the run
            record.write(json.dumps(faults.operations))
            record.close()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def works(folder: Path, *args: str, faults: Faults | None = None) -> str:
    """Runs a command line to its end; returns what it printed."""
    child = Child(folder, *args, faults=faults)
    code = child.wait()
    assert code == 0, f"exit code {code}\n{child.text}"
    return child.text


def ranks(folder: Path, *args: str, processes: int = 2, faults: dict[int, Faults] | None = None) -> list[Child]:
    """Starts a command line in several processes, with the environment that torchrun gives them.

    Args:
        folder: The working directory of all.
        args: The command line.
        processes: How many.
        faults: What happens to the file operations of a rank.
    """
    port = free_port()
    return [
        Child(
            folder,
            *args,
            faults=(faults or {}).get(rank),
            environment={
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"},
                **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            },
        )
        for rank in range(processes)
    ]


def torchrun(folder: Path, *args: str, processes: int = 2) -> str:
    """Runs a command line in several processes to its end; what rank 0 printed."""
    children = ranks(folder, *args, processes=processes)
    codes = [child.wait() for child in children]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(child.text for child in children)
    return children[0].text


def ended(children: list[Child], seconds: float = 30.0) -> list[int]:
    """Waits for processes as a launcher does: if one fails, and the others don't end within `seconds`, it ends them."""
    failed, end, begin = None, None, time.monotonic()
    while (codes := [child.poll() for child in children]).count(None):
        now = time.monotonic()
        if failed is None and any(codes):
            failed, end = now, now + seconds
        if end is not None and now > end:
            for child in children:
                if child.code is None:
                    child.kill(signal.SIGTERM if now < failed + 2 * seconds else signal.SIGKILL)
            end = failed + 2 * seconds if now < failed + 2 * seconds else now + 5
        for child in children:
            child.end_after(LIMIT + seconds, begin)
        time.sleep(0.01)
    return [code for code in codes if code is not None]


def copy(source: Path, target: Path) -> Path:
    """Copies a folder."""
    shutil.copytree(source, target, symlinks=True)
    return target


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a finished run writes, in a form that can be compared with another run."""
    state = json.loads((run / "run.json").read_text())
    with (run / "metrics.csv").open(newline="") as lines:
        rows = [{k: v for k, v in row.items() if k not in CHANGING} for row in csv.DictReader(lines)]
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    checkpoint = read_checkpoint(newest)
    model = {path.name: path.read_bytes() for path in (run / "model").glob("*") if path.suffix != ".md"}
    return {
        "status": state["status"],
        "step": state["step"],
        "phases": state["phases"],
        "rows": rows,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "weights": {name: value.numpy().tobytes() for name, value in checkpoint["state_dict"].items()},
        "model": model,
        "samples": (run / "samples.jsonl").read_text() if (run / "samples.jsonl").exists() else "",
        "rollouts": (run / "rollouts.jsonl").read_text() if (run / "rollouts.jsonl").exists() else "",
        "config": (run / "config.yaml").read_text(),
    }


def deviations(run: Path, expected: dict[str, Any]) -> list[str]:
    """Differences of a run folder from the expected one, by name; leftover files count as differences."""
    try:
        actual = outcome(run)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        return [f"unusable: {type(error).__name__}: {error}"]
    different = [name for name, value in expected.items() if actual[name] != value]
    cache = next((above / "cache" for above in run.parents if (above / "cache").is_dir()), run)
    halves = (path for folder in {run.parent, cache} for path in folder.rglob("*.half"))
    leftovers = [path.name for path in (*halves, *run.glob("lock.json"))]
    others = [path.name for path in run.parent.iterdir() if path.is_dir() and path.name != run.name]
    return different + [f"left {name}" for name in leftovers] + [f"another folder {name}" for name in others]
