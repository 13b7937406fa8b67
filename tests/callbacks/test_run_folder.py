"""What a run writes of itself when it begins."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.errors import UserError
from oumi_pl.report.record import Record
from oumi_pl.runs import folders

CONFIG = "name: Größe 大\n"


def described(folder, report, config=CONFIG, held_out=(), **kwargs):
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(report=lambda: report, held_out_rows=lambda: held_out),
        global_step=0,
        callbacks=[],
        world_size=1,
        precision="32-true",
    )
    module = SimpleNamespace(
        total_steps=lambda: 5,
        parameters=list,
        causal_lm=SimpleNamespace(base=None),
        model_name=None,
        loss=None,
        device=torch.device("cpu"),
    )
    RunFolder(folder, "r", "r", config, **kwargs)._describe(trainer, module, folder)
    return folders.read_state(folder)


def test_files_are_written_as_utf_8_in_any_locale(tmp_path, monkeypatch):
    write_text = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, text, encoding="ascii": write_text(self, text, encoding=encoding)
    )
    state = described(tmp_path, {"train": {"rows": 3}})
    assert Record(tmp_path).config_text == CONFIG
    assert Record(tmp_path).data == {"train": {"rows": 3}}
    assert state["steps"] == 5
    assert "template_date" not in state


def test_the_template_date_is_recorded_and_can_not_change_on_resume(tmp_path):
    dated = {"train": {"rows": 3, "template_date": "2026-03-01"}}
    assert described(tmp_path, dated)["template_date"] == "2026-03-01"
    assert described(tmp_path, dated, resume=tmp_path)["template_date"] == "2026-03-01"
    later = {"train": {"rows": 3, "template_date": "2026-03-02"}}
    with pytest.raises(UserError, match=r"was 2026-03-01 .* set data.template_variables.date: 2026-03-01"):
        described(tmp_path, later, resume=tmp_path)


def test_held_out_rows_are_listed_only_if_a_fraction_is_held_out(tmp_path):
    described(tmp_path, {})
    assert not (tmp_path / folders.HELD_OUT).exists()
    described(tmp_path, {}, held_out=[("tickets", "a.csv row 3"), ("tickets", "a.csv row 9")])
    lines = [json.loads(line) for line in (tmp_path / folders.HELD_OUT).read_text().splitlines()]
    assert lines == [{"source": "tickets", "row": "a.csv row 3"}, {"source": "tickets", "row": "a.csv row 9"}]
