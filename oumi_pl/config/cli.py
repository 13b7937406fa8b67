"""Extends LightningCLI with the callbacks, loggers and defaults of every run, and with short error messages."""

import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from oumi_pl.callbacks.advice import Advice, PreferenceWarnings
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.dry_run import dry_run
from oumi_pl.callbacks.export import Export
from oumi_pl.callbacks.loop import RunLoop
from oumi_pl.callbacks.memory import Memory
from oumi_pl.callbacks.predictions import Predictions
from oumi_pl.callbacks.progress import ProgressLine
from oumi_pl.callbacks.report import Report
from oumi_pl.callbacks.rollouts import Rollouts, RolloutWarnings
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.samples import Answers, Samples
from oumi_pl.callbacks.start import Start
from oumi_pl.callbacks.stopping import LastStep, Preemption
from oumi_pl.callbacks.throughput import Throughput
from oumi_pl.callbacks.tracking import Tracking
from oumi_pl.config.check import Checker, Parser, options, unwrapped_mistakes
from oumi_pl.config.files import as_written, merged, read_options, with_model
from oumi_pl.config.refusals import (
    launched_devices,
    refuse_contradictions,
    refuse_missing_gpus,
    refuse_seed,
    refuse_unknown_devices,
    refuse_unsupported_precision,
)
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import LanguageModule
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.loggers import names as logger_names
from oumi_pl.runs.metrics import MetricsCSV
from oumi_pl.terminal.screen import Line, quiet
from oumi_pl.terminal.text import echo

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # our plan is already divided among ranks
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` on a recipe.

    Args:
        args: The command line after the program's name.
        recipe: Name of the recipe, by which `--resume` finds its runs.
        resume: Run folder to continue.
        trees: Contents of the recipes, in order.
    """

    engine_callbacks: Sequence[Any] = ()
    """Additional transformers callbacks for the other engines."""

    def __init__(
        self,
        args: list[str],
        recipe: str = "run",
        resume: Path | None = None,
        trees: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.recipe = recipe
        self.resume = resume
        self.trees = trees
        self.command = args[0]
        quiet()
        super().__init__(
            LanguageModule,
            TextData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={name: {"allow_abbrev": False} for name in self.subcommands()} | {"allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command to run: building parsers for all four would take longer than the parsing itself."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks recipes and options, then parses them."""
        checker = Checker(options(self._subcommand_parsers[self.command]))
        typed = read_options(args[1:])
        files = [value for flag, value in typed if flag == "--config"]
        for i, tree in enumerate(self.trees):
            try:
                checker.check_recipe(tree)
            except UserError as error:
                if len(files) < 2 or len(files) != len(self.trees):
                    raise
                raise UserError(f"{files[i]}: {error}") from error
        checker.check_options(typed)
        super().parse_arguments(parser, self.with_initial_model(args))
        refuse_seed(self.config[self.command].get("seed_everything"))

    def with_initial_model(self, args: list[str]) -> list[str]:
        """Replaces `recipe:NAME` by the model of that recipe, which may have to be trained: hence after the checks."""
        if any(flag.endswith("help") for flag, _ in read_options(args[1:])):
            return args
        return with_model(args, {} if self.resume else merged(self.trees))

    def _parse_ckpt_path(self) -> None:
        """Does nothing. Lightning would load the whole checkpoint here to read hyper-parameters, and ours have none."""

    def instantiate_classes(self) -> None:
        """Builds module, data and trainer, and checks that they fit together.

        Raises:
            UserError: a class refuses its arguments, or the parts contradict each other.
        """
        with unwrapped_mistakes():
            super().instantiate_classes()
        config = self.config_init[self.subcommand]
        if self.subcommand != "fit" and config["engine"] != "lightning":
            raise UserError(f"engine: {config['engine']} can only run fit; {self.subcommand} needs --engine lightning")
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        refuse_contradictions(str(self.subcommand), config, self.model, self.datamodule, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command. Settings that Lightning refuses are reported as mistakes of the user."""
        engine = self._get(self.config_init, "engine")
        self._refuse_other_engine(engine)
        try:
            if self._get(self.config_init, "dry_run"):
                dry_run(self.trainer, self.model, self.datamodule, self._get(self.config_init, "ckpt_path"))
            elif engine == "lightning":
                super()._run_subcommand(subcommand)
            else:
                from oumi_pl import adapters

                adapters.run(engine, self.trainer, self.model, self.datamodule, self.engine_callbacks)
        except MisconfigurationException as error:
            raise UserError(f"trainer: {_first_sentence(error)}") from error
        finally:
            Line.end()  # a callback may have failed before the progress line was closed

    def _refuse_other_engine(self, engine: str) -> None:
        """Refuses options that an engine does not support, and checkpoints of another engine."""
        ckpt_path = self._get(self.config_init, "ckpt_path")
        if engine != "lightning" and self._get(self.config_init, "dry_run"):
            raise UserError(f"--dry_run measures Lightning's loop, but --engine {engine} uses its own: leave one out")
        if engine != "lightning" and ckpt_path is not None:
            raise UserError(f"engine: {ckpt_path} is a Lightning checkpoint, which {engine} can't resume")
        if engine == "lightning" and self.resume is not None and any(self.resume.glob("checkpoints/checkpoint-*")):
            raise UserError(f"--resume: {self.resume} was trained by another engine; select it with --engine")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Turns off Lightning's table of results, because `after_validate` prints the metrics."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | {"verbose": False} if "verbose" in kwargs else kwargs

    def after_validate(self) -> None:
        """Prints the metrics."""
        for name, value in self.trainer.callback_metrics.items():
            if "/" in name:
                echo(f"{name:28} {float(value):.6g}")

    after_test = after_validate

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the keys of a recipe besides model, data and trainer."""
        parser.add_argument(
            "--engine",
            type=Literal["lightning", "hf", "trl"],
            default="lightning",
            help="Whose training loop is used: Lightning, transformers.Trainer, or TRL's trainers.",
        )
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; by default the recipe's.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Folder for run folders.")
        steps = "Optimizer steps between validations; by default once per epoch."
        parser.add_argument("--val_every", type=int | None, default=None, help=steps)
        tokens = "Tokens to train on, including padding, rounded up to optimizer steps."
        parser.add_argument("--max_tokens", type=float | None, default=None, help=tokens)
        if self.command == "fit":
            parser.add_argument(
                "--dry_run",
                type=bool,
                default=False,
                help="Try a few updates on the largest micro-batch, and print a table of their time and memory.",
            )
        parser.add_argument("--report", type=bool, default=True, help="Write curves.png and report.html at the end.")
        loggers = "Loggers besides metrics.csv: tensorboard, wandb, mlflow; several as a list or separated by commas."
        parser.add_argument("--logger", type=list[str] | str | None, default=None, help=loggers)
        parser.add_class_arguments(Checkpoints, "checkpoint")
        parser.add_class_arguments(Export, "export")
        parser.add_class_arguments(Predictions, "predictions")
        parser.add_class_arguments(Samples, "samples")
        parser.add_class_arguments(Rollouts, "rollouts")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Builds the recipe's trainer with the callbacks, loggers and limits of every run."""
        config = self._get(self.config_init, "trainer")
        get = lambda key: self._get(self.config_init, key)  # noqa: E731
        kwargs["callbacks"] = self._callbacks(config)
        loggers = config.get("logger")
        kwargs["logger"] = [MetricsCSV(), *_as_list(loggers)] if loggers is not False else False
        kwargs["enable_checkpointing"] = None  # False would refuse `Checkpoints`, which is disabled instead
        kwargs["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        endless = config.get("max_epochs") is None and config.get("max_steps") == -1 and config.get("max_time") is None
        if endless:
            kwargs["max_epochs"] = 1 if get("max_tokens") is None else -1
        if get("val_every") is not None:
            kwargs |= self._validation_by_steps(config, get("val_every"))
        refuse_unknown_devices(config)
        kwargs |= launched_devices(config)
        try:
            trainer = self.trainer_class(**{**config, **kwargs})
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise UserError(f"trainer: {_first_sentence(error)}") from error
        refuse_missing_gpus(config, trainer)
        refuse_unsupported_precision(config.get("precision"), trainer.strategy.root_device)
        if get("max_tokens") is not None:
            self._limit_tokens(trainer, config, get("max_tokens"))
        RunLoop.replace_in(trainer)
        return trainer

    def _callbacks(self, config: Any) -> list[Any]:
        """The callbacks of every run and those of the recipe, in the order in which Lightning calls them."""
        get = lambda key: self._get(self.config_init, key)  # noqa: E731
        folder = RunFolder(
            Path(get("runs_dir")).expanduser(),
            get("name") or self.recipe,
            self.recipe,
            self._yaml(),
            self.resume,
            recipe_text=as_written([Path(str(path)) for path in self._get(self.config, "config") or []]),
            ckpt_path=None if self.resume is not None else self._get(self.config_init, "ckpt_path"),
        )
        if self.subcommand == "predict":
            folder.name += "-predict"
        own = _as_list(config.get("callbacks"))
        watching = [Start(), LastStep(), Memory(), Throughput(), PreferenceWarnings(), get("predictions")]
        if not any(isinstance(c, ProgressBar) for c in own) and config.get("enable_progress_bar") is not False:
            watching.append(ProgressLine())
        watching += self._rollouts(own)
        samples = [] if self._has_samples(own) else [get("samples")]
        # saving comes after them, so that a checkpoint has the state of other callbacks after its step
        checkpoints = get("checkpoint")
        if config.get("enable_checkpointing") is False:
            self._disable(checkpoints, own)
        saving = [checkpoints, Preemption(), get("export")]
        reporting: list[Any] = [Report()] if get("report") else []
        named = logger_names(get("logger"))
        if self.subcommand == "fit" and (named or config.get("logger")):
            reporting.append(Tracking(named))
        return [folder, *watching, Advice(), *own, *samples, *saving, *reporting]

    @staticmethod
    def _disable(checkpoints: Checkpoints, own: list[Any]) -> None:
        """`enable_checkpointing: false` means the same as `checkpoint.enabled: false`."""
        others = [f"trainer.callbacks: {type(c).__name__}" for c in own if isinstance(c, Checkpoint)]
        if checkpoints.monitor is not None:
            others.append("checkpoint.monitor")
        if others:
            raise UserError(f"trainer.enable_checkpointing is false, but {others[0]} keeps checkpoints; drop one")
        checkpoints.enabled = False

    def _has_samples(self, own: list[Any]) -> bool:
        """Whether a callback of the recipe shows samples already. Then settings of `samples` are refused, as unused."""
        names = [type(c).__name__ for c in own if isinstance(c, Answers | Samples)]
        parser, given = self._parser(str(self.subcommand)), self._get(self.config, "samples")
        if names and given["rows"] and given != parser.get_defaults(skip_validation=True)["samples"]:
            raise UserError(f"samples: the recipe's {names[0]} shows what the model writes; set its own arguments")
        return bool(names)

    def _rollouts(self, own: list[Any]) -> list[Any]:
        """What watches online training; nothing for other data, which refuse settings of `rollouts`, as unused."""
        data: Any = self.datamodule
        if data.samples:
            is_own = any(isinstance(callback, Rollouts) for callback in own)
            return [RolloutWarnings(), *([] if is_own else [self._get(self.config_init, "rollouts")])]
        parser, settings = self._parser(str(self.subcommand)), self._get(self.config, "rollouts")
        if settings != parser.get_defaults(skip_validation=True)["rollouts"]:
            raise UserError(f"rollouts: {type(data).__name__} samples no completions while training; leave it out")
        return []

    def _limit_tokens(self, trainer: Any, config: Any, max_tokens: float) -> None:
        """Sets the number of steps from a number of tokens. With padding, an update has rows x `max_length`."""
        if config.get("max_steps", -1) != -1:
            raise UserError("max_tokens and trainer.max_steps both say how long to train: drop one")
        data: Any = self.datamodule
        ranks = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        tokens = data.batch_size * trainer.accumulate_grad_batches * ranks * data.max_length
        if max_tokens < tokens:
            raise UserError(f"max_tokens is {max_tokens:g}, but a single update has {tokens:,} tokens")
        trainer.fit_loop.epoch_loop.max_steps = math.ceil(max_tokens / tokens)

    @staticmethod
    def _validation_by_steps(config: Any, val_every: int) -> dict[str, Any]:
        if config.get("val_check_interval") is not None:
            raise UserError(
                "val_every and trainer.val_check_interval both say when to validate: keep val_every (optimizer steps)"
            )
        if val_every < 1:
            raise UserError(f"val_every is {val_every}, but has to be at least 1 optimizer step")
        # Lightning counts micro-batches, not optimizer steps
        return {
            "val_check_interval": val_every * int(config.get("accumulate_grad_batches") or 1),
            "check_val_every_n_epoch": None,
        }

    def _yaml(self) -> str:
        """The config that reproduces this run, without options that apply to this invocation only."""
        subcommand = str(self.subcommand)
        config: Namespace = self.config[subcommand].clone()
        for key in ("config", "ckpt_path", "weights_only", "dry_run"):
            config.pop(key, None)
        return self._parser(subcommand).dump(_plain(config), skip_none=False, skip_validation=True)


def instantiate(config: dict[str, Any]) -> tuple[LanguageModule, TextData]:
    """Builds module and data of a recipe without a trainer, for exports and previews.

    Raises:
        UserError: a key, class or value is wrong, or a class refuses its arguments.
    """
    quiet()
    parser = Parser()
    # as LightningCLI does: a user's optimizer, for example, need not say the type of its parameters
    parser.add_subclass_arguments(LanguageModule, "model", fail_untyped=False)
    parser.add_subclass_arguments(TextData, "data", fail_untyped=False)
    tree = {"model": config["model"], "data": config["data"]}
    Checker(options(parser)).check_recipe({key: part for key, part in tree.items() if not isinstance(part, Namespace)})
    with unwrapped_mistakes():
        parts = parser.instantiate_classes(parser.parse_object(tree))
    return parts.model, parts.data


def _plain(value: Any) -> Any:
    """A config without enums, which YAML can't hold: Lightning's `Timer(interval: str)` has one as its default."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(item) for key, item in vars(value).items()})
    return value.value if isinstance(value, Enum) else value


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _first_sentence(error: Exception) -> str:
    """The first sentence of an error of Lightning's, without its advice."""
    return " ".join(str(error).split()).split(". ")[0][:300].rstrip(".")
