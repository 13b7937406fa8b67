"""The battery of mistakes: what is said, the exit code, and that nothing was written.

`python -m tests.test_error_battery` prints it as a table. Elsewhere: out of memory, and errors of ours, in
`test_errors.py`; what a class of one's own may do wrong, in `test_errors.py` and `test_dpo_command.py`.
"""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from oumi_pl.modules.base import LanguageModule
from tests.command_line import CommandLine
from tests.error_battery_cases import HERE, Case
from tests.error_battery_data import BATTERY, ROWS

ROOT = Path(__file__).parents[1]
FIT = ("fit", "--config", "r.yaml")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def must_not_run(*_):
    raise AssertionError


def told(case: Case, cli: CommandLine, patch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and all that is printed of a case, the directory's name taken out; nothing may be left behind."""
    cli.recipe(case.changes)
    for name, content in case.files.items():
        cli.write(name, content)
    case.before(cli, patch)
    before = cli.files()
    code, _, err = cli.run(*FIT, *case.args.split())
    assert cli.files() == before
    return code, err.replace(str(cli.directory.resolve()), HERE)


@pytest.mark.parametrize("name", BATTERY)
def test_mistake(cli, monkeypatch, name):
    if name in ROWS:  # before any weight is made
        monkeypatch.setattr(LanguageModule, "build", must_not_run)
    assert told(BATTERY[name], cli, monkeypatch) == (2, f"error: {BATTERY[name].message}\n")


def test_full_disk_leaves_whole_checkpoints_and_the_run_goes_on(cli, monkeypatch):
    """The disk fills up while the second checkpoint is written."""
    save, written = torch.save, []

    def filling_up(content, file):
        written.append(file)
        if len(written) == 2:
            file.write(b"a half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr("oumi_pl.runs.checkpoints.torch.save", filling_up)
    steps = ("--trainer.max_steps", "3", "--checkpoint.every", "1")
    code, _, err = cli.run(*FIT, *steps)
    assert code == 2
    assert "error: No space left on device to write runs/r/checkpoints/step-00000002.ckpt" in err
    assert "continue with --resume" in err
    assert [p.name for p in cli.directory.glob("runs/r/checkpoints/*")] == ["step-00000001.ckpt"]
    monkeypatch.undo()
    monkeypatch.chdir(cli.directory)
    assert "resuming runs/r from step-00000001.ckpt" in cli.works("fit", "--resume", "runs/r")
    assert cli.state("runs/r")["status"] == "finished"


def test_ctrl_c_saves_and_says_how_to_go_on(cli):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "oumi_pl", *FIT, "--trainer.max_steps", "100000"]
    run = subprocess.Popen(command, cwd=cli.directory, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = cli.directory / "runs/r/metrics.csv"
    until = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130
    step = cli.state("runs/r")["step"]
    assert err.rstrip().endswith(f"stopped by SIGINT after step {step}; resume it with: oumi_pl fit --resume runs/r")
    assert "Traceback" not in err
    out = cli.works("fit", "--resume", "runs/r", "--trainer.max_steps", str(step + 1))
    assert f"resuming runs/r from step-{step:08}.ckpt" in out
    assert cli.state("runs/r")["step"] == step + 1


class _Printed:
    """What a command prints, as pytest's `capsys` gives it."""

    def __init__(self):
        self.out, self.err = io.StringIO(), io.StringIO()

    def readouterr(self):
        texts = [(stream.getvalue(), stream.truncate(0), stream.seek(0))[0] for stream in (self.out, self.err)]
        return texts[0], texts[1]


def main():
    print("| mistake | what is said | exit code |\n|---|---|---|")
    for name, case in BATTERY.items():
        printed, here = _Printed(), Path.cwd()
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            patch.setenv("OUMI_PL_CACHE", f"{directory}/cache")
            with contextlib.redirect_stdout(printed.out), contextlib.redirect_stderr(printed.err):
                code, said = told(case, CommandLine(Path(directory), patch, printed), patch)
            os.chdir(here)
        said = said.strip().replace("|", "\\|").replace("\n", "<br>")
        print(f"| {name} | {said} | {code} |")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
