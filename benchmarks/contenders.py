"""What benchmarks of a trainer type against TRL share: contenders in processes of their own, timed, in one table.

Rates are of the updates after the first, waiting for data included, per second and per second of processor time, which
a busy machine disturbs less. `over all` counts the first update too, and what is computed beforehand, but not loading
and tokenizing. Memory is the process's peak, and what of it came after the imports.
"""

import argparse
import gzip
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]
Run = Callable[..., Result]
"""Called with the parsed arguments, the folder of what was prepared, a scratch folder, and the options of the case."""

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
PAIRS, TOKENIZER, TEXTS = "a .jsonl.gz of HH pairs", "GPT-2's directory", "a .jsonl of texts"
BATCH = 4
MAX_LENGTH = 512
LR, CLIP = 1e-5, 1.0
VOCABULARY = 50257
SHAPES = {
    "17m": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""Of Llamas, by their parameters with tied embeddings and GPT-2's vocabulary. 135m is the shape of SmolLM2."""
LLAMA = SHAPES["17m"] | {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4}
"""What trains with 4 heads; `sft.py` and `precision.py` train `SHAPES`."""
TRL = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
TRL |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
TRL |= {"learning_rate": LR, "max_grad_norm": CLIP, "weight_decay": 0.0, "logging_steps": 1, "num_train_epochs": 1}
EMPTY = re.compile(r'Assistant:(\\n| )*"')
"""Where a response is empty, in a line of JSON."""


class Column(NamedTuple):
    """A column of the table. `ratio`: 1 compares as a multiple of the peer, -1 the peer as a multiple, 0 not at all."""

    title: str
    form: str = ".2f"
    ratio: int = 1


MEMORY = {"peak": Column("peak GB"), "added": Column("added GB")}
RATES = {"loop": Column("/s"), "per_cpu": Column("/CPU s")}
COLUMNS = RATES | {"over_all": Column("over all"), "beforehand": Column("before s", ratio=0)} | MEMORY
LOSS = {"loss": Column("last loss", ".6f", 0)}
NAME, WIDTH = 26, 11


# ---- child processes


def child_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `in_a_process` gives to a child."""
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def in_a_process(file: str, name: str, folder: Path, **environment: str) -> Result:
    """Runs the script once more, with the options that it was given, as the child `name`; returns what it reports."""
    command = [sys.executable, file, *sys.argv[1:], "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0].removeprefix("RESULT ")) if lines else {}


def contender(file: str, name: str, args: argparse.Namespace, folder: Path) -> Result:
    """`in_a_process` with so many threads, and a cache that is deleted with the folder."""
    return in_a_process(file, name, folder, OMP_NUM_THREADS=str(args.threads), OUMI_PL_CACHE=str(folder / "cache"))


def report(result: Result) -> None:
    """Prints what a child measured, with its peak memory, and what came after a `baseline`, for `in_a_process`."""
    peak = peak_memory()
    print("RESULT " + json.dumps(result | {"peak": peak, "added": peak - result.get("baseline", 0.0)}))


def peak_memory(who: int = resource.RUSAGE_SELF) -> float:
    """In 1e9 bytes."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e9


def versions(threads: int) -> str:
    """Of packages and Python, with the machine."""
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "lightning"))
    machine = platform.processor() or platform.machine()
    return f"{named}, python {platform.python_version()}; {machine}, {threads} threads"


# ---- arguments and data


def pair_arguments(parser: argparse.ArgumentParser, steps: int, of: str) -> None:
    """Adds the options of a benchmark on HH pairs."""
    parser.add_argument("--pairs", type=Path, default=DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    common_arguments(parser, steps, of)


def common_arguments(parser: argparse.ArgumentParser, steps: int, of: str) -> None:
    """Adds `--tokenizer` and `--steps`; `of` says what an update has."""
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=steps, help=f"updates{of}; fewer to try it out")


def check(args: argparse.Namespace, **files: str) -> None:
    """Stops if there is nothing to time, or a file that an option names is missing; `files` says what they are."""
    for missing in (path for path in (getattr(args, name) for name in files) if not path.exists()):
        sys.exit(f"{missing} is missing: " + ", ".join(f"--{name} takes {what}" for name, what in files.items()))
    if args.steps < 2:
        sys.exit("--steps: at least 2, since the first update is not timed")


def write_pairs(args: argparse.Namespace, folder: Path, n: int) -> None:
    """Copies the first `n` pairs that both have a response, and links the tokenizer."""
    check(args, pairs=PAIRS, tokenizer=TOKENIZER)
    with gzip.open(args.pairs, "rt") as lines:
        rows = list(islice((line for line in lines if not EMPTY.search(line)), n))
    if len(rows) < n:
        sys.exit(f"{args.pairs} holds {len(rows)} pairs, not {n}")
    (folder / "pairs.jsonl").write_text("".join(rows))
    (folder / "tokenizer").symlink_to(args.tokenizer.resolve())


# ---- contenders


class Clock:
    """When the updates ended, and what they trained on. `units` are what the rates count: rows, pairs or tokens."""

    def __init__(self) -> None:
        self.baseline = peak_memory()
        self.begun = self.beforehand = 0.0
        self.ends: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self.units: list[int] = []
        self.positions = self.tokens = 0  # read by the model, and of those that are no padding

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def end(self, units: int) -> None:
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.units.append(units)

    def result(self) -> Result:
        later = sum(self.units[1:])
        return vars(self) | {
            "loop": later / (self.ends[-1] - self.ends[0]),
            "per_cpu": later / (self.processor[-1] - self.processor[0]),
            "over_all": sum(self.units) / (self.beforehand + self.ends[-1] - self.begun),
            "loss": self.losses[-1],
        }


def lightning_trainer(clock: Clock, scratch: Path, *callbacks: Any) -> Any:
    """A trainer of one epoch with what the command line adds to a run, but for saving, which TRL doesn't do either."""
    import lightning as L

    from oumi_pl.callbacks.progress import ProgressLine
    from oumi_pl.callbacks.start import Start
    from oumi_pl.callbacks.stopping import LastStep
    from oumi_pl.callbacks.throughput import Throughput
    from oumi_pl.config.cli import TRAINER_DEFAULTS
    from oumi_pl.runs.metrics import MetricsCSV

    clock.baseline = peak_memory()  # these imports are no part of what a run adds
    L.seed_everything(0)
    metrics = MetricsCSV()
    metrics.open(scratch / "metrics.csv")
    ours = [Start(), LastStep(), Throughput(), ProgressLine()]
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "gradient_clip_val": CLIP}
    settings |= {"logger": metrics, "enable_checkpointing": False}
    return L.Trainer(callbacks=[*ours, *callbacks], **settings, **TRAINER_DEFAULTS)


def far(one: Result, two: Result, near: dict[tuple[str, int], float]) -> Iterator[str]:
    """What is further apart than it may be: `near` has tolerances of (a list's name, index)."""
    for (what, at), tolerance in near.items():
        if not abs(one[what][at] - two[what][at]) <= tolerance:
            yield f"{what}[{at}] is {one[what][at]}, not {two[what][at]}"


def saved_tokens(results: dict[str, Result]) -> Iterator[str]:
    """What sharing prompts and leaving out padding save, if the contenders that show it ran."""
    shared, apart, padded = (results.get(name) for name in ("oumi_pl", "oumi_pl, prompts twice", "TRL"))
    parts = []
    if shared and apart:
        parts += [f"{1 - shared['positions'] / apart['positions']:.1%} of the tokens are saved by sharing prompts"]
    if padded:
        parts += [f"{1 - padded['tokens'] / padded['positions']:.1%} of what TRL reads is padding"]
    if parts:
        yield "; ".join(parts)


# ---- the comparison


@dataclass
class Benchmark:
    """A comparison. `main` runs it from the command line.

    file: The script, which its child processes run. unit: Of the rates. peers: The cases that others are compared with;
    the work of all is compared with the first one's. cases: name -> what runs it, with its options. arguments: Adds
    options to the parser. write: Checks these, and writes data into a folder; returns a line on them. prepare: Makes
    models and rows of them, in a process of its own. differences: Says in what a case has done other work than another.
    columns: Of the table, by the keys of results. compared: The title of a table of ratios. closing: Lines below.
    """

    file: str
    description: str | None
    unit: str
    peers: tuple[str, ...]
    cases: dict[str, tuple[Run, dict[str, Any]]]
    arguments: Callable[[argparse.ArgumentParser], None]
    write: Callable[[argparse.Namespace, Path], str]
    prepare: Callable[[argparse.Namespace, Path], None]
    differences: Callable[[Result, Result], Iterable[str]]
    columns: dict[str, Column] = field(default_factory=lambda: COLUMNS | LOSS)
    compared: str = "as a multiple of {peer}"
    closing: Callable[[dict[str, Result]], Iterable[str]] = lambda results: ()

    def main(self) -> None:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.arguments(parser)
        names = "; ".join(self.cases)
        parser.add_argument("--cases", nargs="+", choices=self.cases, default=self.cases, metavar="CASE", help=names)
        parser.add_argument("--threads", type=int, default=os.cpu_count())
        child_arguments(parser)
        args = parser.parse_args()
        if args.child:
            self._child(args)
            return
        print(versions(args.threads))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            print(self.write(args, folder), flush=True)
            contender(self.file, "prepare", args, folder)
            print(self._row(self.unit, {key: column.title for key, column in self.columns.items()}))
            results: dict[str, Result] = {}
            for name in (name for name in self.cases if name in args.cases):
                results[name] = result = contender(self.file, name, args, folder)
                base = next(iter(results))
                for difference in self.differences(result, results[base]):
                    sys.exit(f"{name} does other work than {base}: {difference}")
                print(self._row(name, {key: f"{result[key]:{c.form}}" for key, c in self.columns.items()}), flush=True)
        for line in (*self._ratios(results), *self.closing(results)):
            print(line)

    def _row(self, name: str, cells: dict[str, str]) -> str:
        return f"{name:{NAME}}" + "".join(f"{cells.get(key, ''):>{WIDTH}}" for key in self.columns)

    def _ratios(self, results: dict[str, Result]) -> Iterator[str]:
        for peer in (peer for peer in self.peers if peer in results):
            yield self.compared.format(peer=peer)
            for name in (name for name in results if name not in self.peers):
                compared = {key: column.ratio for key, column in self.columns.items() if column.ratio}
                ratios = {key: (results[name][key] / results[peer][key]) ** power for key, power in compared.items()}
                yield self._row(name, {key: f"{ratio:.2f}x" for key, ratio in ratios.items()}).rstrip()

    def _child(self, args: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(args.threads)
        if args.child == "prepare":
            self.prepare(args, args.folder)
            return
        run, options = self.cases[args.child]
        with tempfile.TemporaryDirectory() as scratch:
            # nothing computed beforehand is found again by the next contender
            os.environ["OUMI_PL_CACHE"] = scratch
            result = run(args, args.folder, Path(scratch), **options)
        report(result)
