"""What all tests share: no network, no cache of the user's, one thread per process so that sums come out the same."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def quiet():
    from oumi_pl.cli import _quiet

    _quiet()
