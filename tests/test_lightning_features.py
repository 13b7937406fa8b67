"""Lightning's Trainer flags and built-in callbacks: each works, or is refused by name, as the documentation says.

`python -m tests.test_lightning_features` prints the table of `oumi_pl/callbacks/README.md`. By default a few features
are run; all of them, on every kind of training, with `-m slow`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, LearningRateFinder, ThroughputMonitor

from tests.command_line import GONE, CommandLine
from tests.tiny import LLAMA, conversations, pairs, write_jsonl

ROOT = Path(__file__).parents[1]
CALLBACKS = "lightning.pytorch.callbacks."
HERE = "tests.test_lightning_features."
LR, EPOCHS = 0.1, 2


# ---- what is watched


@dataclass
class Seen:
    """What a run did: rows of each update by epoch, rates, weights after each update, norms of gradients."""

    epochs: dict[int, list[list[int]]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    path: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validations: list[int] = field(default_factory=list)
    final: Any = None
    trainer: Any = None

    @property
    def updates(self) -> list[int]:
        return [len(updates) for updates in self.epochs.values()]


RUNS: list[Seen] = []


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


class Watch(L.Callback):
    """Records a run in `RUNS`. The weights before the first update are the first of its path."""

    def on_train_start(self, trainer, pl_module):
        self.seen, self.update = Seen(trainer=trainer, path=[flat(pl_module)]), []
        RUNS.append(self.seen)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.update += batch["sample_ids"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.seen.epochs.setdefault(trainer.current_epoch, []).append(self.update)
            self.seen.path.append(flat(pl_module))
            self.seen.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.update = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.validations.append(trainer.global_step)

    def on_train_end(self, trainer, pl_module):
        self.seen.final = flat(pl_module)


class Quiet(LambdaCallback):
    """Lightning's class takes functions, which a recipe can't write."""

    def __init__(self):
        super().__init__(on_train_batch_end=lambda *args: None)


class Throughput(ThroughputMonitor):
    def __init__(self):
        super().__init__(batch_size_fn=lambda batch: len(batch["sample_ids"]), window_size=2)


# ---- kinds of training


def sft(packing: bool) -> dict[str, Any]:
    data = {"train": "rows.jsonl", "validation": "val.jsonl", "packing": packing}
    return {"model": "SFT", "data": "SFTData", "init_args": data | {"max_length": 128}}


KINDS = {
    "SFT packed": sft(True),
    "SFT padded": sft(False),
    "DPO": {
        "model": "DPO",
        "data": "DPOData",
        "init_args": {"train": "pairs.jsonl", "validation": "val-pairs.jsonl", "max_length": 256},
    },
    "pretraining": {
        "model": "Pretrain",
        "data": "PretrainData",
        "init_args": {"train": "texts.jsonl", "validation": "val-texts.jsonl", "max_length": 64},
    },
}


def write_data(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", conversations(20))
    write_jsonl(folder / "val.jsonl", conversations(3, seed=5))
    write_jsonl(folder / "pairs.jsonl", pairs(10))
    write_jsonl(folder / "val-pairs.jsonl", pairs(3, seed=5))
    for name, seed, rows in (("texts", 1, 16), ("val-texts", 2, 2)):
        texts = [{"text": " ".join(m["content"] for m in row["messages"])} for row in conversations(rows, seed)]
        write_jsonl(folder / f"{name}.jsonl", texts)


def recipe_of(kind: str) -> dict[str, Any]:
    chosen = KINDS[kind]
    return {
        "model": {
            "class_path": chosen["model"],
            "init_args": {
                "config": LLAMA,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": LR}},
                "schedule": {"class_path": "Linear"},
            },
        },
        "data": {
            "class_path": chosen["data"],
            "init_args": chosen["init_args"] | {"tokenizer": {"class_path": "ByteTokenizer"}, "batch_size": 2},
        },
        "trainer": {"max_steps": GONE, "max_epochs": EPOCHS, "callbacks": [{"class_path": f"{HERE}Watch"}]},
    }


# ---- features


@dataclass(frozen=True)
class Feature:
    """A flag or a callback, as changes to a recipe, and what has to come of it.

    same: The weights are bit for bit those of a run without it. updates: How many there are in each epoch, as a
    function of how many there would be. rows: Whether each epoch has all rows once. falls: Whether the rate falls
    linearly to 0 over the updates that ran. check: What else holds of the run and the run without it. refused: A part
    of the message that refuses it.
    """

    changes: dict[str, Any]
    same: bool = True
    updates: Callable[[int], list[int]] = lambda n: [n] * EPOCHS
    rows: bool = True
    falls: bool = True
    check: Callable[[Seen, Seen, CommandLine], None] = lambda seen, plain, cli: None
    refused: str = ""


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    path = name if "." in name else CALLBACKS + name
    return {"trainer.callbacks": [{"class_path": path, "init_args": init_args}, {"class_path": f"{HERE}Watch"}]}


def flag(**values: Any) -> dict[str, Any]:
    return {f"trainer.{key}": value for key, value in values.items()}


def averaged(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    assert torch.allclose(seen.final, torch.stack(seen.path[1:]).mean(0), rtol=1e-5, atol=1e-6)
    assert same(seen.path[-1], plain.path[-1])


def moving_average(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    average = seen.path[1]
    for weights in seen.path[2:]:
        average = 0.5 * average + 0.5 * weights
    assert torch.allclose(seen.final, average, rtol=1e-5, atol=1e-6)
    assert same(seen.path[-1], plain.path[-1])


def clipped_to(norm: float) -> Callable[[Seen, Seen, CommandLine], None]:
    def check(seen: Seen, plain: Seen, cli: CommandLine) -> None:
        for (before, after), rate in zip(itertools.pairwise(seen.path), seen.rates, strict=True):
            assert float((after - before).norm()) == pytest.approx(rate * norm, rel=1e-3)

    return check


def clipped_by_value(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    step = (seen.path[1] - seen.path[0]).abs()
    assert float(step.max()) == pytest.approx(LR * 1e-3, rel=1e-2)


def found_rate(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    """The run is that of a recipe which names the rate that was found."""
    (finder,) = (c for c in seen.trainer.callbacks if isinstance(c, LearningRateFinder))
    rate = finder.optimal_lr.suggestion()
    assert seen.rates[0] == rate != LR
    cli.works("fit", "--config", "r.yaml", f"--model.optimizer.lr={rate}", f"--trainer.callbacks={HERE}Watch")
    assert same(RUNS[-1].final, seen.final)


def validated(*steps: Callable[[int], int]) -> Callable[[Seen, Seen, CommandLine], None]:
    def check(seen: Seen, plain: Seen, cli: CommandLine) -> None:
        assert seen.validations == sorted({step(plain.updates[0]) for step in steps})

    return check


def saved(pattern: str, number: int) -> Callable[[Seen, Seen, CommandLine], None]:
    def check(seen: Seen, plain: Seen, cli: CommandLine) -> None:
        assert len([*(cli.directory / "runs").glob(f"r*/{pattern}")]) == number

    return check


def overfitted(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    first, second = seen.epochs.values()
    assert first == second


def close(seen: Seen, plain: Seen, cli: CommandLine) -> None:
    assert seen.losses[:3] == pytest.approx(plain.losses[:3], rel=2e-2)


STOPS = {"monitor": "val/loss", "min_delta": 1000.0, "patience": 1}
"""`EarlyStopping` that stops at the second validation."""
FEATURES: dict[str, Feature] = {
    # callbacks
    "BackboneFinetuning": Feature(callback("BackboneFinetuning"), refused="BackboneFinetuning freezes the `backbone`"),
    "BatchSizeFinder": Feature(callback("BatchSizeFinder"), refused="BatchSizeFinder changes the rows of an update"),
    "DeviceStatsMonitor": Feature(callback("DeviceStatsMonitor")),
    "EarlyStopping": Feature(callback("EarlyStopping", **STOPS) | flag(max_epochs=4), same=False, falls=False),
    "EMAWeightAveraging": Feature(callback("EMAWeightAveraging", decay=0.5), same=False, check=moving_average),
    "GradientAccumulationScheduler": Feature(
        callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 2}),
        same=False,
        updates=lambda n: [n, math.ceil(n / 2)],
    ),
    "LambdaCallback": Feature(callback(f"{HERE}Quiet")),
    "LearningRateFinder": Feature(
        callback("LearningRateFinder", num_training_steps=19, min_lr=1e-3) | flag(max_epochs=4),
        same=False,
        updates=lambda n: [n] * 4,
        falls=False,
        check=found_rate,
    ),
    "LearningRateMonitor": Feature(callback("LearningRateMonitor")),
    "ModelCheckpoint": Feature(callback("ModelCheckpoint"), check=saved("checkpoints/epoch=*.ckpt", 1)),
    "ModelPruning": Feature(callback("ModelPruning", pruning_fn="l1_unstructured"), refused="ModelPruning looks for"),
    "ModelSummary": Feature(callback("ModelSummary")),
    "OnExceptionCheckpoint": Feature(callback("OnExceptionCheckpoint", dirpath="failed")),
    "RichModelSummary": Feature(callback("RichModelSummary")),
    "RichProgressBar": Feature(callback("RichProgressBar")),
    "SpikeDetection": Feature(callback("SpikeDetection")),
    "StochasticWeightAveraging": Feature(
        callback("StochasticWeightAveraging", swa_lrs=1e-3), refused="StochasticWeightAveraging copies the weights"
    ),
    "ThroughputMonitor": Feature(callback(f"{HERE}Throughput")),
    "Timer": Feature(callback("Timer", duration="00:01:00:00")),
    "TQDMProgressBar": Feature(callback("TQDMProgressBar")),
    "WeightAveraging": Feature(callback("WeightAveraging"), same=False, check=averaged),
    # flags
    "accumulate_grad_batches": Feature(
        flag(accumulate_grad_batches=2), same=False, updates=lambda n: [math.ceil(n / 2)] * EPOCHS
    ),
    "barebones": Feature(flag(barebones=True), refused="trainer.barebones"),
    "benchmark": Feature(flag(benchmark=True)),
    "check_val_every_n_epoch": Feature(flag(check_val_every_n_epoch=2), check=validated(lambda n: 2 * n)),
    "default_root_dir": Feature(flag(default_root_dir="elsewhere")),
    "detect_anomaly": Feature(flag(detect_anomaly=True)),
    "deterministic": Feature(flag(deterministic=True)),
    "enable_autolog_hparams": Feature(flag(enable_autolog_hparams=False)),
    "enable_checkpointing": Feature(flag(enable_checkpointing=False), check=saved("checkpoints/*", 0)),
    "enable_model_summary": Feature(flag(enable_model_summary=True)),
    "enable_progress_bar": Feature(flag(enable_progress_bar=False)),
    "fast_dev_run": Feature(flag(fast_dev_run=2), same=False, updates=lambda n: [2], rows=False, check=saved("*", 0)),
    "gradient_clip_val": Feature(flag(gradient_clip_val=0.01), same=False, check=clipped_to(0.01)),
    "gradient_clip_algorithm": Feature(
        flag(gradient_clip_val=1e-3, gradient_clip_algorithm="value"), same=False, check=clipped_by_value
    ),
    "inference_mode": Feature(flag(inference_mode=False)),
    "limit_train_batches: number": Feature(
        flag(limit_train_batches=3), same=False, updates=lambda n: [3] * EPOCHS, rows=False
    ),
    "limit_train_batches: share": Feature(
        flag(limit_train_batches=0.5), same=False, updates=lambda n: [n // 2] * EPOCHS, rows=False
    ),
    "limit_val_batches": Feature(flag(limit_val_batches=1)),
    "log_every_n_steps": Feature(flag(log_every_n_steps=3)),
    "logger": Feature(flag(logger=False), check=saved("metrics.csv", 0)),
    "max_epochs": Feature(flag(max_epochs=1), same=False, updates=lambda n: [n]),
    "max_steps": Feature(flag(max_epochs=GONE, max_steps=3), same=False, updates=lambda n: [3], rows=False),
    "max_time": Feature(flag(max_time="00:01:00:00")),
    "min_epochs": Feature(
        callback("EarlyStopping", **STOPS) | flag(max_epochs=4, min_epochs=3),
        same=False,
        updates=lambda n: [n] * 3,
        falls=False,
    ),
    "min_steps": Feature(
        callback("EarlyStopping", **STOPS) | flag(max_epochs=4, min_steps=12, min_epochs=1),
        same=False,
        updates=lambda n: [n] * max(2, 12 // n) + [12 % n] * (2 * n < 12 and 12 % n > 0),
        rows=False,
        falls=False,
        check=saved("checkpoints/step-*.ckpt", 1),
    ),
    "num_sanity_val_steps": Feature(flag(num_sanity_val_steps=1)),
    "overfit_batches": Feature(
        flag(overfit_batches=2), same=False, updates=lambda n: [2] * EPOCHS, rows=False, check=overfitted
    ),
    "precision: bf16-mixed": Feature(flag(precision="bf16-mixed"), same=False, check=close),
    "precision: bf16-true": Feature(flag(precision="bf16-true"), same=False, check=close),
    "precision: 64-true": Feature(flag(precision="64-true"), same=False, check=close),
    "profiler": Feature(flag(profiler="simple")),
    "reload_dataloaders_every_n_epochs": Feature(flag(reload_dataloaders_every_n_epochs=1)),
    "sync_batchnorm": Feature(flag(sync_batchnorm=True)),
    "use_distributed_sampler": Feature(flag(use_distributed_sampler=True)),
    "val_check_interval": Feature(
        flag(val_check_interval=2, check_val_every_n_epoch=GONE) | {"trainer.check_val_every_n_epoch": None},
        check=lambda seen, plain, cli: validated(*(lambda n, k=k: k for k in range(2, 2 * plain.updates[0], 2)))(
            Seen(validations=[step for step in seen.validations if step < 2 * plain.updates[0]]), plain, cli
        ),
    ),
}
FAST = ("EMAWeightAveraging", "LearningRateFinder", "reload_dataloaders_every_n_epochs", "overfit_batches")
"""Features that are run by default, on the kinds in turn."""


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours, theirs)


# ---- verdicts


def runs(cli: CommandLine, kind: str, changes: dict[str, Any]) -> tuple[int, str]:
    write_data(cli.directory)
    tree = recipe_of(kind)
    for path, value in tree["model"]["init_args"].items():
        changes = {f"model.init_args.{path}": value} | changes
    cli.recipe(
        {
            "model": tree["model"],
            "data": tree["data"],
            "trainer.max_steps": GONE,
            "trainer.max_epochs": EPOCHS,
            "trainer.callbacks": tree["trainer"]["callbacks"],
        }
        | changes
    )
    code, _, err = cli.run("fit", "--config", "r.yaml")
    return code, err


PLAIN: dict[str, Seen] = {}
"""By kind, the run without any feature."""


def plain(cli: CommandLine, kind: str) -> Seen:
    if kind not in PLAIN:
        code, err = runs(cli, kind, {})
        assert code == 0, err
        PLAIN[kind] = RUNS[-1]
    return PLAIN[kind]


def verdict(cli: CommandLine, name: str, kind: str) -> str:
    """`works` or `refused`; an error if it is neither as the feature says."""
    feature, reference = FEATURES[name], plain(cli, kind)
    cli.directory = cli.directory / "feature"
    cli.directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cli.directory)
        count = len(RUNS)
        code, err = runs(cli, kind, feature.changes)
        if feature.refused:
            assert code == 2, err
            assert feature.refused in err
            assert len(RUNS) == count
            return "refused"
        assert code == 0, err
        hold(feature, RUNS[-1], reference, cli)
    return "works"


def hold(feature: Feature, seen: Seen, reference: Seen, cli: CommandLine) -> None:
    assert seen.updates == feature.updates(reference.updates[0])
    if feature.rows:
        every = Counter(row for update in reference.epochs[0] for row in update)
        assert all(Counter(row for update in updates for row in update) == every for updates in seen.epochs.values())
    if feature.falls:
        total = sum(seen.updates)
        assert seen.rates == pytest.approx([LR * (1 - step / total) for step in range(total)])
    assert same(seen.final, reference.final) == feature.same
    feature.check(seen, reference, cli)


BEFORE = dict.fromkeys(("BackboneFinetuning", "GradientAccumulationScheduler", "LearningRateFinder"), "crashed") | {
    "BatchSizeFinder": "ran, not checked; DPO crashed",
    "ModelCheckpoint": "wrong: outside of the run folder",
    "ModelPruning": "crashed",
    "StochasticWeightAveraging": "ran, not checked",
    "Timer": "crashed",
    "barebones": "refused",
    "enable_checkpointing": "refused",
    "limit_train_batches: number": "wrong: learning rate",
    "limit_train_batches: share": "wrong: learning rate",
    "overfit_batches": "wrong: learning rate; pretraining crashed",
}
"""Verdicts of the same checks on commit d80039a, where it wasn't `works` for all kinds of training."""


def table() -> str:
    """The table of the documentation."""
    names = list(KINDS)
    lines = [f"| | {' | '.join(names)} | before |", "|---" * (len(names) + 2) + "|"]
    for name, feature in FEATURES.items():
        flag, _, value = name.partition(": ")
        cell = "refused" if feature.refused else "works"
        shown = f"`{flag}`" + (f" ({value})" if value else "")
        lines.append(f"| {shown} | " + " | ".join([*[cell] * len(names), BEFORE.get(name, "works")]) + " |")
    return "\n".join(lines) + "\n"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(("name", "kind"), [(name, [*KINDS][number % len(KINDS)]) for number, name in enumerate(FAST)])
def test_a_few_features_of_lightning(cli, name, kind):
    assert verdict(cli, name, kind) == "works"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_of_lightning(cli, name, kind):
    shown = verdict(cli, name, kind)
    flag, _, value = name.partition(": ")
    row = f"| `{flag}`" + (f" ({value})" if value else "") + " | "
    (line,) = (line for line in documented().splitlines() if line.startswith(row))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1 + [*KINDS].index(kind)] == shown


def documented() -> str:
    return (ROOT / "oumi_pl/callbacks/README.md").read_text(encoding="utf-8")


def test_the_documentation_has_the_table():
    assert table() in documented()


def test_each_flag_and_callback_of_lightning_is_in_the_table():
    import inspect

    from lightning.pytorch import callbacks

    bases = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "ProgressBar"}
    elsewhere = {"accelerator", "devices", "num_nodes", "strategy", "plugins", "callbacks", "model_registry"}
    elsewhere |= {"limit_test_batches", "limit_predict_batches", "self"}
    flags = set(inspect.signature(L.Trainer.__init__).parameters) - elsewhere
    shown = {name.partition(":")[0] for name in FEATURES}
    assert shown == (set(callbacks.__all__) - bases) | flags


if __name__ == "__main__":
    print(table())
