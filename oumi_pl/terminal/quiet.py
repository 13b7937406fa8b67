"""Silences log noise from dependencies; keeps warnings about the run."""

import logging
import os
import warnings
from typing import Any

from oumi_pl.terminal.progress import styled, terminal_width, wrapped


def _formatted(message: Any, *_: Any, **__: Any) -> str:
    """A warning in yellow, its lines cut between words; where there is no terminal, one line."""
    return styled(wrapped(f"warning: {message}", terminal_width()), "yellow") + "\n"


def quiet() -> None:
    """Silences the loggers and warnings of dependencies, and formats the warnings that remain."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # users need to know what is wrong, not which line of which file warned
    warnings.formatwarning = _formatted
    for harmless in (
        ".*does not have many workers.*",  # tokenizing is done before training: collating is all that a worker would do
        ".*ModelCheckpoint.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation was asked for
        ".*LightningCLI's args parameter is intended.*",
        ".*already initialized or opened.*",
        # sums over all ranks, and the step, are the same on each
        ".*recommended to use `self.log\\('(step|(val|test)/.*)', .*sync_dist=True.*",
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft asks for it
        ".*`gradient_checkpointing_enable` is deprecated.*",  # trl calls it
    ):
        warnings.filterwarnings("ignore", harmless)
