"""Plan a run before a machine is rented: memory, messages and time of an update, for any number of devices."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from oumi_pl.planning.cards import CARDS, DEFAULT, NODE, Card, card_of
from oumi_pl.terminal.screen import meanwhile
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from oumi_pl.planning.fit import Layout, Search
    from oumi_pl.planning.update import Estimate

EPILOG = f"""\
Other options override values of the recipe, as for fit: --data.batch_size 4 --trainer.precision bf16-true
--devices is their number on all nodes, which have {NODE} each; without it, trainer.devices x trainer.num_nodes.

The module, optimizer, strategy and precision of the recipe run for an update on fake tensors, which have shapes but no
values, in a fake process group. No weights are loaded and no GPU is needed; of a model on the hub, config.json is read.
The batch has the largest rows that the settings allow, unless --rows says otherwise.

Not counted: CUDA's own memory (5 % of the card are left free), torch.compile, fp8, kernels of model.attn other than
sdpa and eager, sampling of completions, validation, and the first pass over the data that caches a reference or a
teacher. Models are assumed to keep packed documents apart.

Accuracy: in 19 runs on CPUs (SFT, DPO and pretraining on 1, 2 and 4 processes), the planned peak was within 2.8 % of
that of the run. Peaks on GPUs are not measured, nor is any time, which follows from data sheets.

cards: {", ".join(f"{name} ({card.memory} GB)" for name, card in CARDS.items())}

  oumi_pl plan --config sft/llama3.1_8b_fsdp2 --devices 8 --memory 80
  oumi_pl plan --config dpo/smollm2_135m --card 4090 --fit       the fastest layout that fits
  oumi_pl plan --config mine.yaml --rows data                    with the largest micro-batch of the recipe's data
"""
WIDTH = 15
"""Width of the first column."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code: 0 if the run fits, 1 if it does not."""
    options, overrides = _parser().parse_known_args(args)
    if not options.config:
        recipes = ", ".join(recipe_files.names())
        raise UserError(f"plan needs a recipe: oumi_pl plan --config NAME or FILE; recipes: {recipes}")
    card = card_of(options.card)
    for flag, value in (("--devices", options.devices), ("--memory", options.memory)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} is {value:g}, but has to be above 0")
    memory = 1e9 * (card.memory if options.memory is None else options.memory)
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction is {options.fraction:g}, but has to be above 0 and at most 1")
    configs = tuple(recipe_files.find(name) for name in options.config)
    with meanwhile("loading PyTorch and Lightning"):
        from oumi_pl.planning.fit import Search
        from oumi_pl.planning.update import Settings, estimate

    devices, of_node = devices_of(configs, overrides, options.devices)
    settings = Settings(configs, tuple(overrides), devices, of_node, real_rows=options.rows == "data")
    start = estimate(settings)
    search = Search(settings, start, memory)
    printer = Printer(card, options.fraction, search)
    printer.table(" + ".join(recipe_files.recipe_name(path) for path in configs), start)
    if options.fit:
        return printer.fastest()
    return 0 if search.fits(start) else printer.advice()


def _parser() -> Parser:
    parser = Parser("plan", __doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--config", "-c", action="append", help="a recipe by name or path; several are merged")
    devices = "how many devices in all (default: trainer.devices x trainer.num_nodes, or 1)"
    add("--devices", type=int, metavar="N", help=devices)
    add("--memory", type=float, metavar="GB", help="memory of each device (default: the card's)")
    add("--card", default=DEFAULT, help=f"the card, for its memory and the time (default: {DEFAULT})")
    add("--fraction", type=float, default=0.5, help="share of the card's peak that it reaches (default: 0.5)")
    fit = "the faster one of two layouts: the largest batch_size that fits, with and without gradient_checkpointing"
    add("--fit", action="store_true", help=fit)
    rows = "the largest rows that the settings allow (default), or the largest micro-batch of the recipe's data"
    add("--rows", choices=("full", "data"), default="full", help=rows)
    return parser


def devices_of(configs: tuple[Path, ...], overrides: list[str], total: int | None) -> tuple[int, int]:
    """The number of devices, and how many of them a node has.

    Args:
        configs: Recipes, which may name `trainer.devices` and `trainer.num_nodes`.
        overrides: Options of `fit`, which may name them too, and then win.
        total: The value of `--devices`.

    Raises:
        UserError: both `total` and an override name devices, or an override is no number.
    """
    keys = ("devices", "num_nodes")
    flags = dict(recipe_files.read_options(overrides))
    typed = {key: flags[f"--trainer.{key}"] for key in keys if f"--trainer.{key}" in flags}
    if total is not None:
        if typed:
            both = " and ".join(f"--trainer.{key}" for key in typed)
            raise UserError(f"--devices {total} is the number of all devices; leave out {both}, or --devices")
        return total, NODE
    for key, value in typed.items():
        if _count(value) is None:
            raise UserError(f"--trainer.{key} is {value}, but plan needs a number above 0")
    tree = recipe_files.merged([recipe_files.check(path) for path in configs])
    devices, nodes = (_count(value) or 1 for value in map(((tree.get("trainer") or {}) | typed).get, keys))
    return devices * nodes, devices if nodes > 1 else NODE


def _count(devices: Any) -> int | None:
    """How many devices a value of `trainer.devices` names; None for `auto`, which depends on the machine."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.strip("[] ").split(",") if part]
    if isinstance(devices, list):
        return len(devices) or None
    number = int(devices) if str(devices).lstrip("-").isdigit() else 0
    return number if number > 0 else None


class Printer:
    """Prints estimates.

    Args:
        card: The card of the times.
        fraction: The share of its peak that it reaches.
        search: What finds other layouts.
    """

    def __init__(self, card: Card, fraction: float, search: "Search") -> None:
        self.card = card
        self.fraction = fraction
        self.search = search

    def seconds(self, result: "Estimate") -> float:
        """Seconds of an update."""
        from oumi_pl.planning.times import seconds

        return seconds(result.costs, self.card, self.fraction)

    def table(self, title: str, result: "Estimate") -> None:
        """Prints an estimate."""
        for name, text in self._lines(title, result):
            echo(f"{name:{WIDTH}} {text}")

    def _lines(self, title: str, result: "Estimate") -> Iterator[tuple[str, str]]:
        from oumi_pl.callbacks.dry_run import roughly
        from oumi_pl.callbacks.memory import gigabytes

        devices = f"{result.devices} device{'s' * (result.devices > 1)}"
        yield "plan", f"{title} on {devices}, {result.strategy}, precision {result.precision}"
        rows = f"{result.batch_size} x {result.micro_batches} x {result.data_ranks}"
        ranks = "devices" if result.data_ranks == result.devices else "groups of devices"
        yield (
            "update",
            f"{result.tokens:,} tokens: {rows} (batch_size x accumulate_grad_batches x {ranks})"
            + (", with recomputation" if result.gradient_checkpointing else ""),
        )
        memory, fits = self.search.memory, self.search.fits(result)
        verdict = "fits into" if fits else "does not fit into"
        yield (
            "peak",
            f"{gigabytes(result.total)} per device: {verdict} {gigabytes(memory)} ({result.total / memory:.0%})",
        )
        for kind, size in result.peak.items():
            yield f"  {kind.value}", gigabytes(size)
        held = ", ".join(f"{kind.value} {gigabytes(size)}" for kind, size in result.held.items())
        place = "host memory" if result.offloaded else "always held"
        yield place, f"{gigabytes(sum(result.held.values()))}: {held}"
        yield "computed", f"{result.costs.flops / 1e12:,.3g} TFLOP per update and device"
        yield "sent", f"{gigabytes(result.costs.sent)} per update and device" if result.devices > 1 else "nothing"
        each = self.seconds(result)
        yield (
            "time",
            f"about {roughly(each)} per update on {self.card.name} at {self.fraction:.0%} of its peak: "
            f"{result.tokens / each:,.0f} tokens per second"
            + (", without the copies to and from host memory, and the step there" if result.offloaded else ""),
        )
        if result.left_out:
            yield "left out", " and ".join(result.left_out) + ": what this saves can't be planned without a GPU"

    def fastest(self) -> int:
        """Searches the fastest layout that fits, and prints it; returns the exit code."""
        from oumi_pl.planning.fit import Layout

        result = self.search.fastest(self.seconds)
        echo("")
        if result is None:
            echo("no batch_size fits, with or without recomputation")
            return self.advice()
        changed = " ".join(Layout.of(result).options(self.search.layout))
        self.table(f"the fastest layout that fits: {changed or 'the recipe as it is'};", result)
        return 0

    def advice(self) -> int:
        """Prints what to change for a run that does not fit; returns the exit code."""
        from oumi_pl.callbacks.memory import gigabytes
        from oumi_pl.planning.fit import MOST_DEVICES, Layout

        search, start = self.search, self.search.start
        smaller = [size for size in search.sizes if size < start.batch_size]
        recomputing = search.layout._replace(gradient_checkpointing=True)
        ways = [search.largest(search.layout, smaller)]
        if not start.gradient_checkpointing:
            ways.append(search.largest(recomputing, [*smaller, start.batch_size]))
        if (more := search.with_more_devices(search.layout)) is not None:
            ways.append(more)
        fitting = [self._way(Layout.of(way), gigabytes(way.total)) for way in ways if way is not None]
        for i, way in enumerate(fitting):
            echo(f"{'or' if i else 'what fits':{WIDTH}} {way}")
        if not fitting:
            held = sum(start.held.values())
            echo(f"{'what helps':{WIDTH}} {gigabytes(held)} are held all the time, whatever the batch:")
            too_few = [f"more than {MOST_DEVICES} devices would be needed"] if start.sharded else []
            for line in (*too_few, *start.ways_to_hold_less, "cards with more memory"):
                echo(f"{'':{WIDTH}} {line}")
        return 1

    def _way(self, layout: "Layout", size: str) -> str:
        """What to change for a layout: its options, or its devices, and whether an update has other rows then."""
        before = self.search.layout
        options = " ".join(layout.options(before))
        if layout.devices == before.devices:
            return f"{options} ({size})"
        rows = "the same update" if layout.rows == before.rows else f"updates of {layout.rows} rows, not {before.rows}"
        return f"{layout.devices} devices{' ' * bool(options)}{options} ({size} each, {rows})"
