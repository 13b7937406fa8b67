"""What a run writes of itself when it begins."""

from pathlib import Path
from types import SimpleNamespace

import torch

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.report.record import Record
from oumi_pl.runs import folders

CONFIG = "name: Größe 大\n"


def test_what_is_read_as_utf_8_is_written_so_whatever_the_locale(tmp_path, monkeypatch):
    write_text = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, text, encoding="ascii": write_text(self, text, encoding=encoding)
    )
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(report=lambda: {"train": {"rows": 3}}),
        global_step=0,
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
    RunFolder(tmp_path, "r", "r", CONFIG)._describe(trainer, module, tmp_path)
    assert Record(tmp_path).config_text == CONFIG
    assert Record(tmp_path).data == {"train": {"rows": 3}}
    assert folders.read_state(tmp_path)["steps"] == 5
