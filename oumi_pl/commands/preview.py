"""Show examples as the model will see them, and the data report. Loads no weights, except for --rollouts."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.screen import has_colours, meanwhile
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from oumi_pl.data.base import TextData
    from oumi_pl.preview.shown import Preview, Shown

SPLITS = ("train", "validation", "test")
EPILOG = """\
Other options override values of the recipe, as for fit: --data.max_length 256 --data.train my_rows.jsonl

  oumi_pl preview --config quickstart/sft                      the first rows, and the data report
  oumi_pl preview --config quickstart/sft --row 17 --tokens    row 17, token by token with ids
  oumi_pl preview --config quickstart/dpo --longest -n 1       the longest pair
  oumi_pl preview --config mine.yaml --cut                     where rows were cut to data.max_length
  oumi_pl preview --config mine.yaml --html mine.html          a page to send to a colleague
  oumi_pl preview --config quickstart/grpo --rollouts 3        sample and reward three groups before training

Tokenized rows are cached and reused by fit.
"""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(args)
    if not options.config:
        recipes = ", ".join(recipe_files.names())
        raise UserError(f"preview needs a recipe: oumi_pl preview --config NAME or FILE; recipes: {recipes}")
    _refuse_misspelt(parser, overrides)
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}, but has to be at least 1")
    _refuse_others_with_rollouts(options)
    if options.split not in SPLITS:
        raise UserError(f"--split: there is no {options.split!r}{nearest(options.split, SPLITS)}")
    configs = [recipe_files.find(name) for name in options.config]
    for path in configs:
        recipe_files.check(path)
    from oumi_pl.preview import page

    html = options.html.expanduser() if options.html else None
    if html is not None:
        page.refuse_place(html)
    with meanwhile("loading PyTorch and Lightning"):
        from oumi_pl.preview import recipe, terminal

    if options.rollouts is not None:
        preview = _rollouts(configs, overrides, options)
    else:
        data, notes = recipe.read(configs, overrides)
        preview = _preview(data, options, recipe.title(configs), notes)
    if html is not None:
        page.write(preview, html)
        echo(f"{len(preview.examples)} examples and the data report -> {html}")
        return 0
    plain = options.plain or not has_colours(sys.stdout)
    terminal.show(preview, plain=plain, tokens=options.tokens, full=options.full)
    return 0


def _parser() -> Parser:
    parser = Parser("preview", __doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--config",
        "-c",
        action="append",
        help="a recipe by name or path, or a run's config.yaml; several are merged",
    )
    add("-n", "--rows", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, nargs="+", metavar="I", help="rows by number, counted from 1")
    which.add_argument("--longest", action="store_true", help="the longest examples")
    which.add_argument("--cut", action="store_true", help="examples that were cut to data.max_length")
    which.add_argument("--dropped", action="store_true", help="rows that were dropped, and why")
    which.add_argument(
        "--rollouts",
        type=int,
        metavar="N",
        help="of online training: sample and reward the groups of the first N prompts with the initial model",
    )
    add("--split", default="train", help="train, validation or test (default: train)")
    add("--packs", action="store_true", help="show how the packs of the first micro-batch are filled, and no examples")
    add("--tokens", action="store_true", help="show token by token, with position and id")
    add("--full", action="store_true", help="show long rows in full")
    add("--plain", action="store_true", help="print no escape codes; the default in a pipe, and if NO_COLOR is set")
    add("--html", type=Path, metavar="FILE", help="write a self-contained page instead of printing")
    return parser


def _refuse_misspelt(parser: Parser, overrides: list[str]) -> None:
    """Refuses misspelt options of this command, which would otherwise be read as keys of the recipe.

    Raises:
        UserError: an option is similar to one of this command.
    """
    own = [flag for action in parser._actions for flag in action.option_strings]
    for arg in overrides:
        flag = arg.partition("=")[0]
        close = difflib.get_close_matches(flag, own, n=1, cutoff=0.75) if "." not in flag else []
        if flag.startswith("--") and close:
            raise UserError(f"preview: unknown option {flag}; did you mean {close[0]!r}?")


def _refuse_others_with_rollouts(options: argparse.Namespace) -> None:
    """Checks that `--rollouts` is a number of groups, and that no option asks for something else.

    Raises:
        UserError: it isn't, or one does.
    """
    if options.rollouts is None:
        return
    if options.rollouts < 1:
        raise UserError(f"--rollouts is {options.rollouts}, but has to be at least 1")
    if options.split != "train" or options.packs:
        other = "--packs" if options.packs else f"--split {options.split}"
        raise UserError(f"--rollouts samples completions of the first training prompts; leave out {other}")


def _rollouts(configs: list[Path], overrides: list[str], options: argparse.Namespace) -> "Preview":
    """Samples the first groups and shows them."""
    from oumi_pl.preview import groups, recipe
    from oumi_pl.preview.pieces import Decoder
    from oumi_pl.preview.shown import Preview

    data, sampled, advantages = recipe.sample(configs, overrides, options.rollouts)
    shown = groups.groups(data, Decoder(data.tokenizer), sampled, advantages)
    return Preview(recipe.title(configs), groups.notes(data, sampled), shown, None, [], [])


def _preview(data: "TextData", options: argparse.Namespace, title: str, notes: list[str]) -> "Preview":
    """Builds the splits that `fit` reads and the requested one, and collects what is shown."""
    from oumi_pl.data.examples import ExampleData
    from oumi_pl.preview import report
    from oumi_pl.preview.shown import Preview

    _refuse_other_data(data, options)
    data.prepare_data()
    data.setup("fit")
    if options.split == "test":
        data.make("test")
        data.setup("test")
    by_default = options.split == "train" and not options.row and _chosen(options) is None
    packs = None
    if isinstance(data, ExampleData) and data.capacity is not None and (options.packs or by_default):
        packs = report.packs(data)
    shown = [] if options.packs else _examples(data, options)
    return Preview(title, [*notes, *report.notes(data)], shown, packs, report.tables(data), report.histograms(data))


def _refuse_other_data(data: "TextData", options: argparse.Namespace) -> None:
    """Checks, before any row is read, that the data can show what the options ask for.

    Raises:
        UserError: they can't.
    """
    from oumi_pl.data.examples import ExampleData
    from oumi_pl.data.pretrain import PretrainData
    from oumi_pl.preview.groups import reads_prompts_alone

    if data.sources[options.split] is None:
        raise UserError(f"--split {options.split}: the recipe names no source in data.{options.split}")
    if reads_prompts_alone(data) and (chosen := _chosen(options)) in ("cut", "dropped"):
        raise UserError(f"--{chosen}: prompts are never cut, and the data report counts those that were dropped")
    if isinstance(data, ExampleData):
        if options.packs and data.capacity is None:
            raise UserError("--packs: data.packing is off, so there are no packs: each row is one example")
        return
    if not isinstance(data, PretrainData):
        raise UserError(f"preview: {type(data).__name__} is neither ExampleData nor PretrainData, so it can't be shown")
    if options.packs:
        raise UserError("--packs: the rows of pretraining are shown as they are; packs are for SFTData and DPOData")
    if chosen := _chosen(options):
        raise UserError(
            f"--{chosen}: the rows of pretraining are cut from one stream, so all have the same length and none is cut "
            "or dropped; select rows with -n or --row"
        )


def _chosen(options: argparse.Namespace) -> str | None:
    return next((name for name in ("longest", "cut", "dropped") if getattr(options, name)), None)


def _examples(data: "TextData", options: argparse.Namespace) -> "list[Shown]":
    """The requested examples; if there are none, an entry that says so."""
    from oumi_pl.data.examples import ExampleData
    from oumi_pl.data.pretrain import PretrainData
    from oumi_pl.preview import examples, groups, stream
    from oumi_pl.preview.pieces import Decoder
    from oumi_pl.preview.shown import Shown

    split, count, decoder = options.split, options.rows, Decoder(data.tokenizer)
    if isinstance(data, PretrainData):
        return stream.rows(data, split, decoder, count, options.row)
    if groups.reads_prompts_alone(data):
        return groups.prompts(data, split, decoder, count, numbers=options.row, longest=options.longest)
    assert isinstance(data, ExampleData)
    if options.row is not None:
        rows = examples.numbered(data, split, options.row)
    else:
        rows = getattr(examples, _chosen(options) or "first")(data, split, count)
    shown = [examples.shown(data, split, row, decoder) for row in rows]
    return shown or [Shown(split, [f"no {split} row was {_chosen(options)}"])]
