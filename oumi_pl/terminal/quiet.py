"""Silences log noise from dependencies; keeps warnings about the run."""

import logging
import os
import warnings
from typing import Any

from oumi_pl.terminal.progress import styled, terminal_width, wrapped


def _formatted(message: Any, *_: Any, **__: Any) -> str:
    """Formats a warning: yellow and wrapped on a terminal, one line elsewhere."""
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
        ".*does not have many workers.*",  # rows are tokenized before training, so workers only collate
        ".*ModelCheckpoint.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # the recipe names no validation rows
        ".*LightningCLI's args parameter is intended.*",
        ".*already initialized or opened.*",
        # we log the step and sums over all ranks, which are equal on every rank
        ".*recommended to use `self.log\\('(step|(val|test)/.*)', .*sync_dist=True.*",
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft asks for it
        ".*`gradient_checkpointing_enable` is deprecated.*",  # trl calls it
    ):
        warnings.filterwarnings("ignore", harmless)
