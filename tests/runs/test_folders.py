"""Run folders: their names, their state, and which one goes on."""

import json
import math
import os
import socket
import zipfile

import pytest

from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from oumi_pl.runs import folders, lock
from oumi_pl.runs.folders import checkpoint_name


def write_checkpoint(file):
    """A checkpoint without content: an archive without files."""
    zipfile.ZipFile(file, "w").close()


def run(root, name="r", recipe="r", status="stopped", created=0, step=None, config=True):
    """A run folder as a run leaves it, with a checkpoint at `step`."""
    folder = root / name
    (folder / folders.CHECKPOINTS).mkdir(parents=True)
    folders.write_state(folder, recipe=recipe, status=status, created_ns=created, step=step)
    if config:
        (folder / folders.CONFIG).write_text("trainer: {max_steps: 9}\n")
    if step is not None:
        write_checkpoint(folder / folders.CHECKPOINTS / checkpoint_name(step))
    return folder


def arguments(args=(), resume="", recipe="r", tree=None, command="fit"):
    return recipe_files.resume_arguments(command, resume, recipe, list(args), tree or {})


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        arguments(*args, **kwargs)
    return str(error.value)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    lock.release_all()


def test_names_are_numbered(tmp_path):
    root = tmp_path / "a" / "runs"
    told_and_made = [(folders.free(root, "r").name, folders.create(root, "r").name) for _ in range(3)]
    assert told_and_made == [("r", "r"), ("r-2", "r-2"), ("r-3", "r-3")]
    assert (tmp_path / "a/runs/r-3/checkpoints").is_dir()


def test_leftovers_of_killed_processes_are_removed_and_block_no_name(tmp_path):
    gone, here = 2**22 - 1, socket.gethostname()
    (tmp_path / f".r.{gone}@{here}.half" / "checkpoints").mkdir(parents=True)
    (tmp_path / f".r.{os.getppid()}@{here}.half").mkdir()  # in the making
    (tmp_path / "new.half").mkdir()  # not ours
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)  # without run.json
    (tmp_path / "r-2").mkdir()
    (tmp_path / "r-2" / "mine.txt").touch()
    assert folders.free(tmp_path, "r").name == "r"
    assert folders.create(tmp_path, "r").name == "r"
    assert folders.create(tmp_path, "r").name == "r-3"
    assert {path.name for path in tmp_path.glob("*half")} == {f".r.{os.getppid()}@{here}.half", "new.half"}


def test_leftovers_in_a_run_are_removed(tmp_path):
    folder = run(tmp_path, step=1)
    (tmp_path / "victim").mkdir()
    (folder / "checkpoints" / "step-2.ckpt.half").mkdir()
    (folder / "run.json.17.half").touch()
    (folder / "model.half").symlink_to(tmp_path / "victim")
    folders.remove_leftovers(folder)
    assert list(folder.rglob("*.half")) == []
    assert (tmp_path / "victim").is_dir()


def test_a_run_folder_appears_complete_or_not_at_all(tmp_path):
    def fill(folder):
        assert not (tmp_path / "r").exists()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folders.create(tmp_path, "r", fill)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for refuse in (folders.refuse_unwritable, lambda root: folders.create(root, "r")):
        with pytest.raises(UserError, match=r"runs_dir: can't write to .*file/runs"):
            refuse(tmp_path / "file" / "runs")
    folders.refuse_unwritable(tmp_path / "new" / "runs")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        folders.refuse_unwritable(tmp_path / "runs")


def test_state(tmp_path):
    assert folders.read_state(tmp_path) == {}
    folders.write_state(tmp_path, status="running", step=1)
    folders.write_state(tmp_path, status="failed")
    assert folders.read_state(tmp_path).items() >= {"status": "failed", "step": 1}.items()
    for garbage in ("{", "[]", ""):
        (tmp_path / folders.RUN).write_text(garbage)
        assert folders.read_state(tmp_path) == {}


STATE = {"step": 3, "steps": None, "begun": 1, "times": {"training": 1.5, "saving": 1}, "resumed": [2, 4], "why": None}
STATE |= {
    "status": "running",
    "process": {"host": "a", "pid": 7, "began": None},
    "metrics": {"train/loss": None},
    "more": {},
}


def test_values_of_another_type_are_left_out_of_the_state(tmp_path):
    def read(state):
        (tmp_path / folders.RUN).write_text(json.dumps(state))
        return folders.read_state(tmp_path)

    assert read(STATE) == {key: value for key, value in STATE.items() if key != "steps"}  # which is always a number
    for wrong in ([[]], {"a": [1]}, True, ["", 1], {"": {"": []}}):
        assert read(dict.fromkeys(folders.State.__annotations__, wrong)).keys() <= {"environment", "parent"}
    for key, wrong in {
        "times": {"training": "1"},
        "resumed": [2, "4"],
        "step": 3.5,
        "begun": "1",
        "status": None,
    }.items():
        assert read(STATE | {key: wrong}) == {k: v for k, v in STATE.items() if k not in (key, "steps")}


def test_newest_unfinished_run_of_the_recipe(tmp_path):
    run(tmp_path, "r", created=1)
    run(tmp_path, "r-2", created=5, status="finished")
    run(tmp_path, "r-3", created=3, status="running")
    run(tmp_path, "other", created=9, recipe="other")
    (tmp_path / "no-run").mkdir()
    assert folders.last_unfinished(tmp_path, "r").name == "r-3"


def test_named_run(tmp_path):
    run(tmp_path, "first", created=1)
    run(tmp_path, "first-2", created=2)
    run(tmp_path, "firsts", created=3)
    run(tmp_path, "second", created=4)
    assert folders.last_unfinished(tmp_path, "r", "first").name == "first-2"
    with pytest.raises(UserError, match="nothing to resume for recipe 'r' named 'third'"):
        folders.last_unfinished(tmp_path, "r", "third")


def test_the_config_of_a_run_replaces_its_recipe(tmp_path):
    folder = run(tmp_path, "some-name-2", recipe="some")
    assert folders.recipe_of(folder / folders.CONFIG) == "some"
    assert folders.recipe_of(folder / "other.yaml") is None
    assert folders.recipe_of(tmp_path / folders.CONFIG) is None


def test_resumes_from_the_newest_checkpoint(tmp_path, capsys):
    folder = run(tmp_path / "runs", step=4)
    write_checkpoint(folder / folders.CHECKPOINTS / checkpoint_name(10))
    (folder / folders.CHECKPOINTS / "step-00000011.ckpt.half").write_bytes(b"")
    actual, recipe, args = arguments(["--config", "r.yaml", "--trainer.max_steps", "20"])
    assert (actual.name, recipe) == ("r", "r")
    config, checkpoint = "runs/r/config.yaml", "runs/r/checkpoints/step-00000010.ckpt"
    assert args == ["--config", config, "--trainer.max_steps=20", f"--ckpt_path={checkpoint}"]
    assert capsys.readouterr().out == "resuming runs/r from step-00000010.ckpt\n"


def test_resumes_from_an_older_checkpoint_if_the_newest_is_damaged(tmp_path, capsys):
    folder = run(tmp_path / "runs", step=4)
    damaged = folder / folders.CHECKPOINTS / checkpoint_name(10)
    damaged.write_bytes(b"PK")
    _, _, args = arguments(resume="runs/r", args=["--dry_run"])
    assert args[-1] == "--ckpt_path=runs/r/checkpoints/step-00000004.ckpt"
    assert damaged.exists()
    arguments(resume="runs/r")
    printed = capsys.readouterr().out
    assert "resuming runs/r from step-00000004.ckpt\n" in printed
    assert "step-00000010.ckpt is damaged: it can't be read as a checkpoint" in printed
    assert not damaged.exists()


def test_auto_resumes_the_newest_run_of_the_name_or_starts_one(tmp_path, capsys):
    assert arguments(["--config", "r.yaml"], resume="auto") == (None, "r", ["--config", "r.yaml"])
    assert "there is no run of r in runs yet; starting one" in capsys.readouterr().out
    run(tmp_path / "runs", "r", created=1, step=3)
    run(tmp_path / "runs", "other", created=5, step=4)
    assert arguments(resume="auto")[0].name == "r"
    assert arguments(["--name", "other"], resume="auto")[0].name == "other"


def test_auto_does_nothing_for_a_finished_run_unless_its_length_was_raised(tmp_path):
    run(tmp_path / "runs", status="finished", step=9)
    with pytest.raises(recipe_files.NothingToDo, match="runs/r is finished, at step 9; to train it further: --resume"):
        arguments(resume="auto")
    with pytest.raises(recipe_files.NothingToDo):  # the command that made the run, once more
        arguments(["--trainer.max_steps=9"], resume="auto")
    assert arguments(["--trainer.max_steps=10"], resume="auto")[0].name == "r"


def test_a_run_whose_state_cannot_be_read_is_not_passed_over(tmp_path):
    (run(tmp_path / "runs", step=3) / folders.RUN).write_text("{")
    run(tmp_path / "runs", "other", step=3)
    for resume in ("auto", ""):
        assert "--resume: runs/r/run.json can't be read" in refusal(resume=resume)
        assert arguments(["--name", "other"], resume=resume)[0].name == "other"


def test_a_resume_takes_the_lock_before_it_reads_the_state(tmp_path):
    folder = run(tmp_path / "runs")
    (folder / lock.LOCK).write_text(json.dumps(lock.process() | {"pid": 1, "began": lock.began(1)}))
    assert "is being written by process 1 on" in refusal(resume="runs/r")
    assert "is being written by process 1 on" in refusal(resume="auto")


def test_restarts_a_run_without_checkpoints(tmp_path, capsys):
    run(tmp_path / "runs")
    _, _, args = arguments()
    assert args == ["--config", "runs/r/config.yaml"]
    assert "from the start: it has no checkpoint yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "tree"), [(["--runs_dir", "out"], {"runs_dir": "no"}), (["--runs_dir=out"], {}), ([], {"runs_dir": "out"})]
)
def test_searches_the_configured_runs_dir(tmp_path, args, tree):
    run(tmp_path / "out")
    assert arguments(args, tree=tree)[0].as_posix() == "out/r"


def test_a_named_run_provides_its_recipe(tmp_path):
    run(tmp_path, "x", recipe="theirs")
    assert arguments(resume="x", recipe="run")[1] == "theirs"


def test_refusals(tmp_path):
    run(tmp_path, "early", config=False)
    run(tmp_path, "broken")
    (tmp_path / "broken" / folders.RUN).write_text("{")
    (tmp_path / "folder").mkdir()
    assert "there is no run of it; leave --resume out to start one" in refusal()
    assert refusal(resume="erly") == "--resume: no run folder erly; did you mean 'early'?"
    assert "folder is not a run folder (it has no run.json)" in refusal(resume="folder")
    assert "has no config.yaml, so it stopped before training began; start a new run" in refusal(resume="early")
    assert "broken/run.json can't be read" in refusal(resume="broken")
    assert "leave out --ckpt_path or --resume" in refusal(["--ckpt_path", "x"], resume="early")
    assert "--resume is for fit; for test, pass the weights" in refusal(command="test")


def test_finished_run(tmp_path):
    run(tmp_path / "runs", status="finished", step=9)
    more = "runs/r --trainer.max_steps MORE"
    assert f"runs/r is finished; to train it further: --resume {more}" in refusal()
    assert f"runs/r is finished, at step 9; to train it further: --resume {more}" in refusal(resume="runs/r")
    assert "runs/r is at step 9 already" in refusal(["--trainer.max_steps", "9"], resume="runs/r")
    assert arguments(["--trainer.max_steps=10"], resume="runs/r")[0].name == "r"
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["status"] == "finished"


def test_the_shown_loss_is_the_mean_of_the_last_updates():
    assert folders.recent([100.0, *[2.0] * 10, *[4.0] * 10]) == 3.0
    assert folders.recent([1.0, 2.0]) == 1.5
    assert math.isnan(folders.recent([1.0, math.nan]))
