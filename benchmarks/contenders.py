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
from functools import partial, wraps
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
LLAMA = SHAPES["17m"] | {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""The 17m shape with 4 heads, for all scripts but `sft.py` and `precision.py`."""
TRL = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "max_grad_norm": CLIP,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
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
LOSS = {"last losses": Column("last loss", ".6f", 0)}
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
    """`in_a_process` with `--threads` threads and an empty cache, so that no case finds what another computed."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return in_a_process(file, name, folder, OMP_NUM_THREADS=str(args.threads), OUMI_PL_CACHE=cache)


def report(result: Result) -> None:
    """Prints what a child measured, with its peak memory, and what came after a `baseline`, for `in_a_process`."""
    peak = peak_memory()
    print("RESULT " + json.dumps(result | {"peak": peak, "added": peak - result.get("baseline", 0.0)}))


def peak_memory(who: int = resource.RUSAGE_SELF) -> float:
    """In 1e9 bytes."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e9


def processor() -> str:
    """The name of the processor, which `platform.processor` doesn't know on Linux."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()


def versions(names: Iterable[str], threads: int | None = None) -> str:
    """Of these packages and Python, with the processor and how many threads use it."""
    named = ", ".join(f"{name} {version(name)}" for name in names)
    used = "" if threads is None else f", {threads} threads"
    return f"{named}, python {platform.python_version()}; {processor()}{used}"


# ---- arguments and data


def pair_arguments(parser: argparse.ArgumentParser, steps: int, of: str) -> None:
    """Adds the options of a benchmark on HH pairs."""
    parser.add_argument("--pairs", type=Path, default=DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    common_arguments(parser, steps, of)


def common_arguments(parser: argparse.ArgumentParser, steps: int, of: str) -> None:
    """Adds `--tokenizer` and `--steps`; `of` says what an update has."""
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=steps, help=f"updates{of}; fewer to try it out")


def check_files(args: argparse.Namespace, **files: str) -> None:
    """Stops if a file that an option names is missing; `files` says what they are."""
    for missing in (path for path in (getattr(args, name) for name in files) if not path.exists()):
        sys.exit(f"{missing} is missing: " + ", ".join(f"--{name} takes {what}" for name, what in files.items()))


def check_steps(args: argparse.Namespace, untimed: int) -> None:
    """Stops if no update is left to time, because the first `untimed` are not."""
    if args.steps <= untimed:
        sys.exit(f"--steps: at least {untimed + 1}; updates that are not timed: {untimed}")


def pair_lines(args: argparse.Namespace, n: int) -> list[str]:
    """The first `n` lines of `--pairs` whose pairs have both responses. Stops if an option doesn't fit."""
    check_steps(args, 1)
    check_files(args, pairs=PAIRS, tokenizer=TOKENIZER)
    with gzip.open(args.pairs, "rt") as lines:
        rows = list(islice((line for line in lines if not EMPTY.search(line)), n))
    if len(rows) < n:
        sys.exit(f"{args.pairs} holds {len(rows)} pairs with both responses, and this run takes {n}")
    return rows


def write_pairs(args: argparse.Namespace, folder: Path, n: int) -> None:
    """Copies the first `n` pairs that have both responses, and links the tokenizer."""
    (folder / "pairs.jsonl").write_text("".join(pair_lines(args, n)))
    (folder / "tokenizer").symlink_to(args.tokenizer.resolve())


def our_data(kind: Any, rows: Path, batch_size: int = BATCH, **options: Any) -> Any:
    """Data of ours, with the tokenizer beside the rows.

    kind: The class. The caller imports it, before the memory of the imports is measured.
    """
    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(rows.parent / "tokenizer"), "template": "plain"}
    return kind(str(rows), **names, **options, max_length=MAX_LENGTH, batch_size=batch_size, seed=0)


def planned_ids(data: Any) -> list[int]:
    """Tokenizes the rows; returns the ids of the examples in the order of our plan."""
    data.prepare_data()
    data.setup("fit")
    return [int(i) for i in data.plan(0).example_ids]


def write_tokenized(folder: Path, rows: list[Result]) -> None:
    """Writes rows for `trl_data`."""
    (folder / "tokenized.json").write_text(json.dumps(rows))


def trl_data(folder: Path) -> dict[str, Any]:
    """The tokenized rows and the tokenizer, as arguments of TRL's trainers."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    return {
        "train_dataset": Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        "processing_class": AutoTokenizer.from_pretrained(folder / "tokenizer"),
    }


def save_llama(folder: Path, shape: dict[str, Any]) -> None:
    """Saves a random Llama as `model`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "model")


# ---- contenders


class Clock:
    """When the updates ended, what they trained on, and what they logged.

    rows: Rows or pairs of an update, which the rates count; without it they count tokens.
    """

    def __init__(self, rows: int = 0) -> None:
        self.baseline = peak_memory()
        self.rows = rows
        self.begun = self.beforehand = 0.0
        self.ends: list[float] = []
        self.processor: list[float] = []
        self.units: list[int] = []
        self.positions = self.tokens = 0  # read by the model, and of those that are no padding
        self.logged: dict[str, list[float]] = {}

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def end(self) -> None:
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.units.append(self.rows or self.tokens - sum(self.units))

    def log(self, name: str, value: float) -> None:
        self.logged.setdefault(name, []).append(float(value))

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as beforehand."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.beforehand += time.perf_counter() - start

        return call

    def result(self) -> Result:
        """What was logged is given by its name, and its last value as well: `losses` and `last losses`."""
        later = sum(self.units[1:])
        last = {f"last {name}": values[-1] for name, values in self.logged.items()}
        rates = {
            "loop": later / (self.ends[-1] - self.ends[0]),
            "per_cpu": later / (self.processor[-1] - self.processor[0]),
            "over_all": sum(self.units) / (self.beforehand + self.ends[-1] - self.begun),
        }
        return vars(self) | self.logged | last | rates


def our_watch(clock: Clock, **metrics: str) -> Any:
    """A callback of ours for the clock. It logs the loss, and metrics by the name of a list: `logps="train/..."`."""
    import lightning as L

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.positions += int(pl_module.last_update["positions"])  # prompts as often as they are computed
            clock.tokens += int(pl_module.last_update["tokens"])
            clock.end()
            for name, metric in ({"losses": "train/loss"} | metrics).items():
                clock.log(name, trainer.callback_metrics[metric])

    return Watch()


def trl_watch(clock: Clock, **metrics: str) -> Any:
    """A callback of TRL for the clock. It logs the loss, and metrics by the name of a list."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            for name, metric in ({"losses": "loss"} | metrics).items() if "loss" in logs else ():
                clock.log(name, logs[metric])

    return Watch()


def trl_counted(kind: Any, clock: Clock) -> Any:
    """A trainer class of TRL that counts what its model reads."""

    class Counted(kind):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.positions += inputs["attention_mask"].numel()
            clock.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counted


def trl_with_reference(kind: Any, clock: Clock) -> Any:
    """`trl_counted` for a class with a reference, whose computation is timed, and which is given tokenized rows."""

    class Timed(trl_counted(kind, clock)):
        _precompute_ref_logps = clock.before(kind._precompute_ref_logps)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Timed


def trl_settings(scratch: Path, batch_size: int = BATCH, **options: Any) -> dict[str, Any]:
    """Arguments of TRL's configs."""
    where = {"output_dir": str(scratch / "trl")}
    return TRL | where | {"per_device_train_batch_size": batch_size, "max_length": MAX_LENGTH} | options


def adamw() -> Any:
    """The optimizer of our modules, with the settings of TRL's."""
    import torch

    return partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)


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
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": CLIP,
        "logger": metrics,
        "enable_checkpointing": False,
    }
    ours = [Start(), LastStep(), Throughput(), ProgressLine()]
    return L.Trainer(callbacks=[*ours, *callbacks], **settings, **TRAINER_DEFAULTS)


def far(one: Result, two: Result, near: dict[tuple[str, int], float]) -> Iterator[str]:
    """Yields each value that differs by more than its tolerance. `near` has these by (a list's name, index)."""
    for (what, at), tolerance in near.items():
        if not abs(one[what][at] - two[what][at]) <= tolerance:
            yield f"{what}[{at}] is {one[what][at]}, not {two[what][at]}"


def saved_positions(results: dict[str, Result]) -> Iterator[str]:
    """What sharing prompts and leaving out padding save, if the contenders that show it ran."""
    shared, apart, padded = (results.get(name) for name in ("oumi_pl", "oumi_pl, prompts twice", "TRL"))
    parts = []
    if shared and apart:
        parts += [f"{1 - shared['positions'] / apart['positions']:.1%} of the positions are saved by sharing prompts"]
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
    models and rows of them, in a process of its own. differences: Says in what a case has done different work than
    another. columns: Of the table, by the keys of results. compared: The title of a table of ratios. closing: Lines
    below.
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
        print(versions(("torch", "transformers", "trl", "lightning"), args.threads))
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
                    sys.exit(f"{name} does different work than {base}: {difference}")
                print(self._row(name, {key: f"{result[key]:{c.form}}" for key, c in self.columns.items()}), flush=True)
        for line in (*self._ratios(results), *self.closing(results)):
            print(line)

    def _row(self, name: str, cells: dict[str, str]) -> str:
        return f"{name:{NAME}}" + "".join(f"{cells.get(key, ''):>{WIDTH}}" for key in self.columns)

    def _ratios(self, results: dict[str, Result]) -> Iterator[str]:
        others = [name for name in results if name not in self.peers]
        for peer in (peer for peer in self.peers if peer in results and others):
            yield self.compared.format(peer=peer)
            for name in others:
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
            result = run(args, args.folder, Path(scratch), **options)
        report(result)
