"""The data report of a preview: counts of rows and tokens, notes on tokenizer and template, packs, lengths."""

from typing import Any

import numpy as np

from oumi_pl.data.base import TextData
from oumi_pl.data.duplicates import REPEATED
from oumi_pl.data.examples import ExampleData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sources import as_sources
from oumi_pl.data.tokenizers import TokenizerFactory
from oumi_pl.preview.examples import has_no_dropped_rows
from oumi_pl.preview.groups import reads_prompts_alone
from oumi_pl.preview.shown import Histogram, Pack, Packs, Table

BINS = 32
"""Most bins of a histogram."""
LISTED = 8
"""Most added tokens that are listed by name."""


def tables(data: TextData) -> list[Table]:
    """Counts of rows and tokens with a column per split; and per source, if there are several."""
    report = data.report()
    if not report:
        return []
    names = list(report)
    rows: dict[str, list[str]] = {}
    for column, split in enumerate(report.values()):
        for name, value in _lines(split).items():
            rows.setdefault(name, [""] * len(names))[column] = value
    table = Table("rows and tokens", ["", *names], [[name, *cells] for name, cells in rows.items()])
    several = {split: described["sources"] for split, described in report.items() if "sources" in described}
    return [table, *(_sources(split, sources, _weights(data, split)) for split, sources in several.items())]


def _weights(data: TextData, split: str) -> list[float]:
    """The weights of a split's sources; empty if they have none. Only the training split uses weights."""
    if split != "train":
        return []
    sources: Any = data.sources[split]
    return [source.weight for source in as_sources(sources) if source.weight is not None]


def _lines(report: dict[str, Any]) -> dict[str, str]:
    """The report of a split as names and values."""
    lines = {"rows": f"{report['rows']:,}", "kept": f"{report['kept']:,}"} | _left_out(report)
    for key, name in (
        ("cut", "cut to length"),
        ("straddled", "a token across the border of prompt and answer"),
        ("empty_answers", "an empty answer"),
    ):
        if report.get(key):
            lines[name] = _share(report[key], report["kept"])
    lines |= {note: _share(n, report["kept"]) for note, n in report.get("notes", {}).items()}
    if rows_apart := report.get("turns_apart"):
        name = "turns apart, each after its own history"
        lines[name] = f"{_share(rows_apart, report['kept'])}, {report['turns_apart_tokens']:,} tokens more"
    if "template_date" in report:
        lines["today, for the chat template"] = report["template_date"]
    lines |= _drawn(report)
    for key in ("documents", "replaced", "split"):
        if report.get(key):
            name = {"replaced": "characters that weren't UTF-8", "split": "documents longer than a row"}.get(key, key)
            lines[name] = f"{report[key]:,}"
    lines |= _tokens(report)
    for key, name in (("target_weight", "their weight in the loss"), ("bytes_per_token", "bytes per token")):
        if key in report:
            lines[name] = f"{report[key]:,.2f}"
    lines |= _lengths(report)
    for key, name in (("rows_planned", "rows of an epoch"), ("updates_per_epoch", "updates of an epoch, one device")):
        if key in report:
            lines[name] = f"{report[key]:,}"
    lines |= {"windows": f"{report['windows']:,}"} if "windows" in report else {}
    for key, name in (("fill", "fill of the rows"), ("saved_by_sharing", "saved by sharing prompts")):
        if key in report:
            lines[name] = f"{report[key]:.1%}"
    return lines


def _drawn(report: dict[str, Any]) -> dict[str, str]:
    """What `sample_by` and `order_by` do."""
    drawn = report.get("drawn", {})
    lines = {f"drawn in the first epoch, {name}": _share(n, sum(drawn.values())) for name, n in drawn.items()}
    return lines | ({"order": report["order"]} if "order" in report else {})


def _tokens(report: dict[str, Any]) -> dict[str, str]:
    if "target_tokens" not in report:
        return {"tokens of the prompts": f"{report['tokens']:,}"}
    return {"tokens": f"{report['tokens']:,}", "carry loss": _share(report["target_tokens"], report["tokens"])}


def _lengths(report: dict[str, Any]) -> dict[str, str]:
    lengths = report["lengths"]
    if not lengths or report["kept"] <= 1:
        return {}
    return {
        "length: shortest, median, longest": f"{lengths['p0']:,}, {lengths['p50']:,}, {lengths['p100']:,}",
        "length: 5 %, 25 %, 75 %, 95 %": ", ".join(f"{lengths[p]:,}" for p in ("p5", "p25", "p75", "p95")),
    }


def _left_out(report: dict[str, Any]) -> dict[str, str]:
    """What was not used: rows by reason, with the first of those that can't be used, and columns."""
    lines = {f"dropped: {reason}": _share(n, report["rows"]) for reason, n in report["dropped"].items()}
    for reason, kind in report.get("bad_rows", {}).items():
        lines[f"first: {reason}"] = ", ".join(kind["first"][:LISTED])
    lines |= _repeated(report)
    if report.get("unread_columns"):
        lines["columns that no format reads"] = ", ".join(report["unread_columns"])
    return lines


def _repeated(report: dict[str, Any]) -> dict[str, str]:
    """Rows that say the same as others, with the first of them."""
    lines = {}
    if same := report.get("duplicates"):
        if REPEATED in report["dropped"]:  # which is counted already
            lines[f"first: {REPEATED}"] = _pairs(same["first"])
        else:
            lines["repeat an earlier row"] = f"{_share(same['rows'], report['kept'])}: {_pairs(same['first'])}"
    if shared := report.get("prompts_in_training"):
        identical = f", {shared['identical']:,} of them identical rows" if shared["identical"] else ""
        rows = _share(shared["rows"], report["kept"])
        lines["with a prompt that is in training too"] = f"{rows}{identical}: {_pairs(shared['first'])}"
    if near := report.get("near_duplicates"):
        lines["near an earlier row"] = _with_pairs(_share(near["rows"], report["kept"]), near["first"], "~")
    if shared := report.get("text_in_training"):
        counted = f"{_share(shared['rows'], report['kept'])}, {shared['half']:,} of them with half of their runs"
        lines["share a run of 13 words (or all, if shorter) with training"] = _with_pairs(counted, shared["first"], "~")
    return lines


def _pairs(pairs: list[list[str]], sign: str = "=") -> str:
    """Rows, each with the earlier one, or the one in training, that it is the same as."""
    return ", ".join(f"{row} {sign} {other}" for row, other in pairs)


def _with_pairs(count: str, pairs: list[list[str]], sign: str) -> str:
    return f"{count}: {_pairs(pairs, sign)}" if pairs else count


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else f"{count:,}"


def _sources(split: str, sources: list[dict[str, Any]], weights: list[float]) -> Table:
    keys = [key for key in ("rows", "kept", "cut", "documents", "tokens") if any(source.get(key) for source in sources)]
    rows = []
    for source in sources:
        dropped = source["rows"] - source["kept"]
        rows.append([source["source"], *(f"{source.get(key, 0):,}" for key in keys), f"{dropped:,}"])
    columns = ["", *keys, "dropped"]
    if weights:
        columns.append("share by weight")
        for row, weight in zip(rows, weights, strict=True):
            row.append(f"{weight / sum(weights):.1%}")
    if all("share_of_rows" in source for source in sources):
        columns.append("share of rows, tokens, targets")
        for row, source in zip(rows, sources, strict=True):
            row.append(", ".join(f"{source[f'share_of_{unit}']:.1%}" for unit in ("rows", "tokens", "targets")))
    return Table(f"sources of {split}", columns, rows)


def histograms(data: TextData) -> list[Histogram]:
    """The lengths of the examples or documents of each split."""
    histograms = []
    for split in data.report():
        if reads_prompts_alone(data):
            lengths, what = data.prompt_lengths(split), "prompts"
        elif isinstance(data, ExampleData):
            lengths, what = data.lengths(split), "examples"
        elif isinstance(data, PretrainData):
            lengths, what = np.concatenate([shards.lengths for shards in data.shards(split)]), "documents"
        else:
            continue
        if len(lengths) > 1:
            low, high = int(lengths.min()), int(lengths.max())
            width = -(-(high - low + 1) // BINS)  # an integer, so that all bins span the same number of lengths
            counts = np.bincount((lengths - low) // width)
            histograms.append(Histogram(f"{split}, {what}", low, high, counts.tolist()))
    return histograms


def notes(data: TextData) -> list[str]:
    """Notes on tokenizer, chat template, added tokens and streamed sources."""
    tokenizer, spec = data.tokenizer, data.tokenizer_spec
    name = spec if isinstance(spec, str) else "that of the recipe"
    if isinstance(spec, TokenizerFactory):
        name = type(spec).__name__
    lines = [f"tokenizer: {name}, {len(tokenizer):,} tokens, EOS {tokenizer.eos_token}, padding {tokenizer.pad_token}"]
    if data.template is not None:
        lines.append(f"chat template of rows with turns: {data.template.source}")
    if data.added_tokens:
        texts = tokenizer.convert_ids_to_tokens(data.added_tokens[:LISTED])
        named = [f"{token} ({i})" for i, token in zip(data.added_tokens, texts, strict=False)]
        more = f" and {len(data.added_tokens) - LISTED:,} more" if len(data.added_tokens) > LISTED else ""
        lines.append(f"added to the vocabulary: {', '.join(named)}{more}")
    streamed = (f"train: {name} is tokenized while it is streamed, so it is not counted" for name in data.streamed)
    return [*lines, *streamed]


def packs(data: ExampleData) -> Packs:
    """The packs of the first micro-batch of training. The data must be packed."""
    capacity = data.capacity_for("train")
    assert capacity is not None
    numbered = has_no_dropped_rows(data, "train")
    lengths = data.lengths("train")
    first = next(data.plan(0).micro_batches(0, data.layout))
    filled = [Pack(lengths[ids].tolist(), [i + 1 if numbered else 0 for i in ids.tolist()]) for ids in first]
    total = sum(sum(pack.lengths) for pack in filled)
    share = total / (len(filled) * capacity)
    title = f"packs of the first micro-batch: {len(filled)} of {capacity:,} tokens, {share:.1%} filled"
    return Packs(title, capacity, filled)
