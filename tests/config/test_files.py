"""Recipes are found by name from anywhere, and read with care."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError

ROOT = Path(__file__).parents[2]


def test_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_files.names()
    for name in recipe_files.names():
        path = recipe_files.find(name)
        assert path.is_file()
        assert recipe_files.check(path)
        assert recipe_files.recipe_name(path) == name.replace("/", "-")


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert recipe_files.find("mine.yaml") == Path("mine.yaml")
    assert recipe_files.recipe_name(Path("mine.yaml")) == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.yml", "did you mean 'mine.yaml'?"),
        ("recipes/sft/gsm8k_smal.yaml", "did you mean 'recipes/sft/gsm8k_small.yaml'?"),
        ("gsm8k_small", "did you mean 'sft/gsm8k_small'?"),
        ("/nowhere/at/all.yaml", "--config: no file '/nowhere/at/all.yaml'"),
    ],
)
def test_nearest_is_offered(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("a: 1")
    with pytest.raises(UserError) as error:
        recipe_files.find(name)
    assert message in str(error.value)


BOMB = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
"""Ten lines that stand for 400 million values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, b: 2}", "r.yaml line 1: the key a.b is repeated, first in line 1; keep one"),
        ("a:\n- x: 1\n- y: 1\n  y: 2", "line 4: the key a[1].y is repeated, first in line 3"),
        ("a: 1\nb: !thing 2", "line 2: not valid YAML: could not determine a constructor for the tag '!thing'"),
        ("a: 1\n---\nb: 2", "line 2: not valid YAML: but found another document"),
        ("a: *b", "line 1: not valid YAML: found undefined alias 'b'"),
        (BOMB, "r.yaml: not valid YAML: its aliases (*name) stand for more than 100,000 values"),
        ("text", "and this file is text"),
        ("3", "and this file is of type int"),
    ],
)
def test_refused(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        recipe_files.check(file)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["a: &x {b: 1}\nc: *x", "\ufeffa: 1", "a: {b: 1}\nc: {b: 1}"])
def test_accepted(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    assert recipe_files.check(file)


def test_merge_is_deep_and_the_later_wins():
    first = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert recipe_files.merge(first, {"a": {"c": {"d": 3}}, "e": [2]}) == {"a": {"b": 1, "c": {"d": 3}}, "e": [2]}
    assert first == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert recipe_files.merge({"a": 1}, {"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling, which builds the wheel")
def test_wheel_holds_what_is_no_code(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"oumi_pl/recipes/{name}.yaml" for name in recipe_files.names()}
    for pattern in ("templates/*.jinja", "bundled/*/*.jsonl"):
        expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "oumi_pl" / "data").glob(pattern)}
    assert expected <= inside


@pytest.mark.parametrize(
    ("second", "options", "fresh"),
    [
        (None, ["--data.train.path", "b.jsonl"], {"path": "b.jsonl", "sample": None, "split": "train"}),
        (None, ["--data.train", "{path: b.jsonl, sample: 3}"], {"path": "b.jsonl", "sample": 3, "split": "train"}),
        ({"path": "b.jsonl"}, [], {"path": "b.jsonl", "sample": None, "split": "train"}),
        ({"path": "b.jsonl"}, ["--data.train.sample", "5"], {"path": "b.jsonl", "sample": 5, "split": "train"}),
        ({"sample": 5}, [], None),
        ({"path": "a.jsonl", "sample": 5}, [], None),
        ("b.jsonl", [], None),
        (None, ["--data.train", "b.jsonl"], None),
    ],
)
def test_a_source_with_another_path_inherits_nothing(second, options, fresh):
    first = {"data": {"class_path": "SFTData", "init_args": {"train": {"path": "a.jsonl", "sample": 12, "split": "x"}}}}
    trees = [first] if second is None else [first, {"data": {"train": second}}]
    added = recipe_files.with_fresh_sources(options, trees)[len(options) :]
    assert [json.loads(option.removeprefix("--data.train=")) for option in added] == ([fresh] if fresh else [])
    whole = recipe_files.merged(trees)["data"]
    if fresh and not options:
        assert {**whole["init_args"], **whole}["train"] == second
