"""Plan a run before a machine is rented: memory, messages and time of an update, for any number of devices."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from oumi_pl.planning.cards import CARDS, DEFAULT, Card, card_of
from oumi_pl.terminal.screen import meanwhile
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from oumi_pl.planning.fit import Search
    from oumi_pl.planning.update import Estimate

EPILOG = f"""\
Other options override values of the recipe, as for fit: --data.batch_size 4 --trainer.precision bf16-true

The module, optimizer, strategy and precision of the recipe run for an update on fake tensors, which have shapes but no
values, in a fake process group. No weights are loaded and no GPU is needed; of a model on the hub, config.json is read.
The batch has the largest rows that the settings allow, unless --rows says otherwise.

Not counted: CUDA's own memory (5 % of the card are left free), torch.compile, sampling of completions, validation, and
the first pass over the data that caches a reference or a teacher. Models are assumed to keep packed documents apart.

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
    memory = 1e9 * (card.memory if options.memory is None else options.memory)
    for flag, value in (("--devices", options.devices), ("--memory", memory)):
        if value is not None and value <= 0:
            raise UserError(f"{flag} is {value:g}, but has to be above 0")
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction is {options.fraction:g}, but has to be above 0 and at most 1")
    configs = tuple(recipe_files.find(name) for name in options.config)
    with meanwhile("loading PyTorch and Lightning"):
        from oumi_pl.planning.fit import Search
        from oumi_pl.planning.update import Settings, estimate

    devices = options.devices or _devices(configs)
    settings = Settings(configs, tuple(overrides), devices, real_rows=options.rows == "data")
    start = estimate(settings)
    search = Search(settings, start, memory)
    shown = _Shown(card, options.fraction, search)
    shown.table(" + ".join(recipe_files.recipe_name(path) for path in configs), start)
    if options.fit:
        return shown.fastest()
    return 0 if search.fits(start) else shown.advice()


def _parser() -> Parser:
    parser = Parser("plan", __doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--config", "-c", action="append", help="a recipe by name or path; several are merged")
    add("--devices", type=int, metavar="N", help="how many devices (default: the recipe's, or 1)")
    add("--memory", type=float, metavar="GB", help="memory of each device (default: the card's)")
    add("--card", default=DEFAULT, help=f"the card, for the time (default: {DEFAULT})")
    add("--fraction", type=float, default=0.5, help="share of the card's peak that it reaches (default: 0.5)")
    add("--fit", action="store_true", help="search the fastest batch_size and gradient_checkpointing that fit")
    rows = "the largest rows that the settings allow (default), or the largest micro-batch of the recipe's data"
    add("--rows", choices=("full", "data"), default="full", help=rows)
    return parser


def _devices(configs: tuple[Path, ...]) -> int:
    """The number of devices that a recipe names; 1 if it names none."""
    tree = recipe_files.merged([recipe_files.check(path) for path in configs])
    devices: Any = (tree.get("trainer") or {}).get("devices")
    return devices if isinstance(devices, int) and devices > 0 else 1


class _Shown:
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
        rows = f"{result.batch_size} x {result.micro_batches} x {result.devices}"
        yield (
            "update",
            f"{result.tokens:,} tokens: {rows} (batch_size x accumulate_grad_batches x devices)"
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
        yield "always held", f"{gigabytes(sum(result.held.values()))}: {held}"
        yield "computed", f"{result.costs.flops / 1e12:,.3g} TFLOP per update and device"
        yield "sent", f"{gigabytes(result.costs.sent)} per update and device" if result.devices > 1 else "nothing"
        each = self.seconds(result)
        yield (
            "time",
            f"about {roughly(each)} per update on {self.card.name} at {self.fraction:.0%} of its peak: "
            f"{result.tokens / each:,.0f} tokens per second",
        )

    def fastest(self) -> int:
        """Searches the fastest layout that fits, and prints it; returns the exit code."""
        from oumi_pl.planning.fit import options

        start = self.search.start
        result = self.search.fastest(self.seconds)
        echo("")
        if result is None:
            echo("no batch_size fits, with or without recomputation")
            return self.advice()
        changed = options(start, result)
        self.table(f"the fastest layout that fits: {changed or 'the recipe as it is'};", result)
        return 0

    def advice(self) -> int:
        """Prints what to change for a run that does not fit; returns the exit code."""
        from oumi_pl.callbacks.memory import gigabytes
        from oumi_pl.planning.fit import MOST_DEVICES, options

        search, start = self.search, self.search.start
        smaller = [size for size in search.sizes if size < start.batch_size]
        recomputing = search.layout._replace(gradient_checkpointing=True)
        ways = [search.largest(search.layout, smaller)]
        if not start.gradient_checkpointing:
            ways.append(search.largest(recomputing, [*smaller, start.batch_size]))
        found = [f"{options(start, way)} ({gigabytes(way.total)})" for way in ways if way is not None]
        if (more := search.with_more_devices(search.layout)) is not None:
            found.append(f"{more.devices} devices ({gigabytes(more.total)} each)")
        for i, way in enumerate(found):
            echo(f"{'or' if i else 'what fits':{WIDTH}} {way}")
        if not found:
            held = sum(start.held.values())
            echo(f"{'what helps':{WIDTH}} {gigabytes(held)} are held all the time, whatever the batch:")
            if not start.sharded:
                echo(f"{'':{WIDTH}} sharding over several devices (FSDP2), as in the recipe sft/llama3.1_8b_fsdp2")
            else:
                echo(f"{'':{WIDTH}} more than {MOST_DEVICES} devices would be needed; cards with more memory")
            echo(f"{'':{WIDTH}} --model.lora.r 16 (only adapters have gradients and optimizer state)")
        return 1
