"""The first lines of a run: what is trained on what, with which loss, and where it goes."""

import re

import pytest

from oumi_pl.callbacks import start
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.start import Start, described, summary
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.losses.preference import Sigmoid, WeightedSum
from tests.tiny import data, module, trainer

REPORT = {
    "rows": 1200,
    "kept": 1200,
    "dropped": {},
    "cut": 0,
    "straddled": 0,
    "tokens": 34567,
    "target_tokens": 890,
    "lengths": {"p0": 1, "p50": 20, "p100": 300},
    "fill": 0.5,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A trainer and a module that have begun to train, and where it goes."""
    path = tmp_path_factory.mktemp("start")
    sft, folder = module(lora={"r": 2}), RunFolder(path, "run", "run", "{}")
    built = trainer(max_steps=1, callbacks=[folder])
    built.fit(sft, data(path, validation=0.2))
    return built, sft, folder.directory


def said(begun, monkeypatch, capsys, width):
    for place in ("oumi_pl.terminal.screen", "oumi_pl.callbacks.start"):
        monkeypatch.setattr(f"{place}.terminal_width", lambda: width)
    capsys.readouterr()
    Start().on_train_start(*begun[:2])
    return re.sub(r"\033\[\d*m", "", capsys.readouterr().err).splitlines()


def test_the_first_line_says_what_on_what_with_which_loss_and_where_it_goes(begun, monkeypatch, capsys):
    first, *rest = said(begun, monkeypatch, capsys, None)
    for part in ("SFT of a new LlamaForCausalLM", "k parameters)", "rows-16-0.jsonl", "CrossEntropy", f"-> {begun[2]}"):
        assert part in first
    named = dict(line.split(": ", 1) for line in rest)
    assert {"model", "loss", "train", "validation", "optimizer", "device", "steps"} <= named.keys()
    assert "adapters (LoRA)" in named["model"]
    assert named["device"] == "1 x cpu, precision 32-true"
    assert named["steps"].startswith("1 update of 8 rows each")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_nothing_is_wider_and_what_goes_on_is_indented(begun, monkeypatch, capsys, width):
    lines = said(begun, monkeypatch, capsys, width)
    first = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert lines[0].startswith("SFT of")
    assert all(line.startswith("  ") for line in lines[1:first])
    assert max(len(line) for line in lines[first:]) < width
    assert all(line[: start.LABEL].endswith(" ") for line in lines[first:])


def test_a_loss_is_shown_with_its_own_description():
    assert described(CrossEntropy()).startswith("CrossEntropy: Cross entropy per token")
    assert described(WeightedSum([Sigmoid(), Sigmoid()], [1.0, 1.0])).startswith("WeightedSum of Sigmoid, Sigmoid")


def test_a_report_is_a_line_with_what_was_lost_if_anything_was():
    assert summary(REPORT) == (
        "1,200 rows, all kept, 34,567 tokens, 890 carry loss, length 1/20/300 (min/median/max), fill 50.0%"
    )
    output = summary(REPORT | {"kept": 1100, "dropped": {"too long": 100}, "cut": 7})
    assert "1,200 rows, 1,100 kept, 100 dropped (too long), 7 cut to length" in output
