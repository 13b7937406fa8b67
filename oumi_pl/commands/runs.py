"""List runs with their state and losses, compare runs, or redraw the report of a run."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError, nearest
from oumi_pl.report import listing
from oumi_pl.runs import folders
from oumi_pl.terminal.text import echo

ACTIONS = ("compare", "report")
EPILOG = "also: oumi_pl runs compare A B ... (differing settings, overlaid curves); oumi_pl runs report RUN"


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if args and not args[0].startswith("-"):
        if args[0] not in ACTIONS:
            raise UserError(f"runs: unknown action {args[0]!r}{nearest(args[0], ACTIONS)}")
        return {"compare": _compare, "report": _report}[args[0]](args[1:])
    options = _parser("runs", __doc__, EPILOG).parse_args(args)
    root = options.runs_dir.expanduser()
    runs = folders.all_runs(root)
    if not runs:
        if not root.is_dir() and root != Path("runs"):
            raise UserError(f"runs: no directory {root}")
        echo(f"no runs in {root} yet; start one: oumi_pl fit --config quickstart/sft")
        return 0
    lines = [listing.line(run) for run in runs]
    echo(listing.table(lines, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for note in listing.notes(runs, lines):
        echo(f"note: {note}")
    return 0


def _parser(command: str, description: str | None, epilog: str | None = None) -> Parser:
    parser = Parser(command, description, epilog)
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    return parser


def _report(args: list[str]) -> int:
    """Draws the report again: a running or killed run has no current one."""
    parser = _parser(
        "runs report",
        "Redraw curves.png and report.html of any run, even if it is running or was killed.",
    )
    parser.add_argument("run", nargs="+", help="a run's name or folder")
    options = parser.parse_args(args)
    run_folders = [folders.find(name, options.runs_dir.expanduser()) for name in options.run]
    from oumi_pl.report.page import make

    for run in run_folders:
        if not folders.read_state(run):
            raise UserError(f"runs report: {run / folders.RUN} can't be read; put a copy in its place")
        page = make(run)
        if page is None:
            raise UserError(f"runs report: {run} has no metrics yet: not one step was written to {folders.METRICS}")
        echo(f"report -> {page}")
    return 0


def _compare(args: list[str]) -> int:
    """Compares runs: results, means over seeds, differing settings, and a picture of their curves."""
    what = (
        "Compare runs: results side by side, differing settings, and losses in one picture. Runs that differ in "
        "nothing but their seed are one group, with mean and standard deviation, and a band in the picture."
    )
    parser = _parser("runs compare", what)
    parser.add_argument("run", nargs="+", help="names or folders of two or more runs")
    parser.add_argument("--output", type=Path, help="file of the picture (default: RUNS_DIR/compare.png)")
    options = parser.parse_args(args)
    root = options.runs_dir.expanduser()
    run_folders = [folders.find(name, root) for name in dict.fromkeys(options.run)]
    if len(run_folders) < 2:
        others = ", ".join(run.name for run in folders.all_runs(root) if run.resolve() != run_folders[0].resolve())
        raise UserError(f"runs compare: name two or more runs{f'; there are also {others}' if others else ''}")
    output = (options.output or root / "compare.png").expanduser()
    if output.suffix != ".png":
        raise UserError(f"--output: {output} has to end in .png")
    if not output.parent.is_dir():
        raise UserError(f"--output: no directory {output.parent}")
    if options.output is not None and (output.exists() or output.is_symlink()):
        raise UserError(f"--output: {output} exists; name another file")
    from oumi_pl.report import beside
    from oumi_pl.report.record import Record

    records = [Record(run) for run in run_folders]
    for run in records:
        if not run.metrics:
            raise UserError(f"runs compare: {run.folder} has no metrics yet: not one step was written")
    names = _names(run_folders)
    echo(_table(["", *names], [[name, *cells] for name, cells in beside.outcomes(records).items()]))
    grouped = beside.groups(records, names)
    if len(grouped) < len(records):
        print("\nmean ± standard deviation of runs that differ only in their seed:")
        echo(_table(["", *(group.label for group in grouped)], [[n, *c] for n, c in beside.spreads(grouped).items()]))
    differing = beside.differences(records)
    echo(f"\ndifferent settings ({' | '.join(names)}):" if differing else "\nno settings differ")
    for key, values in differing.items():
        echo(f"  {key}: {' | '.join(values)}")
    if note := beside.incomparable(records):
        echo(f"\nnote: {note}")
    beside.picture(grouped, output)
    echo(f"\npicture -> {output}")
    return 0


def _names(found: Sequence[Path]) -> list[str]:
    """Names of the runs; their paths if two have the same name."""
    names = [run.resolve().name for run in found]
    return names if len(set(names)) == len(names) else [str(run) for run in found]


def _table(head: list[str], rows: list[list[str]]) -> str:
    sizes = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [row[0].ljust(sizes[0]), *(c.rjust(s) for c, s in zip(row[1:], sizes[1:], strict=True))]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
