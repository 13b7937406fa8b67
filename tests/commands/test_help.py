"""`--help`: the project's own options first, and every topic; all of it is read from signatures and docstrings."""

import ast
import inspect
import re
import textwrap

import pytest

from oumi_pl.__main__ import main
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.commands import help as help_pages
from oumi_pl.commands.help import _default, _kind
from oumi_pl.config.check import arguments
from oumi_pl.config.cli import CLI
from oumi_pl.data.sft import SFTData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import BASES, LanguageModule, refuse_unfit_callbacks
from tests.command_line import CommandLine
from tests.test_lightning_features import FEATURES


@pytest.fixture
def ask(capsys, monkeypatch):
    def ask(*args, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(list(args)) == 0
        return capsys.readouterr().out

    return ask


def options(page) -> list[str]:
    return re.findall(r"^  (?:--)?([\w.]+)", page, re.MULTILINE)


def words(text) -> str:
    return " ".join(text.split())


def _is_ours(cls) -> bool:
    return cls.__module__.startswith("oumi_pl.")


def test_own_options_come_first_in_groups(ask):
    page = ask("fit", "--help")
    assert page.startswith("usage: oumi_pl fit --config")
    own = ["config", "resume", "engine", "name", "runs_dir", "dry_run", "checkpoint.every", "export.merge"]
    actual = options(page)
    assert [name for name in actual if name in own] == sorted(own, key=actual.index)
    assert actual.index("checkpoint.mode") < actual.index("model.KEY")
    assert len(page.splitlines()) < 90
    headings = [line for line in page.splitlines() if line and not line.startswith(" ")]
    assert headings[1] == "the run"
    assert any(line.startswith("checkpoint: Writes `step-*.ckpt`") for line in headings)


def test_it_has_every_option_that_the_command_line_adds(ask):
    """Against the source of the command line: an option that another adds turns up by itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CLI.add_arguments_to_parser)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")]
    added = [call.args[0].value.lstrip("-") for call in calls if call.func.attr == "add_argument"]
    classes = [call.args[1].value for call in calls if call.func.attr == "add_class_arguments"]
    assert {"dry_run", "engine"} <= set(added)
    page = ask("fit", "--help")
    actual = options(page)
    assert set(added) <= set(actual)
    for section in set(classes) - {"predictions"}:
        assert any(name.startswith(f"{section}.") for name in actual)
    for name in inspect.signature(Checkpoints).parameters:
        assert f"checkpoint.{name}" in actual
    assert "How many of the newest to keep. (default: 1)" in page


def test_each_command_has_its_own(ask):
    assert "dry_run" not in options(ask("validate", "--help"))
    assert "predictions.max_new_tokens" in options(ask("predict", "-h"))
    assert not {"resume", "checkpoint.every", "engine"} & set(options(ask("predict", "-h")))
    assert options(ask("fit", "--config", "quickstart/sft", "--help")) == options(ask("fit", "--help"))


def test_a_section_shows_its_classes_with_what_is_their_own_and_what_they_share(ask, monkeypatch):
    whole = help_pages._places()  # with the classes that other tests of this process define
    ours = {place: {n: c for n, c in classes.items() if _is_ours(c)} for place, classes in whole.items()}
    monkeypatch.setattr(help_pages, "_places", lambda: ours)
    page = ask("fit", "--help", "model")
    assert "model: one of" in page
    for name in ("SFT", "DPO", "KTO", "Reward", "Distill", "Pretrain", "GRPO"):
        assert re.search(rf"^{name}: ", page, re.MULTILINE)
    every = {f"model.{name}" for cls in ours["model"].values() for name in arguments(cls)}
    actual = options(page)
    assert every <= set(actual)
    assert actual.count("model.gradient_checkpointing") == 1
    assert actual.count("model.loss") == 6
    assert actual.count("model.reference") == 3
    assert "LanguageModule" not in page
    assert not inspect.isabstract(LanguageModule) or "ExampleData" not in ask("fit", "--help", "data")


def test_a_class_is_described_by_its_docstring(ask):
    page = words(ask("fit", "--help", "SFTData", columns=80))
    assert "SFTData, for data" in page
    assert "Turns rows into conversations, renders them with a chat template" in page
    ours = [cls for cls in SFTData.__mro__ if _is_ours(cls)]
    documented = [
        (name, doc)
        for cls in ours
        for name, doc in re.findall(r"^    (\w+): (.+)", inspect.getdoc(cls).split("Args:")[1], re.MULTILINE)
        if name not in ("args", "kwargs")
    ]
    assert len(documented) > 10
    for name, doc in documented:
        assert f"--data.{name} " in page
        assert doc in page
    assert "--data.overflow truncate|keep_start|drop|error" in page


def test_topics_with_many_classes_and_with_one(ask):
    page = ask("fit", "--help", "model.optimizer")
    assert {"AdamW", "MuonAdamW", "SGD"} <= set(options(page))
    assert "model.optimizer.lr" not in page
    assert "data.train.weight" in options(ask("fit", "--help=data.train"))
    assert options(ask("fit", "--help", "AdamW"))[:2] == ["model.optimizer.lr", "model.optimizer.betas"]
    assert "aligned" not in ask("fit", "--help", "AdamW")  # torch's formulas are for a browser
    assert "trainer.max_steps" in options(ask("fit", "--help", "trainer"))


def test_every_listed_callback_is_one_that_a_recipe_can_use(ask):
    """Lightning's are those that the table of features calls working, ours those that no run has by itself."""
    listed = set(re.findall(r"^  ([A-Z]\w+) ", ask("fit", "--help", "trainer.callbacks"), re.MULTILINE))
    working = {name for name, feature in FEATURES.items() if name[0].isupper() and not feature.refused}
    own = {"Answers", "EMA", "Metrics", "PassAtK", "Samples", "TrigramBaseline"}
    classes = help_pages._places()["trainer.callbacks"]
    rooms = ("lightning.", "oumi_pl.callbacks.")  # other tests of this process may have imported or defined more
    assert {name for name in listed if classes[name].__module__.startswith(rooms)} == working | own
    assert classes.keys() >= help_pages.OF_EVERY_RUN - {"BuildModel"}, "no name that is gone"


@pytest.mark.parametrize("kind", BASES)
def test_a_base_class_of_callbacks_is_refused(kind):
    class Mine(kind):
        pass

    with pytest.raises(UserError, match=f"trainer.callbacks: {kind.__name__} is a base class; name a subclass of it"):
        refuse_unfit_callbacks([object.__new__(kind)])
    refuse_unfit_callbacks([object.__new__(Mine)])


def test_a_callback_is_shown_as_a_recipe_has_it(ask):
    page = ask("fit", "--help", "EMA")
    assert "in a recipe: trainer.callbacks: [{class_path: EMA, init_args: {decay: 0.999}}]" in page
    assert options(page) == ["decay", "every", "start"]


def test_the_help_of_one_option_names_its_classes(ask):
    page = ask("fit", "--help", "data.batch_size")
    assert options(page) == ["data.batch_size"]
    assert "DPOData" in page
    assert "--data.batch_size int           Rows per micro-batch" in page
    assert "the newest to keep" in ask("fit", "--help", "--checkpoint.keep")


def test_a_class_of_ones_own(tmp_path, monkeypatch, capsys, ask):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    line.write(
        "own_help.py",
        "from oumi_pl.types import TokenLoss\n\n\nclass Tilted(TokenLoss):\n"
        '    """Leans to one side.\n\n    Args:\n        angle: By how much.\n    """\n\n'
        "    def __init__(self, angle: float = 0.5):\n        pass\n\n"
        "    def __call__(self, logits, targets):\n        pass\n",
    )
    page = ask("fit", "--help", "own_help.Tilted")
    assert "Tilted, for model.loss\nLeans to one side." in page
    assert "  --model.loss.angle float        By how much. (default: 0.5)" in page


@pytest.mark.parametrize(
    ("topic", "nearest"),
    [("modle", "model"), ("cosine", "Cosine"), ("data.batchsize", "data.batch_size")],
)
def test_a_misspelt_topic(capsys, topic, nearest):
    assert main(["fit", "--help", topic]) == 2
    assert capsys.readouterr().err == f"error: --help: unknown topic {topic!r}; did you mean {nearest!r}?\n"


def test_all_is_the_parsers_own_page(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("oumi_pl.config.cli.CLI", lambda args, **_: asked.append(args))
    assert main(["fit", "--help", "all"]) == 0
    assert asked == [["fit", "--help"]]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(ask, columns):
    for topic in ([], ["model"], ["data"], ["trainer"], ["DPO"]):
        lines = ask("fit", "--help", *topic, columns=columns).splitlines()
        assert max(map(len, lines)) <= columns
        assert not [line for line in lines if line != line.rstrip()]


def test_types_and_defaults_are_short():
    assert _kind(int) == "int"
    assert _kind(str | None) == "str"
    assert _kind(list[str] | str | None) == "list or str"
    assert _kind(bool) == "bool"
    assert [_default(v) for v in (None, False, 3, 0.5, (), "x")] == ["", "false", "3", "0.5", "", "x"]
    assert _default({"class_path": "a.b.C", "init_args": {"x": 1}}) == "C(x=1)"
    assert help_pages._plain("see  :class:`~a.B` in\n``c``") == "see a.B in c"
