"""Tokens that a recipe adds: one id each, rows that start as the mean, trained with LoRA too, and exported."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oumi_pl.commands.export import load_checkpoint
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from tests.command_line import GONE, CommandLine
from tests.data.test_pretrain import pretrain_data
from tests.data.test_splitting import turns, write
from tests.models.test_lora import plain_tokenizer, pretrained

TOKENS = ["<ticket>", "<no ticket>"]
OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 256}


def rows(n=16):
    return [{"messages": turns(f"Is {i} a ticket?", f"<ticket> {i}<no ticket>.")} for i in range(n)]


def test_a_new_token_is_one_id_in_prompts_and_answers(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": turns("Why <ticket>?", "So:<ticket><no ticket>.")}])
    data = SFTData(file, **OPTIONS, tokens=TOKENS)
    example = data.examples("train")[0]
    assert data.added_tokens == [260, 261]
    assert example.input_ids.tolist().count(260) == 2
    assert example.input_ids[example.loss_mask].tolist() == [*b"So:", 260, 261, *b".", 259]
    plain = SFTData(file, **OPTIONS)
    assert plain.made_from() != data.made_from()
    assert data.tokenizer.decode([260], skip_special_tokens=True) == "<ticket>"


def test_documents_have_the_tokens_too(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"text": "one <ticket> two"}])
    data = pretrain_data(file, tokens=TOKENS)
    (ids,) = data.shards("train")[0].read(0)
    assert ids.tolist().count(data.added_tokens[0]) == 1


def test_tokens_of_the_chat_template_are_added_beside_them(tmp_path):
    folder = pretrained(tmp_path / "base", plain_tokenizer())
    data = SFTData(write(tmp_path / "rows.jsonl", rows()), tokenizer=folder, template="chatml", tokens=TOKENS)
    tokenizer = data.tokenizer
    assert tokenizer.convert_ids_to_tokens(data.added_tokens[:2]) == TOKENS
    assert set(tokenizer.convert_ids_to_tokens(data.added_tokens[2:])) == {"<|im_start|>", "<|im_end|>"}


def test_rows_start_as_the_mean_of_the_trained_ones(tmp_path):
    folder = pretrained(tmp_path / "base")
    data = SFTData("rows.jsonl", tokenizer=folder, tokens=TOKENS)
    hf = build_model(folder, tokenizer=data.tokenizer, added_tokens=data.added_tokens)
    before = AutoModelForCausalLM.from_pretrained(folder)
    for layer, old in (
        (hf.get_input_embeddings(), before.get_input_embeddings()),
        (hf.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert layer.weight.shape[0] == 262
        assert torch.equal(layer.weight[:260], old.weight)
        torch.testing.assert_close(layer.weight[260:], old.weight.mean(0).expand(2, -1))


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    pretrained(tmp_path / "base", tie_word_embeddings=False)
    write(tmp_path / "rows.jsonl", rows())
    changes = {"model.init_args.model": "base", "model.init_args.config": GONE, "data.init_args.tokenizer": GONE}
    changes |= {"model.init_args.optimizer.init_args.lr": 1e-2, "model.init_args.schedule": GONE}
    line.recipe(changes | {"data.init_args.tokens": TOKENS})
    return line


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_trains_the_rows_and_exports_what_plain_transformers_load(cli, lora):
    options = ["--model.lora", json.dumps({"r": 4})] if lora else []
    code, _, err = cli.run("fit", "--config", "r.yaml", *options)
    assert code == 0, err
    assert "2 added to the vocabulary: <ticket>, <no ticket>; their rows start as the mean of the trained rows" in err
    tokenizer = AutoTokenizer.from_pretrained("runs/r/model")
    ids = tokenizer("a <ticket> or <no ticket>", return_tensors="pt")["input_ids"]
    assert (ids >= 260).sum() == 2
    exported = AutoModelForCausalLM.from_pretrained("runs/r/model").eval()
    live = load_checkpoint(cli.directory / "runs/r").module.causal_lm.hf
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, live(ids).logits, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained("base")
    for weight, old in (
        (exported.model.embed_tokens.weight, base.model.embed_tokens.weight),
        (exported.lm_head.weight, base.lm_head.weight),
    ):
        assert ((weight[260:] - old.mean(0)).abs().amax(1) > 1e-3).all(), "a row was not trained"
        assert torch.equal(weight[:260], old) is lora  # LoRA trains the new rows alone


def test_a_run_goes_on_from_a_model_that_has_them(cli):
    cli.works("fit", "--config", "r.yaml", "--trainer.max_steps", "1")
    code, _, err = cli.run("fit", "--config", "r.yaml", "--model.model", "runs/r/model", "--name", "on")
    assert code == 0, err
    assert "the vocabulary has all of <ticket>, <no ticket> already" in err
    assert AutoModelForCausalLM.from_pretrained("runs/on/model").model.embed_tokens.weight.shape[0] == 262


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("<ticket>", r"data\.tokens is the string '<ticket>'; it has to be a list: \['<ticket>'\]"),
        (["<a>", " "], r"data\.tokens: ' ' can't be a token"),
        ([3], r"data\.tokens: 3 can't be a token"),
        (["<a>", "<a>"], r"data\.tokens: '<a>' occurs twice"),
    ],
)
def test_mistakes_are_one_message(tokens, message):
    with pytest.raises(UserError, match=message):
        SFTData("rows.jsonl", tokenizer=ByteTokenizer(), tokens=tokens)
