"""Runs command lines in this process, in a directory of their own with a tiny recipe in it."""

import copy
import csv
import json
import os
import sys
from pathlib import Path

import yaml

from oumi_pl.__main__ import main
from tests.tiny import LLAMA, conversations, write_jsonl

RECIPE = {
    "seed_everything": 1,
    "model": {
        "class_path": "SFT",
        "init_args": {
            "config": LLAMA,
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
            "schedule": {"class_path": "Cosine", "init_args": {"warmup": 1}},
        },
    },
    "data": {
        "class_path": "SFTData",
        "init_args": {
            "train": "rows.jsonl",
            "tokenizer": {"class_path": "ByteTokenizer"},
            "max_length": 128,
            "batch_size": 2,
        },
    },
    "trainer": {"max_steps": 2, "accelerator": "cpu"},
    "report": False,
    "samples": {"rows": 0},
}

GONE = object()
"""As a change: the key is left out."""


class CommandLine:
    """`fit --config r.yaml` and the like, in a directory with `rows.jsonl` and `r.yaml`."""

    def __init__(self, directory: Path, monkeypatch, capsys):
        self.directory = directory
        self.capsys = capsys
        monkeypatch.chdir(directory)
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it: set it back afterwards
        monkeypatch.setattr(sys, "path", [*sys.path])
        write_jsonl(directory / "rows.jsonl", conversations(16))
        self.recipe()

    def recipe(self, changes=None, file="r.yaml") -> None:
        """Writes the recipe, with values changed by their dotted path."""
        tree = copy.deepcopy(RECIPE)
        for path, value in (changes or {}).items():
            *above, last = path.split(".")
            level = tree
            for key in above:
                level = level.setdefault(key, {})
            level.pop(last, None) if value is GONE else level.update({last: value})
        self.write(file, yaml.safe_dump(tree, sort_keys=False))

    def write(self, file, content) -> None:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def run(self, *args) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, *self.capsys.readouterr()

    def works(self, *args) -> str:
        code, out, err = self.run(*args)
        assert code == 0, err
        return out

    def fails(self, *args) -> str:
        """The message of a mistake: short, without a traceback, and nothing is left behind."""
        before = self.files()
        code, _, err = self.run(*args)
        assert code == 2, err
        assert self.files() == before
        assert "Traceback" not in err
        message = err[err.index("error: ") :]
        assert len(message.splitlines()) <= 5
        return message.strip()

    def files(self) -> set[str]:
        """All files but the cache of tokenized rows."""
        actual = {p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*")}
        return {name for name in actual if not name.startswith("cache") and "__pycache__" not in name}

    def column(self, run, name) -> dict[int, str]:
        """A column of a run's metrics by step, as it was written, empty cells left out."""
        with (self.directory / run / "metrics.csv").open(newline="") as lines:
            return {int(row["step"]): row[name] for row in csv.DictReader(lines) if row.get(name)}

    def state(self, run) -> dict:
        return json.loads((self.directory / run / "run.json").read_text())


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + os.linesep for row in rows)
