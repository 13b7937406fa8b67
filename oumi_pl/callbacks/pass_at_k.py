"""Samples several completions of held-out prompts at each validation, and logs pass@k and other scores."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np

from oumi_pl.callbacks.samples import generation, refuse_sharded, say_why_not
from oumi_pl.data.examples import ChatData
from oumi_pl.data.prompts import Prompt, PromptReader, RecordWithRow
from oumi_pl.data.reward_model import RewardModel, name_of
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.errors import UserError
from oumi_pl.rollouts.evaluation import checked_ks, pass_at_k
from oumi_pl.rollouts.rewards import Rewards, SampleReward, Scored
from oumi_pl.rollouts.sampling import Completion, Sampling, sample, uniforms
from oumi_pl.terminal.screen import working
from oumi_pl.types import Feedback, Preference, Record, RunModule


class PassAtK(L.Callback):
    """Samples `completions` of held-out prompts at each validation, and logs `val/pass@k` and the mean of each metric.

    For training on rows with answers (SFT and the like); in online training, use `RolloutData`'s arguments instead.
    Functions get the row, with the text of the answer as the column `answer` unless it has such a column. Each
    validation draws the same random numbers, and leaves those of training unchanged. Does nothing for models that don't
    complete prompts.

    Args:
        reward: Path of a function `(completion, row) -> float`, the folder or hub id of a reward model, or several; see
            `oumi_pl.rollouts.rewards`. With a reward model, set `success` to a score.
        success: Smallest total reward of a completion that counts as solved.
        completions: Completions per prompt; with 1, it is greedy.
        pass_at: The values of k; 1 and `completions` when left out.
        metrics: Further functions; their means over completions are logged as `val/NAME`.
        rows: Number of held-out rows to complete.
        sampling: How completions are sampled.
        batch_size: Completions per batch.
        seed: Seed of the sampling.
    """

    needs_validation = True

    def __init__(
        self,
        reward: str | list[str] | dict[str, float] = "exact_match",
        *,
        success: float = 1.0,
        completions: int = 8,
        pass_at: list[int] | None = None,
        metrics: str | list[str] | None = None,
        rows: int = 100,
        sampling: Sampling | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value in (("completions", completions), ("rows", rows), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"PassAtK: {name} is {value}, but has to be at least 1")
        self._reward, self._metrics = reward, metrics
        self._resolve(lambda key, path: _Later(path))
        self.success = success
        self.completions = completions
        self.pass_at = checked_ks(pass_at, completions, "PassAtK.pass_at", "completions")
        self.rows = rows
        self.sampling = sampling or Sampling()
        if completions > 1 and self.sampling.temperature == 0:
            raise UserError("PassAtK: greedy completions of a prompt are all the same; raise sampling.temperature")
        self.batch_size = batch_size
        self.seed = seed
        self._generates = True
        self._prompts: list[Prompt] | None = None

    def _resolve(self, load_model: Callable[[str, str], SampleReward]) -> None:
        """Finds the functions and reward models."""
        keys = "PassAtK.reward", "PassAtK.metrics"
        of_reward, of_metrics = (partial(load_model, key) for key in keys)
        self.rewards = Rewards(self._reward, keys[0], of_reward)
        self.metrics = None if self._metrics is None else Rewards(self._metrics, keys[1], of_metrics)

    @property
    def validation_metrics(self) -> list[str]:
        """Names of the logged metrics."""
        return [f"val/{name}" for name in [*(f"pass@{k}" for k in self.pass_at), *self._metric_names]]

    @property
    def _metric_names(self) -> list[str]:
        return [] if self.metrics is None else self.metrics.names

    def setup(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Drops the prompts of an earlier data module; prints a note if the model can't complete prompts.

        Raises:
            UserError: the data have no prompts with answers, or the weights are divided over devices.
        """
        refuse_sharded(trainer, "PassAtK")
        self._prompts = None
        self._generates = pl_module.generates
        data = trainer.datamodule
        is_rewarded = isinstance(data, RolloutData) and bool(data.rewards.names)
        if not isinstance(data, ChatData) or is_rewarded:
            instead = "set data.eval_completions, pass_at and metrics" if is_rewarded else "it needs rows with answers"
            raise UserError(f"PassAtK does not fit {type(data).__name__}: {instead}")
        if not self._generates:
            say_why_not("completions", pl_module)
        if any(isinstance(function, _Later) for function in self._functions):
            self._resolve(lambda key, path: RewardModel(path, data, key))

    @property
    def _functions(self) -> list[Any]:
        return [
            f for rewards in (self.rewards, self.metrics) if rewards is not None for f in rewards.functions.values()
        ]

    def on_validation_epoch_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Samples completions and logs their scores."""
        if trainer.sanity_checking or not self._generates:
            return
        for name, value in self.scores(trainer, pl_module).items():
            pl_module.log(f"val/{name}", value, rank_zero_only=False, sync_dist=False)

    def scores(self, trainer: Any, pl_module: RunModule) -> dict[str, float]:
        """Samples completions; returns pass@k and the mean of each metric by name."""
        data: ChatData = trainer.datamodule
        if self._prompts is None:
            self._prompts = self._fitting(pl_module, data)
        repeated = [(i, prompt) for i, prompt in enumerate(self._prompts) for _ in range(self.completions)]
        with working(f"sampling {len(repeated)} completions"), generation(trainer, pl_module):
            completions = self._sample(pl_module, data, [(i, prompt.ids) for i, prompt in repeated])
        texts = [str(data.tokenizer.decode(completion.ids, skip_special_tokens=True)) for completion in completions]
        samples = [Scored(p, c, text) for (_, p), c, text in zip(repeated, completions, texts, strict=True)]
        rows = [prompt.row for _, prompt in repeated]
        with generation(trainer, pl_module):
            totals = self.rewards.total(self.rewards.components(texts, rows, samples))
            values = np.empty((0, 0)) if self.metrics is None else self.metrics.components(texts, rows, samples)
        solved = (totals >= self.success).reshape(-1, self.completions)
        scores = {f"pass@{k}": float(pass_at_k(solved, k).mean()) for k in self.pass_at}
        return scores | {name: float(values[:, i].mean()) for i, name in enumerate(self._metric_names)}

    def _fitting(self, module: Any, data: ChatData) -> list[Prompt]:
        """The first prompts that leave room for a completion, in the model and in reward models.

        Raises:
            UserError: there is none.
        """
        config = module.causal_lm.base.config.get_text_config()
        models = [function for function in self._functions if isinstance(function, RewardModel)]
        new, most = self.sampling.max_new_tokens, getattr(config, "max_position_embeddings", None) or float("inf")
        fitting = (
            prompt
            for prompt in prompts_with_rows(data)
            if 0 < len(prompt.ids) <= most - new and all(model.has_room(prompt, new) for model in models)
        )
        prompts = list(itertools.islice(fitting, self.rows))
        if not prompts:
            smallest = min([most, *(model.most_tokens for model in models)])
            raise UserError(
                f"PassAtK: no held-out prompt leaves room for {new} new tokens in the {smallest} positions of the "
                "model; lower sampling.max_new_tokens"
            )
        return prompts

    def _sample(self, module: Any, data: ChatData, prompts: list[tuple[int, list[int]]]) -> list[Completion]:
        hf = module.causal_lm.hf
        own = hf.generation_config.eos_token_id
        ends = {*data.stop_tokens, data.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        # a single completion is greedy: it is the model's answer
        sampling = self.sampling if self.completions > 1 else Sampling(self.sampling.max_new_tokens, temperature=0.0)
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            seeds = [(self.seed, i, (start + j) % self.completions) for j, (i, _) in enumerate(batch)]
            numbers = np.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds])
            ids = [prompt for _, prompt in batch]
            completions += sample(hf, data.tokenizer, ids, numbers=numbers, sampling=sampling, ends=ends)
        return completions


class _Later(SampleReward):
    """Stands for a reward model until there are data to read with it."""

    def __init__(self, path: str) -> None:
        self.__name__ = name_of(path)

    def __call__(self, samples: Sequence[Scored]) -> list[float]:
        raise AssertionError("`setup` loads it")


def prompts_with_rows(data: ChatData) -> Iterator[Prompt]:
    """Yields the prompt of each held-out row, and the row with its answer in the column `answer`."""
    sources, keep = data.taken("validation")
    for source in sources:
        for origin, record in PromptReader(source, data.formats).records(keep, strict=False):
            if isinstance(record, RecordWithRow):
                ids, answer = data.tokenize.prompt_ids(record.record)
                yield Prompt(ids, {"answer": answer} | record.row, origin, _answered(record.record))


def _answered(record: Record) -> Record:
    """The conversation or text that a record is about."""
    if isinstance(record, Preference):
        return record.chosen
    return record.response if isinstance(record, Feedback) else record
