"""`report.html`: one page of a run that needs no other file, no network and no script."""

import shlex
import time
from html import escape
from pathlib import Path

from oumi_pl import __version__
from oumi_pl.report import curves, html, sections
from oumi_pl.report.record import Record
from oumi_pl.report.words import meaning
from oumi_pl.runs.checkpoint_files import saved_steps
from oumi_pl.runs.folders import CHECKPOINTS, CONFIG

PAGE = "report.html"
PICTURE = "curves.png"
STYLE = """
:root { --code: #f3f4f6; --good: #1a7f37; --bad: #b42318; --warn: #9a6700; --warned: #fff8e1; }
@media (prefers-color-scheme: dark) { :root { --code: #23282d; --good: #4ac26b; --bad: #ff7b72; --warn: #e3b341;
  --warned: #2d2716; } }
.head { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; }
.state { border: 1px solid currentColor; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600; }
.finished { color: var(--good); } .failed, .killed { color: var(--bad); } .stopped, .unknown { color: var(--warn); }
.running { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 12px 0 0; font-size: 14px; }
a { color: var(--c0); }
.note { background: var(--warned); border-left: 4px solid var(--warn); padding: 8px 12px; margin: 10px 0;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
.note.bad { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 10px; margin: 16px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tile { padding: 9px 12px; } .tile b { display: block; font-size: 20px; font-weight: 600; line-height: 1.3; }
.tile span { color: var(--quiet); font-size: 13px; }
abbr { text-decoration: underline dotted var(--faint); cursor: help; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 10px; }
figure svg { display: block; width: 100%; height: auto; } figure svg text { font-family: inherit; }
.samples { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); } .card { padding: 10px 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 8px 18px;
  margin-top: 8px; border-top: 1px solid var(--edge); padding-top: 8px; }
.bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; margin: 4px 0 10px; background: var(--edge); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px; }
pre { background: var(--code); border-radius: 6px; padding: 10px 12px; overflow-x: auto; margin: 6px 0 12px;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; max-width: 100%; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 3px 16px;
  margin: 6px 0; font-size: 14px; }
dt { color: var(--quiet); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.strip { display: block; width: 100%; max-width: 560px; height: 26px; }
@media print { nav { display: none; } details { display: block; } }
"""
SECTIONS = ("Curves", "Samples", "Data", "Time", "Commands", "Recipe", "Environment", "Metrics")


def make(folder: Path) -> Path | None:
    """Draws the curves of a run and writes its page.

    Returns:
        The page; None if the run has no metrics yet, and so nothing to tell.
    """
    run = Record(folder)
    if not run.metrics:
        return None
    title = f"{run.name}: {run.condition}, step {run.step:,}"
    curves.png(run.metrics, title, folder / PICTURE, run.resumed)
    half = folder / f"{PAGE}.half"
    half.write_text(page(run), encoding="utf-8")
    return half.replace(folder / PAGE)


def page(run: Record) -> str:
    """The page's HTML. All that comes from files is escaped."""
    bodies = {
        "Curves": _curves(run),
        "Samples": sections.samples(run),
        "Data": sections.data(run),
        "Time": sections.times(run),
        "Commands": _commands(run),
        "Recipe": _recipe(run),
        "Environment": sections.environment(run),
        "Metrics": _glossary(run),
    }
    there = [name for name in SECTIONS if bodies[name]]
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in there)
    parts = "".join(f'<h2 id="{name.lower()}">{name}</h2>{bodies[name]}' for name in there)
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    foot = (
        f'<p class="quiet small">Made by oumi_pl {escape(__version__)} at {made}; update it with '
        f"<code>{escape(_command('runs', 'report', str(run.folder)))}</code></p>"
    )
    body = f"{sections.headline(run)}<nav>{links}</nav>{parts}{foot}"
    return html.document(escape(run.name), body, STYLE, "<link rel='icon' href='data:,'>")


def _curves(run: Record) -> str:
    figures = []
    for panel in curves.panels(run.metrics):
        told = "; ".join(f"{line.column}: {meaning(line.column)}" for line in panel.lines if meaning(line.column))
        drawn = curves.svg(panel, run.metrics, run.resumed)
        drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)
        figures.append(f'<figure title="{escape(told)}">{drawn}</figure>')
    legend = escape(curves.legend(run.metrics, run.resumed))
    return f'<p class="quiet small">Against optimizer steps; {legend}.</p><div class="curves">{"".join(figures)}</div>'


def _commands(run: Record) -> str:
    """The commands that go on from here, ready to be pasted."""
    folder = str(run.folder)
    told = []
    resumable = bool(saved_steps(run.folder / CHECKPOINTS))
    if run.condition == "finished":
        more = max(2 * run.step, 1)
        further = "Train it further; a schedule that had come to its end begins to fall from higher up again"
        told.append((further, _command("fit", "--resume", folder, "--trainer.max_steps", str(more))))
    elif run.condition != "running":
        again = "Go on where it was" if resumable else "Start it again (there is no checkpoint yet)"
        again += ", if it is running no more" if run.condition == "running?" else ""
        told.append((again, _command("fit", "--resume", folder)))
    told.append(("Run it again as it was", _command("fit", "--config", str(run.folder / CONFIG))))
    if resumable or (run.folder / CHECKPOINTS / "best.ckpt").exists():
        export = _command("export", "--checkpoint", folder, "--output", f"{folder}-model")
        told.append(("Export the checkpoint as a model folder", export))
    if (run.folder / "model").is_dir():
        prompt = str(run.samples[-1]["prompt"]).strip() if run.samples else ""
        text = prompt if 0 < len(prompt) <= 80 and prompt.isprintable() else "Hello"
        told.append(("Generate", _command("generate", "--model", str(run.folder / "model"), "--prompt", text)))
    told.append(("Put it beside another run", _command("runs", "compare", folder, "OTHER")))
    where = f'<p class="quiet small">From {escape(str(Path.cwd()))}, where this page was made.</p>'
    return where + "".join(f'<p class="label">{escape(k)}</p><pre class="wrap">{escape(v)}</pre>' for k, v in told)


def _command(*words: str) -> str:
    return shlex.join(["oumi_pl", *words])


def _recipe(run: Record) -> str:
    parts = []
    if command := run.state.get("command"):
        parts.append(f'<p class="label">The command that started it</p><pre class="wrap">{escape(str(command))}</pre>')
    if run.resumed and (last := run.state.get("resumed_by")):
        parts.append(f'<p class="label">And the last that resumed it</p><pre class="wrap">{escape(str(last))}</pre>')
    if run.recipe_text:
        parts.append(f'<p class="label">The recipe, as it was written</p><pre>{escape(run.recipe_text)}</pre>')
    if run.config_text:
        what = "The whole config, with the command line's options and all defaults"
        parts.append(f"<details><summary>{what}</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(parts)


def _glossary(run: Record) -> str:
    told = {name: meaning(name) for name in sorted(run.metrics) if meaning(name)}
    listed = "".join(f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>" for name, text in told.items())
    if not listed:
        return ""
    return f"<details><summary>What each of these {len(told)} metrics means</summary><dl>{listed}</dl></details>"
