"""One engine of a comparison, in a process of its own: `python -m oumi_pl.compare.worker ENGINE ROLE ... RECIPE`."""

import sys
from pathlib import Path
from typing import Any

from oumi_pl.compare.record import Record, RecordEngine, RecordLightning
from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI
from oumi_pl.errors import UserError


class RecordedCLI(CLI):
    """`fit` with a callback that records each update."""

    record: Record

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the callback of the engine."""
        trainer = super().instantiate_trainer(**kwargs)
        if self._get(self.config_init, "engine") == "lightning":
            trainer.callbacks.append(RecordLightning(self.record))
        else:
            self.engine_callbacks = [RecordEngine(self.record)]
        return trainer


def main(args: list[str]) -> int:
    """Trains, and leaves `steps.jsonl` and the run folder; returns the exit code.

    Args:
        args: Engine, role, folder of this process, folder of the lead's weights, optimizer steps, recipe, overrides.
    """
    engine, role, folder, snapshots, steps, recipe, *overrides = args
    settings = {
        "engine": engine,
        "runs_dir": f"{folder}/runs",
        "name": "run",
        "export.enabled": False,
        "samples.rows": 0,
        "report": False,
        "logger": "null",
        "trainer.max_steps": steps,
        "trainer.max_epochs": "null",
        "checkpoint.every": 10**9,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    try:
        RecordedCLI.record = Record(Path(folder), Path(snapshots), role)  # type: ignore[arg-type]
        trees = [recipe_files.check(Path(recipe))]
        RecordedCLI(["fit", "--config", recipe, *overrides, *options], recipe="compare", trees=trees)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
