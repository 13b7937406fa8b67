"""What the libraries below say of themselves is kept from the terminal; warnings about the run stay."""

import logging
import os
import warnings


def quiet() -> None:
    """Silences them."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # a user needs what is wrong, not which line of which file says so
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for harmless in (
        ".*does not have many workers.*",  # tokenizing is done before training: collating is all that a worker would do
        ".*ModelCheckpoint.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation was asked for
        ".*LightningCLI's args parameter is intended.*",
        ".*already initialized or opened.*",
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft asks for it
        ".*`gradient_checkpointing_enable` is deprecated.*",  # trl calls it
    ):
        warnings.filterwarnings("ignore", harmless)
