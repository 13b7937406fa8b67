"""What a model writes: completions of the same prompts before, during and after training."""

import itertools
import json
import sys
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.checkpoints import rng_state, set_rng_state
from oumi_pl.generation import complete


class Samples(L.Callback):
    """Completes prompts at the start, at each validation, and shows the last; all are kept in `samples.jsonl`.

    Args:
        prompts: Texts to complete; the beginnings of held-out documents when left out.
        rows: How many of these.
        max_new_tokens: Longest completion.
        temperature: Of sampling; 0 is greedy. Sampling leaves the run's random numbers as they were.
    """

    def __init__(
        self, prompts: list[str] | None = None, rows: int = 3, max_new_tokens: int = 128, temperature: float = 0.0
    ) -> None:
        self.prompts = prompts
        self.rows = rows
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.last: list[tuple[str, str]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the model says before the first update."""
        if trainer.global_step == 0:
            self._write(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the model says now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Shows the last completions."""
        for prompt, completion in self.last:
            print(f"\n{prompt}\033[1m{completion}\033[0m" if sys.stdout.isatty() else f"\n{prompt}|{completion}")

    @rank_zero_only
    def _write(self, trainer: Any, pl_module: Any) -> None:
        data = trainer.datamodule
        ids = self._prompt_ids(data)
        state = rng_state()
        texts = complete(pl_module.causal_lm.hf, data.tokenizer, ids, stop=data.stop_tokens, **self.settings)
        set_rng_state(state)
        self.last = [(data.tokenizer.decode(p), text) for p, text in zip(ids, texts, strict=True)]
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        if folder is None:
            return
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as out:
            for prompt, text in self.last:
                line = {"step": trainer.global_step, "prompt": prompt, "completion": text}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _prompt_ids(self, data: Any) -> list[list[int]]:
        if self.prompts is None:
            return [ids for ids, _ in itertools.islice(data.prompts("validation"), self.rows)]
        return [data.tokenizer.encode(prompt, add_special_tokens=False) for prompt in self.prompts]
