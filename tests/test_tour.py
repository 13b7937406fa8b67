"""The guided tour of CONTRIBUTING, "A batch from YAML to loss": its table names each file that runs, and no other."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, threading
from oumi_pl.__main__ import main
from oumi_pl.config.cli import CLI

CLI._callbacks = lambda self, config: []  # what watches a run is no part of the way of a batch
package, functions = sys.argv[1], set()


class FirstLoss(BaseException):
    pass


def trace(frame, event, loss):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
        functions.add((code.co_filename[len(package) + 1 :], code.co_qualname))
    if event == "return" and code.co_qualname == "SFT.loss_sums" and loss is not None:
        sys.setprofile(None)
        raise FirstLoss


threading.setprofile(trace)
sys.setprofile(trace)
try:
    main(["fit", "--config", "quickstart/sft", "--samples.rows", "0", "--report", "false"])
except FirstLoss:
    pass
print(*sorted({file for file, _ in functions}), len(functions), sep="\\n")
"""


def traced(tmp_path):
    environment = os.environ | {"OUMI_PL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "oumi_pl")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *files, functions = done.stdout.splitlines()
    return [file for file in files if file.endswith(".py") and not file.startswith("callbacks/")], int(functions)


def test_the_tour_names_every_file_that_runs_before_the_first_loss(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## A batch from YAML to loss")[1].split("\n## ")[0]
    toured = re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)?\.py)`", text)
    files, functions = traced(tmp_path)
    assert sorted(toured) == sorted(files)
    assert f"{len(files)} files" in text
    assert f"{round(functions, -1)} functions" in text
