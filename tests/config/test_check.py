"""Recipes and options are checked against signatures: keys, classes and values, each with the nearest right one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.optim import AdamW, Optimizer

from oumi_pl.config.check import Argument, Checker, arguments, innermost, kinds, options, places, type_names
from oumi_pl.config.files import read_options
from oumi_pl.errors import UserError


class Wheel:
    def __init__(self, spokes: int = 8):
        pass


class Wide(Wheel):
    def __init__(self, width: float | Tensor = 1.0, **kwargs):
        super().__init__(**kwargs)


@dataclass
class Road:
    surface: Literal["gravel", "tar"] | bool
    length: float | None = None


class Vehicle:
    def __init__(self, size: int = 1, *, shape: str = "round"):
        pass


class Cart(Vehicle):
    def __init__(
        self,
        colour="red",
        wheel: Wheel | None = None,
        spares: list[Wheel] | Wheel | None = None,
        roads: str | Road | list[Road] | None = None,
        rim: str | Wheel = "none",
        load: dict[str, Any] | None = None,
        names: Sequence[str] = (),
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(params, lr=0.1),
        **kwargs,
    ):
        super().__init__(**kwargs)


class Open(Vehicle):
    def __init__(self, colour="red", **kwargs):
        pass


class Bare(Vehicle):
    def __init__(self):
        pass


@pytest.fixture
def root():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Vehicle, "model")
    parser.add_subclass_arguments(Wheel, "data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trainer.steps", type=int, default=1)
    parser.add_argument("--trainer.depth", type=int, default=1)
    parser.add_argument("--trainer.callbacks", type=list[Wheel] | Wheel | None, default=None)
    return options(parser)


BOTH = {"model": "Cart", "data": "Wide"}


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Vehicle, ["size", "shape"]),
        (Wide, ["width", "spokes"]),
        (Open, ["colour"]),
        (Bare, []),
        (Road, ["surface", "length"]),
    ],
)
def test_arguments_of_a_class(cls, names):
    assert list(arguments(cls)) == names


def test_an_optimizer_gets_its_parameters_from_the_model():
    assert list(arguments(AdamW))[:2] == ["lr", "betas"]


def test_kinds_of_a_type():
    assert kinds(int | None) == (int, (), None, None)
    assert kinds(str | Road | list[str | Road]) == (str, (Road,), str | Road, None)
    assert kinds(dict[str, Any] | float) == (float, (), None, Any)
    assert kinds(Callable[[Iterable], Optimizer]) == (None, (Optimizer,), None, None)
    assert kinds(tuple[float, ...]) == (None, (), float, None)
    assert kinds(Any) == (Any, (), None, None)
    assert type_names(Literal["a", "b"] | bool | None) == ["a|b", "bool"]
    assert type_names(Sequence[str] | dict | Tensor | Wheel) == ["list", "mapping", "Wheel"]
    assert type_names(Callable[[Iterable], Optimizer]) == ["Optimizer"]


def test_places_of_classes(root):
    known = places(root)
    assert set(known["model"]) == {"Cart", "Open", "Bare"}
    assert known["model.wheel"] == known["trainer.callbacks"] == {"Wide": Wide}
    assert known["model.roads"] == {"Road": Road}
    assert "AdamW" in known["model.optimizer"]


def cart(**arguments):
    return {"model": {"class_path": "Cart", "init_args": arguments}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"trainer": {"depht": {}}}, "trainer.depht: unknown key; did you mean 'trainer.depth'?"),
        ({"trainer": {"x": 1}}, "trainer.x: unknown key; known: 'trainer.callbacks', 'trainer.depth', 'trainer.steps'"),
        ({"depth": 1}, "depth: unknown key; did you mean 'trainer.depth'?"),
        ({"trainer": 3}, "trainer: 3 is given, but here is a mapping"),
        ({"config": "x.yaml"}, "config: unknown key"),
        ({"training": {"max_steps": 1}}, "this is an Oumi config, not a recipe: run it with oumi_pl train -c FILE"),
        ({"model": {"model_name": "x"}}, "this is an Oumi config"),
        (cart(sise=1), "model.sise: unknown key; did you mean 'model.size'?"),
        (cart(depth=1), "model.depth: unknown key; did you mean 'trainer.depth'?"),
        ({"model": {"class_path": "Cart", "size": 1}}, "model.size: belongs one level deeper, under model.init_args"),
        ({"model": {"class_path": "Cart", "init_arg": {}}}, "model.init_arg: unknown key; did you mean 'init_args'?"),
        ({"model": {"class_path": "Cart", "init_args": None}}, "model.init_args: None is given"),
        ({"model": {"class_path": "Open", "init_args": {"whatever": 1}}}, "model.whatever: unknown key"),
        ({"model": {"class_path": "Cat"}}, "model: unknown class 'Cat'; did you mean 'Cart'?"),
        ({"model": "Wide"}, "model: unknown class 'Wide'"),
        ({"model": {"class_path": "decimal.Decimal"}}, "model: decimal.Decimal is not a subclass of Vehicle"),
        ({"model": 3}, "model: 3 is not a Vehicle; write for example `model: {class_path: SFT"),
        ({"model": {"init_args": {"wheel": "Wid"}}}, "model.wheel: unknown class 'Wid'; did you mean 'Wide'?"),
        ({"model": {"class_path": "decimal.Decimall"}}, "module 'decimal' has no 'Decimall'; did you mean 'Decimal'?"),
        (cart(size="big"), "model.size: 'big' is not an int"),
        (cart(roads={"surface": "tra"}), "model.roads.surface: 'tra' is not a valid value; did you mean 'tar'?"),
        (
            cart(roads=[{"surface": "tar", "lenght": 1}]),
            "model.roads.0.lenght: unknown key; did you mean 'model.roads.0",
        ),
        (cart(roads={"length": "far"}), "model.roads.length: 'far' is not a float"),
        (cart(load=3), "model.load: 3 is not a mapping"),
        (cart(size={"class_path": "a/b"}), "model.size: 'a/b' is not a type"),
        (cart(size={"class_path": 3}), "model.size: 3 is not a type"),
        (cart(optimizer=0.1), "model.optimizer: 0.1 is not an Optimizer; write for example `optimizer: {class_path: A"),
        (cart(names=["a", 1]), "model.names.1: 1 is not a str"),
        (cart(spares=["Wide", {"class_path": "Wid"}]), "model.spares.1: unknown class 'Wid'"),
        (cart(wheel={"class_path": "Wide", "init_args": {"width": "x"}}), "model.wheel.width: 'x' is not a float"),
    ],
)
def test_mistake_in_a_recipe(root, tree, message):
    assert message in refusal(Checker(root).check_recipe, tree)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"seed": 1, "trainer": {"steps": 3}},
        {"model": "Cart"},
        {"model": {"init_args": {"size": 1}}},  # merged over a recipe that names the class
        cart(colour={"any": {"thing": {}}}, load={"any": {"thing": [1]}}, size=None, roads="tar.jsonl"),
        cart(roads=[{"surface": True}, {"class_path": "Road", "init_args": {"surface": "tar", "length": 1}}]),
        cart(colour=[{"class_path": "decimal.Decimal"}], wheel="Wide", optimizer={"class_path": "torch.optim.SGD"}),
    ],
)
def test_no_mistake_in_a_recipe(root, tree):
    Checker(root).check_recipe(tree)


def test_a_later_recipe_need_not_name_the_class_again(root):
    checker = Checker(root)
    checker.check_recipe({"model": "Bare"})
    message = refusal(checker.check_recipe, {"model": {"init_args": {"size": 1}}})
    assert message == "model.size: unknown key"
    checker.check_recipe({"model": "Open"})
    assert "known: 'model.colour'" in refusal(checker.check_recipe, {"model": {"init_args": {"x": 1}}})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--trainer.step=3", "unknown option --trainer.step; did you mean '--trainer.steps'?"),
        ("--steps 3", "unknown option --steps; did you mean '--trainer.steps'?"),
        ("--stepps 3", "unknown option --stepps; did you mean '--trainer.steps'?"),
        ("--colour red", "unknown option --colour; did you mean '--model.colour'?"),
        ("--wheel.width 3", "unknown option --wheel.width; did you mean '--model.wheel.width'?"),
        ("--modle.load.x 3", "unknown option --modle.load.x; did you mean '--model.load.x'?"),
        ("--model.lod.x 3", "unknown option --model.lod.x; did you mean '--model.load.x'?"),
        ("--model.init_args.sise 3", "unknown option --model.init_args.sise; did you mean '--model.size'?"),
        ("--trainer.q 3", "unknown option --trainer.q; known: '--trainer.callbacks', '--trainer.depth'"),
        ("--quux 3", "unknown option --quux; `--help` lists all, `--model.help SFT` those of a class"),
        ("r.yaml", "'r.yaml' belongs to no option"),
        ("--model.colour --seed 3", "--model.colour: a value is missing"),
        ("--seed three", "seed: 'three' is not an int"),
        ("--seed 1.5", "seed: 1.5 is not an int"),
        ("--model.wheel Wid", "model.wheel: unknown class 'Wid'; did you mean 'Wide'?"),
        ("--model.help Crt", "model: unknown class 'Crt'; did you mean 'Cart'?"),
        (
            "--model.wheel Wide --model.wheel.widht 3",
            "unknown option --model.wheel.widht; did you mean '--model.wheel.width'",
        ),
        (
            "--model.wheel.width 3",
            "--model.wheel.width: no class is named that takes it; name one before it: --model.wheel",
        ),
        (
            "--model.optimizer.momentum 3",
            "unknown option --model.optimizer.momentum; known: '--model.optimizer.amsgrad'",
        ),
        ("--model.optimizer SGD --model.optimizer.lr x", "model.optimizer.lr: 'x' is not a float"),
        ("--trainer.callbacks+=Wid", "trainer.callbacks: unknown class 'Wid'"),
        ("--trainer.callbacks+=Wide --trainer.callbacks.widht 3", "did you mean '--trainer.callbacks.width'?"),
        ('--model.roads [{"surfac":1}]', "model.roads.surfac: unknown key; did you mean 'model.roads.surface'?"),
        ("--model.rim Wide --model.rim.widht 3", "did you mean '--model.rim.width'?"),
        ("--model.load {x:1}", "model.load: '{x:1}' is not a mapping"),
        ("--model Open --model.wheel Wide", "unknown option --model.wheel; "),
    ],
)
def test_mistake_in_an_option(root, typed, message):
    checker = Checker(root)
    checker.check_recipe(BOTH)
    assert message in refusal(checker.check_options, read_options(typed.split()))


@pytest.mark.parametrize(
    "typed",
    [
        "--model.size 3 --model.init_args.shape=flat --model.load.a.b 3 --seed 2",
        "--model.wheel Wide --model.wheel.width=3 --model.wheel.spokes 9",
        "--model.optimizer.lr 3e-4 --model.optimizer.betas [0.1,0.2] --trainer.steps -1",
        "--trainer.callbacks+=Wide --trainer.callbacks.width 3 --trainer.callbacks null",
        "--model.roads.surface tar --model.names+=x --model.names [a,b]",
        '--model.roads [{"surface":"tar"}] --config r.yaml --print_config',
        "--model Open --model.colour blue --model.class_path Bare",
        "--model.roads Road --model.roads.surface tar",
        "--model.roads tar.jsonl --model.roads.surface tar",
        "--model.rim Wide --model.rim.width 3",
        f"--model.rim {__name__}.Wide --model.rim.width 3",
    ],
)
def test_no_mistake_in_options(root, typed):
    checker = Checker(root)
    checker.check_recipe(BOTH)
    checker.check_options(read_options(typed.split()))


def test_model_and_data_are_named(root):
    assert "model: missing" in refusal(Checker(root).check_options, [])
    assert "data: missing" in refusal(Checker(root).check_options, [("--model", "Cart")])
    Checker(root).check_options([("--model.help", "Cart")])


@pytest.mark.parametrize(("value", "hint"), [("Cart", Vehicle), ("jsonargparse.ArgumentParser", ArgumentParser)])
def test_a_class_is_found_whatever_files_are_in_the_folder(root, tmp_path, monkeypatch, value, hint):
    monkeypatch.chdir(tmp_path)
    for name in (value, "rows.jsonl", "rows"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    Checker(root | {"model": Argument(hint)}).check_recipe({"model": value})
    for name in ("rows.jsonl", "rows", "org/name"):
        assert f"model: {name!r} is not a Vehicle" in refusal(Checker(root).check_recipe, {"model": name})


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("the following arguments are required: path", "path: missing, and there is no default"),
        (
            "Parser key \"data\":\n  Errors:\n    - Problem with given class_path 'x.Data':\n        "
            'Parser key "train":\n  Errors:\n  - Problem with y.Source: the following arguments are required: path, b\n'
            "    - Expected a <class 'NoneType'>",
            "data.train.path, data.train.b: missing, and there is no default",
        ),
        (
            "Parser key \"model\":\n  Errors:\n    - Problem with given class_path 'x.Child':\n        "
            'Parser key "init_args.part":\n  Errors:\n    - Expected an instantiatable class, but x.Part is abstract\n'
            "    - Expected a <class 'NoneType'>\n  Given value: {}",
            "model.part: Expected an instantiatable class, but x.Part is abstract",
        ),
        ('Parser key "seed":\n  something else. Given value: 3', "seed: something else."),
        ("unrecognized arguments: x", "unrecognized arguments: x"),
    ],
)
def test_what_only_jsonargparse_knows_is_cut_to_a_line(message, line):
    assert innermost(message) == line
