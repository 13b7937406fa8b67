"""Warnings: Lightning's that do not hold here are kept from the terminal, and those that may hold are not."""

import warnings

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector import result

from oumi_pl.terminal.screen import quiet


@pytest.mark.parametrize(
    ("name", "told"), [("step", False), ("val/loss", False), ("test/nll/web", False), ("steps", True), ("mine", True)]
)
def test_advice_on_sync_dist_is_left_out_for_what_is_the_same_on_all_ranks(monkeypatch, name, told):
    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    monkeypatch.setattr(result, "warning_cache", type(result.warning_cache)())
    collection = result._ResultCollection(training=False)
    collection.log("validation_step", name, torch.tensor(1.0), batch_size=1)
    with warnings.catch_warnings(record=True) as actual:
        warnings.resetwarnings()
        quiet()
        collection.metrics(on_step=False)
    assert [name in str(warning.message) for warning in actual] == [True] * told
