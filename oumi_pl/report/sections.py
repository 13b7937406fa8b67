"""The sections of a report's page, each the HTML of one question: results, samples, the data, where the time went."""

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from oumi_pl.report.clock import PHASES
from oumi_pl.report.html import table
from oumi_pl.report.record import Record
from oumi_pl.report.words import clock, large, meaning, moment, number
from oumi_pl.runs import folders

SHOWN = 12
"""Prompts whose samples a page shows at the most."""
HIGHER_IS_BETTER = ("exact_match", "accuracies", "mean_token_accuracy", "margins")
TILES = {
    "val/exact_match": "Exact answers",
    "val/rewards/accuracies": "Pairs ranked right",
    "val/rewards/margins": "Reward margin",
    "val/bits_per_byte": "Bits per byte",
    "val/perplexity": "Perplexity",
    "val/mean_token_accuracy": "Token accuracy",
    "val/kl": "KL to the reference",
}
"""Metrics of validation that the head of a page shows -> their titles."""
ROWS = {
    "rows": ("rows read", "n"),
    "documents": ("documents", "n"),
    "kept": ("kept", "n"),
    "dropped": ("dropped", "reasons"),
    "cut": ("cut to length", "n"),
    "empty_answers": ("empty answers", "n"),
    "straddled": ("a token crosses the border of prompt and answer", "n"),
    "replaced": ("characters that were not UTF-8", "n"),
    "tokens": ("tokens", "n"),
    "target_tokens": ("tokens that carry loss", "n"),
    "bytes": ("bytes of text", "n"),
    "bytes_per_token": ("bytes per token", "n"),
    "rows_planned": ("rows of an epoch", "n"),
    "windows": ("windows", "n"),
    "updates_per_epoch": ("updates per epoch", "n"),
    "fill": ("fill of the rows", "%"),
    "padding": ("padding", "%"),
    "saved_by_sharing": ("tokens saved where prompts are shared", "%"),
}
"""Key of a data report -> what it counts, and how it is written."""


def headline(run: Record) -> str:
    """Name, state, what was trained on what, and what came out."""
    state, condition = run.state, run.condition
    kind = condition.rstrip("?")
    steps = f"{run.step:,} of {state['steps']:,}" if state.get("steps") else f"{run.step:,}"
    badge = f'<span class="state {escape(kind)}">{escape(condition)}</span>'
    parts = [
        f'<div class="head"><h1>{escape(run.name)}</h1>{badge}</div>',
        f"<p>{escape(_what(run))}</p>",
        f'<p class="quiet small">Begun {moment(state.get("created_ns"))}, step {steps}{_resumed(run)}.</p>',
    ]
    if told := _told(run):
        kind = "note bad" if condition in ("failed", "killed") else "note"
        parts.append(f'<p class="{kind}">{escape(told)}</p>')
    warnings = state.get("warnings")
    for warning in warnings if isinstance(warnings, list) else []:
        parts.append(f'<p class="note">{escape(str(warning))}</p>')
    return "".join(parts) + f'<div class="tiles">{"".join(_tiles(run))}</div>'


def _what(run: Record) -> str:
    """What is trained, on what: one sentence."""
    model = run.state.get("model")
    model = model if isinstance(model, dict) else {}
    parts = []
    if model.get("trainer"):
        origin = model.get("name") or "random weights"
        count, trained = model.get("parameters", 0), model.get("trainable", 0)
        sizes = f"{large(count)} parameters" + ("" if trained == count else f", {large(trained)} of them trained")
        parts.append(f"{model['trainer']} of {model.get('architecture')} ({origin}; {sizes}), loss {model.get('loss')}")
    init = (run.config.get("data") or {}).get("init_args")
    source = init.get("train") if isinstance(init, dict) else None
    train = run.data.get("train")
    if source:
        size = ""
        if isinstance(train, dict) and isinstance(train.get("tokens"), int):
            size = f" ({train['tokens']:,} tokens in {number(train.get('kept'))} rows)"
        parts.append(f"trained on {_source(source)}{size}")
    if run.config.get("engine", "lightning") != "lightning":
        parts.append(f"by the engine {run.config['engine']}")
    return "; ".join(parts) + "." if parts else f"Recipe {run.state.get('recipe', 'unknown')}."


def _source(source: Any) -> str:
    if isinstance(source, list):
        return ", ".join(_source(s) for s in source[:4]) + (f" and {len(source) - 4} more" if len(source) > 4 else "")
    return str(source.get("path", source)) if isinstance(source, dict) else str(source)


def _resumed(run: Record) -> str:
    return f", resumed at step {', '.join(f'{s:,}' for s in run.resumed)}" if run.resumed else ""


def _told(run: Record) -> str:
    """What is to be said of a run that did not finish."""
    if run.condition == "killed":
        return f"The run was killed after step {run.step:,}, or its machine went down: its process is gone."
    if run.condition == "running?":
        host = (run.state.get("process") or {}).get("host")
        return f"The run says it is running{f' on {host}' if host else ''}, which can't be seen from here."
    reason = run.state.get("reason")
    return str(reason) if reason and run.condition in ("failed", "stopped") else ""


def _tiles(run: Record) -> list[str]:
    metrics = run.metrics
    tiles = []
    if "train/loss" in metrics:
        values = metrics["train/loss"][1]
        last = f"mean of the last {min(folders.RECENT, len(values))} updates; began at {number(values[0])}"
        tiles.append(_tile("Training loss", number(folders.recent(values)), last, meaning("train/loss")))
    if "val/loss" in metrics:
        tiles.append(_tile("Validation loss", number(metrics["val/loss"][1][-1]), *_best(metrics, "val/loss")))
    for name, title in TILES.items():
        if name in metrics:
            tiles.append(_tile(title, number(metrics[name][1][-1]), *_best(metrics, name)))
    took = folders.seconds(run.folder, run.state)
    tiles.append(_tile("Time", clock(took), "all in all, resumes included" if run.resumed else "all in all", ""))
    if "train/num_tokens" in metrics:
        tokens = metrics["train/num_tokens"][1][-1]
        tiles.append(_tile("Tokens seen", large(tokens), "without padding", meaning("train/num_tokens")))
    return tiles


def _best(metrics: dict[str, folders.Column], name: str) -> tuple[str, str]:
    steps, values = metrics[name]
    finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(finite) < 2 or name == "val/kl":
        return f"at step {steps[-1]:,}", meaning(name)
    best, step = (max if name.endswith(HIGHER_IS_BETTER) else min)(finite)
    where = "the best so far" if step == steps[-1] else f"best {number(best)} at step {step:,}"
    return f"{number(values[0])} at step {steps[0]:,}; {where}", meaning(name)


def _tile(title: str, value: str, below: str, hover: str) -> str:
    name = f'<abbr title="{escape(hover)}">{escape(title)}</abbr>' if hover else escape(title)
    return f'<div class="tile"><span>{name}</span><b>{escape(value)}</b><span>{escape(below)}</span></div>'


def samples(run: Record) -> str:
    """What the model wrote for each prompt at the first and at the last step that was looked at."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    cards = []
    for prompt, found in list(by_prompt.items())[:SHOWN]:
        found.sort(key=lambda sample: sample["step"])
        first, last = found[0], found[-1]
        texts = [(_when(first), first.get("completion"))]
        if last is not first:
            texts.append((_when(last), last.get("completion")))
        if last.get("reference"):
            texts.append(("Reference", last["reference"]))
        columns = "".join(
            f'<div><span class="label">{escape(label)}</span><div class="text">{_text(text)}</div></div>'
            for label, text in texts
        )
        asked = f'<span class="label">Prompt</span><div class="text">{_text(prompt)}</div>'
        cards.append(f'<div class="card">{asked}<div class="pair">{columns}</div></div>')
    more = f'<p class="quiet small">{len(by_prompt) - SHOWN} more prompts in samples.jsonl.</p>'
    return f'<div class="samples">{"".join(cards)}</div>{more if len(by_prompt) > SHOWN else ""}' if cards else ""


def _when(sample: dict[str, Any]) -> str:
    return f"Step {sample['step']:,}" if sample["step"] else "Before the first update"


def _text(text: Any) -> str:
    shown = "" if text is None else str(text)
    return escape(shown) if shown.strip() else '<span class="quiet">(nothing)</span>'


def data(run: Record) -> str:
    """The data report of all splits, side by side; empty if there is none."""
    splits = {name: report for name, report in run.data.items() if isinstance(report, dict)}
    if not splits:
        return ""
    rows = []
    for key, (title, kind) in ROWS.items():
        if any(report.get(key) not in (None, {}) and (report.get(key) or key == "kept") for report in splits.values()):
            rows.append([title, *(_cell(report.get(key), kind) for report in splits.values())])
    parts = [table(["", *map(escape, splits)], rows)]
    lengths = {name: report["lengths"] for name, report in splits.items() if report.get("lengths")}
    if lengths:
        parts.append(f'<p class="label">Length in tokens</p>{_lengths(lengths)}')
    for name, report in splits.items():
        if isinstance(report.get("sources"), list):
            parts.append(_sources(f"Sources of {name}", report["sources"]))
    consumed = run.data.get("consumed")
    if isinstance(consumed, list) and any(source.get("tokens") for source in consumed if isinstance(source, dict)):
        parts.append(_sources("Read in the running pass", consumed))
    return "".join(parts)


def _cell(value: Any, kind: str) -> str:
    if value is None or value == {}:
        return ""
    if kind == "reasons" and isinstance(value, dict):
        return "<br>".join(f"{escape(number(n))} ({escape(str(reason))})" for reason, n in value.items())
    return f"{value:.1%}" if kind == "%" and isinstance(value, int | float) else escape(number(value))


def _lengths(splits: dict[str, dict[str, int]]) -> str:
    """Percentiles of each split as a strip, all to one scale, and in numbers."""
    longest = max(max(lengths.values()) for lengths in splits.values()) or 1
    differ = any(min(lengths.values()) < max(lengths.values()) for lengths in splits.values())
    percentiles = list(next(iter(splits.values())))
    rows = [[escape(name), *(f"{found.get(p, 0):,}" for p in percentiles)] for name, found in splits.items()]
    numbers = table(["", *map(_percentile, percentiles)], rows)
    if not differ:
        return numbers
    strips = [f'<span class="label">{escape(n)}</span>{_strip(found, longest)}' for n, found in splits.items()]
    legend = '<p class="quiet small">Line: all rows; pale: 90 % of them; dark: half of them; mark: the median.</p>'
    return "".join(strips) + legend + numbers


def _percentile(name: str) -> str:
    return {"p0": "least", "p50": "median", "p100": "most"}.get(name, f"{name[1:]} %")


def _strip(found: dict[str, int], longest: int) -> str:
    """A box plot, 0 to the longest row of all splits, drawn in 500 by 26 units and stretched to the page."""
    at = {p: 500 * found[p] / longest for p in ("p0", "p5", "p25", "p50", "p75", "p95", "p100") if p in found}
    if len(at) < 7:
        return ""
    box = lambda low, high, y, height, fill: (  # noqa: E731
        f'<rect x="{at[low]:.1f}" y="{y}" width="{max(1.5, at[high] - at[low]):.1f}" height="{height}" {fill}/>'
    )
    return (
        '<svg class="strip" viewBox="0 0 504 26" preserveAspectRatio="none" aria-hidden="true">'
        + box("p0", "p100", 12, 2, 'fill="var(--faint)"')
        + box("p5", "p95", 7, 12, 'fill="var(--c0)" opacity="0.3"')
        + box("p25", "p75", 7, 12, 'fill="var(--c0)" opacity="0.7"')
        + f'<rect x="{at["p50"] - 1:.1f}" y="3" width="3" height="20" fill="var(--c1)"/></svg>'
    )


def _sources(title: str, sources: list[Any]) -> str:
    found = [source for source in sources if isinstance(source, dict)]
    keys = [key for key in dict.fromkeys(key for source in found for key in source) if key != "source"]
    keys = [key for key in keys if any(source.get(key) for source in found)]
    rows = []
    for source in found:
        cells = (_cell(source.get(key), "%" if key in ("share", "wanted") else "reasons") for key in keys)
        rows.append([escape(str(source.get("source", ""))), *cells])
    return table(["", *(escape(key.replace("_", " ")) for key in keys)], rows, escape(title))


def times(run: Record) -> str:
    """Where the time went, and how fast the updates were."""
    known = run.state.get("times")
    spent = {phase: s for phase, s in known.items() if s >= 0.0005} if isinstance(known, dict) else {}
    whole = sum(spent.values())
    parts = []
    if whole:
        bar = "".join(
            f'<span style="width:{100 * s / whole:.3f}%;background:{_color(i)}"></span>'
            for i, s in enumerate(spent.values())
        )
        key = '<span class="key" style="background:{}"></span>{}'
        rows = [
            [key.format(_color(i), escape(PHASES.get(p, p))), clock(s), f"{s / whole:.1%}"]
            for i, (p, s) in enumerate(spent.items())
        ]
        parts.append(f'<div class="bar">{bar}</div>{table(["All in all", clock(whole), ""], rows)}')
        if run.condition not in ("finished", "stopped", "failed"):
            parts.append('<p class="quiet small">Up to the last validation.</p>')
    speeds = [
        ("Tokens per second, median", "train/tokens_per_second"),
        ("Pairs per second, median", "train/pairs_per_second"),
    ]
    speeds += [("Model FLOPs utilisation, median", "train/mfu"), ("Padding, median", "train/padding")]
    told = {title: number(_median(run.metrics[name][1])) for title, name in speeds if name in run.metrics}
    if "train/peak_memory_gb" in run.metrics:
        told["Peak memory, GB"] = number(max(run.metrics["train/peak_memory_gb"][1]))
    return "".join(parts) + pairs(told)


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _color(index: int) -> str:
    return f"var(--c{index})" if index < 6 else ("var(--faint)", "var(--quiet)")[index % 2]


def environment(run: Record) -> str:
    """The machine and the versions."""
    found = run.state.get("environment")
    found = found if isinstance(found, dict) else {}
    model, owner, git = run.state.get("model"), run.state.get("process"), found.get("git")
    told: dict[str, Any] = {"oumi_pl": run.state.get("oumi_pl"), "python": found.get("python")}
    if isinstance(found.get("packages"), dict):
        told |= found["packages"]
    if "device" in found:
        told["device"] = f"{found.get('devices', 1)} x {found['device']}"
    if "cpu" in found:
        memory = f", {found['memory_gb']} GB" if found.get("memory_gb") else ""
        told["processor"] = f"{found['cpu']}, {found.get('cpus')} usable{memory}"
    if "platform" in found:
        told["platform"] = f"{found['platform']}, {found.get('machine')}"
    if isinstance(git, dict):
        changed = git.get("changed_files")
        files = "file differs" if changed == 1 else "files differ"
        told["git"] = f"{git.get('commit')}" + (f", {changed} tracked {files} from it" if changed else ", clean")
    if isinstance(model, dict):
        told["precision"] = model.get("precision")
    if isinstance(owner, dict):
        told["host"] = owner.get("host")
    return pairs({name: value for name, value in told.items() if value is not None})


def pairs(told: dict[str, Any]) -> str:
    """Names and values, one below the other; nothing if there are none."""
    listed = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in told.items())
    return f"<dl>{listed}</dl>" if listed else ""
