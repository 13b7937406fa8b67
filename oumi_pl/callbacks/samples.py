"""What a model writes: completions of the same prompts before, during and after training."""

import contextlib
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.models.generation import complete
from oumi_pl.runs.checkpoints import rng_state, set_rng_state
from oumi_pl.terminal.progress import styled, terminal_width, working
from oumi_pl.terminal.screen import visible

FILE = "samples.jsonl"
LOOKED_AT = 50
"""Rows among which those are looked for whose completion has room in the model's positions."""
LINES = 3
"""Lines of a completion that the terminal shows; the file has all of it."""
WIDTH = 100
"""Columns of these lines at the most, and where there is no terminal."""


class SampleFile:
    """`samples.jsonl`: a line `{step, prompt, completion, reference}` for each completion."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._last_step = -1

    def open(self, trainer: Any) -> None:
        """Finds the run's file, and cuts off what a part of the run wrote that a resume does again."""
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        self._path = None if folder is None else folder / FILE
        self._last_step = -1
        if self._path is None or not self._path.exists():
            return
        written = self._path.read_text("utf-8").split("\n")  # JSON leaves other line ends, such as U+2028, in its texts
        kept = [line for line in map(_parsed, written) if line is not None]
        kept = [line for line in kept if line["step"] <= trainer.global_step]
        half = self._path.with_name(FILE + ".half")
        half.write_text("".join(_line(line) for line in kept), encoding="utf-8")
        half.replace(self._path)
        self._last_step = max((line["step"] for line in kept), default=-1)

    def write(self, step: int, samples: list[dict[str, str]]) -> None:
        """Appends the completions of a step, unless they are there."""
        if self._path is None or step <= self._last_step:
            return
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(_line({"step": step, **sample}) for sample in samples)
        self._last_step = step


def _parsed(line: str) -> dict[str, Any] | None:
    """None for what a kill has left unfinished."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


class Samples(L.Callback):
    """Completes the same prompts at the start, at each validation and at the end: shown, and kept in `samples.jsonl`.

    Args:
        prompts: Texts to complete; the first held-out rows when left out, else the first training rows, and these only
            at the start and at the end.
        rows: How many of these; none with 0.
        max_new_tokens: Longest completion.
        temperature: Of sampling; 0 is greedy. Either leaves the run's random numbers as they were.
    """

    def __init__(
        self, prompts: list[str] | None = None, rows: int = 3, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> None:
        self.prompts = prompts
        self.rows = rows
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.last: list[dict[str, str]] = []
        self._file = SampleFile()
        self._chosen: list[tuple[list[int], str]] | None = None
        self._written = -1

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the model says before the first update."""
        self._file.open(trainer)
        if trainer.global_step == 0:
            self._write(trainer, pl_module)
        else:
            self._written = trainer.global_step

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the model says now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the model says in the end, unless a validation has just done so."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self._written or self.rows < 1 or trainer.fast_dev_run:
            return
        self._written = step
        try:
            if not (chosen := self._choose(trainer, pl_module)):
                return
            with working(f"writing {len(chosen)} samples"), as_it_was(trainer, pl_module):
                data, prompts = trainer.datamodule, [ids for ids, _ in chosen]
                hf = pl_module.causal_lm.hf
                texts = complete(hf, data.tokenizer, prompts, stop=data.stop_tokens, **self.settings)
        except Exception as error:  # a look at the model is not worth the run
            self.rows = 0
            sys.stderr.write(f"no samples are written: {' '.join(str(error).split()) or type(error).__name__}\n")
            return
        self.last = [
            {"prompt": str(data.tokenizer.decode(ids)), "completion": text, "reference": reference}
            for (ids, reference), text in zip(chosen, texts, strict=True)
        ]
        self._file.write(step, self.last)
        told = [readable(data.tokenizer, ids) for ids, _ in chosen]
        sys.stderr.write(shown(step, list(zip(told, texts, strict=True))))

    def _choose(self, trainer: Any, pl_module: Any) -> list[tuple[list[int], str]]:
        """The prompts and what they go on with in the data: those of the first time, at any time."""
        if sharded(trainer, pl_module):
            raise ValueError("the weights are shared out over the ranks; export a checkpoint, and sample from that")
        if self._chosen is None:
            data = trainer.datamodule
            if self.prompts is not None:
                encoded = (data.tokenizer.encode(prompt, add_special_tokens=False) for prompt in self.prompts)
                self._chosen = [(ids, "") for ids in encoded]
            else:
                split = "validation" if data.sources.get("validation") is not None else "train"
                if split == "train" and getattr(data, "streaming", False):
                    raise ValueError("no rows are held out, and those to train on are streamed; set samples.prompts")
                fit = (
                    row for row in itertools.islice(data.prompts(split), LOOKED_AT) if self._has_room(row, pl_module)
                )
                self._chosen = list(itertools.islice(fit, self.rows))
        return self._chosen

    def _has_room(self, row: tuple[list[int], str], pl_module: Any) -> bool:
        """Whether a model that has learned a vector for each position has enough of them."""
        positions = getattr(pl_module.causal_lm.base.config.get_text_config(), "max_position_embeddings", None)
        return bool(row[0]) and len(row[0]) + self.settings["max_new_tokens"] <= (positions or float("inf"))


def sharded(trainer: Any, pl_module: Any) -> bool:
    """Whether no rank has all the weights, so that none can write by itself."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    return pl_module._is_sharded or isinstance(
        trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy
    )


@contextlib.contextmanager
def as_it_was(trainer: Any, pl_module: Any) -> Iterator[None]:
    """For generation amid training: the run's precision, and its generators as they were afterwards.

    Compiled layers run as they were written: each length would else be compiled anew, until torch gives it up for
    training as well. Nothing that is made inside and kept is an inference tensor, which could not be trained with.
    """
    state = rng_state()
    with contextlib.ExitStack() as around:
        if getattr(pl_module, "compile_layers", False):
            around.enter_context(torch.compiler.set_stance("force_eager"))
        around.enter_context(torch.inference_mode(False))
        around.enter_context(trainer.precision_plugin.forward_context())
        try:
            yield
        finally:
            set_rng_state(state)


def shown(step: int, samples: list[tuple[str, str]]) -> str:
    """Prompts and completions for the terminal: the end of each prompt, and the beginning of what follows.

    What a model writes can't drive the terminal: control characters are written as symbols.
    """
    width = min(WIDTH, (terminal_width() or WIDTH) - 1)
    lines = [f"step {step}  samples"]
    for prompt, completion in samples:
        text = printable(completion) if completion.strip() else "(nothing)"
        if len(prompt) + len(text) + 5 <= width:
            lines.append(f"  {styled(prompt, 'dim')} > {text}")
            continue
        lines.append("  " + styled(prompt if len(prompt) <= width - 2 else "…" + prompt[3 - width :], "dim"))
        wrapped = textwrap.wrap(text, width - 6, break_on_hyphens=False)
        if len(wrapped) > LINES:
            wrapped = [*wrapped[: LINES - 1], wrapped[LINES - 1][: width - 8] + " …"]
        lines += [("  > " if i == 0 else "    ") + line for i, line in enumerate(wrapped)]
    return "\n".join(lines) + "\n"


def readable(tokenizer: Any, prompt: list[int]) -> str:
    """A prompt in one line, without special tokens and the role names that templates write around its turns."""
    lines = [line.strip() for line in str(tokenizer.decode(prompt, skip_special_tokens=True)).splitlines()]
    return printable(" | ".join(line for line in lines if line not in ("", "assistant", "user", "system")))


def printable(text: str) -> str:
    """A text in one line that can't drive a terminal: line ends as `⏎`, tabs as `⇥`, control characters by name."""
    return visible(text).replace("\n", "⏎").replace("\t", "⇥")
