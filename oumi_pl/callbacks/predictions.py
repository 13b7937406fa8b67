"""Writes the completions of `predict` as lines of JSON."""

import json
from pathlib import Path
from typing import Any

import lightning as L

from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule


class Predictions(L.Callback):
    """Writes what `predict_step` returns to `predictions.jsonl`: one part per rank, joined in row order at the end.

    Args:
        max_new_tokens: Longest completion.
        temperature: Temperature of sampling; 0 is greedy.
    """

    def __init__(self, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._part: Path | None = None

    def on_predict_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Passes the settings to the module, and creates this rank's part."""
        pl_module.generation_settings = self.settings
        directory = run_directory(trainer)
        assert directory is not None
        self._part = directory / f"predictions.{trainer.global_rank}.part"
        self._part.write_text("", encoding="utf-8")

    def on_predict_batch_end(self, trainer: Any, pl_module: RunModule, outputs: Any, *_: Any) -> None:
        """Appends the completions of a batch at once: a kill loses only the current batch."""
        assert self._part is not None
        with self._part.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in outputs)

    def on_predict_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Joins the parts on rank 0."""
        assert self._part is not None
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = sorted(self._part.parent.glob("predictions.*.part"))
        text = "".join(part.read_text(encoding="utf-8") for part in parts)
        lines = [json.loads(line) for line in text.split("\n") if line]  # not `splitlines`: texts may hold U+2028
        file = self._part.parent / "predictions.jsonl"
        with file.open("w", encoding="utf-8") as out:
            out.writelines(
                json.dumps(line, ensure_ascii=False) + "\n" for line in sorted(lines, key=lambda line: line["row"])
            )
        for part in parts:
            part.unlink()
        echo(f"{len(lines)} completions -> {file}")
