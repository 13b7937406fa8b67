"""What benchmarks of a trainer type against TRL share: contenders in processes of their own, timed, in one table.

Rates are of the updates after the first, waiting for data included, per second and per second of processor time, which
a busy machine disturbs less. `over all` counts the first update too, and what is computed beforehand, but not loading
and tokenizing. Memory is the process's peak, and what of it came after the imports.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Run = Callable[..., Result]
"""Called with the folder of what was prepared, a scratch folder, and the options of the case."""

COLUMNS = {"loop": "/s", "per_cpu": "/CPU s", "over_all": "over all", "beforehand": "before s"}
COLUMNS |= {"peak": "peak GB", "added": "added GB"}
RATIOS = ("loop", "per_cpu", "over_all", "peak", "added")
NAME, WIDTH = 26, 11


def peak_memory() -> float:
    """In 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Clock:
    """When the updates ended, and what they trained on. `units` are what the rates count: rows, pairs or tokens."""

    def __init__(self) -> None:
        self.baseline = peak_memory()
        self.begun = self.beforehand = 0.0
        self.ends: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self.units: list[int] = []

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
        }


def lightning_trainer(scratch: Path, clip: float, *callbacks: Any) -> Any:
    """A trainer of one epoch with what the command line adds to a run, but for saving, which TRL doesn't do either."""
    import lightning as L

    from oumi_pl.callbacks.progress import ProgressLine
    from oumi_pl.callbacks.start import Start
    from oumi_pl.callbacks.stopping import LastStep
    from oumi_pl.callbacks.throughput import Throughput
    from oumi_pl.config.cli import TRAINER_DEFAULTS
    from oumi_pl.runs.metrics import MetricsCSV

    L.seed_everything(0)
    metrics = MetricsCSV()
    metrics.open(scratch / "metrics.csv")
    ours = [Start(), LastStep(), Throughput(), ProgressLine()]
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "gradient_clip_val": clip}
    settings |= {"logger": metrics, "enable_checkpointing": False}
    return L.Trainer(callbacks=[*ours, *callbacks], **settings, **TRAINER_DEFAULTS)


@dataclass
class Benchmark:
    """A comparison. `main` runs it from the command line.

    file: The script, which its child processes run. unit: Of the rates. base: The case that others are compared with.
    cases: name -> what runs it, with its options. arguments: Adds options to the parser. check: Stops if these options
    can't be. write: Writes data into a folder; returns a line on them. prepare: Makes models and rows of them, in a
    process of its own. refuse: Stops if a case has done other work than the base.
    """

    file: str
    description: str | None
    unit: str
    base: str
    cases: dict[str, tuple[Run, dict[str, Any]]]
    arguments: Callable[[argparse.ArgumentParser], None]
    write: Callable[[argparse.Namespace, Path], str]
    prepare: Callable[[Path], None]
    refuse: Callable[[str, Result, Result], None]

    def main(self) -> None:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.arguments(parser)
        parser.add_argument("--threads", type=int, default=os.cpu_count())
        parser.add_argument("--child", help=argparse.SUPPRESS)
        parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.child:
            self._child(args.child, args.threads, args.folder)
            return
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "lightning"))
        machine = platform.processor() or platform.machine()
        print(f"{versions}, python {platform.python_version()}; {machine}, {args.threads} threads")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            print(self.write(args, folder), flush=True)
            self._in_a_process("prepare", args.threads, folder)
            print(f"{self.unit:{NAME}}" + "".join(f"{title:>{WIDTH}}" for title in COLUMNS.values()) + "  last loss")
            results: dict[str, Result] = {}
            for name in self.cases:
                results[name] = self._in_a_process(name, args.threads, folder)
                self.refuse(name, results[name], results[self.base])
                cells = "".join(f"{results[name][key]:{WIDTH}.2f}" for key in COLUMNS)
                print(f"{name:{NAME}}{cells}{results[name]['losses'][-1]:11.6f}", flush=True)
        print("\n".join(self._ratios(results)))

    def _ratios(self, results: dict[str, Result]) -> Iterator[str]:
        yield f"as a multiple of {self.base}"
        for name, result in results.items():
            if name != self.base:
                cells = {key: f"{result[key] / results[self.base][key]:.2f}x" for key in RATIOS}
                yield f"{name:{NAME}}" + "".join(f"{cells.get(key, ''):>{WIDTH}}" for key in COLUMNS)

    def _child(self, name: str, threads: int, folder: Path) -> None:
        import torch

        torch.set_num_threads(threads)
        if name == "prepare":
            self.prepare(folder)
            return
        run, options = self.cases[name]
        with tempfile.TemporaryDirectory() as scratch:
            # nothing computed beforehand is found again by the next contender
            os.environ["OUMI_PL_CACHE"] = scratch
            result = run(folder, Path(scratch), **options)
        peak = peak_memory()
        print("RESULT " + json.dumps(result | {"peak": peak, "added": peak - result["baseline"]}))

    def _in_a_process(self, name: str, threads: int, folder: Path) -> Result:
        command = [sys.executable, self.file, "--child", name, "--threads", str(threads), "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OUMI_PL_CACHE": str(folder / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return json.loads(lines[0].removeprefix("RESULT ")) if lines else {}
