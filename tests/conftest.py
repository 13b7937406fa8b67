"""What all tests share: no network, no cache of the user's, one thread per process so that sums come out the same."""

import contextlib
import os
import random
import socket

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))


def free_port() -> str:
    """A port below those that the system hands out by itself: nothing else gets it between the choice and its use."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no port is free")


LEFT_BY_RUNS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")
"""What a run leaves in the environment: the next one would take itself for one of its ranks, or draw its order from its
seed."""


def forget_runs() -> None:
    for name in LEFT_BY_RUNS:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Removed without being restored, as `monkeypatch` would: fixtures of modules start runs outside of any test."""
    forget_runs()
    monkeypatch.setenv("MASTER_PORT", free_port())  # that of an earlier run is taken
    yield
    forget_runs()


DRAWN = (
    "tests.crash.test_damage",
    "tests.report",
    "tests.recipes",
    "tests.callbacks.test_report",
    "tests.commands.test_runs",
    "tests.runs.test_loggers",
    "tests.own",
)
"""Where runs are reported as they are by default."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Drawing the report of a run takes a second, which most tests have no use for."""
    if not request.module.__name__.startswith(DRAWN):
        monkeypatch.setattr("oumi_pl.report.page.make", lambda run, condition=None: None)


@pytest.fixture(autouse=True)
def quietly():
    from oumi_pl.terminal.screen import quiet

    quiet()
