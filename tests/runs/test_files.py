"""Files are written whole or not at all."""

import os
import socket
from pathlib import Path

import pytest

from oumi_pl.runs import files


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    files.write(tmp_path / "file", "new")
    assert order == [f"{tmp_path}/file.{os.getpid()}@{socket.gethostname()}{files.HALF}", "replace", str(tmp_path)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "file") as half:
        half.write_text("ne")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f"file.{os.getpid()}@{socket.gethostname()}{files.HALF}").symlink_to(tmp_path / "victim")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    files.write(tmp_path / "file", "new")
    assert (tmp_path / "victim").read_text() == "kept"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_folder_replaces_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with files.replacing(tmp_path / "model") as half:
        half.mkdir()
        (half / "new").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
