"""jsonargparse's pages become a line, whichever version words them, and keys are looked up in the right class."""

import pytest

from oumi_pl.config.explain import explain, parameters, signature
from oumi_pl.config.keys import refuse_unknown_keys
from oumi_pl.errors import UserError


class Base:
    def __init__(self, size=1, *, shape="round"):
        pass


class Child(Base):
    def __init__(self, colour="red", **kwargs):
        super().__init__(**kwargs)


class Open:
    def __init__(self, colour="red", **kwargs):
        pass


class Bare:
    pass


CLASSES = {"model": {"Child": Child, "Open": Open}, "model.part": {"Base": Base}}
FLAGS = ["-h", "--help", "--config", "--model", "--model.help", "--trainer.steps", "--trainer.depth", "--seed"]


@pytest.mark.parametrize(
    ("cls", "names", "all_of_them"),
    [
        (Base, ["size", "shape"], True),
        (Child, ["colour", "size", "shape"], True),
        (Open, ["colour"], False),
        (Bare, [], True),
    ],
)
def test_signature(cls, names, all_of_them):
    assert signature(cls) == (names, all_of_them)
    assert parameters(cls) == names


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Unrecognized arguments: --trainer.step=3", "unknown option --trainer.step; did you mean '--trainer.steps'?"),
        ("Unrecognized arguments: --steps 3", "unknown option --steps; did you mean '--trainer.steps'?"),
        ("Unrecognized arguments: --colour red", "unknown option --colour; did you mean '--model.colour'?"),
        (
            "Subcommand 'fit' does not accept option 'trainer.stepps'",
            "trainer.stepps: unknown key; did you mean 'trainer.steps'?",
        ),
        ("argument --model: expected one argument", "--model.colour: a value is missing"),
        ("the following arguments are required: fit.model", "model: missing, and there is no default"),
        (
            "Parser key \"model\":\n  Errors:\n    - Problem with given class_path 'x.Child':\n        "
            "Option 'colur' is not accepted\n    - Expected a <class 'NoneType'>",
            "model.colur: unknown key; did you mean 'colour'?",
        ),
        (
            'Parser key "model":\n  Errors:\n    - Expected a dot import path string: Chld\n',
            "model: unknown class 'Chld'; did you mean 'Child'?",
        ),
        (
            'Parser key "model":\n  Problem with given class_path \'x.Child\':\n    Parser key "size":\n      '
            "Expected a <class 'int'>. Got value: big\n  - Expected a <class 'NoneType'>",
            "model.size: 'big' is not an int",
        ),
        (
            "Parser key \"seed\":\n  Expected a typing.Literal['one', 'two']. Got value: tow",
            "seed: 'tow' is not a valid value; did you mean 'two'?",
        ),
        (
            'Parser key "model":\n  Errors:\n    - Import path a.B does not correspond to a subclass of Base\n',
            "model: a.B is not a subclass of Base",
        ),
        ('Parser key "seed":\n  something else. Given value: 3', "seed: something else."),
    ],
)
def test_explain(message, line):
    assert explain(message, FLAGS, CLASSES, ["fit", "--model.colour", "--seed", "3"]) == line


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"trainer": {"depht": {}}}, "trainer.depht: unknown key; did you mean 'trainer.depth'?"),
        ({"trainer": 3}, "trainer: 3 is given, but here is a mapping"),
        ({"config": "x.yaml"}, "config: unknown key"),
        ({"training": {"max_steps": 1}}, "this is a config of Oumi's, not a recipe: run it with oumi_pl train -c FILE"),
        ({"model": {"model_name": "x"}}, "this is a config of Oumi's"),
        ({"model": {"class_path": "Child", "init_args": {"sise": 1}}}, "model.sise: unknown key; did you mean 'size'?"),
        ({"model": {"class_path": "Child", "size": 1}}, "model.size: belongs one level deeper, under model.init_args"),
        ({"model": {"class_path": "Child", "init_arg": {}}}, "model.init_arg: unknown key; did you mean 'init_args'?"),
        ({"model": {"class_path": "Child", "init_args": 3}}, "model.init_args: 3 is given"),
        ({"model": {"class_path": "Cild"}}, "model: unknown class 'Cild'; did you mean 'Child'?"),
        ({"model": {"init_args": {"part": {"class_path": "Bas"}}}}, "model.part: unknown class 'Bas'"),
        ({"model": {"class_path": "decimal.Decimall"}}, "module 'decimal' has no 'Decimall'; did you mean 'Decimal'?"),
    ],
)
def test_refuse_unknown_keys(tree, message):
    with pytest.raises(UserError) as error:
        refuse_unknown_keys(tree, FLAGS, CLASSES)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"seed": 1, "trainer": {"steps": 3}},
        {"model": "Child"},
        {"model": {"init_args": {"size": 1}}},  # a second recipe, merged over one that names the class
        {"model": {"class_path": "Open", "init_args": {"whatever": 1}}},
        {"model": {"class_path": "Child", "init_args": {"colour": {"any": {"thing": {}}}}}},
        {"model": {"class_path": "Child", "init_args": {"colour": [{"class_path": "decimal.Decimal"}]}}},
    ],
)
def test_known_keys(tree):
    refuse_unknown_keys(tree, FLAGS, CLASSES)


@pytest.mark.parametrize("value", ["Child", "decimal.Decimal"])
def test_a_class_is_one_whatever_lies_in_the_folder(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    for name in (value, "rows.jsonl", "rows"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    refuse_unknown_keys({"model": value}, FLAGS, CLASSES)
    with pytest.raises(UserError, match=r"'rows\.jsonl' is not the name of a class"):
        refuse_unknown_keys({"model": "rows.jsonl"}, FLAGS, CLASSES)


def test_an_option_of_a_class_is_told_as_it_was_typed():
    said = explain("Unrecognized arguments: --sise.deep 1", FLAGS, CLASSES, ["fit", "--model.sise.deep", "1"])
    assert said == "unknown option --model.sise.deep; did you mean '--model.size.deep'?"
