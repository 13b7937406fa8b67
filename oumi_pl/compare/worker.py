"""One engine of a comparison, in a process of its own: `python -m oumi_pl.compare.worker ENGINE ROLE ... RECIPE`."""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from oumi_pl.adapters.batches import EngineLoader
from oumi_pl.attention import path_positions
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI
from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo
from oumi_pl.types import IGNORE_INDEX

Document = tuple[np.ndarray, np.ndarray]
"""Token ids `[seq]` and the target of each position `[seq]`, or IGNORE_INDEX."""


def digest(documents: Iterable[Document]) -> str:
    """Hashes the documents of an update, independently of their order and their micro-batches.

    Tokens after the last target of a document, and documents without targets, are left out: no loss depends on them.
    """
    lines = []
    for ids, targets in documents:
        (at,) = np.nonzero(targets != IGNORE_INDEX)
        if len(at):
            lines.append(np.stack([ids[: at[-1] + 1], targets[: at[-1] + 1]]).astype("<i8").tobytes())
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(len(line).to_bytes(8, "little") + line)
    return digest.hexdigest()[:16]


def documents_of(batch: Mapping[str, Any]) -> Iterator[Document]:
    """Yields the documents of a `Batch`, or of a batch for transformers or TRL.

    In a `Batch` the path of each segment is a document, so a preference pair has two. Other batches have
    `shift_labels`, or `labels` or a `completion_mask` at the positions of the tokens themselves. Those of reward models
    have none of these, and the target is the last token of each row.
    """
    if "segments" in batch:
        yield from _paths(batch)
    elif "shift_labels" in batch:  # if present, transformers counts and averages by these
        yield from _rows(batch, _array(batch["shift_labels"]))
    else:
        if "labels" in batch:
            labels = _array(batch["labels"])
        elif "completion_mask" not in batch:
            labels = _last_tokens(batch)
        else:
            labels = np.where(_array(batch["completion_mask"]) == 1, _array(batch["input_ids"]), IGNORE_INDEX)
        shifted = np.full_like(labels, IGNORE_INDEX)
        shifted[:, :-1] = labels[:, 1:]
        yield from _rows(batch, shifted)


def _last_tokens(batch: Mapping[str, Any]) -> np.ndarray:
    """Labels that are the last token of each row, padded on the right."""
    ids, ends = _array(batch["input_ids"]), _array(batch["attention_mask"]).sum(1) - 1
    labels = np.full_like(ids, IGNORE_INDEX)
    native = getattr(batch, "native", None)
    if native is None or native["sample_ids"]:  # a rank that ran out of rows has a stand-in
        labels[np.arange(len(ids)), ends] = ids[np.arange(len(ids)), ends]
    return labels


def _paths(batch: Mapping[str, Any]) -> Iterator[Document]:
    """The path of each segment. Does not use the layouts of `models.lm`: that way a bug there shows as a difference."""
    ids, targets = _array(batch["input_ids"])[0], _array(batch["targets"])
    predictors, owners = _array(batch["predictors"]), _array(batch["target_segments"])
    for i in range(len(batch["segments"])):
        path = path_positions(batch["segments"], i)
        targets_of_path = np.full(len(path), IGNORE_INDEX)
        targets_of_path[np.searchsorted(path, predictors[owners == i])] = targets[owners == i]
        yield ids[path], targets_of_path


def _rows(batch: Mapping[str, Any], targets: np.ndarray) -> Iterator[Document]:
    """Splits rows into documents, without padding."""
    ids = _array(batch["input_ids"])
    mask = _array(batch["attention_mask"]).astype(bool) if "attention_mask" in batch else np.ones_like(ids, dtype=bool)
    for row, (row_ids, row_targets) in enumerate(zip(ids, targets, strict=True)):
        keep = mask[row]
        # in packed rows, positions restart with each document; in padded rows they may count padding
        starts = [0]
        if "position_ids" in batch and "attention_mask" not in batch:
            starts = np.flatnonzero(_array(batch["position_ids"])[row] == 0).tolist() or [0]
        for start, end in zip(starts, [*starts[1:], len(row_ids)], strict=True):
            yield row_ids[start:end][keep[start:end]], row_targets[start:end][keep[start:end]]


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


# ---- what each update did


Role = Literal["lead", "held", "free"]
"""`lead` saves its weights after each step; `held` starts each step from these weights; `free` trains on its own."""


class Record:
    """Writes a line per update to `steps.jsonl`: batch hash, seconds, peak memory, and the distance to the lead.

    `update` is the norm of the difference to the lead's update, relative to the norm of the lead's update; `weights` is
    the same for the weights. `rounding` is the sum of `|update| ulp(weight)` over the squared norm of the update: see
    `allowed`. Seconds are measured from the end of one update to the end of the next, without the time to record.

    Args:
        folder: Folder for `steps.jsonl`.
        snapshots: Folder of the lead's weights.
        role: See `Role`.
    """

    def __init__(self, folder: Path, snapshots: Path, role: Role) -> None:
        self.file = folder / "steps.jsonl"
        self.snapshots = snapshots
        self.role = role
        self._ended: float | None = None  # time of the last update's end
        self._recording = 0.0  # seconds spent on recording since then
        folder.mkdir(parents=True, exist_ok=True)
        snapshots.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

    def before(self, step: int, model: nn.Module) -> None:
        """Call before update `step` (from 0): saves the weights, or loads those of the lead."""
        began = time.perf_counter()
        if self.role == "lead" and step == 0:
            self._save(0, model)
        if self.role == "held":
            self._load(step, model)
        self._recording = time.perf_counter() - began
        if self._ended is None:
            self._ended = began

    def after(self, step: int, model: nn.Module, documents: Iterable[Document]) -> None:
        """Call after update `step` (from 0): writes its line."""
        assert self._ended is not None
        seconds = time.perf_counter() - self._ended - self._recording
        if self.role == "lead":
            self._save(step + 1, model)
        device = next(model.parameters()).device
        line = {
            "step": step + 1,
            "batch": digest(documents),
            "seconds": seconds,
            "peak_memory_gb": peak_memory(device) / 1e9,
            **self._distance(step, model),
        }
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        self._ended = time.perf_counter()

    def _path(self, step: int) -> Path:
        return self.snapshots / f"{step:06}.safetensors"

    def _save(self, step: int, model: nn.Module) -> None:
        save_file({name: p.detach().cpu().clone() for name, p in _trained(model)}, self._path(step))

    def _load(self, step: int, model: nn.Module) -> None:
        weights = load_file(self._path(step))
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(weights[name])

    def _distance(self, step: int, model: nn.Module) -> dict[str, float]:
        if self.role == "lead":
            return {}
        theirs = load_file(self._path(step + 1))
        start = load_file(self._path(step)) if self.role == "held" else {}
        difference = size = rounding = 0.0
        for name, parameter in _trained(model):
            target = theirs[name].double()
            moved = target - start[name].double() if start else target
            difference += float((parameter.detach().cpu().double() - target).square().sum())
            size += float(moved.square().sum())
            if start:
                rounding += float((moved * target).abs().sum()) * torch.finfo(parameter.dtype).eps
        distance = (difference / size) ** 0.5 if size else float("inf") if difference else 0.0
        if self.role == "free":
            return {"weights": distance}
        return {"update": distance, "rounding": rounding / size if size else 0.0}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class RecordLightning(L.Callback):
    """Calls a `Record` before and after each update in Lightning."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._documents: list[Document] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts recording before the first micro-batch of an update."""
        if not self._documents:
            self.record.before(trainer.global_step, pl_module.causal_lm.hf)
        self._documents += documents_of(batch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Records the update after its last micro-batch."""
        if not trainer.fit_loop._should_accumulate():
            self.record.after(trainer.global_step - 1, pl_module.causal_lm.hf, self._documents)
            self._documents = []


class RecordEngine(TrainerCallback):
    """Calls a `Record` before and after each update in a trainer of transformers or TRL."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._documents: list[Document] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts recording before the first micro-batch of an update."""
        loader: EngineLoader = kwargs["train_dataloader"]
        self._documents = [document for batch in loader.update for document in documents_of(batch)]
        self.record.before(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records the update after its last micro-batch."""
        self.record.after(state.global_step - 1, kwargs["model"], self._documents)


# ---- the process


class RecordedCLI(CLI):
    """Runs `fit` with a callback that records each update."""

    record: Record

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the recording callback for the engine."""
        trainer = super().instantiate_trainer(**kwargs)
        if self._get(self.config_init, "engine") == "lightning":
            trainer.callbacks.append(RecordLightning(self.record))
        else:
            self.engine_callbacks = [RecordEngine(self.record)]
        return trainer


def main(args: list[str]) -> int:
    """Trains, and writes `steps.jsonl` and the run folder; returns the exit code.

    Args:
        args: Engine, role, output folder, folder of the lead's weights, optimizer steps, recipe, overrides.
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
        echo(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
