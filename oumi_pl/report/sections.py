"""Computes the sections of a report: results, samples, data, time and environment."""

import math
import statistics
from typing import Any

from oumi_pl.report.clock import PHASES
from oumi_pl.report.record import Record
from oumi_pl.report.words import clock, large, meaning, moment, number
from oumi_pl.runs import folders
from oumi_pl.runs.lineage import parent_text

HIGHER_IS_BETTER = ("exact_match", "accuracies", "sign_accuracy", "mean_token_accuracy", "margins", "val/reward")
TILES = {
    "val/loss": "Validation loss",
    "val/reward": "Validation reward",
    "val/exact_match": "Exact answers",
    "val/rewards/accuracies": "Pairs ranked right",
    "val/rewards/sign_accuracy": "Rewards with the right sign",
    "val/rewards/margins": "Reward margin",
    "val/bits_per_byte": "Bits per byte",
    "val/perplexity": "Perplexity",
    "val/mean_token_accuracy": "Token accuracy",
    "val/kl": "KL to the reference",
}
"""Validation metric -> title of its tile at the top of the page."""
SPEEDS = {
    "train/tokens_per_second": "Tokens per second, median",
    "train/rows_per_second": "Rows per second, median",
    "train/mfu": "Model FLOPs utilisation, median",
    "train/padding": "Padding, median",
}
ROWS = {
    "rows": ("rows read", "n"),
    "documents": ("documents", "n"),
    "kept": ("kept", "n"),
    "dropped": ("dropped", "reasons"),
    "bad_rows": ("of these, rows that can't be used", "first rows"),
    "duplicates": ("repeat an earlier row", "pairs"),
    "prompts_in_training": ("with a prompt that is in training too", "pairs"),
    "near_duplicates": ("near an earlier row (half of their runs of 13 words)", "near pairs"),
    "text_in_training": ("share a run of 13 words (or all, if shorter) with training", "near pairs"),
    "unread_columns": ("columns that aren't read", "names"),
    "cut": ("cut to length", "n"),
    "empty_answers": ("empty answers", "n"),
    "straddled": ("a token crosses the border of prompt and answer", "n"),
    "notes": ("notes", "reasons"),
    "drawn": ("drawn in the first epoch", "reasons"),
    "order": ("order", "text"),
    "turns_apart": ("a branch for each turn", "n"),
    "turns_apart_tokens": ("tokens that the branches add", "n"),
    "template_date": ("today, for the chat template", "text"),
    "replaced": ("characters that were not UTF-8", "n"),
    "tokens": ("tokens", "n"),
    "target_tokens": ("tokens that carry loss", "n"),
    "target_weight": ("their weight in the loss", "n"),
    "bytes": ("bytes of text", "n"),
    "bytes_per_token": ("bytes per token", "n"),
    "rows_planned": ("rows of an epoch", "n"),
    "windows": ("windows", "n"),
    "updates_per_epoch": ("updates per epoch", "n"),
    "fill": ("fill of the rows", "%"),
    "padding": ("padding", "%"),
    "saved_by_sharing": ("tokens saved where prompts are shared", "%"),
}
"""Key of a data report -> its title, and the format of its value."""
PERCENTILES = {"p0": "least", "p5": "5 %", "p25": "25 %", "p50": "median", "p75": "75 %", "p95": "95 %", "p100": "most"}

Table = tuple[list[str], list[list[str]], str]
"""Columns, rows and title."""


def headline(run: Record) -> dict[str, Any]:
    """Name, state, summary, warnings and results of the run."""
    state = run.state
    steps = f"{run.step:,} of {state['steps']:,}" if state.get("steps") else f"{run.step:,}"
    resumed = f", resumed at step {', '.join(f'{s:,}' for s in run.resumed)}" if run.resumed else ""
    return {
        "title": run.name,
        "condition": run.condition,
        "summary": _summary(run),
        "begun": f"Begun {moment(state.get('created_ns'))}, step {steps}{resumed}{_ended(state)}.",
        "ending": _ending(run),
        "warnings": state.get("warnings", []),
        "tiles": _tiles(run),
    }


def _ended(state: dict[str, Any]) -> str:
    """What ended a finished run before its last update."""
    return f", ended by {state['why']}" if state.get("why") and state.get("status") == "finished" else ""


def _summary(run: Record) -> str:
    """Model and data in one sentence."""
    model = run.part("model")
    parts = []
    if model.get("trainer"):
        origin = model.get("name") or "random weights"
        count, trained = model.get("parameters", 0), model.get("trainable", 0)
        sizes = f"{large(count)} parameters" + ("" if trained == count else f", {large(trained)} of them trained")
        loss = f", loss {model['loss']}" if model.get("loss") else ""
        parts.append(f"{model['trainer']} of {model.get('architecture')} ({origin}; {sizes}){loss}")
    init = (run.config.get("data") or {}).get("init_args")
    source = init.get("train") if isinstance(init, dict) else None
    train = run.data.get("train")
    if source:
        size = ""
        if isinstance(train, dict) and isinstance(train.get("tokens"), int):
            size = f" ({train['tokens']:,} tokens in {number(train.get('kept'))} rows)"
        parts.append(f"trained on {_source(source)}{size}")
    if parent := parent_text(run.state):
        parts.append(f"begun from {parent}")
    if run.config.get("engine", "lightning") != "lightning":
        parts.append(f"by the engine {run.config['engine']}")
    return "; ".join(parts) + "." if parts else f"Recipe {run.state.get('recipe', 'unknown')}."


def _source(source: Any) -> str:
    if isinstance(source, list):
        return ", ".join(_source(s) for s in source[:4]) + (f" and {len(source) - 4} more" if len(source) > 4 else "")
    return str(source.get("path", source)) if isinstance(source, dict) else str(source)


def _ending(run: Record) -> str:
    """Why the run did not finish; empty if it did."""
    if run.condition == "killed":
        return f"The run was killed after step {run.step:,}, or its machine went down: its process no longer exists."
    if run.condition == "running?":
        host = run.part("process").get("host")
        return f"The run is marked as running{f' on {host}' if host else ''}, which can't be checked from here."
    reason = run.state.get("reason")
    return str(reason) if reason and run.condition in ("failed", "stopped") else ""


def _tiles(run: Record) -> list[dict[str, str]]:
    metrics = run.metrics
    tiles = []

    def add(title: str, value: str, note: str, metric: str = "") -> None:
        tiles.append({"title": title, "value": value, "note": note, "meaning": meaning(metric)})

    # the loss of a policy gradient does not measure progress
    first, title = ("train/reward", "Training reward") if "train/reward" in metrics else ("train/loss", "Training loss")
    if first in metrics:
        values = metrics[first][1]
        note = f"mean of the last {min(folders.RECENT, len(values))} updates; began at {number(values[0])}"
        add(title, number(folders.recent(values)), note, first)
    passes = sorted((name for name in metrics if name.startswith("val/pass@")), key=lambda name: (len(name), name))
    for name, title in (TILES | {name: name.removeprefix("val/") for name in passes}).items():
        if name in metrics and not (name == "val/loss" and "val/reward" in metrics):
            add(title, number(metrics[name][1][-1]), _best(metrics, name), name)
    took = folders.seconds(run.folder, run.state)
    add("Time", clock(took), "in total, resumes included" if run.resumed else "in total")
    if "train/num_tokens" in metrics:
        add("Tokens seen", large(metrics["train/num_tokens"][1][-1]), "without padding", "train/num_tokens")
    return tiles


def _best(metrics: dict[str, folders.Column], name: str) -> str:
    steps, values = metrics[name]
    finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(finite) < 2 or name == "val/kl":
        return f"at step {steps[-1]:,}"
    best, step = (max if name.endswith(HIGHER_IS_BETTER) or "pass@" in name else min)(finite)
    where = "the best so far" if step == steps[-1] else f"best {number(best)} at step {step:,}"
    return f"{number(values[0])} at step {steps[0]:,}; {where}"


def samples(run: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt with its completions at the first and the last step, and the reference."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    cards = []
    for prompt, known in by_prompt.items():
        known.sort(key=lambda sample: sample["step"])
        texts = []
        for sample in known[:1] + known[1:][-1:]:
            when = f"Step {sample['step']:,}" if sample["step"] else "Before the first update"
            completion = sample.get("completion")
            texts.append((when, "" if completion is None else str(completion)))
        if reference := known[-1].get("reference"):
            texts.append(("Reference", str(reference)))
        cards.append((prompt, texts))
    return cards


# ---- groups of online training

GROUPS = 8
"""Number of prompts whose completions are shown."""
TIMES = 4
"""Number of updates shown for a prompt: the first, the last, and some evenly between."""


def groups(run: Record) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Selects prompts, each with its best and worst completion at some of the updates that sampled it.

    Returns:
        Text and origin of the prompt, and `{when, mean, best, worst}` for each update; `best` and `worst` are
        `(text, total reward, rewards in words)`, and `worst` is None if all completions got the same reward. Prompts
        that were sampled most often come first, then those whose rewards changed most.
    """
    by_prompt: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for line in run.rollouts:
        key = str(line.get("prompt")), str(line.get("origin"))
        by_prompt.setdefault(key, {}).setdefault(line["update"], []).append(line)

    def change(updates: dict[int, list[dict[str, Any]]]) -> float:
        means = [statistics.fmean(_total(line) for line in lines) for lines in updates.values()]
        return max(means) - min(means)

    ranked = sorted(by_prompt.items(), key=lambda item: (-len(item[1]), -change(item[1])))
    shown = []
    for (prompt, origin), updates in ranked[:GROUPS]:
        steps = sorted(updates)
        count = min(TIMES, len(steps))
        chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
        shown.append((prompt, origin, [_group(step, updates[step]) for step in chosen]))
    return shown


def _group(update: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [_total(line) for line in lines]
    best, worst = max(lines, key=_total), min(lines, key=_total)
    mean = f"{len(lines)} completions, mean reward {number(statistics.fmean(totals))}"
    return {
        "when": f"Update {update:,}",
        "mean": mean,
        "best": _scored(best),
        "worst": _scored(worst) if min(totals) < max(totals) else None,
    }


def _scored(line: dict[str, Any]) -> tuple[str, str, str]:
    rewards = line.get("rewards")
    parts = [f"{name} {number(value)}" for name, value in rewards.items()] if isinstance(rewards, dict) else []
    parts += [f"{number(line.get('length'))} tokens"] + ([] if line.get("finished", True) else ["cut"])
    return str(line["completion"]), number(_total(line)), ", ".join(parts)


def _total(line: dict[str, Any]) -> float:
    total = line.get("total")
    return float(total) if isinstance(total, int | float) else math.nan


# ---- data


def tables(run: Record) -> list[Table]:
    """The tables of the data report: splits side by side, lengths, sources. Empty without a report."""
    splits = _splits(run)
    if not splits:
        return []
    rows = []
    for key, (title, kind) in ROWS.items():
        if any(report.get(key) not in (None, {}) and (report.get(key) or key == "kept") for report in splits.values()):
            rows.append([title, *(_cell(report.get(key), kind) for report in splits.values())])
    shown = [(["", *splits], rows, "")]
    lengths = {name: report["lengths"] for name, report in splits.items() if report.get("lengths")}
    if lengths:
        cells = [[name, *(f"{percentiles.get(p, 0):,}" for p in PERCENTILES)] for name, percentiles in lengths.items()]
        shown.append((["", *PERCENTILES.values()], cells, "Length in tokens"))
    for name, report in splits.items():
        if isinstance(report.get("sources"), list):
            shown.append(_sources(f"Sources of {name}", report["sources"]))
    consumed = run.data.get("consumed")
    if isinstance(consumed, list) and any(source.get("tokens") for source in consumed if isinstance(source, dict)):
        shown.append(_sources("Read in the current pass", consumed))
    return shown


def strips(run: Record) -> dict[str, dict[str, float]]:
    """Split -> percentiles of its lengths, scaled so that the longest of all is 500; empty if all are equally long."""
    lengths = {name: report["lengths"] for name, report in _splits(run).items() if report.get("lengths")}
    longest = max((percentiles.get("p100", 0) for percentiles in lengths.values()), default=0)
    if all(min(percentiles.values()) == max(percentiles.values()) for percentiles in lengths.values()):
        return {}
    whole = {name: percentiles for name, percentiles in lengths.items() if percentiles.keys() >= PERCENTILES.keys()}
    return {name: {p: 500 * percentiles[p] / longest for p in PERCENTILES} for name, percentiles in whole.items()}


def _splits(run: Record) -> dict[str, dict[str, Any]]:
    return {name: report for name, report in run.data.items() if isinstance(report, dict)}


def _cell(value: Any, kind: str) -> str:
    if value is None or value == {}:
        return ""
    if kind == "reasons" and isinstance(value, dict):
        return "\n".join(f"{number(n)} ({reason})" for reason, n in value.items())
    if kind == "first rows" and isinstance(value, dict):
        return "\n".join(f"{', '.join(rows['first'])}: {reason}" for reason, rows in value.items())
    if kind in ("pairs", "near pairs") and isinstance(value, dict):
        sign = " = " if kind == "pairs" else " ~ "
        pairs = ", ".join(sign.join(pair) for pair in value["first"])
        return f"{number(value['rows'])}: {pairs}" if pairs else number(value["rows"])
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.1%}" if kind == "%" and isinstance(value, int | float) else number(value)


def _sources(title: str, sources: list[Any]) -> Table:
    mappings = [source for source in sources if isinstance(source, dict)]
    apart = ("source", "bad_rows", "duplicates")  # those of all sources are in the first table
    keys = [key for key in dict.fromkeys(key for source in mappings for key in source) if key not in apart]
    keys = [key for key in keys if any(source.get(key) for source in mappings)]
    rows = []
    for source in mappings:
        cells = (
            _cell(source.get(key), "%" if key == "wanted" or key.startswith("share") else "reasons") for key in keys
        )
        rows.append([str(source.get("source", "")), *cells])
    return ["", *(key.replace("_", " ") for key in keys)], rows, title


# ---- time and machine


def phases(run: Record) -> list[dict[str, Any]]:
    """The phases of the run with their seconds, shares and colours."""
    spent = {phase: s for phase, s in run.part("times").items() if s >= 0.0005}
    colors = [*(f"var(--c{i})" for i in range(6)), *("var(--faint)", "var(--quiet)") * len(spent)]
    return [
        {
            "name": PHASES.get(phase, phase),
            "seconds": s,
            "time": clock(s),
            "share": s / sum(spent.values()),
            "color": color,
        }
        for (phase, s), color in zip(spent.items(), colors, strict=False)
    ]


def speeds(run: Record) -> dict[str, str]:
    """Speed and memory of the updates."""
    facts = {}
    for name, title in SPEEDS.items():
        if name in run.metrics:
            finite = [value for value in run.metrics[name][1] if math.isfinite(value)]
            facts[title] = number(statistics.median(finite) if finite else math.nan)
    if "train/peak_memory_gb" in run.metrics:
        facts["Peak memory, GB"] = number(max(run.metrics["train/peak_memory_gb"][1]))
    return facts


def environment(run: Record) -> dict[str, Any]:
    """Machine and package versions."""
    machine, git = run.part("environment"), run.part("environment").get("git")
    facts: dict[str, Any] = {"oumi_pl": run.state.get("oumi_pl"), "python": machine.get("python")}
    if isinstance(machine.get("packages"), dict):
        facts |= machine["packages"]
    if "device" in machine:
        facts["device"] = f"{machine.get('devices', 1)} x {machine['device']}"
    if "cpu" in machine:
        memory = f", {machine['memory_gb']} GB" if machine.get("memory_gb") else ""
        facts["processor"] = f"{machine['cpu']}, {machine.get('cpus')} usable{memory}"
    if "platform" in machine:
        facts["platform"] = f"{machine['platform']}, {machine.get('machine')}"
    if isinstance(git, dict):
        changed = git.get("changed_files")
        files = "file differs" if changed == 1 else "files differ"
        facts["git"] = f"{git.get('commit')}" + (f", {changed} tracked {files} from it" if changed else ", clean")
    facts |= {"precision": run.part("model").get("precision"), "host": run.part("process").get("host")}
    return {name: value for name, value in facts.items() if value is not None}
