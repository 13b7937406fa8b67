"""One engine of a comparison, in a process of its own: `python -m oumi_pl.compare.worker ENGINE ROLE ... RECIPE`."""

import sys
from pathlib import Path
from typing import Any

from oumi_pl.compare.record import Record, RecordEngine, RecordLightning
from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI
from oumi_pl.errors import UserError


class RecordedCLI(CLI):
    """`fit`, watched."""

    record: Record

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the callback that watches the engine."""
        trainer = super().instantiate_trainer(**kwargs)
        if self._get(self.config_init, "engine") == "lightning":
            trainer.callbacks.append(RecordLightning(self.record))
        else:
            self.engine_callbacks = [RecordEngine(self.record)]
        return trainer


def main(args: list[str]) -> int:
    """Trains as it is told, and leaves `steps.jsonl` and the run folder; returns the exit code.

    Args:
        args: Engine, role, own folder, folder of the lead's weights, optimizer steps, recipe, and any overrides.
    """
    engine, role, place, snapshots, steps, recipe, *overrides = args
    own = {"engine": engine, "runs_dir": f"{place}/runs", "name": "run", "export.enabled": False, "samples.rows": 0}
    own |= {"report": False, "logger": "null"}
    own |= {"trainer.max_steps": steps, "trainer.max_epochs": "null", "checkpoint.every": 10**9}
    options = [f"--{key}={value}" for key, value in own.items()]
    try:
        RecordedCLI.record = Record(Path(place), Path(snapshots), role)  # type: ignore[arg-type]
        trees = [recipe_files.check(Path(recipe))]
        RecordedCLI(["fit", "--config", recipe, *overrides, *options], recipe="compare", trees=trees)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
