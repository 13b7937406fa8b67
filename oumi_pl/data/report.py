"""The data report: counts of rows and tokens, computed once the rows are planned."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from oumi_pl.data.duplicates import LISTED, Keyed, prompts_in_training, repeated
from oumi_pl.data.plan import Plan
from oumi_pl.data.shards import Shards
from oumi_pl.data.store import ExampleStore

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the sources' reports.

    `unread_columns` and `bad_rows` (reason -> number of rows, and the first of them) are there only if there are any.
    """
    counts = ("rows", "kept", "cut", "straddled", "empty_answers")
    total: dict[str, Any] = {key: sum(r[key] for r in reports) for key in counts}
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report["dropped"])
    total["dropped"] = dict(dropped)
    notes: Counter[str] = Counter()
    for report in reports:
        notes.update(report.get("notes", {}))
    if notes:
        total["notes"] = dict(notes)
    if unread := {name for report in reports for name in report.get("unread_columns", ())}:
        total["unread_columns"] = sorted(unread)
    return total | _merged_bad_rows(reports)


def _merged_bad_rows(reports: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [report["bad_rows"] for report in reports if "bad_rows" in report]
    merged_kinds = {
        reason: {
            "rows": sum(kinds[reason]["rows"] for kinds in bad if reason in kinds),
            "first": [origin for kinds in bad if reason in kinds for origin in kinds[reason]["first"]],
        }
        for kinds in bad
        for reason in kinds
    }
    return {"bad_rows": merged_kinds} if bad else {}


def of_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """The sum and the percentiles of lengths `[examples]`."""
    tokens = int(lengths.sum())
    percentiles = {f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES} if tokens else {}
    return {"tokens": tokens, "lengths": percentiles}


def describe(stores: list[ExampleStore], lengths: np.ndarray, plan: Plan, capacity: int | None) -> dict[str, Any]:
    """Counts, tokens, length percentiles, and `fill`, the used share of the packs' capacity.

    `target_weight` is the weight of all targets, if rows or turns have weights.
    """
    described = merged([store.report for store in stores]) | {
        **of_lengths(lengths),
        "target_tokens": sum(store.target_tokens for store in stores),
        **_target_weight(stores),
        "rows_planned": plan.rows,
        "updates_per_epoch": len(plan),
    }
    if capacity is not None:
        planned = lengths[plan.example_ids].sum()
        described["fill"] = round(float(planned / max(1, plan.rows * capacity)), 6)
    if len(stores) > 1:
        described["sources"] = [store.report for store in stores]
    return described


def describe_repeated(
    stores: Sequence[Keyed], reports: Sequence[dict[str, Any]], training: Sequence[Keyed] | None
) -> dict[str, Any]:
    """Counts repeated rows of a split, and held-out rows whose prompt is in training too.

    Args:
        stores: The rows of each source of the split.
        reports: The report of each source.
        training: Those of the training split; None if this is it, or if it is not used.

    Returns:
        `duplicates`, the rows that repeat an earlier one (`rows`, and the `first` pairs of them), and
        `prompts_in_training` (see there). Each only if there are any.
    """
    same = repeated(stores)
    for left_out in (report["duplicates"] for report in reports if "duplicates" in report):
        same = {"rows": same["rows"] + left_out["rows"], "first": [*same["first"], *left_out["first"]][:LISTED]}
    described: dict[str, Any] = {"duplicates": same} if same["rows"] else {}
    if training is None:
        return described
    shared = [prompts_in_training(store, training) for store in stores]
    if any(part["rows"] for part in shared):
        described["prompts_in_training"] = {
            "rows": sum(part["rows"] for part in shared),
            "identical": sum(part["identical"] for part in shared),
            "first": [pair for part in shared for pair in part["first"]][:LISTED],
        }
        if len(stores) > 1:
            parts = zip(reports, shared, strict=True)
            described["sources"] = [report | {"prompts_in_training": part["rows"]} for report, part in parts]
    return described


def _target_weight(stores: list[ExampleStore]) -> dict[str, float]:
    """The weight of all targets; nothing if each has the weight 1."""
    if all(store.target_weights is None for store in stores):
        return {}
    weights = (store.targets if store.target_weights is None else store.target_weights for store in stores)
    return {"target_weight": round(float(sum(values.sum() for values in weights)), 6)}


def describe_documents(shards: list[Shards], across: bool = False) -> dict[str, Any]:
    """Counts of documents, with the keys of `describe`; documents are never cut.

    `replaced` counts the characters that replaced invalid UTF-8; `bytes` are those of UTF-8 text.

    Args:
        shards: The documents of each source.
        across: Whether first tokens of documents are targets, except for the very first.
    """
    lengths = np.concatenate([s.lengths for s in shards])
    counted = of_lengths(lengths)
    tokens = counted["tokens"]
    sources = [source_report(s) for s in shards]
    text_bytes = sum(source["bytes"] for source in sources)
    dropped = Counter({"empty": sum(source["empty"] for source in sources)})
    for source in sources:
        dropped.update(source.get("dropped", {}))
    bad = _merged_bad_rows(sources)
    dropped.update({reason: kind["rows"] for reason, kind in bad.get("bad_rows", {}).items()})
    described: dict[str, Any] = {
        **{key: sum(source[key] for source in sources) for key in ("rows", "kept", "replaced")},
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "cut": 0,
        "straddled": 0,
        "empty_answers": 0,
        "documents": len(lengths),
        **counted,
        "target_tokens": max(0, tokens - (1 if across else len(lengths))),
        "bytes": text_bytes,
        "bytes_per_token": round(text_bytes / max(1, tokens), 4),
    }
    return described | bad | ({"sources": sources} if len(sources) > 1 else {})


def source_report(shards: Shards) -> dict[str, Any]:
    """Counts of a source's documents."""
    counts = {"documents": len(shards), "tokens": shards.tokens, "bytes": int(shards.manifest["text_bytes"])}
    return {"source": shards.name} | shards.manifest["report"] | counts


def describe_consumed(
    mixture: dict[str, Any],
    names: Sequence[str],
    weights: Sequence[float | None],
    running: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """What the current pass has read from each source: documents, whole passes, tokens and their share.

    With weights, also the intended share.

    Args:
        mixture: The state of a `TokenMixture`, before the document that is being cut into rows.
        names: Of the sources.
        weights: Of the sources.
        running: Source of that document, and how many of its tokens are in rows already; None if there is none.
    """
    tokens = list(mixture["tokens"])
    if running is not None:
        tokens[running[0]] += running[1]
    mixture = mixture | {"tokens": tokens}
    total, wanted = max(1, sum(tokens)), [w for w in weights if w is not None]
    described = []
    for i, name in enumerate(names):
        counts = {key: mixture[key][i] for key in ("documents", "passes", "tokens")}
        described.append({"source": name, **counts, "share": round(mixture["tokens"][i] / total, 6)})
        if wanted:
            described[-1]["wanted"] = round(wanted[i] / sum(wanted), 6)
    return described
