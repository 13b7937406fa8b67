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
def own_port(monkeypatch):
    """A run on several processes leaves its port in the environment, where the next one would find it taken."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def quietly():
    from oumi_pl.quiet import quiet

    quiet()
