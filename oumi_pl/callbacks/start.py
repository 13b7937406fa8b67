"""Prints the first lines of a run: model, data, loss, optimizer, steps and run folder."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

from oumi_pl.callbacks.progress import short
from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.data.duplicates import REPEATED
from oumi_pl.data.sources import as_sources
from oumi_pl.losses.preference import WeightedSum
from oumi_pl.runs import folders
from oumi_pl.runs.lineage import parent_text
from oumi_pl.terminal.screen import styled, terminal_width, wrapped
from oumi_pl.terminal.text import visible
from oumi_pl.types import RunData, RunModule

LABEL = 12
"""Columns of the labels at the left."""
SOURCES = 5
"""Most sources of a mixture whose shares are printed; the data report has all."""
REASON = 100
"""Most characters of a reason for dropping rows; the data report has it whole."""


class Start(L.Callback):
    """Prints model, data, loss, optimizer and steps before the first update."""

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Prints the lines."""
        width = terminal_width()
        text = [styled(wrapped(headline(trainer, pl_module), width, "  "), "bold")]
        for label, value in lines(trainer, pl_module):
            if width is None:
                text.append(wrapped(f"{label}: {value}" if label else value, None))
            else:
                text.append(styled(f"{visible(label):{LABEL}}", "dim") + wrapped(value, width - LABEL, " " * LABEL))
        sys.stderr.write("\n".join(text) + "\n")
        sys.stderr.flush()


def headline(trainer: Any, pl_module: RunModule) -> str:
    """The first line, a summary of the run."""
    data: RunData = trainer.datamodule
    sources: Any = data.sources["train"]
    names = [source.title for source in as_sources(sources)]
    source = names[0] if len(names) == 1 else f"a mixture of {len(names)} sources"
    model = pl_module.model_name or f"a new {type(pl_module.causal_lm.base).__name__}"
    parameters = short(sum(p.numel() for p in pl_module.parameters()))
    loss = "" if pl_module.loss is None else f", loss {type(pl_module.loss).__name__}"
    folder = run_directory(trainer) or "nowhere"
    return f"{type(pl_module).__name__} of {model} ({parameters} parameters) on {source}{loss} -> {folder}"


def lines(trainer: Any, pl_module: RunModule) -> Iterator[tuple[str, str]]:
    """The other lines: label (which may be empty) and text."""
    data: RunData = trainer.datamodule
    yield "model", _model(pl_module)
    if pl_module.loss is not None:
        yield "loss", described(pl_module.loss)
    yield from map(labelled, pl_module.notes)
    yield from data_lines(data, data.report())
    if data.template is not None:
        of_template = len({*_texts(data)} - {*data.new_tokens})
        added = f", {of_template} tokens added" if of_template else ""
        yield "template", f"{data.template.source}, for rows with turns{added}"
    if data.new_tokens:
        yield "tokens", _new_tokens(data, pl_module)
    folder = run_directory(trainer)
    if folder is not None and (parent := parent_text(folders.read_state(folder))):
        yield "parent", parent
    yield "optimizer", _optimizer(trainer.optimizers[0], trainer.global_step)
    yield "device", f"{trainer.world_size} x {pl_module.device.type}, precision {trainer.precision}"
    yield "steps", _steps(trainer, pl_module)


def _texts(data: RunData) -> list[str]:
    """The tokens that were added to the vocabulary."""
    return list(data.tokenizer.convert_ids_to_tokens(data.added_tokens))


def labelled(note: str) -> tuple[str, str]:
    """Splits a note into label and text, as in `reference: a frozen copy`; other notes get an empty label."""
    name, colon, rest = note.partition(": ")
    return (name, rest) if colon and len(name) < LABEL and " " not in name else ("", note)


def data_lines(data: RunData, report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The data report of each split in a line, and the streamed sources."""
    for split, rows in report.items():
        yield split, summary(rows)
        if any("share_of_rows" in source for source in rows.get("sources", ())):
            yield "mixture", mixture(rows["sources"])
        if "drawn" in rows:
            total = sum(rows["drawn"].values())
            yield "drawn", ", ".join(f"{name}: {n:,} ({n / total:.1%})" for name, n in rows["drawn"].items())
        if "order" in rows:
            yield "order", rows["order"]
    for name in data.streamed:
        yield "train", f"{name}, tokenized while it is streamed"


def _new_tokens(data: RunData, pl_module: RunModule) -> str:
    """The recipe's tokens, and what their rows start as."""
    added = [token for token in data.new_tokens if token in _texts(data)]
    if not added:
        return f"the vocabulary has all of {', '.join(data.new_tokens)} already"
    start = "the mean of the trained rows" if pl_module.model_name is not None else "random numbers"
    return f"{len(added)} added to the vocabulary: {', '.join(added)}; their rows start as {start}"


def mixture(sources: list[dict[str, Any]]) -> str:
    """The shares of a mixture's sources in an epoch."""
    parts = [
        f"{source['source']}: {source['share_of_rows']:.1%} of the rows, {source['share_of_tokens']:.1%} of the "
        f"tokens, {source['share_of_targets']:.1%} of what carries loss"
        for source in sources[:SOURCES]
    ]
    return "; ".join(parts) + (f"; and {len(sources) - SOURCES} more" if len(sources) > SOURCES else "")


def _model(pl_module: RunModule) -> str:
    parameters = list(pl_module.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = f"weights of {pl_module.model_name}" if pl_module.model_name else "random weights"
    share = f"all {trained:,} parameters are trained"
    if trained < total:
        how = "as adapters (LoRA)" if pl_module.lora is not None else "the others are frozen"
        share = f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}), {how}"
    return f"{type(pl_module.causal_lm.base).__name__}, {weights}; {share}"


def described(loss: Any) -> str:
    """A loss and the first sentence of its documentation."""
    sentence = (inspect.getdoc(type(loss)) or "").partition("\n\n")[0].replace("\n", " ")
    parts = ", ".join(type(part).__name__ for part in loss.losses) if isinstance(loss, WeightedSum) else ""
    return f"{type(loss).__name__}{f' of {parts}' if parts else ''}{f': {sentence}' if sentence else ''}"


def _optimizer(optimizer: Optimizer, step: int) -> str:
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    lr = f"lr {min(rates):g}" + (f" to {max(rates):g}" if len(rates) > 1 else "")
    if step:
        lr += f" ({max(group['lr'] for group in optimizer.param_groups):.3g} at step {step:,} of its schedule)"
    decays: dict[float, int] = {}
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        decays[decay] = decays.get(decay, 0) + sum(p.numel() for p in group["params"])
    decayed = " and ".join(f"{decay:g} for {short(count)} values" for decay, count in decays.items())
    return f"{type(optimizer).__name__}, {lr}, weight decay {decayed}"


def _steps(trainer: Any, pl_module: RunModule) -> str:
    data: RunData = trainer.datamodule
    total, rows = pl_module.total_steps(), data.layout.rows_per_update
    unit = f"{data.row_name}{'s' if rows > 1 else ''}"
    resumed = f"; resumed at step {trainer.global_step:,}" if trainer.global_step else ""
    # a callback changes the accumulation with the epoch
    later = [(epoch, data.layout.at(epoch).rows_per_update) for epoch, _ in data.layout.schedule]
    changes = "".join(f", of {n:,} from epoch {epoch + 1} on" for epoch, n in later if epoch > trainer.current_epoch)
    return (
        f"{total:,} update{'s' if total > 1 else ''} of {rows:,} {unit} each{changes}{resumed}; the "
        f"loss shown from here on is the mean of the last {folders.RECENT} updates"
    )


def _shortened(reason: str) -> str:
    return reason if len(reason) <= REASON else f"{reason[: REASON - 3]}..."


def _repeated(report: dict[str, Any]) -> list[str]:
    """Rows that say the same as others, or nearly the same."""
    parts = []
    if "duplicates" in report and REPEATED not in report["dropped"]:
        parts.append(f"{report['duplicates']['rows']:,} repeat an earlier row")
    if shared := report.get("prompts_in_training"):
        parts.append(f"{shared['rows']:,} with a prompt that is in training too")
    if near := report.get("near_duplicates"):
        parts.append(f"{near['rows']:,} near an earlier row")
    if shared := report.get("text_in_training"):
        half = f" ({shared['half']:,} with half of their runs)" if shared["half"] else ""
        parts.append(f"{shared['rows']:,} share a run of 13 words (or all, if shorter) with training{half}")
    return parts


def summary(report: dict[str, Any]) -> str:
    """The report of a split in one line."""
    kept = "all" if report["kept"] == report["rows"] else f"{report['kept']:,}"
    parts = [f"{report['rows']:,} row{'s' if report['rows'] != 1 else ''}, {kept} kept"]
    if report.get("documents", report["kept"]) != report["kept"]:
        parts.append(f"{report['documents']:,} documents")
    parts += [f"{n:,} dropped ({_shortened(reason)})" for reason, n in report["dropped"].items()]
    parts += _repeated(report)
    if report["cut"]:
        parts.append(f"{report['cut']:,} cut to length")
    if report["straddled"]:
        parts.append(f"{report['straddled']:,} with a token across the border of prompt and answer")
    if report.get("unread_columns"):
        parts.append(f"columns that aren't read: {', '.join(report['unread_columns'])}")
    if report.get("empty_answers"):
        parts.append(f"{report['empty_answers']:,} with an empty answer")
    parts += [f"{n:,} with {note}" for note, n in report.get("notes", {}).items()]
    if report.get("turns_apart"):
        more = f"{report['turns_apart_tokens']:,} tokens more than their longest"
        parts.append(f"{report['turns_apart']:,} with a branch for each turn ({more})")
    lengths = report["lengths"]
    loss = f", {report['target_tokens']:,} carry loss" if "target_tokens" in report else " in prompts"
    parts.append(f"{report['tokens']:,} tokens{loss}")
    if lengths and lengths["p0"] == lengths["p100"]:
        parts.append(f"length {lengths['p0']:,}")
    elif lengths:
        parts.append(f"length {lengths['p0']}/{lengths['p50']}/{lengths['p100']} (min/median/max)")
    if "fill" in report:
        parts.append(f"fill {report['fill']:.1%}")
    if "saved_by_sharing" in report:
        parts.append(f"{report['saved_by_sharing']:.1%} of the tokens saved where prompts are shared")
    return ", ".join(parts)
