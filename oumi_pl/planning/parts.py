"""The parts of a recipe's run, for planning: trainer, module and data, without weights, rows or other processes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI
from oumi_pl.config.files import PREFIX
from oumi_pl.data.trained_bpe import TrainedBPE
from oumi_pl.models.build import vocabulary
from oumi_pl.planning.configs import KNOWN, config_of

KERNELS = ("eager", "sdpa")
"""Values of `model.attn` that run anywhere; others are planned with the attention for packed rows."""


class Parts(CLI):
    """Builds trainer, module and data of a `fit`, and runs nothing."""

    trainer: Any
    model: Any
    datamodule: Any
    is_pretrained: bool
    """Whether the recipe names a model, whose weights a run would load."""
    left_out: tuple[str, ...]
    """Those of `model.compile` and `model.fp8` that the recipe sets: it is planned as if they were off."""

    def with_initial_model(self, args: list[str]) -> list[str]:
        """Leaves `recipe:NAME` as it is: its config is enough."""
        return args

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


@contextmanager
def launched(devices: int) -> Iterator[None]:
    """Sets the environment in which a launcher such as torchrun would start rank 0 of this many processes."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(devices))
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0")
    with patch.dict(os.environ, sizes | ranks | {"TORCHELASTIC_RUN_ID": "plan"}):
        yield


def parts_of(configs: Sequence[Path], overrides: Sequence[str], devices: int, *, with_tokenizer: bool = False) -> Parts:
    """Builds trainer, module and data for a number of devices; call it within `launched`.

    Args:
        configs: Recipes; later ones win.
        overrides: Options of `fit`.
        devices: Number of ranks.
        with_tokenizer: Whether rows will be read.

    Raises:
        UserError: for every mistake that `fit` would report before it loads anything.
    """
    trees = [recipe_files.check(path) for path in configs]
    args = [part for path in configs for part in ("--config", str(path))]
    args += [*overrides, *_sizes(recipe_files.merged(trees), overrides, devices)]
    args += ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices), "--trainer.num_nodes", "1"]
    parts = Parts(["fit", *args], trees=trees)
    parts.is_pretrained = parts.model.model_name is not None
    needing_card = {"model.compile": parts.model.compile_layers, "model.fp8": parts.model.fp8}
    parts.left_out = tuple(key for key, is_set in needing_card.items() if is_set)
    _describe(parts.model, parts.datamodule, devices, with_tokenizer)
    return parts


def _sizes(tree: Mapping[str, Any], overrides: Sequence[str], devices: int) -> list[str]:
    """The option that shards over all devices, for a recipe that names how many shards there are."""
    strategy = (tree.get("trainer") or {}).get("strategy")
    arguments = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    named = [key for key in ("data_parallel_size", "shards") if arguments.get(key) is not None]
    if not named or any("trainer.strategy" in override for override in overrides):
        return []
    others = arguments.get("replicas", 1) * arguments.get("tensor", 1)
    return [f"--trainer.strategy.init_args.{named[0]}", str(max(1, devices // others))]


def _describe(module: Any, data: Any, devices: int, with_tokenizer: bool) -> None:
    """Replaces the names of models and tokenizers in a module and its data by configs and numbers of tokens."""
    name, tokenizer_name = module.model_name, module.tokenizer_name
    module.compile_layers = module.fp8 = False  # `Parts.left_out`
    module.attn = module.attn if module.attn in KERNELS else None
    if name is not None:
        config = initial_config(name, "model", devices, module.revision)
        dtype = config.pop("dtype", "float32")
        module.dtype_name = dtype if module.dtype_name == "auto" else module.dtype_name
        module.model_name, module.config = None, config | (module.config or {})
    if with_tokenizer:
        data.tokenizer_spec = data.tokenizer_spec or tokenizer_name
    elif data.tokenizer_spec is not None:
        data.__dict__["tokenizer"] = Vocabulary(vocabulary_of(data))
    elif name is not None:
        data.__dict__["tokenizer"] = Vocabulary(module.config["vocab_size"])
    elif tokenizer_name is not None:  # that of a teacher
        config = initial_config(tokenizer_name, "data.tokenizer", devices)
        data.__dict__["tokenizer"] = Vocabulary(config["vocab_size"])


def initial_config(name: str, key: str, devices: int, revision: str | None = None) -> dict[str, Any]:
    """The config values of a model by name, also of `recipe:NAME`; call it within `launched`.

    Args:
        name: Folder, id on the hub, or `recipe:NAME`.
        key: The key of the recipe that names it, for messages.
        devices: Number of ranks.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: there is no such model or recipe.
    """
    if not name.startswith(PREFIX):
        return config_of(name, key, revision)
    parts = parts_of([recipe_files.find(name.removeprefix(PREFIX))], [], devices)
    return {"vocab_size": parts.datamodule.tokenizer.size} | parts.model.config


def vocabulary_of(data: Any) -> int:
    """The number of tokens of the tokenizer that data name.

    Raises:
        UserError: it can't be loaded.
    """
    spec = data.tokenizer_spec
    if isinstance(spec, TrainedBPE):
        return spec.vocab_size
    if isinstance(spec, str) and spec in KNOWN:
        return int(KNOWN[spec]["vocab_size"])
    return vocabulary(data.tokenizer)


class Vocabulary:
    """Takes the place of a tokenizer whose ids alone matter.

    Args:
        size: Number of tokens.
    """

    bos_token_id = eos_token_id = pad_token_id = 0
    chat_template = None

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        """A vocabulary with the largest id."""
        return {"": self.size - 1}

    def __len__(self) -> int:
        return self.size
