"""The first lines of a run: what is trained, on what, with which loss, where it goes."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder

CUT_SHARE = 0.01
"""Share of rows cut to length above which the run says so."""


class Start(L.Callback):
    """Prints model, data report, optimizer groups and steps before the first update."""

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints."""
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        base = pl_module.causal_lm.base
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in pl_module.parameters())
        loss = type(getattr(pl_module, "loss", None)).__name__
        console.print(
            f"[bold]{type(pl_module).__name__}[/] of {type(base).__name__} "
            f"({pl_module.model_name or 'random weights'}), {trainable:,} of {everything:,} parameters trainable, "
            f"{loss}, {trainer.precision}, on {pl_module.device} x {trainer.world_size} -> {folder}"
        )
        for split, report in trainer.datamodule.report().items():
            console.print(f"{split}: {summary(report)}")
            if report["kept"] and report["cut"] / report["kept"] > CUT_SHARE:
                console.print(
                    f"[yellow]warning: {report['cut'] / report['kept']:.1%} of the {split} rows are cut to "
                    f"data.max_length {trainer.datamodule.max_length}; raise it, or let overflow drop them[/]"
                )
        for name in getattr(trainer.datamodule, "streamed", ()):
            console.print(f"train: {name}, tokenized while it is streamed")
        for note in getattr(pl_module, "notes", ()):
            console.print(note)
        template = getattr(trainer.datamodule, "template", None)
        if template is not None:
            added = f", {len(trainer.datamodule.added_tokens)} tokens added" if trainer.datamodule.added_tokens else ""
            console.print(f"chat template of rows with turns: {template.source}{added}")
        for group in trainer.optimizers[0].param_groups:
            numel = sum(p.numel() for p in group["params"])
            optimizer = f"{type(trainer.optimizers[0]).__name__}, {group.get('name', 'all')}"
            console.print(
                f"optimizer: {optimizer}: {len(group['params'])} tensors, {numel:,} values, "
                f"lr {group['initial_lr']:g}, weight decay {group.get('weight_decay', 0):g}"
            )
        resumed = f", resumed at step {trainer.global_step}" if trainer.global_step else ""
        total = pl_module.total_steps()
        console.print(f"{total:,} optimizer step{'s' if total > 1 else ''}{resumed}")


def summary(report: dict[str, Any]) -> str:
    """A split's report in a line."""
    parts = [f"{report['rows']:,} rows, {report['kept']:,} kept"]
    parts += [f"{n:,} dropped ({reason})" for reason, n in report["dropped"].items()]
    if report["cut"]:
        parts.append(f"{report['cut']:,} cut to length")
    if report["straddled"]:
        parts.append(f"{report['straddled']:,} with a token across the border of prompt and answer")
    lengths = report["lengths"]
    parts.append(f"{report['tokens']:,} tokens, {report['target_tokens']:,} carry loss")
    parts.append(f"length {lengths['p0']}/{lengths['p50']}/{lengths['p100']} (min/median/max)")
    parts.append(f"fill {report['fill']:.1%}" if "fill" in report else f"padding {report['padding']:.1%}")
    if "saved_by_sharing" in report:
        parts.append(f"{report['saved_by_sharing']:.1%} of the tokens saved where prompts are shared")
    return ", ".join(parts)
