"""The first lines of a run: what is trained, on what, with which loss, where it goes."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.figures import short
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.runs import folders
from oumi_pl.terminal.progress import styled, terminal_width, wrapped

LABEL = 12
"""Columns of the names at the left."""


class Start(L.Callback):
    """Prints model, data, loss, optimizer and steps before the first update."""

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints."""
        first, *rest = list(lines(trainer, pl_module))
        width = terminal_width()
        text = [styled(wrapped(first, width, "  "), "bold")]
        for label, value in rest:
            if width is None:
                text.append(f"{label}: {value}" if label else value)
            else:
                text.append(styled(f"{label:{LABEL}}", "dim") + wrapped(value, width - LABEL, " " * LABEL))
        sys.stderr.write("\n".join(text) + "\n")
        sys.stderr.flush()


def lines(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """The first line, and then pairs of a name and what there is to say."""
    data = trainer.datamodule
    folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
    base, loss = pl_module.causal_lm.base, getattr(pl_module, "loss", None)
    everything = sum(p.numel() for p in pl_module.parameters())
    model = pl_module.model_name or f"a new {type(base).__name__}"
    source = _sources(data, "train")
    named = f", loss {type(loss).__name__}" if loss is not None else ""
    yield (
        f"{type(pl_module).__name__} of {model} ({short(everything)} parameters) on {source}{named} -> "
        f"{folder or 'nowhere'}"
    )
    yield "model", _model(pl_module, everything)
    if loss is not None:
        yield "loss", described(loss)
    for note in getattr(pl_module, "notes", ()):
        name, colon, rest = note.partition(": ")
        yield (name, rest) if colon and len(name) < LABEL and " " not in name else ("", note)
    for split, report in data.report().items():
        yield split, summary(report)
    for name in getattr(data, "streamed", ()):
        yield "train", f"{name}, tokenized while it is streamed"
    if (template := getattr(data, "template", None)) is not None:
        added = f", {len(data.added_tokens)} tokens added" if data.added_tokens else ""
        yield "template", f"{template.source}, for rows with turns{added}"
    yield "optimizer", _optimizer(trainer.optimizers[0])
    devices = f"{trainer.world_size} x {pl_module.device.type}"
    yield "device", f"{devices}, precision {trainer.precision}"
    yield "steps", _steps(trainer, pl_module)


def _model(pl_module: Any, everything: int) -> str:
    trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    weights = f"weights of {pl_module.model_name}" if pl_module.model_name else "random weights"
    share = f"all {trained:,} parameters are trained"
    if trained < everything:
        how = "as adapters (LoRA)" if pl_module.lora is not None else "the others are frozen"
        share = f"{trained:,} of {everything:,} parameters are trained ({trained / everything:.2%}), {how}"
    return f"{type(pl_module.causal_lm.base).__name__}, {weights}; {share}"


def described(loss: Any) -> str:
    """A loss and the first sentence of what it says of itself."""
    says = (inspect.getdoc(type(loss)) or "").partition("\n\n")[0].replace("\n", " ")
    parts = ", ".join(type(part).__name__ for part in getattr(loss, "losses", ()))
    return f"{type(loss).__name__}{f' of {parts}' if parts else ''}{f': {says}' if says else ''}"


def _optimizer(optimizer: Any) -> str:
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    lr = f"lr {min(rates):g}" + (f" to {max(rates):g}" if len(rates) > 1 else "")
    decays: dict[float, int] = {}
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        decays[decay] = decays.get(decay, 0) + sum(p.numel() for p in group["params"])
    decayed = " and ".join(f"{decay:g} for {short(count)} values" for decay, count in decays.items())
    return f"{type(optimizer).__name__}, {lr}, weight decay {decayed}"


def unit(data: Any) -> str:
    """What `data.batch_size` counts."""
    if data.packing and hasattr(data, "plan"):  # without a plan, rows are filled whether documents are apart or not
        return "pack"
    return "pair" if data.gives == "pairs" else "row"


def _steps(trainer: Any, pl_module: Any) -> str:
    total, rows = pl_module.total_steps(), trainer.datamodule.layout.rows_per_update
    what = unit(trainer.datamodule)
    resumed = f"; resumed at step {trainer.global_step:,}" if trainer.global_step else ""
    return (
        f"{total:,} update{'s' if total > 1 else ''} of {rows:,} {what}{'s' if rows > 1 else ''} each{resumed}; the "
        f"loss shown from here on is the mean of the last {folders.RECENT} updates"
    )


def _sources(data: Any, split: str) -> str:
    found = getattr(data, "sources", {}).get(split)
    found = found if isinstance(found, list) else [found]
    names = [str(getattr(source, "path", source)) for source in found]
    return names[0] if len(names) == 1 else f"a mixture of {len(names)} sources"


def summary(report: dict[str, Any]) -> str:
    """A split's report in a line."""
    kept = "all" if report["kept"] == report["rows"] else f"{report['kept']:,}"
    parts = [f"{report['rows']:,} row{'s' if report['rows'] != 1 else ''}, {kept} kept"]
    if report.get("documents", report["kept"]) != report["kept"]:
        parts.append(f"{report['documents']:,} documents")
    parts += [f"{n:,} dropped ({reason})" for reason, n in report["dropped"].items()]
    if report["cut"]:
        parts.append(f"{report['cut']:,} cut to length")
    if report["straddled"]:
        parts.append(f"{report['straddled']:,} with a token across the border of prompt and answer")
    if report.get("empty_answers"):
        parts.append(f"{report['empty_answers']:,} with an empty answer")
    lengths = report["lengths"]
    parts.append(f"{report['tokens']:,} tokens, {report['target_tokens']:,} carry loss")
    if lengths and lengths["p0"] == lengths["p100"]:
        parts.append(f"length {lengths['p0']:,}")
    elif lengths:
        parts.append(f"length {lengths['p0']}/{lengths['p50']}/{lengths['p100']} (min/median/max)")
    if "fill" in report:
        parts.append(f"fill {report['fill']:.1%}")
    if "saved_by_sharing" in report:
        parts.append(f"{report['saved_by_sharing']:.1%} of the tokens saved where prompts are shared")
    return ", ".join(parts)
