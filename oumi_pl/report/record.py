"""Reads a run folder. Missing or broken files count as empty."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from oumi_pl.runs import files, folders


@dataclass(frozen=True)
class Record:
    """A run folder whose files are read on first use."""

    folder: Path
    shown_condition: str | None = None
    """The state to show, instead of that in `run.json`."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.resolve().name

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return folders.read_state(self.folder)

    def part(self, name: str) -> dict[str, Any]:
        """A mapping in `run.json`; empty if missing."""
        return _mapping(self.state.get(name))

    @cached_property
    def condition(self) -> str:
        """The current state of the run: see `oumi_pl.runs.folders.condition`."""
        return self.shown_condition or folders.condition(self.state)

    @cached_property
    def metrics(self) -> dict[str, folders.Column]:
        """The columns of `metrics.csv`."""
        return folders.read_metrics(self.folder)

    @cached_property
    def data(self) -> dict[str, Any]:
        """The data report, by split."""
        try:
            return _mapping(files.parse(self._text("data.json")))
        except ValueError:
            return {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config."""
        import yaml

        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            files.refuse_expanding(yaml.compose(self.config_text, Loader=loader))
            return _mapping(yaml.load(self.config_text, Loader=loader))
        except (yaml.YAMLError, ValueError, RecursionError, TypeError):
            return {}

    @cached_property
    def config_text(self) -> str:
        """The text of `config.yaml`."""
        return self._text(folders.CONFIG)

    @cached_property
    def recipe_text(self) -> str:
        """The recipe as its author wrote it."""
        return self._text(folders.RECIPE)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The samples in `samples.jsonl`, without lines that a kill cut short."""
        lines = self._lines("samples.jsonl")
        return [sample for sample in lines if isinstance(sample.get("step"), int) and "prompt" in sample]

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """The completions in `rollouts.jsonl`, without a last line that says why the file ends."""
        lines = self._lines("rollouts.jsonl")
        return [line for line in lines if isinstance(line.get("update"), int) and "completion" in line]

    @property
    def rollouts_end(self) -> int | None:
        """The first update that `rollouts.jsonl` lacks because of its size; None if it has all."""
        return next((line["update"] for line in self._lines("rollouts.jsonl")[-1:] if "stopped" in line), None)

    @property
    def step(self) -> int:
        """The last step known to be done."""
        return max([0, self.state.get("step", 0), *(steps[-1] for steps, _ in self.metrics.values())])

    @property
    def resumed(self) -> list[int]:
        """The steps at which the run was resumed; a restart from step 0 does not count."""
        return [step for step in self.state.get("resumed", []) if step > 0]

    def _repr_html_(self) -> str:
        from oumi_pl.report.page import framed, inline, page

        return framed(page(self), 640) if self.metrics else inline(f"{self.name} has no metrics yet")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects in a file of JSON lines; broken lines are skipped."""
        mappings = []
        for line in self._text(name).split("\n"):  # not `splitlines`: JSON texts may hold U+2028
            try:
                value = files.parse(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                mappings.append(value)
        return mappings

    def _text(self, name: str) -> str:
        try:
            return files.read(self.folder / name).decode(errors="replace")
        except OSError:
            return ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
