"""Shows what the model writes before, during and after training: samples, and answers to held-out questions."""

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

from oumi_pl.callbacks.run_folder import completed, run_directory
from oumi_pl.errors import UserError
from oumi_pl.models.generation import complete
from oumi_pl.models.sharding import is_sharded
from oumi_pl.runs import files
from oumi_pl.runs.checkpoints import rng_state, set_rng_state
from oumi_pl.terminal.screen import styled, terminal_width, working
from oumi_pl.terminal.text import echo, visible
from oumi_pl.types import RunData, RunModule

FILE = "samples.jsonl"
CANDIDATES = 50
"""How many rows are searched for prompts whose completion fits into the model's positions."""
SOURCES = 8
"""Most sources of which a row is completed if there are more of them than `rows`."""
LINES = 3
"""Most lines of a completion in the terminal; the file has all of it."""
WIDTH = 100
"""Most columns of such a line, and the columns where there is no terminal."""


class SampleFile:
    """`samples.jsonl`: a line `{step, prompt, completion, reference}` for each completion."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._last_step = -1

    def open(self, trainer: Any) -> None:
        """Finds the file of the run, and removes the lines of steps that a resumed run will repeat."""
        directory = run_directory(trainer)
        self._path = None if directory is None else directory / FILE
        self._last_step = -1
        if self._path is None or not self._path.exists():
            return
        # not `splitlines`: texts may hold U+2028 and the like
        written = files.read(self._path).decode(errors="replace").split("\n")
        kept = [line for line in map(_parsed, written) if line is not None]
        kept = [line for line in kept if line["step"] <= trainer.global_step]
        files.write(self._path, "".join(_line(line) for line in kept))
        self._last_step = max((line["step"] for line in kept), default=-1)

    def write(self, step: int, samples: list[dict[str, str]]) -> None:
        """Adds the completions of a step, all or none, unless the file has them already."""
        if self._path is None or step <= self._last_step:
            return
        earlier = files.read(self._path) if self._path.exists() else b""
        files.write(self._path, earlier + "".join(_line({"step": step, **sample}) for sample in samples).encode())
        self._last_step = step

    @property
    def last_step(self) -> int:
        """The last step whose completions the file has; -1 without any."""
        return self._last_step


def _parsed(line: str) -> dict[str, Any] | None:
    """The sample of a line; None for a line that a kill cut short."""
    try:
        sample = files.parse(line)
    except ValueError:
        return None
    return sample if isinstance(sample, dict) and isinstance(sample.get("step"), int) else None


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


class Samples(L.Callback):
    """Completes the same prompts at the start, at each validation and at the end; prints and writes `samples.jsonl`.

    Does nothing for models that do not complete prompts.

    Args:
        prompts: Texts to complete. If left out, the prompts of the first held-out rows; without held-out rows, those of
            the first training rows, which are completed only at the start and at the end.
        rows: Number of rows if `prompts` is left out, taken from the sources in turn, and at least one of each (of up
            to 8). 0 turns samples off.
        max_new_tokens: Longest completion.
        temperature: Temperature of sampling; 0 is greedy. Sampling does not change the random numbers of training.
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
        self._sampled_step = -1

    def _repr_html_(self) -> str:
        from oumi_pl.report.page import inline

        title = f"samples at step {self._sampled_step:,}" if self.last else "no samples yet"
        return inline(title, samples=self.last, height=80 + 90 * len(self.last))

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Writes samples before the first update."""
        if not pl_module.generates and self.rows:
            self.rows = 0
            say_why_not("samples", pl_module)
        self._file.open(trainer)
        if trainer.global_step == 0:
            self._write(trainer, pl_module)
        else:
            self._sampled_step = self._file.last_step

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Writes samples of the validated weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Writes samples at the last step, unless its validation has done so."""
        self._write(trainer, pl_module)
        completed(trainer, "samples")

    def _write(self, trainer: Any, pl_module: RunModule) -> None:
        step = trainer.global_step
        if step == self._sampled_step or self.rows < 1 or trainer.fast_dev_run:
            return
        self._sampled_step = step
        data: RunData = trainer.datamodule
        try:
            if not (chosen := self._choose(trainer, pl_module)):
                return
            with working(f"writing {len(chosen)} samples"), generation(trainer, pl_module):
                hf, prompts = pl_module.causal_lm.hf, [ids for ids, _ in chosen]
                texts = complete(hf, data.tokenizer, prompts, stop=data.stop_tokens, **self.settings)
        except Exception as error:  # no failure of sampling may end the run
            self.rows = 0
            why = " ".join(str(error).split()) or type(error).__name__
            echo(f"no samples are written: {why}", file=sys.stderr)
            return
        self.last = [
            {"prompt": str(data.tokenizer.decode(ids)), "completion": text, "reference": reference}
            for (ids, reference), text in zip(chosen, texts, strict=True)
        ]
        self._file.write(step, self.last)
        readable_prompts = [readable(data.tokenizer, ids) for ids, _ in chosen]
        sys.stderr.write(shown(step, list(zip(readable_prompts, texts, strict=True))))

    def _choose(self, trainer: Any, pl_module: RunModule) -> list[tuple[list[int], str]]:
        """The prompts and their reference completions, the same ones every time.

        Raises:
            ValueError: no samples are possible; with the reason.
        """
        if sharded(trainer, pl_module):
            raise ValueError("the weights are sharded; export a checkpoint, and sample from that")
        if self._chosen is None:
            data: RunData = trainer.datamodule
            if self.prompts is not None:
                encoded = (data.tokenizer.encode(prompt, add_special_tokens=False) for prompt in self.prompts)
                self._chosen = [(ids, "") for ids in encoded]
            else:
                split = "validation" if data.sources["validation"] is not None else "train"
                if split == "train" and data.streaming:
                    raise ValueError("no rows are held out, and the training rows are streamed; set samples.prompts")
                # at least one of each source, in turn
                sources = [
                    (row for row in itertools.islice(prompts, CANDIDATES) if self._has_room(row, pl_module))
                    for prompts in data.prompts_by_source(split)
                ]
                turns = itertools.chain.from_iterable(itertools.zip_longest(*sources))
                rows = max(self.rows, min(len(sources), SOURCES))
                self._chosen = list(itertools.islice((row for row in turns if row is not None), rows))
        return self._chosen

    def _has_room(self, row: tuple[list[int], str], pl_module: RunModule) -> bool:
        """Whether prompt and completion fit into the model's positions, if their number is fixed."""
        positions = getattr(pl_module.causal_lm.base.config.get_text_config(), "max_position_embeddings", None)
        return bool(row[0]) and len(row[0]) + self.settings["max_new_tokens"] <= (positions or float("inf"))


@rank_zero_only
def say_why_not(what: str, pl_module: RunModule) -> None:
    """Prints that something is left out because the model does not complete prompts."""
    sys.stderr.write(f"no {what} are written: {type(pl_module).__name__} does not complete prompts\n")


def sharded(trainer: Any, pl_module: RunModule) -> bool:
    """Whether no rank holds all weights, so that none can generate by itself."""
    return shards_weights(trainer) or is_sharded(pl_module.causal_lm)


def shards_weights(trainer: Any) -> bool:
    """Whether the strategy divides weights over ranks, which is known before a model is built."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    # `is_sharded` looks for DTensors; these strategies shard in other ways, or only while the model runs
    strategies = DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy
    return isinstance(trainer.strategy, strategies)


def refuse_sharded(trainer: Any, name: str) -> None:
    """Refuses a callback that completes prompts in a run whose strategy divides the weights.

    Raises:
        UserError: names the callback, and what to do.
    """
    if shards_weights(trainer):
        raise UserError(
            f"trainer.callbacks: {name} completes prompts while training, which it can't with weights that "
            "trainer.strategy divides over devices; leave it out, and score an exported model with generate --metric"
        )


@contextlib.contextmanager
def generation(trainer: Any, pl_module: RunModule) -> Iterator[None]:
    """Prepares generation during training: in the run's precision, and with the random state restored afterwards.

    Compiled layers run uncompiled: torch would compile each length again, and after a few give up compiling, also for
    training. Inference mode is off: a tensor that is created in it and kept, such as a cached mask, can't be used in
    training later.
    """
    state = rng_state()
    with contextlib.ExitStack() as contexts:
        if pl_module.compile_layers:
            contexts.enter_context(torch.compiler.set_stance("force_eager"))
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(trainer.precision_plugin.forward_context())
        try:
            yield
        finally:
            set_rng_state(state)


def shown(step: int, samples: list[tuple[str, str]]) -> str:
    """Formats prompts and completions for the terminal: the end of each prompt, and the beginning of the completion.

    Control characters are written as symbols, so that a model can't control the terminal.
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
    """A prompt in one line, without special tokens and the role names that chat templates add."""
    lines = [line.strip() for line in str(tokenizer.decode(prompt, skip_special_tokens=True)).splitlines()]
    return printable(" | ".join(line for line in lines if line not in ("", "assistant", "user", "system")))


def printable(text: str) -> str:
    """Text in one line: line ends as `⏎`, tabs as `⇥`, control characters by name."""
    return visible(text).replace("\n", "⏎").replace("\t", "⇥")


# ---- answers to held-out questions


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
        elif shards_weights(trainer):
            self._generates = False
            if trainer.is_global_zero:
                sys.stderr.write("no answers are written: trainer.strategy divides the weights over devices\n")

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
            table.add_row(escape(question), escape(printable(references[i])), escape(before), after)
        console = Console(highlight=False)
        console.print(table)
        before = f" (before training: {self.score_before:.1%})" if self.score_before is not None else ""
        console.print(f"exact match: [bold]{self.score:.1%}[/] of {len(references)}{before}")
