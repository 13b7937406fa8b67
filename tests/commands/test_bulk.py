"""`generate --file --output`: many rows in batches, with all their columns, continued after a kill, and scored."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oumi_pl.__main__ import main
from oumi_pl.commands import bulk
from oumi_pl.commands.bulk import PART, Prompt, interval
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from tests.models.test_lora import pretrained
from tests.rollouts import stand_ins
from tests.tiny import write_jsonl

QUESTIONS = ["a", "a longer question", "mid", "the longest question of them all", "b", "cc"]
ROWS = [{"id": f"t-{i}", "prompt": text, "lang": "en"} for i, text in enumerate(QUESTIONS)]
NEW = ["--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bulk")
    tokenizer = ByteTokenizer().build()
    hf = build_model(pretrained(path / "base", initializer_range=0.3), tokenizer=tokenizer)
    export_model(LM(hf), path / "model", tokenizer, stop_tokens=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    return path / "model"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(folder, *args):
    return main(["generate", "--model", str(folder), *NEW, *map(str, args)])


def lines(path):
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def one_by_one(folder, capsys, *args):
    """The completions of `--prompt`, which the other tests of `generate` compare with transformers."""
    capsys.readouterr()
    assert generate(folder, *args, *(part for text in QUESTIONS for part in ("--prompt", text)), "--json") == 0
    return [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]


def test_each_row_is_completed_and_keeps_its_columns(folder, capsys, tmp_path):
    expected = one_by_one(folder, capsys, "--batch_size", 1)
    assert len(set(expected)) == len(QUESTIONS)
    assert generate(folder, "--file", write_jsonl(tmp_path / "in.jsonl", ROWS), "--output", "out.jsonl") == 0
    assert "6 completions" in capsys.readouterr().out
    found = lines("out.jsonl")
    for i, (line, row, completion) in enumerate(zip(found, ROWS, expected, strict=True), 1):
        assert line == row | {"row": i, "completion": completion, "finished": line["finished"]}
    assert not (tmp_path / f"out.jsonl{PART}").exists()


def test_rows_of_csv_of_lines_and_of_turns_are_completed_alike(folder, capsys, tmp_path):
    expected = one_by_one(folder, capsys)
    with Path("in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["nr", "ticket"])
        writer.writeheader()
        writer.writerows({"nr": f"0{i}", "ticket": text} for i, text in enumerate(QUESTIONS))
    (tmp_path / "in.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    chats = [{"messages": [{"role": "user", "content": text}], "id": i} for i, text in enumerate(QUESTIONS)]
    answered = [{"question": text, "answer": "gold"} for text in QUESTIONS]
    for name, rows in (("chats", chats), ("answered", answered)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert generate(folder, "--file", "in.csv", "--columns", "prompt=ticket", "--output", "csv.csv") == 0
    with Path("csv.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["completion"] for line in found] == expected
    assert [line["nr"] for line in found] == [f"0{i}" for i in range(6)]
    for name in ("in.txt", "chats.jsonl", "answered.jsonl"):
        assert generate(folder, "--file", name, "--output", f"{name}.out.jsonl") == 0
        assert [line["completion"] for line in lines(f"{name}.out.jsonl")] == expected, name
    assert [line["answer"] for line in lines("answered.jsonl.out.jsonl")] == ["gold"] * 6


def test_vllm_completes_the_same_rows(folder, capsys, tmp_path, monkeypatch):
    expected = one_by_one(folder, capsys)
    stand_ins.install(monkeypatch)
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert generate(folder, "--engine", "vllm", "--file", rows, "--output", "out.jsonl", "--logprobs") == 0
    assert [line["completion"] for line in lines("out.jsonl")] == expected
    assert generate(folder, "--file", rows, "--output", "here.jsonl", "--logprobs") == 0
    for served, here in zip(lines("out.jsonl"), lines("here.jsonl"), strict=True):
        assert (served["token_ids"], served["finished"]) == (here["token_ids"], here["finished"])
        assert served["logprobs"] == pytest.approx(here["logprobs"], abs=1e-5)
    (llm,) = stand_ins.LLM.built
    assert llm.options["generation_config"] == "vllm"


def test_a_sample_of_vllm_does_not_depend_on_the_batch(folder, tmp_path, monkeypatch):
    stand_ins.install(monkeypatch)
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    sampled = ("--engine", "vllm", "--file", rows, "--temperature", 1, "--samples", 2, "--seed", 5)
    assert generate(folder, *sampled, "--output", "one.jsonl", "--batch_size", 1) == 0
    assert generate(folder, *sampled, "--output", "all.jsonl") == 0
    assert lines("one.jsonl") == lines("all.jsonl")
    assert len({line["completion"] for line in lines("all.jsonl")}) > len(ROWS)


def test_vllm_needs_an_exported_model_and_the_extra(folder, capsys, tmp_path, monkeypatch):
    assert main(["generate", "--engine", "vllm", "--checkpoint", "runs/r", "--prompt", "a"]) == 2
    assert "--engine vllm takes an exported model, --model DIR" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert generate(folder, "--engine", "vllm", "--prompt", "a") == 2
    assert "pip install 'oumi_pl[vllm]'" in capsys.readouterr().err


def test_a_column_named_as_one_of_ours_is_kept_under_another_name(folder, tmp_path):
    row = {"question": "a", "answer": "b", "row": 17, "completion": "mine"}
    assert generate(folder, "--file", write_jsonl(tmp_path / "in.jsonl", [row]), "--output", "out.jsonl") == 0
    (line,) = lines("out.jsonl")
    assert (line["row"], line["source_row"], line["source_completion"]) == (1, 17, "mine")


def test_the_columns_of_the_recipe_are_read_beside_its_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder)
    (run / "run.json").write_text("{}")
    train = {"path": "tickets.csv", "columns": {"question": "ticket", "answer": "reply"}}
    (run / "config.yaml").write_text(json.dumps({"data": {"init_args": {"train": train}}}))
    rows = write_jsonl(tmp_path / "in.jsonl", [{"ticket": text} for text in QUESTIONS])
    assert main(["generate", "--model", str(run / "model"), "--file", rows, "--output", "out.jsonl", *NEW]) == 0
    assert [line["ticket"] for line in lines("out.jsonl")] == QUESTIONS


def test_a_function_that_came_with_a_model_runs_only_if_it_is_trusted(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder)
    (run / "run.json").write_text("{}")
    train = {"path": "tickets.csv", "format": "received_format.read"}
    (run / "config.yaml").write_text(json.dumps({"data": {"init_args": {"train": train}}}))
    code = "from pathlib import Path\nfrom oumi_pl.types import Text\nPath('imported').touch()\n"
    (tmp_path / "received_format.py").write_text(code + "def read(row): return Text('', prompt=row['ticket'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = write_jsonl(tmp_path / "in.jsonl", [{"ticket": text} for text in QUESTIONS])
    command = ["generate", "--model", str(run / "model"), "--file", rows, "--output", "out.jsonl", *NEW]
    assert main(command) == 2
    assert "reads rows with the function received_format.read; if you trust" in capsys.readouterr().err
    assert not Path("imported").exists()
    assert main([*command, "--trust"]) == 0
    assert Path("imported").exists()


def test_a_killed_command_is_continued_without_repeating_a_row(folder, tmp_path, monkeypatch, capsys):
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    options = ["--file", rows, "--temperature", 1, "--samples", 2, "--batch_size", 2]
    assert generate(folder, *options, "--seed", 5, "--output", "whole.jsonl") == 0
    completed = []
    original = bulk.Completer.__call__

    def killed(self, prompts, on_text=None):
        if len(completed) == 3:
            raise KeyboardInterrupt
        completed.append([item[:2] for item in prompts])
        return original(self, prompts, on_text)

    monkeypatch.setattr(bulk.Completer, "__call__", killed)
    assert generate(folder, *options, "--seed", 5, "--output", "out.jsonl") == 130
    part = tmp_path / f"out.jsonl{PART}"
    assert "6 of 12 completions are in out.jsonl.part; repeat the command" in capsys.readouterr().err
    with part.open("a") as file:
        file.write('[1, 1, "cut by a k')  # as a kill while the line was written
    assert generate(folder, *options, "--temperature", 0.5, "--seed", 5, "--output", "out.jsonl") == 2
    assert "was begun with another temperature" in capsys.readouterr().err
    monkeypatch.setattr(bulk.Completer, "__call__", original)
    assert generate(folder, *options, "--output", "out.jsonl") == 0  # its seed is in the file
    assert "has 6 of 12 completions" in capsys.readouterr().err
    assert lines("out.jsonl") == lines("whole.jsonl")
    assert [(line["row"], line["sample"]) for line in lines("out.jsonl")] == [
        (r, s) for r in range(1, 7) for s in (1, 2)
    ]
    assert generate(folder, *options, "--output", "out.jsonl") == 2
    assert "exists; name another file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_it_completed(folder, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    script = (
        "import os, signal\nfrom oumi_pl.__main__ import main\nfrom oumi_pl.commands import bulk\n"
        "call = bulk.Completer.__call__\ndone = []\n"
        "def killed(self, prompts, on_text=None):\n    done.append(1)\n"
        "    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return call(self, prompts, on_text)\n"
        "bulk.Completer.__call__ = killed\n"
        f"main(['generate', '--model', {str(folder)!r}, '--file', 'in.jsonl', '--output', 'out.jsonl', "
        "'--batch_size', '2', '--max_new_tokens', '6'])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False, capture_output=True)
    assert done.returncode == -9
    assert len(lines(f"out.jsonl{PART}")) == 1 + 4
    assert generate(folder, "--file", "in.jsonl", "--output", "out.jsonl") == 0
    assert [line["row"] for line in lines("out.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_batches_hold_prompts_of_similar_length_and_equal_room():
    prompts = [(i, 1, Prompt({}, "", [0] * n, 6 if n < 30 else 2)) for i, n in enumerate((3, 31, 9, 4, 8, 31, 5), 1)]
    parts = bulk.batches(prompts, 2)
    assert [[len(prompt.ids) for _, _, prompt in part] for part in parts] == [[31, 31], [9, 8], [5, 4], [3]]


def test_log_probabilities_are_those_of_the_model(folder, tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert generate(folder, "--file", rows, "--output", "out.jsonl", "--logprobs") == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oumi_pl.commands.generate import prompt_ids

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in lines("out.jsonl"):
        prompt, ids = prompt_ids(tokenizer, line["prompt"]), line["token_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected = [float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
        assert line["logprobs"] == pytest.approx(expected, abs=2e-5)
        assert line["logprob"] == pytest.approx(sum(expected), abs=1e-4)


def test_a_stop_string_ends_a_completion_before_it(folder, tmp_path, capsys):
    whole = one_by_one(folder, capsys)
    stop = whole[1][2]
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert generate(folder, "--file", rows, "--output", "out.jsonl", "--stop", stop) == 0
    found = lines("out.jsonl")
    assert [line["completion"] for line in found] == [text.split(stop)[0] for text in whole]
    assert found[1]["finished"]


METRICS = """
def length(completion, row):
    return len(completion)

def checks(completion, row):
    assert row["lang"] == "en"
    return {"known": row["id"] == "t-1", "half": 0.5}

def broken(completion, row):
    raise ValueError("no")
"""


def test_metrics_are_written_beside_the_answers_and_summed_up(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "judge_rows.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = write_jsonl(tmp_path / "in.jsonl", ROWS)
    command = ["--file", rows, "--output", "out.jsonl"]
    assert generate(folder, *command, "--metric", "judge_rows.broken") == 2
    assert "broken failed for row 1: ValueError: no" in capsys.readouterr().err
    monkeypatch.setattr(bulk.Completer, "__call__", None)  # the completions are there already
    assert generate(folder, *command, "--metric", "judge_rows.length", "--metric", "judge_rows.checks") == 0
    out = capsys.readouterr().out
    found = lines("out.jsonl")
    assert [line["length"] for line in found] == [len(line["completion"]) for line in found]
    assert [line["checks/known"] for line in found] == [0, 1, 0, 0, 0, 0]
    assert "checks/known: 0.1667 (95 % interval 0.03005 to 0.5635, 6 rows)" in out
    assert "checks/half: 0.5 (95 % interval 0.5 to 0.5, 6 rows)" in out


def test_the_interval_of_shares_is_wilsons_and_else_of_the_mean():
    assert interval([1.0] * 10) == pytest.approx((1.0, 0.72246, 1.0), abs=1e-4)
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, high - mean) == pytest.approx((2.5, 1.959964 * math.sqrt(5 / 3 / 4)))
    assert low == pytest.approx(2 * mean - high)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"ticket": "b"}], "in.jsonl:2: no format fits the columns ticket"),
        ([{"prompt": "a", "context": "b"}], "in.jsonl:1: "),
        ([{"prompt": "a" * 600}], "in.jsonl:1: it has 6"),
    ],
)
def test_a_row_without_a_usable_prompt_is_named_before_anything_is_generated(folder, rows, message, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", rows)
    assert generate(folder, "--file", "in.jsonl", "--output", "out.jsonl") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
