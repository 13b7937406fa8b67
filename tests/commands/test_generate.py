"""`generate`: what a model folder or a checkpoint says, and mistakes that are told before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from oumi_pl.__main__ import main
from oumi_pl.commands import generate
from oumi_pl.commands.generate import prompt_ids
from oumi_pl.data.sft import SFTData
from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from tests.models.test_lora import plain_tokenizer, pretrained
from tests.tiny import LLAMA, conversations, write_jsonl

ROOT = Path(__file__).parents[2]
SHARP = {"initializer_range": 0.3}
"""So that rounding decides nothing, and answers differ."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoints lie beside the model that it exported."""
    path = tmp_path_factory.mktemp("run")
    recipe = {
        "seed_everything": 3,
        "model": {"class_path": "SFT", "init_args": {"config": LLAMA | SHARP}},
        "data": {
            "class_path": "SFTData",
            "init_args": {
                "train": write_jsonl(path / "rows.jsonl", conversations(8)),
                "tokenizer": {"class_path": "ByteTokenizer"},
            },
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
        "runs_dir": str(path / "runs"),
    }
    (path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUMI_PL_CACHE", str(path / "cache"))
        patch.setenv("PL_GLOBAL_SEED", "0")
        assert main(["fit", "--config", str(path / "r.yaml")]) == 0
    return path / "runs" / "r"


def said(capsys, *args):
    capsys.readouterr()
    assert main(["generate", *map(str, args)]) == 0
    return capsys.readouterr().out


def refused(capsys, *args):
    capsys.readouterr()
    assert main(["generate", *map(str, args)]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def by_transformers(folder, text, new, **kwargs):
    """Greedy, by nothing but transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", **kwargs)
    out = model.generate(**ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_folder_and_its_checkpoint_say_what_transformers_says(run, capsys):
    turn = "<|im_start|>user\nSay ab.<|im_end|>\n<|im_start|>assistant\n"
    expected = by_transformers(run / "model", turn, 12, add_special_tokens=False)
    assert len(expected) > 5
    options = ["--prompt", "Say ab.", "--max_new_tokens", 12]
    assert said(capsys, "--model", run / "model", *options) == f"{expected}\n"
    assert said(capsys, "--checkpoint", run, *options) == f"{expected}\n"
    assert said(capsys, "--checkpoint", run / "checkpoints" / "step-00000001.ckpt", *options) == f"{expected}\n"
    raw = by_transformers(run / "model", "Say ab.", 12)
    assert raw != expected
    assert said(capsys, "--model", run / "model", *options, "--raw") == f"{raw}\n"


def test_several_prompts_by_option_and_file(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("second\n\nthird\n")
    options = ["--model", run / "model", "--max_new_tokens", 5, "--json"]
    lines = [
        json.loads(line)
        for line in said(capsys, *options, "--prompt", "first", "--file", tmp_path / "prompts.txt").splitlines()
    ]
    assert [line["prompt"] for line in lines] == ["first", "second", "third"]
    assert len({line["completion"] for line in lines}) == 3
    monkeypatch.setattr("sys.stdin", (tmp_path / "prompts.txt").open())
    assert [json.loads(line) for line in said(capsys, *options, "--file", "-").splitlines()] == lines[1:]


def test_a_prompt_of_a_text_file_is_a_whole_line(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("\ufefffirst\u2028line\r\nsecond\rthird".encode())
    options = ["--model", run / "model", "--max_new_tokens", 2, "--json", "--file", tmp_path / "prompts.txt"]
    lines = [json.loads(line) for line in said(capsys, *options).split("\n") if line]
    assert [line["prompt"] for line in lines] == ["first\u2028line", "second", "third"]
    (tmp_path / "prompts.txt").write_bytes(b"a\0b")
    assert "holds binary data (a zero byte)" in refused(capsys, *options)


def test_a_prompt_that_would_fill_the_memory_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("oumi_pl.data.tokenize.LONGEST", 10)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "short", "response": "x" * 20}, {"prompt": "x" * 11}])
    error = refused(capsys, "--model", run / "model", "--file", tmp_path / "rows.jsonl")
    assert "rows.jsonl:2: a text of 11 characters" in error


def test_a_seed_repeats_what_was_drawn(run, capsys):
    options = ["--model", run / "model", "--prompt", "x", "--max_new_tokens", 8, "--temperature", 2, "--json"]
    drawn = [said(capsys, *options, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_terminal_shows_prompts_and_streams(run, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    whole = said(capsys, "--model", run / "model", "--prompt", "x", "--max_new_tokens", 12)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    pieces = []
    monkeypatch.setattr(generate, "_write", pieces.append)
    shown = said(capsys, "--model", run / "model", "--prompt", "x\033[2J", "--prompt", "x", "--max_new_tokens", 12)
    assert shown.startswith("\033[2mx⟨ESC⟩[2J\033[0m\n")
    assert "".join(pieces).endswith(whole[:-1])
    assert len(pieces) > 4


def test_a_terminal_is_not_driven(capsys):
    generate._write("a\033[31m\r\n\tb\x9b\x7f é😀\u202eright to left\u2066")
    assert capsys.readouterr().out == "a⟨ESC⟩[31m⟨CR⟩\n\tb⟨U+009B⟩⟨DEL⟩ é😀⟨U+202E⟩right to left⟨U+2066⟩"


def test_an_interruption_ends_the_line_and_the_program(run, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate, "_write", stop)
    assert main(["generate", "--model", str(run / "model"), "--prompt", "x"]) == 130
    out, error = capsys.readouterr()
    assert out.endswith("\n\n")
    assert error == "interrupted\n"


def test_an_adapter_is_put_on_its_base(tmp_path, capsys):
    base = pretrained(tmp_path / "base", **SHARP)
    tokenizer = ByteTokenizer().build()
    hf = build_model(base, tokenizer=tokenizer, lora={"r": 4})
    for name, parameter in hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    export_model(LM(hf), tmp_path / "adapter", tokenizer)
    options = ["--prompt", "x", "--max_new_tokens", 12, "--raw"]
    with_adapter = said(capsys, "--model", tmp_path / "adapter", *options)
    assert with_adapter == by_transformers(tmp_path / "adapter", "x", 12) + "\n"
    assert with_adapter != said(capsys, "--model", base, *options)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "the base of the adapter" in refused(capsys, "--model", tmp_path / "adapter", *options)


def test_a_prompt_is_tokenized_as_a_training_row(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", conversations(3))
    data = SFTData(rows, validation=rows, tokenizer=ByteTokenizer())
    data.setup("fit")
    for (ids, _), row in zip(data.prompts("validation"), conversations(3), strict=True):
        assert prompt_ids(data.tokenizer, row["messages"][0]["content"]) == list(ids)


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_prompt_begins_with_one_bos_where_training_rows_do(template):
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    apply_template(tokenizer, load_template(tokenizer, template))
    for text in (tokenizer.chat_template, tokenizer.chat_template.replace("{{- bos_token }}", "")):
        tokenizer.chat_template = text
        ids = prompt_ids(tokenizer, "Hi")
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
    assert prompt_ids(tokenizer, "Hi", raw=True) == [tokenizer.bos_token_id, *tokenizer("Hi")["input_ids"][1:]]


def test_the_system_turn_comes_first():
    tokenizer = ByteTokenizer().build()
    text = tokenizer.decode(prompt_ids(tokenizer, "Hi", system="Be kind"))
    assert text.index("Be kind") < text.index("Hi")
    with pytest.raises(UserError, match="--system: this tokenizer has no chat template"):
        prompt_ids(ByteTokenizer(chat_template=False).build(), "Hi", system="Be kind")


def test_a_prompt_longer_than_the_model_is_refused(run, capsys):
    assert "has 600 tokens, but the model has only 512 positions" in refused(
        capsys, "--model", run / "model", "--raw", "--prompt", "x" * 600
    )
    options = ["--model", str(run / "model"), "--raw", "--prompt", "x" * 505, "--max_new_tokens", "20"]
    assert main(["generate", *options]) == 0
    out, error = capsys.readouterr()
    assert len(out.encode()) <= 7 * 3 + 1
    assert "leaves 7 of the model's 512 positions" in error


MISTAKES = {
    "neither": (["--prompt", "x"], "name --model DIR or --checkpoint FILE"),
    "both": (["--model", "a", "--checkpoint", "b", "--prompt", "x"], "name one of the two"),
    "no prompt": (["--model", "empty"], "name a --prompt TEXT, or a --file"),
    "empty prompt": (["--model", "empty", "--prompt", "  "], "--prompt is empty"),
    "a run folder": (["--model", "run", "--prompt", "x"], "run is a run folder; its model: --model run/model"),
    "an unfinished run": (["--model", "begun", "--prompt", "x"], "its model: --checkpoint begun"),
    "no model folder": (["--model", "empty", "--prompt", "x"], "empty is not a model folder: it has no config.json"),
    "no weights": (["--model", "run/model", "--prompt", "x"], "no weights in run/model"),
    "a checkpoint as model": (["--model", "x.ckpt", "--prompt", "x"], "for a checkpoint, use --checkpoint x.ckpt"),
    "no file": (["--model", "a", "--file", "nowhere.txt"], "--file: nowhere.txt can't be read"),
    "no tokens": (["--model", "a", "--prompt", "x", "--max_new_tokens", "0"], "has to be at least 1"),
    "cold": (["--model", "a", "--prompt", "x", "--temperature", "-1"], "can't be below 0"),
    "top_p of greedy": (["--model", "a", "--prompt", "x", "--top_p", "0.9"], "--top_p is for sampling"),
    "top_p": (["--model", "a", "--prompt", "x", "--temperature", "1", "--top_p", "2"], "at most 1"),
    "raw with system": (["--model", "a", "--prompt", "x", "--raw", "--system", "y"], "which --raw leaves out"),
    "misspelt": (["--modle", "a", "--prompt", "x"], "see: oumi_pl generate --help"),
}


@pytest.fixture(scope="module")
def light_answers(tmp_path_factory):
    """What the mistakes are told, by one interpreter, and which of the heavy libraries it has loaded for that."""
    directory = tmp_path_factory.mktemp("light")
    for name in ("empty", "run/model", "begun"):
        (directory / name).mkdir(parents=True)
    for name in ("run/run.json", "begun/run.json", "run/model/config.json", "x.ckpt"):
        (directory / name).write_text("{}")
    script = (
        "import contextlib, io, json, sys\nfrom oumi_pl.__main__ import main\nanswers = []\n"
        "for args in json.loads(sys.argv[1]):\n    text = io.StringIO()\n"
        "    with contextlib.redirect_stderr(text):\n        code = main(['generate', *args])\n"
        "    answers.append([code, text.getvalue()])\n"
        "print(json.dumps([answers, sorted({'torch', 'transformers', 'lightning'} & sys.modules.keys())]))"
    )
    command = [sys.executable, "-c", script, json.dumps([args for args, _ in MISTAKES.values()])]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=True)
    answers, heavy = json.loads(done.stdout)
    assert not heavy
    return dict(zip(MISTAKES, answers, strict=True))


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_reported_before_anything_is_loaded(light_answers, case):
    code, text = light_answers[case]
    assert MISTAKES[case][1] in text
    assert code == 2
    assert text.count("\n") == 1


def test_a_checkpoint_that_there_is_not(run, capsys):
    assert "did you mean" in refused(capsys, "--checkpoint", f"{run}x", "--prompt", "x")


def test_a_name_that_can_not_be_reached(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'someone/model' is no folder" in refused(capsys, "--model", "someone/model", "--prompt", "x")


def test_a_model_that_lacks_weights_is_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = Path(pretrained(tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, "--model", folder, "--prompt", "x")
    assert "lacks 1 of the model's weights, first model.layers.1.mlp.up_proj.weight" in error
