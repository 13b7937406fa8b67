"""Builds the data module of a recipe as `fit` does, without a trainer and without weights; or starts it to sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI, instantiate
from oumi_pl.config.files import PREFIX
from oumi_pl.data.base import TextData
from oumi_pl.data.rollout_loader import Group
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import LanguageModule
from oumi_pl.runs import folders
from oumi_pl.terminal.screen import working


class _Settings(CLI):
    """Parses and checks the command line of `fit`, without building the objects that it describes."""

    def with_initial_model(self, args: list[str]) -> list[str]:
        """Leaves `recipe:NAME` as it is: a preview needs its tokenizer alone."""
        return args

    def instantiate_classes(self) -> None:
        """Instantiates nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def read(configs: Sequence[Path], overrides: Sequence[str]) -> tuple[TextData, list[str]]:
    """Builds the data module that `fit` would train on, and finds its tokenizer.

    Args:
        configs: Recipes; later ones win.
        overrides: `--data.max_length 256` and the like.

    Returns:
        The data with a tokenizer, and notes on other models and on where the tokenizer comes from.

    Raises:
        UserError: for every mistake in the settings of model and data that `fit` would report.
    """
    args = [part for path in configs for part in ("--config", str(path))]
    trees = [recipe_files.check(path) for path in configs]
    settings = _Settings(["fit", *args, *overrides], trees=trees).config["fit"]
    module, data = instantiate({"model": settings.model, "data": settings.data})
    data.micro_batches = settings.trainer.accumulate_grad_batches or 1
    data.workers = 0  # starting processes would take longer than a few rows do
    others = _other_models(module)
    if data.tokenizer_spec is not None or module.tokenizer_name is None:
        return data, others
    data.tokenizer_spec, notes = _tokenizer_of(module.tokenizer_name, Path(settings.runs_dir).expanduser())
    return data, others + notes


def _other_models(module: LanguageModule) -> list[str]:
    """The reference or the teacher that a recipe names."""
    reference = module.reference
    if reference is None or reference.kind == "none":
        return []
    return [f"{reference.role}: {'the model at the start' if reference.is_initial else reference.name}"]


class _Sampling(CLI):
    """Starts the `fit` of a recipe, samples the first groups, and ends it before the first update.

    Args:
        args: The command line of `fit`.
        trees: Contents of the recipes, in order.
        count: Groups to sample.
    """

    def __init__(self, args: list[str], trees: Sequence[dict[str, Any]], count: int) -> None:
        self.sampled = _FirstGroups(count)
        super().__init__(args, trees=trees)

    def _run_subcommand(self, subcommand: str) -> None:
        """Samples, and keeps nothing."""
        if not isinstance(self.datamodule, RolloutData):
            name = type(self.datamodule).__name__
            raise UserError(f"--rollouts: {name} samples no completions while training; RolloutData does (GRPO)")
        self.trainer.callbacks = [self.sampled]  # type: ignore[attr-defined]
        self.trainer.loggers = []
        self.trainer.limit_val_batches = 0
        self.trainer.fit(self.model, datamodule=self.datamodule)


class _FirstGroups(L.Callback):
    """Samples the groups of the first prompts of the first epoch, exactly those of the first update."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.groups: list[Group] = []
        self.advantages = np.empty((0, 0))
        """`[groups, completions]`; of these groups alone."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples, and lets the run end."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        plan = data.plan(0)
        rows = range(min(self.count, plan.rows))
        with working(f"sampling and rewarding {len(rows) * data.completions} completions"):
            self.groups = data.training_groups(plan, 0, rows)
        self.advantages = data.policy.advantages(data.totals(self.groups))
        trainer.fit_loop.epoch_loop.max_steps = 0


def sample(
    configs: Sequence[Path], overrides: Sequence[str], count: int
) -> tuple[RolloutData, list[Group], np.ndarray]:
    """Samples and rewards the first groups of a recipe's first epoch with its initial model, on one device.

    Trains the recipe of the initial model first, if `model` names a recipe that has no finished run, as `fit` does.

    Args:
        configs: Recipes; later ones win.
        overrides: `--data.completions 4` and the like.
        count: Groups to sample.

    Returns:
        The data, the groups, and their advantages `[groups, completions]`.

    Raises:
        UserError: for every mistake that `fit` would report, and for data that sample nothing.
    """
    trees = [recipe_files.check(path) for path in configs]
    args = [part for path in configs for part in ("--config", str(path))]
    cli = _Sampling(["fit", *args, *overrides, "--trainer.devices", "1"], trees, count)
    data: Any = cli.datamodule
    return data, cli.sampled.groups, cli.sampled.advantages


def _tokenizer_of(model: str, root: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a model, and notes. For `recipe:NAME` without a finished run, the tokenizer its model will have.

    Raises:
        UserError: the recipe does not exist, or its tokenizer can't be loaded.
    """
    if not model.startswith(PREFIX):
        return model, []
    name = model.removeprefix(PREFIX)
    path = recipe_files.find(name)
    if folder := folders.last_model(root, recipe_files.recipe_name(path)):
        return str(folder), [f"tokenizer: of {folder}, the newest model of {model}"]
    try:
        data, _ = read([path], [])
        tokenizer = data.tokenizer
    except UserError as error:
        raise UserError(
            f"model: {model} has no finished run in {root}, and its tokenizer can't be loaded: {error}"
        ) from None
    return tokenizer, [
        f"tokenizer: {model} has no finished run in {root} yet; this is the tokenizer that its model will have"
    ]


def title(configs: Sequence[Path]) -> str:
    """The names of the recipes, joined."""
    return " + ".join(folders.recipe_of(path) or recipe_files.recipe_name(path) for path in configs)
