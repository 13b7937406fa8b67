"""Configurations for the tests: given in what a user types, loaded or refused."""

import pytest

from oumi_pl.core.configs import OumiConfigError, TrainingConfig

HEAD = "model: {model_name: m}\ndata: {train: {datasets: [{dataset_name: d}]}}\n"
"""The least that a run needs, as a file says it."""

LEAST = ("model.model_name=m", "data.train.datasets=[{dataset_name: d}]")
"""The same as it is typed."""


def load(*typed):
    """The least that a run needs, and what was typed over it."""
    return TrainingConfig.from_yaml_and_arg_list(None, [*LEAST, *typed])


def refused(action, *args, **kwargs):
    """The message with which something is refused."""
    with pytest.raises(OumiConfigError) as error:
        action(*args, **kwargs)
    return str(error.value)
