"""`runs`: the list, the comparison and the report, of runs in any state."""

import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest

from oumi_pl.__main__ import main
from oumi_pl.report import listing
from oumi_pl.runs import folders, lock
from tests.report.folders import columns, curve, run_folder, write_metrics

TYPES = json.dumps(
    {"created_ns": "x", "steps": "x", "step": "x", "times": {"a": "x"}, "recipe": 3, "begun": "x", "before": []}
    | {"status": "running", "process": {"pid": "x", "host": socket.gethostname(), "began": "x"}}
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def works(capsys, *args) -> str:
    assert main(["runs", *args]) == 0
    return capsys.readouterr().out


def fails(capsys, *args) -> str:
    assert main(["runs", *args]) == 2
    return capsys.readouterr().err.strip().removeprefix("error: ")


def cells(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in out.splitlines() if line}


def test_lists_runs_the_newest_last_with_state_step_and_losses(here, capsys):
    run_folder(here, "b", created_ns=time.time_ns())
    run_folder(here, "a", created_ns=time.time_ns() - 10**9 * 7200, status="stopped", step=41)
    folders.write_state(here / "a", steps=90)
    out = works(capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["name", "a", "b"]
    assert cells(out)["a"] == ["a", "r", "stopped", "41/90", "0.7345", "0.7906", "0.7906", "10", "s", "2", "h", "ago"]
    assert sum(4 / math.sqrt(step) for step in range(21, 41)) / 20 == pytest.approx(0.7345, abs=1e-4)
    assert cells(out)["b"][-1] == "now"


def test_a_run_whose_process_is_gone_was_killed(here, capsys):
    gone = lock.process() | {"pid": 2**22 - 1}
    reused = lock.process() | {"began": "at another time"}
    elsewhere = lock.process() | {"host": "elsewhere"}
    for name, process in {"gone": gone, "reused": reused, "here": lock.process(), "there": elsewhere}.items():
        run_folder(here, name, status="running", process=process, begun=time.time() - 60, before=10)
    out = works(capsys)
    states = {name: line[2] for name, line in cells(out).items()}
    assert (states["gone"], states["reused"], states["here"], states["there"]) == (
        *("killed", "killed", "running", "running?"),
    )
    assert (
        "note: there is marked as running on elsewhere, which can't be checked from here; its last step was written now"
        in out
    )
    assert cells(out)["gone"][-3:-1] == ["1:10", "min"], "up to the last line, with the sessions before"


def test_a_zombie_process_counts_as_ended():
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        deadline = time.monotonic() + 20
        while lock.began(child.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.began(child.pid) is None
    finally:
        child.wait()
    assert lock.began(os.getpid()) == lock.process()["began"]


def test_broken_folders_do_not_break_the_list(here, capsys):
    run_folder(here, "good")
    for name, text in {"text": "{", "list": "[]", "types": TYPES}.items():
        (here / name).mkdir()
        (here / name / folders.RUN).write_text(text)
    (here / "types" / folders.METRICS).write_text("step,train/loss\nx,y\n1")
    (here / "no-run").mkdir()
    assert set(cells(works(capsys))) == {"name", "good", "text", "list", "types"}


def test_no_runs_says_how_to_start_one(here, capsys):
    assert "no runs in runs yet; start one: oumi_pl fit --config quickstart/sft" in works(capsys)
    assert "no directory other" in fails(capsys, "--runs_dir", "other")


def test_a_narrow_terminal_gets_fewer_columns(here):
    lines = [listing.line(run_folder(here, "a-name-that-is-rather-long", recipe="r"))]
    assert "recipe" in listing.table(lines, None)
    for width in (100, 80, 60, 40):
        table = listing.table(lines, width)
        assert max(map(len, table.splitlines())) <= width
        assert {"name", "state", "step", "val"} <= set(table.split())
    assert "a-name-that-is…" in listing.table(lines, 40)


def test_the_list_imports_nothing_heavy(here):
    run_folder(here, "r")
    code = (
        "import sys; from oumi_pl.__main__ import main; main(['runs']); "
        "print({'torch', 'numpy', 'matplotlib', 'lightning', 'yaml', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_compare_shows_results_and_differing_settings(here, capsys):
    run_folder(here, "one", lr=0.1)
    write_metrics(here / "one", columns() | {"val/loss": {10: 3.0, 20: 1.0, 40: 2.0}})
    run_folder(here, "two", lr=0.2, steps=20)
    out = works(capsys, "compare", "one", str(here / "two"))
    rows = {line.split("  ")[0]: line.split("  ") for line in out.splitlines()}
    assert [c.strip() for c in rows["val/loss, best"] if c.strip()][1:] == ["1 at 20", "1.118 at 20"]
    assert "  model.lr: 0.1 | 0.2\n" in out
    assert "  trainer.max_steps: 40 | 20\n" in out
    assert "name:" not in out
    assert "model.model" not in out, "null in both"
    assert "picture -> runs/compare.png" in out
    assert (here / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "of different kinds" not in out


def test_repeated_runs_are_not_seeds(here, capsys):
    for name in ("base-1", "base-2"):
        run_folder(here, name, seed=3)
    assert "base (2 runs, the same seed)" in works(capsys, "compare", "base-1", "base-2")


def test_differences_in_data_are_named_by_source_and_count(here, capsys):
    """Also if the configs are equal, since a file may have changed; such runs are no repetitions of each other."""
    for name, kept in (("base-1", 10), ("base-2", 12)):
        folder = run_folder(here, name, seed=int(name[-1]))
        sources = [{"source": "a.jsonl", "kept": kept}, {"source": "b.jsonl", "kept": 5}]
        train = {"rows": 20, "kept": kept + 5, "tokens": 100 * kept, "sources": sources}
        (folder / "data.json").write_text(json.dumps({"train": train, "validation": {"kept": 3, "tokens": 40}}))
    out = works(capsys, "compare", "base-1", "base-2")
    assert "  rows of train a.jsonl: 10 | 12\n" in out
    assert "  tokens of train: 1,000 | 1,200\n" in out
    assert "b.jsonl" not in out
    assert "validation" not in out.partition("settings")[2]
    assert "standard deviation" not in out


def test_runs_that_differ_only_in_their_seed_are_one_group_with_error_bars(here, capsys):
    for name, seed, lr, loss in (
        ("base-1", 1, 0.1, 2.0),
        ("base-2", 2, 0.1, 3.0),
        ("base-3", 3, 0.1, 7.0),
        ("other", 1, 0.2, 5.0),
    ):
        run_folder(here, name, seed=seed, lr=lr)
        write_metrics(here / name, columns() | {"val/loss": {20: 9.0, 40: loss}})
    out = works(capsys, "compare", "base-1", "base-2", "base-3", "other")
    table = out.partition("mean ± standard deviation of runs that differ only in their seed:\n")[2]
    head, _, losses = table.splitlines()[:3]
    assert [cell.strip() for cell in head.split("  ") if cell] == ["base (3 runs, seeds 1, 2, 3)", "other"]
    assert [cell.strip() for cell in losses.split("  ") if cell] == ["val/loss", "4 ± 2.6", "5"]
    assert "seed_everything: 1 | 2 | 3 | 1" in out
    assert (here / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "standard deviation" not in works(capsys, "compare", "base-1", "other")


def test_runs_without_a_metric_of_a_known_name_are_drawn(here, capsys):
    for name in ("one", "two"):
        write_metrics(run_folder(here, name), {"of_my_module": {1: 2.0, 2: 1.0}})
    assert "picture -> runs/compare.png" in works(capsys, "compare", "one", "two")


def test_runs_with_other_losses_are_compared_with_a_warning(here, capsys):
    run_folder(here, "one")
    run_folder(here, "two", model={"trainer": "DPO", "loss": "Sigmoid"})
    out = works(capsys, "compare", "one", "two", "--output", "p.png")
    assert "these losses are of different kinds (one: SFT with L, two: DPO with Sigmoid)" in out


def test_a_killed_run_can_be_reported(here, capsys):
    run_folder(here, "r", status="running", process=lock.process() | {"began": "long ago"})
    assert works(capsys, "report", "r") == "report -> runs/r/report.html\n"
    assert "killed after step 40" in (here / "r/report.html").read_text()
    assert json.loads((here / "r" / folders.RUN).read_text())["status"] == "running", "what is written stays"


def test_a_run_whose_state_cannot_be_read_keeps_its_report(here, capsys):
    run_folder(here, "r")
    works(capsys, "report", "r")
    before = (here / "r/report.html").read_bytes()
    (here / "r" / folders.RUN).write_text("{")
    assert main(["runs", "report", "r"]) == 2
    assert "runs report: runs/r/run.json can't be read; put a copy in its place" in capsys.readouterr().err
    assert (here / "r/report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "first", "secnd"], "no run 'secnd' in runs; did you mean 'second'?"),
        (["compare", "first"], "runs compare: name two or more runs; there are also second, empty"),
        (["compare", "first", "first"], "runs compare: name two or more runs"),
        (["compare", "first", "empty"], "has no metrics yet"),
        (["compare", "first", "second", "--output", "a/b.png"], "--output: no directory a"),
        (["compare", "first", "second", "--output", "x.pdf"], "--output: x.pdf has to end in .png"),
        (["compare"], "the following arguments are required: run"),
        (["report", "empty"], "has no metrics yet"),
        (["report", "fist"], "did you mean 'first'?"),
        (["compere", "a"], "runs: unknown action 'compere'; did you mean 'compare'?"),
    ],
)
def test_mistakes(here, capsys, args, message):
    for name in ("first", "second"):
        run_folder(here, name)
    run_folder(here, "empty", steps=0)
    assert message in fails(capsys, *args)


def test_metrics_of_a_run_that_is_being_written(tmp_path):
    write_metrics(tmp_path, {"train/loss": curve(5), "val/loss": {2: 7.0}})
    with (tmp_path / folders.METRICS).open("a") as out:
        out.write("6,0.1")
    actual = folders.read_metrics(tmp_path)
    assert actual["train/loss"][0] == [1, 2, 3, 4, 5]
    assert actual["val/loss"] == ([2], [7.0])
    assert folders.read_metrics(tmp_path, only=("val/loss",)).keys() == {"val/loss"}
    assert folders.read_metrics(tmp_path / "none") == {}
