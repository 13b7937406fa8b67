"""Seven jobs of a user as one shell script, from a dirty CSV to a model that is pushed, quantized and talked with."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands.test_push import Hub, serving
from tests.tiny import LLAMA

pytestmark = pytest.mark.slow  # a dozen commands, each of which imports the package

SCRIPT = Path(__file__).with_name("seven_jobs.sh")
MODEL = {"config": LLAMA | {"vocab_size": 260, "max_position_embeddings": 256}}
ADAMW = {"class_path": "AdamW", "init_args": {"lr": 5e-3, "weight_decay": 0.0}}
TRAINER = {"max_steps": 20}
OWN = """
def polite(completion, row):
    return float("please" in completion or "thank" in completion.lower())
"""


def ticket(i):
    return f"Where is parcel {i}?", f"Parcel {i} is on its way, thank you."


def write_csv(file, rows, columns):
    with file.open("w", encoding="cp1252", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_tickets(folder):
    """60 tickets, of which 20 are repeated under new ids, 5 have no answer, 5 are German and 5 of low quality."""
    rows = [{"ticket": q, "answer": a, "lang": "en", "quality": 3} for q, a in map(ticket, range(60))]
    rows += rows[:20]
    rows += [{"ticket": f"Lost {i}", "answer": "", "lang": "en", "quality": 3} for i in range(5)]
    rows += [
        {"ticket": f"Paket für Köln {i}", "answer": "Ja, morgen früh", "lang": "de", "quality": 3} for i in range(5)
    ]
    rows += [{"ticket": f"spam {i}", "answer": "spam", "lang": "en", "quality": 1} for i in range(5)]
    write_csv(folder / "tickets.csv", [{"id": i} | row for i, row in enumerate(rows)], ["id", *rows[0]])
    new = [{"ticket": ticket(i)[0], "customer": f"Müller {i}"} for i in range(100, 112)]
    with (folder / "new.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, [*new[0]])
        writer.writeheader()
        writer.writerows(new)


def recipe(kind, data, model, arguments, **changes):
    return {
        "seed_everything": 1,
        "model": {"class_path": kind, "init_args": model | {"optimizer": ADAMW}},
        "data": {"class_path": data, "init_args": {"max_length": 128, "batch_size": 8} | arguments},
        "trainer": TRAINER,
        "val_every": 10,
        "checkpoint": {"every": 10},
    } | changes


def write_inputs(folder):
    write_tickets(folder)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day, how can I help?"}]
    chats = [{"messages": [{**turns[0], "content": f"Hello from {i}"}, turns[1]]} for i in range(40)]
    pairs = [
        {"prompt": ticket(i)[0], "chosen": "Please wait, thank you.", "rejected": "Don't know."} for i in range(40)
    ]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in [ticket(1)]]
    for name, lines in {"chats": chats, "pairs": pairs, "oumi": rows * 16}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "my_metrics.py").write_text(OWN)
    source = {"path": "tickets.csv", "encoding": "cp1252", "columns": {"prompt": "ticket", "completion": "answer"}}
    source |= {"where": "lang == 'en' and quality >= 2"}
    clean = {"validation": 0.2, "duplicates": "drop", "bad_rows": "drop"}
    tokenizer = {"tokenizer": {"class_path": "ByteTokenizer"}}
    mixture = {"train": [source | {"weight": 0.8}, {"path": "chats.jsonl", "weight": 0.2}], "weight_by": "targets"}
    trained = {"model": "runs/tickets/model"}
    metrics = {"class_path": "Metrics", "init_args": {"metrics": ["my_metrics.polite"], "max_new_tokens": 24}}
    best = {"checkpoint": {"every": 10, "monitor": "val/polite", "mode": "max"}}
    recipes = {
        "tickets": recipe("SFT", "SFTData", MODEL, {"train": source} | clean | tokenizer),
        "mixed": recipe("SFT", "SFTData", trained, mixture | clean),
        "polite": recipe(
            "DPO",
            "DPOData",
            trained,
            {"train": "pairs.jsonl", "validation": 0.2},
            trainer=TRAINER | {"callbacks": [metrics]},
            **best,
        ),
        "oumi": {
            "model": {"model_name": "runs/tickets/model", "model_max_length": 128, "torch_dtype_str": "float32"},
            "data": {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": "oumi.jsonl"}]}},
            "training": {
                "trainer_type": "TRL_SFT",
                "output_dir": "oumi",
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "save_steps": 0,
            },
        },
    }
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_the_seven_jobs(tmp_path):
    pytest.importorskip("gguf", reason="the last job writes a GGUF file: pip install 'oumi_pl[gguf]'")
    write_inputs(tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "oumi_pl").write_text(f'#!/bin/sh\nexec {sys.executable} -m oumi_pl "$@"\n')
    (commands / "oumi_pl").chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "HF_TOKEN": "hf_of_the_stand_in"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OUMI_PL_CACHE": str(tmp_path / "cache")}
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    with serving() as hub:
        environment["HF_ENDPOINT"] = hub
        done = subprocess.run(
            ["bash", str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    report = json.loads((tmp_path / "runs/tickets/data.json").read_text())
    dropped = {"train": 0, "validation": 0}
    for split in dropped:
        reasons = report[split]["dropped"]
        dropped[split] = sum(n for reason, n in reasons.items() if "repeats" in reason)
        assert report[split]["kept"] == report[split]["rows"] - sum(reasons.values())
    assert sum(dropped.values()) >= 20
    assert sum(n for reason, n in report["train"]["dropped"].items() if "where" in reason) == 10
    state = json.loads((tmp_path / "runs/killed/run.json").read_text())
    assert (state["status"], state["step"]) == ("finished", 40)
    assert "killed" in json.dumps(json.loads((tmp_path / "runs/branch/run.json").read_text())["parent"])
    with (tmp_path / "answers.csv").open(newline="") as lines:
        answers = list(csv.DictReader(lines))
    assert [row["customer"] for row in answers] == [f"Müller {i}" for i in range(100, 112)]
    assert all(row["polite"] in ("0.0", "1.0") for row in answers)
    assert Hub.repositories["someone/tickets"]["private"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= Hub.repositories["someone/tickets"]["files"].keys()
    assert (tmp_path / "gguf/model.gguf").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "conversation.txt").read_text().strip()
