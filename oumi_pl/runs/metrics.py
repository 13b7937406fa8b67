"""Writes `metrics.csv`: one line per optimizer step. A resume truncates it to its checkpoint and continues it.

The table lists name, meaning and window of every metric. Names are TRL's if it has one. "Update" is one optimizer step:
all its micro-batches on all ranks. In KTO, `chosen` are the desirable rows and `rejected` the others, and `kl` is the
mean log-ratio of whole mismatched responses, as it is in the loss.

| name | meaning | window |
|---|---|---|
| `step` | optimizer steps done | |
| `epoch` | epochs done, as a fraction | |
| `train/loss` | training loss per target token; per pair in preference training, per row in KTO | the update |
| `train/mean_token_accuracy` | share of target tokens that are the most likely ones | the update |
| `train/grad_norm` | 2-norm of the gradient before clipping | the update |
| `train/lr` | learning rate of the first parameter group | the update |
| `train/num_tokens` | tokens seen, without padding | the run, resumes included |
| `train/target_tokens` | tokens seen that carried loss | the run, resumes included |
| `train/tokens_per_second` | tokens over wall time, with waiting for data, without validation | the update |
| `train/mfu` | model FLOPs utilisation: achieved over peak dense bf16 FLOP/s; only on known GPUs | the update |
| `train/padding` | share of the computed positions that is padding, or a shared prompt computed again | the update |
| `train/peak_memory_gb` | peak memory: allocated on CUDA, resident elsewhere; 1e9 bytes | the run on rank 0 |
| `train/rewards/chosen`, `/rejected` | rewards of the responses, as the loss defines them | the update's pairs |
| `train/rewards/chosen_std`, `/rejected_std` | their standard deviation; of reward models | the update's pairs |
| `train/rewards/margins` | chosen minus rejected reward; in KTO, of their means | the update's pairs |
| `train/rewards/accuracies` | share of pairs whose margin is above 0; exactly 0 counts half | the update's pairs |
| `train/logps/chosen`, `/rejected` | log-probability of a response, in nats | the update's pairs |
| `train/lengths/chosen`, `/rejected` | target tokens of a response | the update's pairs |
| `train/rewards/sign_accuracy` | (KTO) share of rows whose reward has the sign of the label | the update's rows |
| `train/kl` | estimated KL divergence from the reference: half the squared log-ratio | the update's targets |
| `train/outcomes/mean`, `/std` | mean and standard deviation of rewards of rows with an outcome | the update's rows |
| `train/outcomes/accuracies` | share of these rows on the right side of 0, with `BCE` | the update's rows |
| `train/outcomes/errors` | mean distance of reward and score, with `MSE` | the update's rows |
| `train/rows_per_second` | rows (pairs) over wall time, where the loss is a mean over rows | the update |
| `train/reward`, `train/reward_std` | total reward, less the KL penalty if that is in it | the update's completions |
| `train/rewards/NAME`, `/NAME_std` | a reward before its weight, if there are several | the update's completions |
| `train/reward/SOURCE` | `train/reward` of the prompts of one source, if there are several | its completions |
| `train/groups_without_variance` | share of prompts whose completions all got the same reward | the update |
| `train/extra_groups` | groups sampled in place of one without variance | the update's groups |
| `train/length` | tokens of a completion, with those of an environment | the update's completions |
| `train/turns` | the policy's turns in a completion, with an environment | the update's completions |
| `train/truncated` | share of completions that were cut at `max_new_tokens` | the update's completions |
| `train/entropy` | entropy of the distribution that was sampled from, nats per token | the update's tokens |
| `train/clipped/low`, `/high` | share of tokens whose ratio was clipped | the update's tokens |
| `train/sampling_difference` | distance of sampled and recomputed log-probabilities | the update's tokens |
| `train/importance/mean`, `/truncated` | weights of tokens that vLLM sampled; share at the bound | its tokens |
| `train/seconds/generating` | sampling, with waiting for other ranks; 0 if the completions are older | the update |
| `train/seconds/rewarding` | rewards, and the KL penalty if that is in the reward | the update |
| `train/seconds/training` | forward and backward passes, and the optimizer's step | the update |
| `val/reward`, `/reward_std` | total reward of completions; `val/loss` is minus this | all of `validation` |
| `val/reward/SOURCE` | the same of the prompts of one source, if there are several | its completions |
| `val/pass@K` | probability that one of K completions is a success, an unbiased estimate | all of `validation` |
| `val/NAME` | mean of a function in `data.metrics` or `PassAtK.metrics` over completions | all of `validation` |
| `val/NAME`, `val/NAME/KEY` | mean of a function in `Metrics.metrics` over greedy completions | its rows |
| `val/loss` | the training loss on held-out tokens or pairs | all of `validation` |
| `val/loss/SOURCE` | the same of one source, if there are several | all of it |
| `val/nll` | cross-entropy in nats per target token; `val/loss` unless another loss is trained | all of `validation` |
| `val/perplexity` | exp of `val/nll` | all of `validation` |
| `val/bits_per_byte` | bits per byte of UTF-8 text, which compares tokenizers; of pretraining | all of `validation` |
| `val/nll/SOURCE`, `val/perplexity/SOURCE`, `val/bits_per_byte/SOURCE` | the same of one source | all of it |
| `val/mean_token_accuracy` | as in training | all of `validation` |
| `val/exact_match` | share of greedy answers equal to the reference (with the `Answers` callback) | its rows |
| `val/rewards/accuracies/SOURCE` | the same of the pairs of one source; of reward models | all of it |
| `val/rewards/...`, `val/logps/...`, `val/lengths/...`, `val/kl` | as in training | all of `validation` |
| `test/...` | as `val/...` | all of `test` |
"""

import csv
import io
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.errors import UserError
from oumi_pl.runs import files
from oumi_pl.runs.folders import step_in
from oumi_pl.terminal.text import echo


class MetricsCSV(Logger):
    """Appends to `metrics.csv`. Lightning's CSVLogger deletes an existing file, so a resume would lose the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.file: Path | None = None
        self.columns: list[str] = ["step", "epoch"]
        self._row: dict[str, Any] = {}
        self._unwritten = False
        self._begin: int | None = None
        """Where the line of `_row` begins in the file, if it is there."""

    def open(self, file: Path, step: int = 0, row: dict[str, Any] | None = None) -> None:
        """Creates the file, or continues it from `step`: later lines are removed.

        `row` is the line of `step` from the checkpoint, for a run that was killed before that line was written. It is
        written at once, since a run may have nothing left to train.
        """
        self.file = file
        rows = [line for line in _read(file, notes=True) if int(line["step"]) <= step]
        self.columns = list(rows[0]) if rows else ["step", "epoch"]
        self._row, self._begin, self._unwritten = {}, None, False
        if row:
            rows = [line for line in rows if int(line["step"]) < row["step"]]
            self.columns += sorted(row.keys() - set(self.columns))
            self._row, self._unwritten = dict(row), True
        self._rewrite(rows)
        self.flush()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds metrics to the line of a step, which validation shares; a new step writes the line before it."""
        if self.file is None or step is None:
            return
        if self._row and self._row["step"] != step:
            self._write_row()
            self._row, self._begin = {}, None
        self._row = {**self._row, **metrics, "step": step}
        self._unwritten = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the line of the last step."""
        self._write_row()

    @rank_zero_only
    def flush(self) -> None:
        """Writes the line of the last step, and waits until the file is on disk: before a checkpoint that covers it."""
        self._write_row()
        if self.file is not None and self.file.exists():
            files.sync(self.file)

    def _write_row(self) -> None:
        """Writes the current line, in the place of an earlier one of its step.

        A kill can leave a part of a line. If a checkpoint covers that step, the line is in the checkpoint as well.
        """
        if not self._unwritten or self.file is None:
            return
        new = [name for name in self._row if name not in self.columns]
        if new:
            self.columns += sorted(new)
            self._rewrite([line for line in _read(self.file) if int(line["step"]) != self._row["step"]])
            self._begin = None
        with self.file.open("r+", newline="", encoding="utf-8") as out:
            out.seek(0, 2)
            self._begin = out.seek(out.tell() if self._begin is None else self._begin)
            csv.DictWriter(out, self.columns, restval="").writerow(self._row)
            out.truncate()
        self._unwritten = False

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        assert self.file is not None
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        files.write(self.file, text.getvalue())

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run folder holds one file, and its versions are other run folders."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """None: there is nothing but the file."""
        return None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `config.yaml` has the hyper-parameters."""


def _read(file: Path, notes: bool = False) -> list[dict[str, Any]]:
    """The lines of a file by column, without damaged ones; with `notes`, prints how many those are.

    Raises:
        UserError: it can't be read, or is a link, a pipe or something else than a file.
    """
    try:
        header, *lines = files.read(file).decode(errors="replace").splitlines() or [""]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}); remove it to go on without its lines") from error
    columns = next(csv.reader([header.replace("\0", "")]), [])
    cells = [line.split(",") for line in lines]  # below the header there are only numbers, so no quotes
    whole = [_is_row(line, columns) for line in cells]
    damaged = whole[:-1].count(False)  # a kill can cut the last one short
    if notes and damaged:
        echo(f"note: {file}: {damaged} damaged lines are left out", file=sys.stderr)
    return [dict(zip(columns, line, strict=True)) for line, is_whole in zip(cells, whole, strict=True) if is_whole]


def _is_row(cells: list[str], columns: list[str]) -> bool:
    """Whether a line has a number or nothing in each of the columns, and a step."""
    if len(cells) != len(columns) or step_in(dict(zip(columns, cells, strict=True)).get("step")) is None:
        return False
    try:
        [float(cell) for cell in cells if cell]
    except ValueError:
        return False
    return True
