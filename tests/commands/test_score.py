"""`score`: rows in, rewards out, the same as in plain transformers."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.lm import plain_scores
from tests.command_line import CommandLine, jsonl
from tests.models.test_lora import pretrained
from tests.modules.test_reward import loaded_by_transformers
from tests.tiny import conversations, pairs, reward, write_jsonl

TEXTS = [{"prompt": "ab ", "completion": "cd", "id": 7}, {"prompt": "ab ", "completion": "c" * 20, "id": 8}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer, ours = ByteTokenizer().build(), reward()
    torch.manual_seed(0)
    ours.assemble(tokenizer)
    torch.nn.init.normal_(ours.causal_lm.base.score.weight)
    folder = tmp_path_factory.mktemp("models") / "model"
    ours.save(folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def scores(cli, model, rows, *options):
    write_jsonl(cli.directory / "in.jsonl", rows)
    out = cli.works("score", "--model", model, "--input", "in.jsonl", "--output", "out.jsonl", *options)
    lines = [json.loads(line) for line in (cli.directory / "out.jsonl").read_text().splitlines()]
    (cli.directory / "out.jsonl").unlink()
    return out, lines


def plainly(model, texts):
    """What a user of transformers computes, for texts or turns."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]
        if isinstance(text, list)
        else [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for text in texts
    ]
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        return plain_scores(loaded_by_transformers(model, pad), [torch.tensor(row) for row in rows]).tolist()


def test_conversations_and_texts_get_the_scores_of_transformers(cli, model):
    out, lines = scores(cli, model, conversations(9), "--batch_size", "4")
    assert [line["messages"] for line in lines] == [row["messages"] for row in conversations(9)]
    expected = plainly(model, [row["messages"] for row in conversations(9)])
    assert [line["reward"] for line in lines] == pytest.approx(expected, abs=1e-5)
    assert out.startswith("9 rows, rewards from ")
    _, lines = scores(cli, model, TEXTS)
    assert [line["id"] for line in lines] == [7, 8]
    expected = plainly(model, [row["prompt"] + row["completion"] for row in TEXTS])
    assert [line["reward"] for line in lines] == pytest.approx(expected, abs=1e-5)


def test_pairs_get_two_rewards(cli, model):
    rows = [*pairs(6), pairs(1)[0] | {"rejected": pairs(1)[0]["chosen"]}]  # the last one has equal responses
    killed = subprocess.Popen(["true"])
    killed.wait()
    left = cli.directory / f".out.jsonl.{killed.pid}@{socket.gethostname()}.half"
    left.touch()
    out, lines = scores(cli, model, rows)
    assert not left.exists(), "what a killed process was writing"
    for name in ("chosen", "rejected"):
        expected = plainly(model, [row["prompt"] + row[name] for row in rows])
        assert [line[f"reward_{name}"] for line in lines] == pytest.approx(expected, abs=1e-5)
    right = sum(line["reward_chosen"] > line["reward_rejected"] for line in lines)
    assert f"{right / 7:.1%} of 7 pairs have the larger reward" in out


def test_long_rows_are_refused_or_cut(cli, model):
    long = [TEXTS[0], {"prompt": "a" * 600, "completion": "b"}]
    write_jsonl(cli.directory / "in.jsonl", long)
    command = ("score", "--model", model, "--input", "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl:2: 602 tokens, but max_length is 512" in cli.fails(*command)
    _, lines = scores(cli, model, long, "--overflow", "truncate", "--max_length", "10")
    assert lines[1]["reward"] == pytest.approx(plainly(model, ["a" * 8 + "b"])[0], abs=1e-5)


def test_an_adapter_is_scored_with_its_base(cli, model, tmp_path):
    base = pretrained(tmp_path / "base")
    ours = reward(base, lora={"r": 2, "init_lora_weights": False})
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours.assemble(tokenizer)
    ours.save(tmp_path / "adapter", tokenizer=tokenizer)
    _, lines = scores(cli, str(tmp_path / "adapter"), conversations(3))
    expected = plainly(str(tmp_path / "adapter"), [row["messages"] for row in conversations(3)])
    assert [line["reward"] for line in lines] == pytest.approx(expected, abs=1e-5)


MISTAKES = {
    "no format": (jsonl({"prompt": "a", "respons": "b"}), "in.jsonl:1: no format fits the columns prompt, respons"),
    "later row": (jsonl(TEXTS[0], {"prompt": "a", "completion": 3}), "in.jsonl:2: column 'completion' holds a value"),
    "no JSON": ("{", "in.jsonl:1: "),
    "empty": ("", "in.jsonl: the file is empty"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES)
def test_rows_that_are_wrong(cli, model, content, message):
    cli.write("in.jsonl", content)
    assert message in cli.fails("score", "--model", model, "--input", "in.jsonl", "--output", "out.jsonl")


def test_other_mistakes(cli, model, tmp_path):
    write_jsonl(cli.directory / "in.jsonl", TEXTS)
    lm = pretrained(tmp_path / "lm")
    command = ("score", "--input", "in.jsonl", "--output", "out.jsonl", "--model")
    assert "is LlamaForCausalLM, not a reward model; train one" in cli.fails(*command, lm)
    assert "no folder './nothing'" in cli.fails(*command, "./nothing")
    assert "--batch_size is 0, but has to be at least 1" in cli.fails(*command, model, "--batch_size", "0")
    cli.write("out.jsonl", "")
    assert "--output: out.jsonl exists; name another file" in cli.fails(*command, model)
    assert "the following arguments are required: --output" in cli.fails("score", "--model", model, "--input", "x")


def test_help_and_mistakes_import_nothing_heavy():
    code = (
        "import sys; from oumi_pl.__main__ import main; main(['score', '--help']); "
        "main(['score', '--model', 'm']); "
        "print([name for name in ('torch', 'transformers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "reward_chosen" in done.stdout
