"""`train(config)`: a whole Oumi training config, from its data to the files that it leaves."""

import math
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from oumi_pl.core.configs import PeftSaveMode, TrainingConfig
from oumi_pl.core.layout import write_base, write_layout
from oumi_pl.core.recipe import Engine, Recipe, to_recipe
from oumi_pl.core.trainers.registered import registered_model, trainer_of
from oumi_pl.core.words import spoken
from oumi_pl.errors import UserError
from oumi_pl.runs import lock
from oumi_pl.runs.folders import CHECKPOINTS, CONFIG, read_state
from oumi_pl.terminal.text import echo

LENGTH = ("max_steps", "max_epochs")


def train(config: TrainingConfig, engine: Engine | None = None, verbose: bool = False) -> None:
    """Trains what an Oumi config describes, as the native recipe that it becomes.

    A model that is registered (`oumi_pl.core.registry`) has no recipe; Oumi's own trainer trains it.

    Args:
        config: The config. Its paths are not looked at before they are read; `finalize_and_validate` does that.
        engine: `lightning`, `trl` or `hf`; what Oumi's trainer type stands for when left out.
        verbose: Print what each key of the config became. What is done otherwise than in Oumi is printed in any case.

    Raises:
        UserError: a key has no counterpart, or whatever else is wrong with config or data.
    """
    from oumi_pl.callbacks.stopping import Stopped

    if registered_model(config.model) is not None:
        _train_registered(config, engine)
        return
    recipe = to_recipe(config, engine, online=True)
    if int(os.environ.get("RANK", "0")) == 0:
        lines = [*(became(recipe) if verbose else ()), *differences(recipe)]
        echo("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        name = str(recipe.tree.get("name", "output"))
        file = Path(scratch) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe.tree, sort_keys=False), encoding="utf-8")
        try:
            with spoken():
                cli, run = _fit(file, recipe, name)
        except Stopped:  # by Ctrl-C, say: what is there so far is to be found where it always is
            if stopped := _newest(Path(recipe.tree["runs_dir"]).expanduser(), name):
                write_layout(Path(stopped), config)
            raise
        finally:
            lock.release_all()
    if run is not None and int(os.environ.get("RANK", "0")) == 0:
        write_layout(run, config, cli.trainer.world_size, str(cli.model.causal_lm.hf))
        if config.training.use_peft and config.peft.peft_save_mode == PeftSaveMode.ADAPTER_AND_BASE_MODEL:
            write_base(run, cli.model.causal_lm.hf)
        echo(f"output -> {run}")


def _train_registered(config: TrainingConfig, engine: Engine | None) -> None:
    """Trains a model that the user registered."""
    if engine not in (None, "lightning"):
        raise UserError(
            f"--engine {engine}: {config.model.model_name!r} is registered, and Oumi's own trainer trains it"
        )
    with spoken():
        trainer_of(config).train()
    if int(os.environ.get("RANK", "0")) == 0:
        echo(f"output -> {config.training.output_dir}")


def became(recipe: Recipe) -> list[str]:
    """What each key of the config became, one line each."""
    width = max(map(len, recipe.became), default=0)
    return [f"{key:{width}}  {meaning}" for key, meaning in recipe.became.items()]


def differences(recipe: Recipe) -> list[str]:
    """What is done otherwise than in Oumi, one line each."""
    return [f"note: {text}" for texts in recipe.comments.values() for text in texts]


def _fit(file: Path, recipe: Recipe, name: str) -> tuple[Any, Path | None]:
    """Runs the recipe, or goes on with the run that it names.

    Returns:
        The command line that ran, and the run's folder; twice None if the run to go on with has ended.
    """
    from oumi_pl.callbacks.run_folder import run_directory
    from oumi_pl.config import files
    from oumi_pl.config.cli import CLI

    args, tree, folder = ["--config", str(file)], files.check(file), None
    if recipe.resume is not None:
        # the run's own config is the record of what it does; how long may have changed
        length = {key: tree["trainer"][key] for key in LENGTH if key in tree["trainer"]}
        run = recipe.resume or _newest(Path(tree["runs_dir"]).expanduser(), name)
        if run and not recipe.resume and _has_ended(Path(run), length):
            echo(f"{run} is finished, and has nothing left to train; raise training.max_steps, or num_train_epochs")
            return None, None
        if run and not recipe.resume and not _can_go_on(Path(run), recipe):
            run = None
        if run:
            args += [f"--trainer.{key}={value}" for key, value in length.items()]
            folder, name, args = files.resume_arguments("fit", run, name, args, tree)
            assert folder is not None  # which only `auto` may leave out
            tree = files.check(folder / CONFIG)
    cli: Any = CLI(["fit", *args], recipe=name, resume=folder, trees=[tree])
    return cli, run_directory(cli.trainer)


def _newest(root: Path, name: str) -> str | None:
    """The newest run of an output directory that has begun; None if there is none."""
    runs = [
        path.parent for path in root.glob(f"*/{CONFIG}") if re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.parent.name)
    ]
    return str(max(runs, key=lambda run: read_state(run).get("created_ns", 0))) if runs else None


def _has_ended(run: Path, length: dict[str, int]) -> bool:
    """Whether a run is finished, and was as long as it is to be now."""
    trainer = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")).get("trainer") or {}
    state = read_state(run)
    enough = state.get("step", 0) >= length.get("max_steps", math.inf)
    return state.get("status") == "finished" and (enough or all(trainer.get(k) == v for k, v in length.items()))


def _can_go_on(run: Path, recipe: Recipe) -> bool:
    """Whether a run has a checkpoint, or may be killed before its first: a config that writes none starts over."""
    return recipe.tree["checkpoint"].get("enabled", True) or any((run / CHECKPOINTS).glob("*"))


class _Module(ModuleType):
    """Lets `from oumi_pl import train; train(config)` work as in Oumi: the name is this module, and the function."""

    def __call__(self, config: TrainingConfig, engine: Engine | None = None, verbose: bool = False) -> None:
        """As the function `train`."""
        train(config, engine, verbose)


sys.modules[__name__].__class__ = _Module
