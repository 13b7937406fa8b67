"""Greedy answers to held-out questions, before, during and after training: the score, and what they look like."""

import itertools
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.samples import SampleFile, as_it_was, printable, readable
from oumi_pl.models.generation import complete
from oumi_pl.terminal.progress import working


class Answers(L.Callback):
    """Answers held-out prompts greedily, logs the share that equals the reference, and shows some before and after.

    Those that are shown are kept in `samples.jsonl`.

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
        self._asked: list[tuple[list[int], str]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Forgets the questions of other data."""
        self._asked = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Answers once with the weights that training starts from."""
        if trainer.is_global_zero:
            self._file.open(trainer)
        if self.at_start and trainer.global_step == 0:
            self.before, self.score_before = self.answer(trainer, pl_module)
            self._keep(trainer, self.before)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Answers and logs `val/exact_match`."""
        if trainer.sanity_checking:
            return
        self.after, self.score = self.answer(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._keep(trainer, self.after)
        pl_module.log("val/exact_match", self.score, rank_zero_only=False, sync_dist=False)

    def state_dict(self) -> dict[str, Any]:
        """The answers before training, which a resumed run shows as well."""
        return {"before": self.before, "score_before": self.score_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up."""
        self.before, self.score_before = state_dict["before"], state_dict["score_before"]

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Shows the answers before and after."""
        self._show(trainer)

    def answer(self, trainer: Any, pl_module: Any) -> tuple[list[str], float]:
        """The answers, and the share that equals the reference to the letter."""
        prompts, references = self._questions(trainer)
        data = trainer.datamodule
        answers: list[str] = []
        with working(f"answering {len(prompts)} held-out questions"), as_it_was(trainer, pl_module):
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

    def _questions(self, trainer: Any) -> tuple[list[list[int]], list[str]]:
        if self._asked is None:
            self._asked = list(itertools.islice(trainer.datamodule.prompts("validation"), self.rows))
        return [ids for ids, _ in self._asked], [reference for _, reference in self._asked]

    def _rows_to_show(self, count: int) -> list[int]:
        """Some from all over the held-out rows."""
        return list(range(0, count, max(1, count // self.show)))[: self.show] if self.show > 0 else []

    @rank_zero_only
    def _keep(self, trainer: Any, answers: list[str]) -> None:
        prompts, references = self._questions(trainer)
        decode = trainer.datamodule.tokenizer.decode
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
        prompts, references = self._questions(trainer)
        table = Table(box=box.SIMPLE, title=f"Greedy answers to {len(references)} held-out questions")
        table.add_column("question")
        table.add_column("expected", style="bold")
        table.add_column("before", style="dim", max_width=28, overflow="ellipsis", no_wrap=True)
        table.add_column("after")
        for i in self._rows_to_show(len(references)):
            right = self.after[i].strip() == references[i].strip()
            question = readable(trainer.datamodule.tokenizer, prompts[i])
            before = printable(self.before[i]) if self.before else ""
            mark = "[green]✓ [/]" if right else "[red]✗ [/]"
            after = mark + escape(printable(self.after[i]))
            table.add_row(escape(question), escape(references[i]), escape(before), after)
        console = Console(highlight=False)
        console.print(table)
        before = f" (before training: {self.score_before:.1%})" if self.score_before is not None else ""
        console.print(f"exact match: [bold]{self.score:.1%}[/] of {len(references)}{before}")
