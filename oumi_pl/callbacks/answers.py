"""Answers held-out questions before, during and after training, and measures how many answers are right."""

import itertools
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.samples import SampleFile, generation, printable, readable, say_why_not
from oumi_pl.models.generation import complete
from oumi_pl.terminal.progress import working
from oumi_pl.types import RunData, RunModule


class Answers(L.Callback):
    """Answers held-out prompts greedily, logs the share that equals the reference, and shows some of them.

    The shown answers are also written to `samples.jsonl`. Does nothing for models that do not complete prompts.

    Args:
        rows: Held-out rows to answer.
        show: How many to show in the terminal.
        max_new_tokens: Longest answer.
        batch_size: Prompts per forward pass.
        at_start: Answer before the first step as well.
    """

    needs_validation = True
    validation_metrics = ("val/exact_match",)

    def __init__(
        self, rows: int = 200, show: int = 6, max_new_tokens: int = 64, batch_size: int = 64, at_start: bool = True
    ) -> None:
        self.rows = rows
        self.show = show
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.at_start = at_start
        self.before: list[str] = []
        self.after: list[str] = []
        self.score_before: float | None = None
        self.score: float | None = None
        self._file = SampleFile()
        self._generates = True
        self._questions: list[tuple[list[int], str]] | None = None

    def setup(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Clears the questions of an earlier data module; says so if the model can't answer any."""
        self._questions = None
        self._generates = pl_module.generates
        if not self._generates:
            say_why_not("answers", pl_module)

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Answers once with the initial weights."""
        if not self._generates:
            return
        if trainer.is_global_zero:
            self._file.open(trainer)
        if self.at_start and trainer.global_step == 0:
            self.before, self.score_before = self.answer(trainer, pl_module)
            self._keep(trainer, self.before)

    def on_validation_epoch_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Answers and logs `val/exact_match`."""
        if trainer.sanity_checking or not self._generates:
            return
        self.after, self.score = self.answer(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._keep(trainer, self.after)
        pl_module.log("val/exact_match", self.score, rank_zero_only=False, sync_dist=False)

    def state_dict(self) -> dict[str, Any]:
        """The answers from before training, which a resumed run shows as well."""
        return {"before": self.before, "score_before": self.score_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the answers from before training."""
        self.before, self.score_before = state_dict["before"], state_dict["score_before"]

    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Shows the answers before and after training."""
        self._show(trainer)

    def answer(self, trainer: Any, pl_module: RunModule) -> tuple[list[str], float]:
        """The answers, and the share of them that equals the reference, ignoring surrounding white space."""
        data: RunData = trainer.datamodule
        prompts, references = self._prompts_and_references(data)
        answers: list[str] = []
        with working(f"answering {len(prompts)} held-out questions"), generation(trainer, pl_module):
            for start in range(0, len(prompts), self.batch_size):
                answers += complete(
                    pl_module.causal_lm.hf,
                    data.tokenizer,
                    prompts[start : start + self.batch_size],
                    max_new_tokens=self.max_new_tokens,
                    stop=data.stop_tokens,
                )
        right = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
        return answers, right / max(1, len(answers))

    def _prompts_and_references(self, data: RunData) -> tuple[list[list[int]], list[str]]:
        if self._questions is None:
            self._questions = list(itertools.islice(data.prompts("validation"), self.rows))
        return [ids for ids, _ in self._questions], [reference for _, reference in self._questions]

    def _rows_to_show(self, count: int) -> list[int]:
        """Evenly spaced indices of `count` rows, `show` of them."""
        return list(range(0, count, max(1, count // self.show)))[: self.show] if self.show > 0 else []

    @rank_zero_only
    def _keep(self, trainer: Any, answers: list[str]) -> None:
        data: RunData = trainer.datamodule
        prompts, references = self._prompts_and_references(data)
        decode = data.tokenizer.decode
        rows = self._rows_to_show(len(references))
        kept = [{"prompt": decode(prompts[i]), "completion": answers[i], "reference": references[i]} for i in rows]
        self._file.write(trainer.global_step, kept)

    @rank_zero_only
    def _show(self, trainer: Any) -> None:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        if not self.after:
            return
        data: RunData = trainer.datamodule
        prompts, references = self._prompts_and_references(data)
        table = Table(box=box.SIMPLE, title=f"Greedy answers to {len(references)} held-out questions")
        table.add_column("question")
        table.add_column("expected", style="bold")
        table.add_column("before", style="dim", max_width=28, overflow="ellipsis", no_wrap=True)
        table.add_column("after")
        for i in self._rows_to_show(len(references)):
            right = self.after[i].strip() == references[i].strip()
            question = readable(data.tokenizer, prompts[i])
            before = printable(self.before[i]) if self.before else ""
            mark = "[green]✓ [/]" if right else "[red]✗ [/]"
            after = mark + escape(printable(self.after[i]))
            table.add_row(escape(question), escape(references[i]), escape(before), after)
        console = Console(highlight=False)
        console.print(table)
        before = f" (before training: {self.score_before:.1%})" if self.score_before is not None else ""
        console.print(f"exact match: [bold]{self.score:.1%}[/] of {len(references)}{before}")
