"""`chat`: a conversation on standard input, whose turns are remembered until /clear."""

import io

import pytest
import torch

from oumi_pl.__main__ import main
from oumi_pl.commands import chat
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from tests.tiny import LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = ByteTokenizer().build()
    torch.manual_seed(5)
    build_model(None, config=LLAMA | {"initializer_range": 0.3, "vocab_size": len(tokenizer)}).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def answers(capsys, monkeypatch, folder, lines, *args) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", "--model", str(folder), "--max_new_tokens", "8", *args]) == 0
    return capsys.readouterr().out.splitlines()


def expected(folder, *turns, system=None) -> str:
    """The greedy answer of plain transformers to turns of user and assistant."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True)


def test_turns_are_remembered_until_clear_and_the_end_of_input_ends(capsys, monkeypatch, folder):
    said: list[str] = []
    ask = chat.Chat.ask
    monkeypatch.setattr(chat.Chat, "ask", lambda self, text: said.append(ask(self, text)) or said[-1])
    answers(capsys, monkeypatch, folder, ["one", "two", "/clear", "two", "", "/exit", "three"])
    first = expected(folder, "one")
    assert said == [first, expected(folder, "one", first, "two"), expected(folder, "two")]
    assert said[1] != said[2]


def test_the_answer_is_printed_and_the_system_prompt_is_read(capsys, monkeypatch, folder):
    out = "\n".join(answers(capsys, monkeypatch, folder, ["one"], "--system", "Be brief"))
    assert out == chat.visible(expected(folder, "one", system="Be brief"))
    assert "unknown /help" in _errors(capsys, monkeypatch, folder, ["/help"])


def _errors(capsys, monkeypatch, folder, lines) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--model", str(folder), "--max_new_tokens", "8"]) == 0
    return capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch, folder, capsys):
    loaded = chat.from_folder(str(folder))
    conversation = chat.Chat(loaded, chat._options(["--model", str(folder), "--max_new_tokens", "8"]))
    whole = conversation.ask("one")
    conversation.clear()
    pieces = []

    def interrupted(text: str) -> str:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(chat, "visible", interrupted)
    answer = conversation.ask("one")
    assert len(pieces) == 2
    assert answer == "".join(pieces) != whole
    assert whole.startswith(answer)
    assert [turn["content"] for turn in conversation.turns] == ["one", answer]


def test_a_conversation_that_is_too_long_says_so_and_is_not_remembered(monkeypatch, folder, capsys):
    err = _errors(capsys, monkeypatch, folder, ["x" * 600])
    assert "longer than the model's 512 tokens: /clear" in err


def test_one_model_is_named():
    with pytest.raises(UserError, match="name one model"):
        chat.main([])
    with pytest.raises(UserError, match="--top_p above 0"):
        chat.main(["--model", "x", "--top_p", "0"])


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(monkeypatch, folder, errors, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"Say \xff\xfe\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", "--model", str(folder)]) == 2
    assert "chat: the input is not UTF-8" in capsys.readouterr().err
