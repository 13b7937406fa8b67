"""Completes the prompts of many rows: in batches by length, into a file that a repeated command continues."""

import csv
import hashlib
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from oumi_pl.errors import UserError
from oumi_pl.rollouts.metrics import Metric, scores
from oumi_pl.runs.files import replacing
from oumi_pl.terminal.text import echo
from oumi_pl.types import Row, beside

if TYPE_CHECKING:
    from oumi_pl.commands.serving import Served
    from oumi_pl.rollouts.sampling import Sampling

PART = ".part"
"""Suffix of an output file that is not complete: a line of settings, then a line per completion, in any order."""
WINDOW = 16
"""Batches of prompts that are sorted by length together, if completions are printed in order."""
Z = 1.959964
"""Standard deviations on each side of the middle 95 % of a normal distribution."""


class Prompt(NamedTuple):
    """A prompt of a row."""

    row: Row
    """The columns as they were read."""
    text: str
    """What to show of it."""
    ids: list[int]
    limit: int
    """Most tokens of its completion."""


class Answer(NamedTuple):
    """A completion, by the number of its row and of the sample, both from 1."""

    row: int
    sample: int
    completion: str
    """Its text, up to the stop string that ended it."""
    finished: bool
    """Whether it ended by itself; False if `max_new_tokens` cut it."""
    ids: list[int]
    logprobs: list[float]
    """Of each token, under the distribution that it was sampled from."""

    def values(self, *, samples: bool, logprobs: bool) -> Row:
        """The columns that are written beside those of the row."""
        line: Row = {"row": self.row, **({"sample": self.sample} if samples else {})}
        line |= {"completion": self.completion, "finished": self.finished}
        if logprobs:
            total = round(math.fsum(self.logprobs), 6)
            line |= {"logprob": total, "token_ids": self.ids, "logprobs": [round(v, 6) for v in self.logprobs]}
        return line


class Completer(NamedTuple):
    """A model with the settings of its completions."""

    model: Any
    tokenizer: Any
    ends: Sequence[int]
    """Ids that end a completion."""
    sampling: "Sampling"
    seed: int
    served: "Served | None" = None
    """The model in vLLM; None samples with `generate`."""

    def __call__(
        self, prompts: Sequence[tuple[int, int, Prompt]], on_text: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """Completes prompts, each with the number of its row and of the sample, in one batch.

        They have the same `limit`. What is sampled depends on the seed and these two numbers alone, not on the batch.

        Args:
            prompts: At least one.
            on_text: For a single prompt: called with each new piece of text while it is generated.
        """
        import dataclasses

        import numpy as np

        from oumi_pl.models.generation import TextStreamer
        from oumi_pl.rollouts.sampling import sample, uniforms

        limit = prompts[0][2].limit
        ids_of_prompts = [prompt.ids for _, _, prompt in prompts]
        seeds = [(self.seed, row, number) for row, number, _ in prompts]
        sampling = dataclasses.replace(self.sampling, max_new_tokens=limit)
        if self.served is not None:
            completions = self.served.sample(ids_of_prompts, seeds, sampling, self.ends)
        else:
            completions = sample(
                self.model,
                self.tokenizer,
                ids_of_prompts,
                numbers=np.stack([uniforms(seed, limit) for seed in seeds]),
                sampling=sampling,
                ends=self.ends,
                streamer=None if on_text is None else TextStreamer(self.tokenizer, on_text),
            )
        answers = []
        for (row, number, _), completion in zip(prompts, completions, strict=True):
            text = str(self.tokenizer.decode(completion.ids, skip_special_tokens=True))
            cut = min((at for stop in self.sampling.stop if (at := text.find(stop)) >= 0), default=len(text))
            ids, logps = completion.ids.tolist(), completion.logps.tolist()
            answers.append(Answer(row, number, text[:cut], completion.is_finished, ids, logps))
        return answers


def batches(prompts: Sequence[tuple[int, int, Prompt]], size: int) -> list[list[tuple[int, int, Prompt]]]:
    """Divides prompts into batches of one `limit` and similar length, the longest first: memory runs out early or not.

    A prompt that leaves less room than others in the model's positions is not batched with them, since their
    completions would be cut where its own is.
    """
    ordered = sorted(prompts, key=lambda item: (item[2].limit, -len(item[2].ids), item[0], item[1]))
    parts: list[list[tuple[int, int, Prompt]]] = []
    for item in ordered:
        if not parts or len(parts[-1]) == size or parts[-1][0][2].limit != item[2].limit:
            parts.append([])
        parts[-1].append(item)
    return sorted(parts, key=lambda part: -len(part[0][2].ids))


def in_order(
    complete: Completer, prompts: Sequence[Prompt], samples: int, size: int
) -> Iterator[tuple[Prompt, Answer]]:
    """Yields the completions of prompts in their order, a window of batches at a time."""
    items = [(row, s, prompt) for row, prompt in enumerate(prompts, 1) for s in range(1, samples + 1)]
    for start in range(0, len(items), WINDOW * size):
        window = items[start : start + WINDOW * size]
        answers = {(a.row, a.sample): a for batch in batches(window, size) for a in complete(batch)}
        yield from ((prompt, answers[row, number]) for row, number, prompt in window)


# ---- the output file


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file of weights, by which a changed model is noticed."""
    files = [folder] if folder.is_file() else [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def hashed(prompts: Sequence[Prompt]) -> str:
    """A hash of the rows and their prompts."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps([prompt.row, prompt.ids, prompt.limit], default=str).encode() + b"\n")
    return digest.hexdigest()


class Part:
    """The unfinished output file, to which completions are appended as they come.

    Args:
        output: The file that it becomes.
        settings: All that the completions depend on.

    Raises:
        UserError: it is there already with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.path = output.with_name(output.name + PART)
        self.answers: dict[tuple[int, int], Answer] = {}
        """Those that are there, by row and sample."""
        self.settings = json.loads(json.dumps(settings))
        """Those of the completions so far, with their seed, which is drawn if none is set."""
        if self.path.exists():
            self._read()
        if self.settings["seed"] is None:
            self.settings["seed"] = secrets.randbits(32)

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
        first, *lines = whole.decode().split("\n")[:-1] or [""]
        before = json.loads(first) if first else self.settings
        asked = self.settings if self.settings["seed"] is not None else self.settings | {"seed": before.get("seed")}
        if others := [name for name in asked if before.get(name) != asked[name]]:
            raise UserError(
                f"--output: {self.path} was begun with another {' and '.join(others)}; repeat that command, delete the "
                "file, or name another output"
            )
        self.settings = before
        for line in lines:
            answer = Answer(*json.loads(line))
            self.answers[answer.row, answer.sample] = answer
        with self.path.open("r+b") as file:
            file.truncate(len(whole))

    @contextmanager
    def opened(self) -> Iterator[Callable[[Sequence[Answer]], None]]:
        """Yields a function that appends completions, which a kill right after it does not lose."""
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                _write_line(file, self.settings)
                file.flush()

            def append(answers: Sequence[Answer]) -> None:
                for answer in answers:
                    _write_line(file, answer)
                    self.answers[answer.row, answer.sample] = answer
                file.flush()

            yield append


def _write_line(file: IO[str], value: Any) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write(path: Path, lines: Sequence[Row]) -> None:
    """Writes rows as JSON lines or CSV, atomically. Lists and mappings are JSON in a cell of CSV."""
    with replacing(path) as half, half.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
            return
        columns = list(dict.fromkeys(name for line in lines for name in line))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | tuple) else value


def run(
    complete: Completer,
    prompts: Sequence[Prompt],
    part: Part,
    output: Path,
    metrics: Mapping[str, Metric],
    *,
    samples: int,
    batch_size: int,
    logprobs: bool,
) -> list[str]:
    """Completes what `part` lacks, writes the output with all columns, and returns lines that sum it up.

    Raises:
        UserError: a metric fails, after the completions were saved, or the file can't be written.
    """
    from oumi_pl.terminal.screen import track

    items = [(row, s, prompt) for row, prompt in enumerate(prompts, 1) for s in range(1, samples + 1)]
    missing = [item for item in items if item[:2] not in part.answers]
    if len(missing) < len(items):
        echo(f"{part.path} has {len(items) - len(missing):,} of {len(items):,} completions", file=sys.stderr)
    start = time.monotonic()
    try:
        with part.opened() as append:
            for batch in track(
                batches(missing, batch_size), "completing", total=len(missing), unit="prompts", size=len
            ):
                append(complete(batch))
    except KeyboardInterrupt:
        done = f"{len(part.answers):,} of {len(items):,} completions are in {part.path}"
        echo(f"{done}; repeat the command to go on", file=sys.stderr)
        raise
    except OSError as error:
        raise UserError(f"--output: can't write to {part.path}: {error.strerror}") from error
    seconds = time.monotonic() - start
    scored: dict[str, list[list[float]]] = {}
    lines = []
    for row, prompt in enumerate(prompts, 1):
        of_row: dict[str, list[float]] = {}
        for number in range(1, samples + 1):
            answer = part.answers[row, number]
            values = answer.values(samples=samples > 1, logprobs=logprobs)
            for name, value in scores(metrics, answer.completion, prompt.row, "--metric", f"row {row}").items():
                of_row.setdefault(name, []).append(value)
                values[name] = value
            lines.append(beside(prompt.row, values))
        for name, numbers in of_row.items():
            scored.setdefault(name, []).append(numbers)
    write(output, lines)
    part.path.unlink()
    rate = f" in {seconds:.1f} s, {len(missing) / seconds:.3g} a second" if missing and seconds > 0 else ""
    return [f"{len(lines):,} completions{rate} -> {output}", *(summary(name, v) for name, v in scored.items())]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values with the ends of its 95 % interval.

    Wilson's interval if all values are 0 or 1, which is right for few rows and for shares near 0 and 1; else the mean
    and 1.96 standard errors on both sides.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if all(value in (0, 1) for value in values):
        middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
        return mean, max(0.0, middle - half), min(1.0, middle + half)
    if n < 2:
        return mean, -math.inf, math.inf
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - Z * error, mean + Z * error


def summary(name: str, values: Sequence[Sequence[float]]) -> str:
    """A metric's mean and interval. The samples of a row are no independent values: their mean counts once."""
    mean, low, high = interval([math.fsum(of_row) / len(of_row) for of_row in values])
    return f"{name}: {mean:.4g} (95 % interval {low:.4g} to {high:.4g}, {len(values):,} rows)"
