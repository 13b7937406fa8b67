"""Licences of data sources: from cards in the hub's cache and files beside local data, in the model card."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from oumi_pl.data.licences import licence_of
from oumi_pl.models.export import model_card
from tests.command_line import CommandLine
from tests.tiny import conversations, write_jsonl


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "data").mkdir()
    return write_jsonl(tmp_path / "data/rows.jsonl", [{"text": "a"}])


@pytest.mark.parametrize(
    ("name", "content", "licence"),
    [
        ("README.md", "---\nlicense: cc-by-4.0\ntags: [x]\n---\n# Rows", "cc-by-4.0"),
        ("README.md", "---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: our-terms\n---\n", "our-terms"),
        ("LICENSE", "\n   MIT License\n\nCopyright", "MIT License, in LICENSE"),
        ("LICENCE.txt", "Apache License\n", "Apache License, in LICENCE.txt"),
        ("README.md", "# Rows without a header", None),
        ("README.md", "---\nlicense: '](javascript:x)'\n---\n", None),
        ("README.md", "---\n" + "[" * 5000, None),
        ("LICENSE", "<script>\n", None),
    ],
)
def test_a_card_or_a_licence_beside_local_files(rows, name, content, licence):
    (Path(rows).parent / name).write_text(content)
    for source in (rows, str(Path(rows).parent), f"{Path(rows).parent}/*.jsonl"):
        assert licence_of(source) == licence


def test_the_card_of_a_hub_data_set_is_read_from_the_cache(tmp_path, monkeypatch):
    folder = tmp_path / "datasets--org--rows"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "README.md").write_text("---\nlicense: odc-by\n---\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    config = {"data": {"init_args": {"train": ["org/rows", "org/unknown"]}}}
    card = model_card(config, "", {}, "m", licence=licence_of)
    assert "on `org/rows` (licence: odc-by), `org/unknown`." in card


def test_data_that_are_no_longer_there_have_none(tmp_path):
    assert licence_of(str(tmp_path / "gone.jsonl")) is None


def test_the_card_of_a_run_names_the_licence_of_its_data(tmp_path, monkeypatch, capsys):
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows/a.jsonl", conversations(8))
    (tmp_path / "rows/README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    cli.recipe({"data.init_args.train": "rows", "trainer.max_steps": 1})
    cli.works("fit", "--config", "r.yaml")
    cli.works("export", "--checkpoint", "runs/r", "--output", "out")
    for card in ("runs/r/model/README.md", "out/README.md"):
        assert "on `rows` (licence: cc0-1.0)." in (tmp_path / card).read_text()
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["status"] == "finished"
