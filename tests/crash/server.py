"""What the process imports that forks the runs of `harness.py`: all that they need, and nothing that starts threads."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

# OpenBLAS starts its threads when numpy is imported
os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import peft
import torch.utils.serialization
import transformers.models.llama.modeling_llama

import oumi_pl.config.cli
from oumi_pl.__main__ import main
from tests.crash import harness

IMPORTED = (peft, torch, transformers, oumi_pl, harness)


def warm_up() -> None:
    """Reads a recipe, which fills the caches of the parser, and computes nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        recipe = Path(folder) / "r.yaml"
        harness.prepare(recipe.parent / "files")
        before = Path.cwd()
        os.chdir(recipe.parent / "files")
        code = main(["fit", "--config", "r.yaml", "--print_config"])
        os.chdir(before)
    assert code == 0


warm_up()
