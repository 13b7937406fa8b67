"""`recipes`: the list says of each recipe what it is for, what it needs and how to run it, from its own header."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oumi_pl.__main__ import main
from oumi_pl.commands.recipes import listing
from oumi_pl.config import files as recipe_files

ROOT = Path(__file__).parents[2]
NAMES = recipe_files.names()


def said(capsys, *args, code=0):
    assert main(["recipes", *args]) == code
    return "".join(capsys.readouterr())


def refused(capsys, *args):
    message = said(capsys, *args, code=2)
    assert message.startswith("error: recipes: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("name", NAMES)
def test_a_header_tells_purpose_command_and_hardware(name):
    header = recipe_files.header(recipe_files.shipped() / f"{name}.yaml")
    assert header.purpose.endswith(".")
    assert f"oumi_pl fit --config {name}" in " ".join(header.commands[-1].split(" ")[:4])
    assert re.search(r"CPU|GPU", header.hardware)
    assert len(header.hardware) <= 46


def test_the_list_has_all_of_it_in_80_columns(capsys):
    text = said(capsys)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert [line.split()[0] for line in text.splitlines() if line.split("  ")[0] in NAMES] == NAMES
    flat = " ".join(text.split())
    for name in NAMES:
        header = recipe_files.header(recipe_files.shipped() / f"{name}.yaml")
        assert f"{name} {header.hardware} {' '.join(header.purpose.split())}" in flat
    assert "oumi_pl prepare --config pretrain/llama_1b_fsdp2" in text
    assert "oumi_pl fit --config NAME" in text


def test_bold_is_for_terminals_alone(capsys):
    assert "\033" not in said(capsys)
    assert listing(NAMES[:1], bold=True).startswith(f"\033[1m{NAMES[0]}")


def test_the_list_can_be_narrowed(capsys):
    assert "sft/gsm8k_small" not in said(capsys, "quickstart")
    one = said(capsys, "quickstart/sft")
    assert "oumi_pl fit --config quickstart/sft" in one
    assert "quickstart/dpo" not in one


def test_the_readme_lists_what_is_shipped():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("\n## Recipes") :].split("\n\n")[1]
    assert sorted(re.findall(r"`(\w+/[\w.]+)`", table)) == sorted(NAMES)


def test_show_prints_the_file(capsys):
    assert said(capsys, "show", "quickstart/sft") == recipe_files.find("quickstart/sft").read_text(encoding="utf-8")


def test_copy_writes_the_file_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    shipped = recipe_files.find("sft/gsm8k_small").read_bytes()
    assert "oumi_pl fit --config 'my own.yaml'" in said(capsys, "copy", "sft/gsm8k_small", "my own.yaml")
    assert "oumi_pl fit --config folder/gsm8k_small.yaml" in said(capsys, "copy", "sft/gsm8k_small", "folder")
    assert Path("my own.yaml").read_bytes() == Path("folder/gsm8k_small.yaml").read_bytes() == shipped


def test_copy_writes_over_nothing_and_makes_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    assert "mine.yaml exists" in refused(capsys, "copy", "quickstart/sft", "mine.yaml")
    assert "no directory away" in refused(capsys, "copy", "quickstart/sft", "away/mine.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
    assert Path("mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "gsm8k_small"], "unknown recipe 'gsm8k_small'; did you mean 'sft/gsm8k_small'?"),
        (["copy", "quickstart/stf", "x.yaml"], "did you mean 'quickstart/sft'?"),
        (["show"], "show needs NAME: oumi_pl recipes show NAME"),
        (["copy", "quickstart/sft"], "copy needs NAME FILE"),
        (["shwo", "quickstart/sft"], "did you mean 'show'?"),
        (["qickstart"], "did you mean 'quickstart'?"),
    ],
)
def test_refused(capsys, args, message):
    assert message in refused(capsys, *args)


@pytest.mark.parametrize("args", [[], ["show", "quickstart/sft"], ["--help"]])
def test_an_answer_takes_a_fraction_of_a_second(args):
    command = [sys.executable, "-X", "importtime", "-m", "oumi_pl", "recipes", *args]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers", "jsonargparse", "numpy", "rich", "yaml"}
    assert time.perf_counter() - began < 3  # a tenth of this on a machine that has nothing else to do
