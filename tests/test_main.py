"""Answers that need no heavy import, and exit codes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from oumi_pl import __version__
from oumi_pl.__main__ import main
from oumi_pl.config.files import read_options, write_options

ROOT = Path(__file__).parents[1]

LIGHT = {
    "no arguments": ([], 0, "usage: oumi_pl COMMAND"),
    "--help": (["--help"], 0, "fit       train on a recipe"),
    "--version": (["--version"], 0, f"oumi_pl {__version__}"),
    "recipes": (["recipes"], 0, "quickstart/sft"),
    "unknown command": (["fitt"], 2, "unknown command 'fitt'; did you mean 'fit'?"),
    "no recipe": (["fit"], 2, "fit needs a recipe: oumi_pl fit --config NAME or FILE; recipes: "),
    "recipe that there is not": (
        ["fit", "--config", "sft/gsm8k_smal"],
        2,
        "no recipe 'sft/gsm8k_smal'; did you mean 'sft/gsm8k_small'?",
    ),
    "file that there is not": (
        ["fit", "--config", "lst.yaml"],
        2,
        "--config: no file 'lst.yaml'; did you mean 'list.yaml'?",
    ),
    "--config without value": (["fit", "--config"], 2, "--config: give a recipe by name or path; recipes: "),
    "--config before an option": (["fit", "--config", "--name", "x"], 2, "--config: give a recipe by name or path"),
    "broken YAML": (["fit", "-c", "broken.yaml"], 2, "broken.yaml line 2: not valid YAML: "),
    "key twice": (["fit", "--config=twice.yaml"], 2, "twice.yaml line 4: the key a.b is repeated, first in line 2"),
    "list": (
        ["fit", "--config", "list.yaml"],
        2,
        "a recipe is a mapping (model:, data:, trainer:), and this file is a list",
    ),
    "empty": (["fit", "--config", "empty.yaml"], 2, "and this file is empty"),
    "comments alone": (["fit", "--config", "comments.yaml"], 2, "comments.yaml has no settings; write model:, data:"),
    "not UTF-8": (["fit", "--config", "latin.yaml"], 2, "latin.yaml line 2: not UTF-8 text; save the recipe as UTF-8"),
    "no such date": (["fit", "--config", "date.yaml"], 2, "date.yaml: not valid YAML: "),
    "nothing to resume": (
        ["fit", "--config", "one.yaml", "--resume"],
        2,
        "--resume: nothing to resume for recipe 'one'",
    ),
    "resume of no recipe": (["fit", "--resume"], 2, "--resume: name the recipe of the run (--config NAME or FILE), or"),
    "no run folder": (["fit", "--resume", "runs/erly"], 2, "no run folder runs/erly; did you mean 'runs/early'?"),
    "resume of validate": (["validate", "-c", "one.yaml", "--resume"], 2, "--resume is for fit; for validate, pass"),
    "export without checkpoint": (
        ["export"],
        2,
        "export: the following arguments are required: --checkpoint, --output",
    ),
}

FILES = {
    "one.yaml": b"model: SFT\n",
    "list.yaml": b"- 1\n",
    "empty.yaml": b"\n",
    "comments.yaml": b"# nothing\n\n# model:\n",
    "broken.yaml": b"a: 1\n  b: [\n",
    "twice.yaml": b"a:\n  b: 1\n  c: 2\n  b: 3\n",
    "latin.yaml": b"# x\n# caf\xe9\n",
    "date.yaml": b"day: 2020-13-45\n",
    "runs/early/run.json": b"{}",
}

SCRIPT = """
    import contextlib, io, json, sys
    from oumi_pl.__main__ import main

    answers = []
    for args in json.loads(sys.argv[1]):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = main(args)
        heavy = {"torch", "lightning", "transformers", "jsonargparse", "numpy", "rich"} & sys.modules.keys()
        answers.append([code, text.getvalue(), sorted(heavy)])
    print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """All light answers, from one interpreter that has imported nothing else."""
    directory = tmp_path_factory.mktemp("light")
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    before = sorted(directory.rglob("*"))
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps([args for args, _, _ in LIGHT.values()])]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=True)
    assert sorted(directory.rglob("*")) == before
    return dict(zip(LIGHT, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", LIGHT)
def test_light_answer(answers, case):
    _, code, text = LIGHT[case]
    given_code, given_text, heavy = answers[case]
    assert text in given_text
    assert given_code == code
    assert not heavy
    assert "Traceback" not in given_text
    assert code == 0 or len(given_text.splitlines()) == 1


def test_arguments_that_are_no_text_are_one_message(tmp_path):
    for args in ([b"runs", b"compare", b"\xff"], [b"fit", b"--config", b"\xff.yaml"], [b"\xff"]):
        env = {"PYTHONPATH": str(ROOT), "PATH": ""}
        command = [sys.executable, "-m", "oumi_pl", *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: argument \\udcff")
        assert done.stderr.count(b"\n") == 1


def test_names_of_files_that_are_no_text_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"runs/\xff\x1b")).mkdir(parents=True)
    (tmp_path / os.fsdecode(b"runs/\xff\x1b/run.json")).write_text('{"status": "finished"}')
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-m", "oumi_pl", "runs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "⟨U+DCFF⟩⟨ESC⟩" in done.stdout


def test_what_reads_no_recipe_imports_no_more_than_it_needs(tmp_path):
    """The interpreter itself starts in 20 ms; each of these would take as long again."""
    code = """if True:
        import contextlib, io, sys
        from oumi_pl.__main__ import main
        with contextlib.redirect_stdout(io.StringIO()):
            main(["--help"]), main(["--version"])
        print({"yaml", "subprocess", "traceback", "difflib", "json", "importlib.metadata"} & sys.modules.keys())
    """
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        ("--a.b 1 --c=2 --d=", [("--a.b", "1"), ("--c", "2"), ("--d", "")]),
        ("--a --b -1 --c -.5", [("--a", None), ("--b", "-1"), ("--c", "-.5")]),
        ("-c r.yaml --a+=x", [("--config", "r.yaml"), ("--a+", "x")]),
        ("r.yaml --print_config x", [("r.yaml", None), ("--print_config", None), ("x", None)]),
        ("-h", [("--help", "")]),
        ("--help model", [("--help", "model")]),
        ("--help=model", [("--help", "model")]),
        ("--help --name x", [("--help", ""), ("--name", "x")]),
        ("--model.help SFT", [("--model.help", "SFT")]),
        ("--resume", [("--resume", "")]),
        ("--resume runs/r --name x", [("--resume", "runs/r"), ("--name", "x")]),
        ("--dry_run", [("--dry_run", "true")]),
        ("--dry_run --name x", [("--dry_run", "true"), ("--name", "x")]),
        ("--dry_run false", [("--dry_run", "false")]),
        ("", []),
    ],
)
def test_a_command_line_is_read_as_options_with_values(typed, options):
    assert read_options(typed.split()) == options
    assert read_options(write_options(options)) == options


def test_module_is_the_command(tmp_path):
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-m", "oumi_pl", "fitt"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'fitt'; did you mean 'fit'?\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """As `oumi_pl recipes | head -1`."""
    reader = "import sys; sys.stdin.read(1)"
    piped = f"{sys.executable} -m oumi_pl recipes | {sys.executable} -c '{reader}'"
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["/bin/sh", "-c", piped], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("oumi_pl.__main__._run", interrupt)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("stop", "code"), [(SystemExit(), 0), (SystemExit(3), 3), (SystemExit("no"), 1)])
def test_system_exit_becomes_the_code(monkeypatch, stop, code):
    def leave(*_):
        raise stop

    monkeypatch.setattr("oumi_pl.__main__._run", leave)
    assert main(["fit"]) == code
