"""Constructors of data classes state only their own arguments; recipes, help and Python know the inherited ones too."""

import re

import pytest

from oumi_pl.__main__ import main
from oumi_pl.commands import help as help_pages
from oumi_pl.config.cli import instantiate
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.packed_chat import PackedChatData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from tests.command_line import CommandLine
from tests.tiny import LLAMA

SHARED = {
    "train": "rows.jsonl",
    "validation": 0.25,
    "group": "customer",
    "test": ["a.jsonl", "b.jsonl"],
    "predict": "questions.jsonl",
    "tokenizer": "gpt2",
    "tokens": ["<ticket>"],
    "pad_token": "<|pad|>",
    "max_length": 77,
    "batch_size": 3,
    "eval_batch_size": 5,
    "workers": 1,
    "seed": 9,
    "trust_remote_code": True,
}
EXAMPLES = SHARED | {"packing": True, "group_by_length": False, "bad_rows": "drop", "processes": 2}
EXAMPLES |= {"duplicates": "drop", "weight_by": "tokens"}
EXAMPLES |= {"template": "plain", "overflow": "drop"}
EXAMPLES |= {"template_variables": {"mood": 1}, "lost": "drop", "add_eos": True, "fields": ["margin"]}
NEED_ALL_ROWS = {"sample_by": "quality", "order_by": "level", "near_duplicates": True}
EXAMPLES |= NEED_ALL_ROWS
STREAM = SHARED | {
    "packing": "best_fit",
    "isolate": True,
    "streaming": True,
    "shuffle_buffer": 4,
    "exhausted": "restart",
    "eval_stride": 16,
    "duplicates": "drop",
    "near_duplicates": True,
}
ARGUMENTS = {
    SFTData: EXAMPLES | {"train_on": "all", "turns": "apart", "streaming": True, "shuffle_buffer": 4},
    DPOData: EXAMPLES,
    PretrainData: STREAM,
    PackedChatData: STREAM | {"template": "plain", "bad_rows": "drop"},
}
"""Every argument of each class, with a value that is not its default."""
NAMED_OTHERWISE = {"tokenizer": "tokenizer_spec", "tokens": "new_tokens", "template": "template_spec"}


def stored(data):
    """The values of arguments as a data module holds them."""
    values = vars(data) | data.sources | {name: vars(data).get(own) for name, own in NAMED_OTHERWISE.items()}
    if isinstance(data, PretrainData):
        return values | {"packing": data.method}
    return values | {"sample_by": data.draws.sampled, "order_by": data.draws.ordered}


def together(cls):
    """The arguments of a class, in sets that go together: what needs all rows beforehand doesn't go with streaming."""
    arguments, streamed = ARGUMENTS[cls], {"streaming", "shuffle_buffer"}
    if "streaming" not in arguments:
        return [arguments]
    return [{k: v for k, v in arguments.items() if k not in others} for others in (streamed, NEED_ALL_ROWS)]


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_a_recipe_sets_every_argument(cls):
    name = f"{cls.__module__}.{cls.__name__}"
    for arguments in together(cls):
        recipe = {
            "model": {"class_path": "SFT", "init_args": {"config": LLAMA}},
            "data": {"class_path": name, "init_args": arguments},
        }
        _, data = instantiate(recipe)
        assert type(data) is cls
        values = stored(data)
        assert {argument: values[argument] for argument in arguments} == arguments


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_help_describes_every_argument(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["fit", "--help", f"{cls.__module__}.{cls.__name__}"]) == 0
    page = capsys.readouterr().out
    described = dict(re.findall(r"^  --data\.(\w+) (.+(?:\n {20,}.+)*)", page, re.MULTILINE))
    assert described.keys() == ARGUMENTS[cls].keys()
    for argument, text in described.items():
        assert re.search(r"\w[`)]?\.( |$)", " ".join(text.split())), f"no sentence on {argument}: {text!r}"
    assert "See `" not in page, "a reference to another class where its arguments should be"


def test_help_of_all_data_classes_has_the_shared_arguments_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    whole = help_pages._places()  # with the classes that other tests of this process define
    ours = {name: cls for name, cls in whole["data"].items() if cls.__module__.startswith("oumi_pl.")}
    monkeypatch.setattr(help_pages, "_places", lambda: whole | {"data": ours})
    assert main(["fit", "--help", "data"]) == 0
    page = capsys.readouterr().out
    assert " ChatData" not in page, "an abstract class"
    for argument in SHARED:
        assert page.count(f"--data.{argument} ") == 1
    for argument in ("packing", "template", "train_on", "isolate"):
        assert f"--data.{argument} " in page


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("trian", "train"), ("max_lenght", "max_length"), ("pack", "packing"), ("train_onn", "train_on")],
)
def test_a_misspelt_key_in_a_recipe_is_refused_with_the_nearest_one(tmp_path, monkeypatch, capsys, key, nearest):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    line.recipe({f"data.init_args.{key}": 3})
    assert f"data.{key}: unknown key; did you mean 'data.{nearest}'?" in line.fails("fit", "--config", "r.yaml")


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_sources_may_be_given_by_position(cls):
    sources = cls("rows.jsonl", 0.1, "test.jsonl", "questions.jsonl").sources
    assert sources == {"train": "rows.jsonl", "validation": 0.1, "test": "test.jsonl", "predict": "questions.jsonl"}
    assert cls("rows.jsonl", validation=0.1).sources["validation"] == 0.1
    with pytest.raises(TypeError, match="positional arguments"):
        cls("rows.jsonl", 0.1, "test.jsonl", "questions.jsonl", "gpt2")


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_an_unknown_keyword_is_an_error_that_names_it(cls):
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_lenght'"):
        cls("rows.jsonl", max_lenght=3)
    with pytest.raises(TypeError, match="multiple values for argument 'train'"):
        cls("rows.jsonl", train="others.jsonl")


def test_defaults_are_those_of_the_class_that_states_them():
    assert [cls().group_by_length for cls in (SFTData, DPOData)] == [True, False]
    assert {cls().max_length for cls in ARGUMENTS} == {1024}
    assert {cls(batch_size=3).eval_batch_size for cls in ARGUMENTS} == {3}
