"""`report.html`: one page of a run that needs no other file, no network and no script."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from oumi_pl import __version__
from oumi_pl.errors import UserError
from oumi_pl.report import curves, sections
from oumi_pl.report.record import Record
from oumi_pl.report.words import clock, meaning
from oumi_pl.runs import files
from oumi_pl.runs.folders import CHECKPOINTS, CONFIG, RUN, saved_steps


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Renders a template. All values are escaped; the page needs no other file, no network and no script.

    Args:
        template: A file that may extend `base.html` and import from `parts.html`, both beside this one.
        filters: Name in the template -> function of a value.
        values: Name in the template -> value.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)


def framed(html: str, height: int) -> str:
    """A page within a notebook: in a frame, so that its style does not change the notebook's."""
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe srcdoc="{escape(html)}" style="{style}" sandbox="allow-popups"></iframe>'


def inline(title: str, facts: Sequence[str] = (), *, height: int = 120, **parts: Any) -> str:
    """A small page within a notebook.

    Args:
        title: Its first line.
        facts: Further lines.
        height: Of the frame, in pixels.
        parts: `curves` (SVG elements), `bars` (name, parameters, trained ones, most parameters), or `samples`.
    """
    content = {"curves": [], "bars": [], "samples": []} | parts
    page = render(INLINE, {"count": lambda n: f"{n:,}"}, title=title, facts=facts, **content)
    return framed(page, height)


PAGE = "report.html"
PICTURE = "curves.png"
TEMPLATE = Path(__file__).with_name("report.html")
INLINE = Path(__file__).with_name("inline.html")


def make(folder: Path, condition: str | None = None) -> Path | None:
    """Draws the curves of a run and writes its page; returns its path, or None if the run has no metrics yet.

    `condition` is shown as the state of the run, because the report is drawn before the run is marked as finished.
    """
    run = Record(folder, condition)
    if not run.metrics:
        return None
    title = f"{run.name}: {run.condition}, step {run.step:,}"
    curves.png(run.metrics, title, folder / PICTURE, run.resumed)
    try:
        text = page(run)
    except DAMAGE as error:
        raise UserError(
            f"{folder}: the report can't be drawn, because {RUN} or data.json holds something else than a run writes "
            f"({type(error).__name__}: {error})"
        ) from error
    files.write(folder / PAGE, text)
    return folder / PAGE


DAMAGE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError)
"""What values of other kinds raise."""


def page(run: Record) -> str:
    """The HTML of the page."""
    phases = sections.phases(run)
    commands = {
        "The command that started it": run.state.get("command"),
        "The last command that resumed it": run.state.get("resumed_by") if run.resumed else None,
    }
    return render(
        TEMPLATE,
        **sections.headline(run),
        curves=[_curve(run, panel) for panel in curves.panels(run.metrics)],
        legend=curves.legend(run.metrics, run.resumed),
        samples=sections.samples(run),
        groups=sections.groups(run),
        groups_end=run.rollouts_end,
        tables=sections.tables(run),
        strips=sections.strips(run),
        phases=phases,
        total_time=clock(sum(phase["seconds"] for phase in phases)),
        speeds=sections.speeds(run),
        commands=_commands(run),
        directory=Path.cwd(),
        recipe={what: command for what, command in commands.items() if command},
        recipe_text=run.recipe_text,
        config=run.config_text,
        environment=sections.environment(run),
        meanings={name: meaning(name) for name in sorted(run.metrics) if meaning(name)},
        version=__version__,
        created=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        update=_command("runs", "report", str(run.folder)),
    )


def _curve(run: Record, panel: curves.Panel) -> tuple[str, str]:
    """The meanings of a panel's metrics, and its picture."""
    meanings = "; ".join(f"{line.column}: {meaning(line.column)}" for line in panel.lines if meaning(line.column))
    svg = curves.svg(panel, run.metrics, run.resumed)
    return meanings, svg.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)


def _commands(run: Record) -> dict[str, str]:
    """Next steps -> their commands, quoted for a shell."""
    folder = str(run.folder)
    commands = {}
    resumable = bool(saved_steps(run.folder / CHECKPOINTS))
    if run.condition == "finished":
        more = max(2 * run.step, 1)
        further = "Train it further; a learning rate that has decayed rises again, because the schedule gets longer"
        commands[further] = _command("fit", "--resume", folder, "--trainer.max_steps", str(more))
    elif run.condition != "running":
        again = "Resume it" if resumable else "Start it again (there is no checkpoint yet)"
        again += ", if it is no longer running" if run.condition == "running?" else ""
        commands[again] = _command("fit", "--resume", folder)
    commands["Run it again with the same config"] = _command("fit", "--config", str(run.folder / CONFIG))
    if resumable or (run.folder / CHECKPOINTS / "best.ckpt").exists():
        export = _command("export", "--checkpoint", folder, "--output", f"{folder}-model")
        commands["Export the checkpoint as a model folder"] = export
    if (run.folder / "model").is_dir():
        prompt = str(run.samples[-1]["prompt"]).strip() if run.samples else ""
        text = prompt if 0 < len(prompt) <= 80 and prompt.isprintable() else "Hello"
        commands["Generate"] = _command("generate", "--model", str(run.folder / "model"), "--prompt", text)
    commands["Compare it with another run"] = _command("runs", "compare", folder, "OTHER")
    return commands


def _command(*words: str) -> str:
    return shlex.join(["oumi_pl", *words])
