"""Escape sequences in names, values and data reach no terminal, whichever command prints them."""

import json
import shutil

import pytest

from tests.crash.harness import Child, prepare, works
from tests.tiny import conversations, write_jsonl

ESC = "\x1b[31m\x9b31m\x1b]0;title\x07"
FIT = ("fit", "--config", "r.yaml")
RUN = f"runs/run{ESC}"
OWN = f"""
import lightning as L

class Raises(L.Callback):
    def on_train_start(self, trainer, module):
        raise RuntimeError({ESC!r})
"""
CHANGES = {
    "name": f"run{ESC}",
    "data.init_args.train": {"path": "rows.jsonl", "name": f"source{ESC}"},
    "data.init_args.max_length": 60,
    "trainer.max_steps": 2,
    "checkpoint.every": 1,
    "checkpoint.monitor": None,
    "val_every": 1,
}


def rows(n):
    """Rows with escape sequences in their texts, and in the name of a column that nothing reads."""
    for row in conversations(n):
        user, assistant = row["messages"]
        turns = [user | {"content": user["content"] + ESC}, assistant | {"content": ESC + assistant["content"]}]
        yield {"messages": turns, f"column{ESC}": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run, and one of which another program has written the state."""
    base = tmp_path_factory.mktemp("escapes") / "base"
    prepare(base, changes=CHANGES)
    write_jsonl(base / "rows.jsonl", rows(12))
    write_jsonl(base / "held-out.jsonl", rows(2))
    (base / "own.py").write_text(OWN)
    text = works(base, *FIT)
    assert_no_escapes(text)
    received = shutil.copytree(base / RUN, base / f"runs/received{ESC}")
    state = json.loads((received / "run.json").read_text())
    (received / "run.json").write_text(json.dumps(state | {"status": f"s{ESC}", "recipe": ESC, "phases": [ESC]}))
    metrics = (received / "metrics.csv").read_text()
    (received / "metrics.csv").write_text(metrics.replace("train/lr", f"train/{ESC[:5]}"))
    return base


def assert_no_escapes(text):
    assert "Traceback" not in text, text
    assert "\x1b" not in text, ascii(text)
    assert "\x9b" not in text, ascii(text)
    assert "\x07" not in text, ascii(text)


slow = pytest.mark.slow
CHECKPOINT = ("--ckpt_path", f"{RUN}/checkpoints/step-00000002.ckpt")
COMMANDS = {
    "an unknown command": (ESC,),
    "a key that does not exist": (*FIT, f"--data.{ESC}", "1"),
    "a value": (*FIT, "--trainer.max_steps", ESC),
    "runs": ("runs",),
    "a run that does not exist": ("runs", "report", ESC),
    "generate": (
        *("generate", "--model", f"{RUN}/model", "--prompt", f"a{ESC}", "--max_new_tokens", "2"),
        *("--output", f"one{ESC}.jsonl"),  # a pipe gets completions as they are
    ),
    "preview": ("preview", "--config", "r.yaml", "--tokens"),
    "recipes": ("recipes", "copy", "quickstart/sft", f"{ESC}.yaml"),
    "resume": ("fit", "--resume", f"runs/received{ESC}", "--trainer.max_steps", "3"),
    "resume a finished run": (*FIT, "--resume", "auto"),
}
SLOW = {
    "fit --dry_run": (*FIT, "--dry_run"),
    "fit --engine hf": (*FIT, "--engine", "hf", "--name", f"hf{ESC}"),
    "fit --report": (*FIT, "--report", "true", "--name", f"report{ESC}"),
    "fit --print_config": (*FIT, "--print_config"),
    "validate": ("validate", "--config", "r.yaml", *CHECKPOINT),
    "test": ("test", "--config", "r.yaml", "--data.test", "held-out.jsonl", *CHECKPOINT),
    "predict": ("predict", "--config", "r.yaml", "--data.predict", "held-out.jsonl", *CHECKPOINT),
    "runs report": ("runs", "report", RUN),
    "runs report of a received run": ("runs", "report", f"runs/received{ESC}"),
    "runs compare": ("runs", "compare", RUN, f"runs/received{ESC}", "--output", f"{ESC}.png"),
    "export": ("export", "--checkpoint", RUN, "--output", f"again{ESC}"),
    "push": ("push", f"{RUN}/model", f"me/x{ESC}", "--dry_run"),
    "push to a name": ("push", f"{RUN}/model", "me/x", "--dry_run"),
    "generate from a file": (
        *("generate", "--checkpoint", RUN, "--file", "held-out.jsonl", "--max_new_tokens", "2"),
        *("--output", f"{ESC}.jsonl"),
    ),
    "preview to a page": ("preview", "--config", "r.yaml", "--html", f"{ESC}.html"),
    "compare": ("compare", "--config", "r.yaml", "--engines", "lightning,hf", "--steps", "1"),
}


@pytest.mark.parametrize("name", [*COMMANDS, *(pytest.param(name, marks=slow) for name in SLOW)])
def test_no_command_prints_an_escape_sequence(base, name):
    child = Child(base, *(COMMANDS | SLOW)[name])
    assert child.wait() in (0, 1 if name == "compare" else 2), child.text
    assert_no_escapes(child.text)


def test_an_error_of_own_code_keeps_its_traceback_without_escape_sequences(base):
    child = Child(base, *FIT, "--name", "raises", "--trainer.callbacks", "[{class_path: own.Raises}]")
    assert child.wait() == 1
    assert "the error comes from your file" in child.text
    assert_no_escapes(child.text.replace("Traceback", ""))
