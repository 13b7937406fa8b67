"""Data for online training: prompts, for which the policy samples groups of completions that rewards score."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from oumi_pl.data import report as reports
from oumi_pl.data.code import code_of
from oumi_pl.data.collate import collate
from oumi_pl.data.duplicates import RowKeys
from oumi_pl.data.examples import ChatData
from oumi_pl.data.formats import FORMATS, Formats
from oumi_pl.data.plan import Plan, plan_epoch
from oumi_pl.data.prompts import Prompt, prompt_only, read_prompts
from oumi_pl.data.records import value_in
from oumi_pl.data.reward_model import RewardModel
from oumi_pl.data.rollout_loader import EvalLoader, Group, RolloutLoader
from oumi_pl.data.sources import fingerprint
from oumi_pl.data.store import cache_key
from oumi_pl.data.tokenize import Tokenize
from oumi_pl.data.tokenizers import tokenizer_fingerprint
from oumi_pl.errors import UserError
from oumi_pl.rollouts.environment import Environment, sample_episodes
from oumi_pl.rollouts.evaluation import checked_ks
from oumi_pl.rollouts.rewards import Reward, Rewards, Scored
from oumi_pl.rollouts.sampling import Completion, Engine, Generate, Sampling
from oumi_pl.types import Batch, Example, Record, Segment, beside

if TYPE_CHECKING:
    from oumi_pl.data.near_duplicates import RowTexts

OTHER_PROMPT = (0, 1)
"""Appended to the seed that draws the prompts of extra rounds; the fifth number of a seed is then 1.

Seeds of completions have at most four numbers, those of later turns six with a 0 there, and those of an
environment a 2. The last is not 0, since numpy ignores zeros at the end of a seed.
"""


class Policy(Protocol):
    """What rollouts need of a module."""

    @property
    def causal_lm(self) -> Any:
        """The model, an `oumi_pl.models.lm.LM`."""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Maps the rewards of an update, `[prompts, completions]`, to advantages of the same shape."""

    def recomputed(self, batch: Batch) -> np.ndarray | None:
        """Log-probabilities under the policy of the targets of a batch of groups, `[targets]`; None if not needed.

        Called for completions of an engine that is not exact.
        """

    def penalties(self, batch: Batch) -> np.ndarray:
        """What is taken from the reward of each completion of a batch of groups, `[completions]`."""


class RolloutData(ChatData):
    """Samples `completions` per prompt from the policy, scores them, and yields them update by update.

    A row of `batch_size` is a prompt with all its completions, which share it. Completions are sampled when their
    update is due. They depend on the seed, the epoch, the prompt's place in it and their index alone, not on ranks or
    micro-batches.

    Args:
        args: As in `TextData`.
        reward: The dotted path of a function `(completion, row) -> float`; the folder or hub id of a reward model
            (a name with a slash); or several, as a list, or as a mapping to their weights. See
            `oumi_pl.rollouts.rewards`. `Distill` needs none.
        completions: Completions per prompt (a group), at least 2 if they are compared by a reward.
        sampling: How they are sampled.
        engine: What samples them; transformers' `generate` when left out.
        environment: Answers the policy's turns, with the results of tools for example, so that completions have several
            turns; see `oumi_pl.rollouts.environment`. Its tokens carry no loss. Rewards get the policy's last turn, and
            the texts of all turns as the row's column `turns`.
        steps_per_rollout: Number of updates whose completions are sampled together, before the first of them.
        iterations: How often each rollout is trained on.
        prompts_per_call: Prompts whose groups are sampled in one batch.
        extra_rounds: How often prompts whose completions all got the same total reward are replaced by prompts that
            are drawn from the epoch (similar to "dynamic sampling", Yu et al. 2025, arXiv:2503.14476, equation 11). If
            no round finds a group with different rewards, the original one stays. `train/extra_groups` counts the
            groups that were sampled in addition.
        mask_truncated: Exclude completions that were truncated at `max_new_tokens` from the loss.
        overlong_tokens: Over how many of the last of `max_new_tokens` the penalty in training grows linearly from 0 to
            `overlong_penalty` (Yu et al. 2025, arXiv:2503.14476, "soft overlong punishment"); 0 for none.
        overlong_penalty: Taken from the total reward of a completion with `max_new_tokens`.
        eval_completions: Completions per held-out prompt, sampled if more than one; one is greedy.
        success: Minimum total reward with which a held-out completion counts as solved.
        pass_at: The values of k for which `val/pass@k` is estimated from the `eval_completions`; 1 and all of them when
            left out.
        metrics: Further functions `(completion, row) -> float` by their paths, whose means over held-out completions
            are logged as `val/NAME`.
        kwargs: As in `ChatData`.
    """

    branching = True
    samples = True
    formats: Formats = ((prompt_only, ("prompt",)), *FORMATS)
    prompt_formats = formats

    def __init__(
        self,
        *args: Any,
        reward: str | list[str] | dict[str, float] | Reward | None = None,
        completions: int = 8,
        sampling: Sampling | None = None,
        engine: Engine | None = None,
        environment: Environment | None = None,
        steps_per_rollout: int = 1,
        iterations: int = 1,
        prompts_per_call: int = 8,
        extra_rounds: int = 0,
        mask_truncated: bool = False,
        overlong_tokens: int = 0,
        overlong_penalty: float = 1.0,
        eval_completions: int = 1,
        success: float = 1.0,
        pass_at: list[int] | None = None,
        metrics: str | list[str] | Reward | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, value, least in (
            ("completions", completions, 1 if reward is None else 2),
            ("steps_per_rollout", steps_per_rollout, 1),
            ("iterations", iterations, 1),
            ("prompts_per_call", prompts_per_call, 1),
            ("extra_rounds", extra_rounds, 0),
            ("eval_completions", eval_completions, 1),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}, but has to be at least {least}")
        if self.packing:
            raise UserError(
                "data.packing: a row is a prompt with its completions, which share it already; leave it out"
            )
        if self.weight_by != "rows":
            raise UserError(
                f"data.weight_by: {self.weight_by} of completions are unknown before they are sampled; the weights of "
                "sources are shares of the prompts"
            )
        self.rewards = Rewards.none() if reward is None else Rewards(reward, load_model=self.__reward_model)
        self.completions = completions
        self.sampling = sampling or Sampling()
        self.engine = engine or Generate()
        self.environment = environment
        self.engine.check(self.sampling)
        self.steps_per_rollout = steps_per_rollout
        self.iterations = iterations
        self.prompts_per_call = prompts_per_call
        if extra_rounds and reward is None:
            raise UserError("data.extra_rounds: without a reward, no group of completions is better than another")
        self.extra_rounds = extra_rounds
        if not 0 <= overlong_tokens <= self.sampling.max_new_tokens:
            raise UserError(
                f"data.overlong_tokens is {overlong_tokens}, but has to be from 0 to data.sampling.max_new_tokens, "
                f"which is {self.sampling.max_new_tokens}"
            )
        if not overlong_penalty >= 0:
            raise UserError(f"data.overlong_penalty is {overlong_penalty}, but has to be 0 or more")
        self.mask_truncated = mask_truncated
        self.overlong_tokens, self.overlong_penalty = overlong_tokens, overlong_penalty
        self.eval_completions = eval_completions
        self.success = success
        self.pass_at = checked_ks(pass_at, eval_completions, "data.pass_at", "data.eval_completions")
        in_metrics = partial(self.__reward_model, key="data.metrics")
        self.metrics = None if metrics is None else Rewards(metrics, "data.metrics", in_metrics)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds spent on `generating` and `rewarding` training completions since the last update was logged."""
        self.__prompts: dict[str, list[Prompt]] = {}
        self.__reports: dict[str, list[dict[str, Any]]] = {}
        self.__keys: dict[str, list[RowKeys]] = {}
        self.__same: dict[str, dict[str, Any]] = {}

    def __reward_model(self, path: str, key: str = "data.reward") -> RewardModel:
        return RewardModel(path, self, key)

    @property
    def row_name(self) -> str:
        """The unit of `batch_size`."""
        return "prompt"

    @property
    def metric_names(self) -> list[str]:
        """Names of `metrics`."""
        return [] if self.metrics is None else self.metrics.names

    @property
    def validation_metrics(self) -> list[str]:
        """Metrics of validation that depend on the settings of the data."""
        if not self.rewards.names:
            return []
        names = [*(f"pass@{k}" for k in self.pass_at), *self.metric_names]
        names += [f"rewards/{name}" for name in self.rewards.names] if len(self.rewards.names) > 1 else []
        names += ["groups_without_variance"] if self.eval_completions > 1 else []
        sources = self.source_names("validation") if self.sources["validation"] is not None else []
        names += [f"reward/{name}" for name in sources] if len(sources) > 1 else []
        return [f"val/{name}" for name in names]

    @cached_property
    def tokenize(self) -> Tokenize:
        """Tokenizes prompts."""
        return Tokenize(self.tokenizer, self.max_length, overflow=self.overflow, renderer=self.renderer)

    # ---- prompts

    def all_prompts(self, split: str) -> list[Prompt]:
        """The prompts of a split, in memory. Those with too little room for a completion are left out.

        Raises:
            UserError: a row has no prompt; names it.
        """
        if split not in self.__prompts:
            sources, keep = self.taken(split)
            keys: list[RowKeys] = []
            read = []
            for source in sources:
                before = keys if self.drops_repeated(split) else None
                of_source = read_prompts(
                    source, self.formats, self.__prompt_ids, self.room, keep=keep, bad_rows=self.bad_rows, before=before
                )
                read.append(of_source)
                keys.append(of_source[2])
            self.__prompts[split] = [prompt for prompts, _, _ in read for prompt in prompts]
            self.__reports[split] = [report for _, report, _ in read]
            self.__keys[split] = keys
        return self.__prompts[split]

    @property
    def room(self) -> int:
        """Most tokens of a prompt.

        Raises:
            UserError: no prompt fits.
        """
        room = self.max_length - self.sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"data.max_length is {self.max_length}, which leaves no room for a prompt and "
                f"{self.sampling.max_new_tokens} new tokens"
            )
        return room

    def __prompt_ids(self, record: Record) -> list[int]:
        return self.tokenize.prompt_ids(record)[0]

    def make(self, split: str) -> None:
        """Reads the prompts."""
        self.all_prompts(split)
        if self.near_duplicates:
            self.report()

    def setup(self, stage: str) -> None:
        """Stops before weights are loaded if completions can't be sampled.

        Raises:
            UserError: no prompt of a split is left, or weights are to be sharded: ranks sample different numbers of
                batches, so that some would wait for ever to gather weights.
        """
        self.refuse_sharded_weights()
        for split in self.needed(stage):
            if not self.all_prompts(split):
                raise UserError(
                    f"data.{split}: none of its prompts leaves room for {self.sampling.max_new_tokens} new tokens in "
                    f"data.max_length, which is {self.max_length}"
                )

            for rewards in filter(None, (self.rewards, self.metrics)):
                self.__refuse_long(split, rewards)

    def __refuse_long(self, split: str, rewards: Rewards) -> None:
        for model in rewards.functions.values():
            if isinstance(model, RewardModel):
                model.refuse_long(self.all_prompts(split), self.sampling.max_new_tokens)
                if self.environment is not None and not model.reads_ids:
                    raise UserError(
                        f"{model.key} has other tokens or another chat template than the policy, so it can't read "
                        "completions of several turns; leave out data.environment, or name another reward"
                    )

    def refuse_sharded_weights(self) -> None:
        """Refuses a strategy that shards weights, since ranks sample different numbers of batches.

        Raises:
            UserError: it does.
        """
        if self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError("trainer.strategy: completions can't be sampled from sharded weights; use ddp")

    def made_from(self) -> list[str]:
        """A hash of the sources and which of their rows are used, the tokenizer, the rendering and the lengths."""
        sources, keep = self.taken("train")
        weights = self.source_weights if len(sources) > 1 else []
        rows = [[fingerprint(source) for source in sources], weights, str(keep), self.duplicates]
        rendering = tokenizer_fingerprint(self.tokenizer), self.template_variables
        return [cache_key(rows, *rendering, self.max_length, self.completions), *self.draws.identity]

    def held_out_rows(self) -> Iterator[tuple[str, str]]:
        """See `TextData`."""
        if isinstance(self.sources["validation"], float):
            self.all_prompts("validation")
            for report, keys in zip(self.__reports["validation"], self.__keys["validation"], strict=True):
                yield from ((report["source"], origin) for origin in dict.fromkeys(keys.origins))

    def lengths(self, split: str) -> np.ndarray:
        """Most tokens of each prompt with its completions, `[prompts]`."""
        return self.prompt_lengths(split) + self.completions * self.sampling.max_new_tokens

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """See `TextData`."""
        return None

    def report(self) -> dict[str, Any]:
        """Counts per split: rows read, kept and dropped, tokens and lengths of the prompts."""
        return {split: self.__report_of(split) for split in self.__reports}

    def __report_of(self, split: str) -> dict[str, Any]:
        report = reports.merged(self.__reports[split]) | reports.of_lengths(self.prompt_lengths(split))
        report |= self.__repeated(split)
        if split == "train":
            plan = self.plan(0)
            report |= {"rows_planned": plan.rows, "updates_per_epoch": len(plan) * self.iterations}
            report |= self.report_of_draws(plan.example_ids)
        return report

    def __repeated(self, split: str) -> dict[str, Any]:
        """The part of a report about prompts that repeat others, counted once."""
        if split not in self.__same:
            training = self.__keys.get("train") if split != "train" else None
            described = reports.describe_repeated(self.__keys[split], self.__reports[split], training)
            if self.near_duplicates:
                described = self.with_near_duplicates(split, described, self.__reports[split], training is not None)
            self.__same[split] = described
        return self.__same[split]

    def row_texts(self, split: str) -> "list[RowTexts]":
        """See `ExampleData`: the texts of the prompts, with answers if their rows have any."""
        from oumi_pl.data.near_duplicates import RowTexts, name_of

        prompts, of_sources, start = self.all_prompts(split), [], 0
        code = code_of(type(self), *(function for function, _ in self.formats))
        for keys, report in zip(self.__keys[split], self.__reports[split], strict=True):
            texts = partial(_texts_of, prompts[start : start + len(keys.origins)])
            of_sources.append(RowTexts(name_of(keys, code), keys, texts, report["source"]))
            start += len(keys.origins)
        return of_sources

    def prompt_lengths(self, split: str) -> np.ndarray:
        """Tokens of each prompt, `[prompts]`."""
        return np.array([len(prompt.ids) for prompt in self.all_prompts(split)], dtype=np.int64)

    # ---- plan and loaders

    def plan(self, epoch: int) -> Plan:
        """The prompts of each update of an epoch."""
        lengths = self.prompt_lengths("train")
        sizes = [report["kept"] for report in self.__reports["train"]]
        ids = self.drawn(sizes, epoch)
        rows_per_update = self.layout.at(epoch).rows_per_update
        shuffle = self.draws.ordered is None
        how: dict[str, Any] = {"group_by_length": False, "shuffle": shuffle}
        return plan_epoch(lengths, ids, rows_per_update, seed=self.run_seed, epoch=epoch, **how)

    def column_values(self, name: str) -> Sequence[Any]:
        """See `ExampleData`.

        Raises:
            UserError: a row has no value in the column; names it.
        """
        values = []
        for prompt in self.all_prompts("train"):
            try:
                values.append(value_in(prompt.row, name))
            except UserError as error:
                raise UserError(f"{prompt.origin}: {error}") from error
        return values

    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs."""
        counts = ((self.layout.at(epoch), self.plan(epoch)) for epoch in range(epochs))
        return sum(
            layout.updates(len(plan) * self.iterations * layout.rows_per_update, self.limit) for layout, plan in counts
        )

    def make_train_loader(self) -> RolloutLoader:  # type: ignore[override]
        """Creates the loader that samples."""
        return RolloutLoader(self, self.plan, self.layout)

    def make_eval_loader(self, split: str) -> Any:
        """Creates a loader that completes this rank's share of the held-out prompts."""
        return EvalLoader(self, split)

    # ---- rollouts

    def training_groups(self, plan: Plan, epoch: int, rows: Iterable[int]) -> list[Group]:
        """The groups of some rows of an epoch's plan, with up to `extra_rounds` prompts sampled in place of each.

        A row's other prompts depend on the seed and the row alone, so that resumes and other layouts sample the same.
        """
        numbers = self.numbered(plan, epoch, rows)
        groups = [*self.groups("train", numbers, self.sampling, self.completions)]
        for extra in range(1, self.extra_rounds + 1):
            same = [i for i, group in enumerate(groups) if not self.has_variance(group)]
            if not same:
                break
            others = [(number, self.__other_prompt(plan, number, extra)) for number, _ in (numbers[i] for i in same)]
            sampled = self.groups("train", others, self.sampling, self.completions, extra)
            for i, group in zip(same, sampled, strict=True):
                groups[i] = replace(group if self.has_variance(group) else groups[i], extra=extra)
        return groups

    def __other_prompt(self, plan: Plan, number: int, extra: int) -> int:
        drawn = np.random.default_rng([self.run_seed, number, extra, *OTHER_PROMPT]).integers(len(plan.example_ids))
        return int(plan.example_ids[drawn])

    def has_variance(self, group: Group) -> bool:
        """Whether the completions of a group got different rewards, before penalties."""
        return bool(np.ptp(self.rewards.total(group.components)) > 0)

    def groups(
        self, split: str, numbers: Sequence[tuple[int, int]], sampling: Sampling, members: int, extra: int = 0
    ) -> list[Group]:
        """Completes and scores prompts; the ranks share the work, and each gets all groups.

        Args:
            split: The split of the prompts.
            numbers: Number of the seed and id of each prompt.
            sampling: How to sample.
            members: Completions per prompt.
            extra: Number of the extra round, from 1; its random numbers are others.
        """
        started, rewarding = time.perf_counter(), self.seconds["rewarding"]
        groups = self.__groups(split, numbers, sampling, members, extra)
        if split == "train":
            seconds = time.perf_counter() - started  # waiting for other ranks counts as generating
            self.seconds["generating"] += seconds - (self.seconds["rewarding"] - rewarding)
        return groups

    def __groups(
        self, split: str, numbers: Sequence[tuple[int, int]], sampling: Sampling, members: int, extra: int
    ) -> list[Group]:
        layout, size = self.layout, self.prompts_per_call
        calls = [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
        self.engine.synchronise(self.policy)
        mine = [self.__call(split, call, sampling, members, extra) for call in calls[layout.rank :: layout.ranks]]
        if layout.ranks == 1:
            return [group for of_call in mine for group in of_call]
        gathered: list[Any] = [None] * layout.ranks
        torch.distributed.all_gather_object(gathered, mine)
        in_order = [gathered[i % layout.ranks][i // layout.ranks] for i in range(len(calls))]
        return [group for of_call in in_order for group in of_call]

    def __call(
        self, split: str, numbers: list[tuple[int, int]], sampling: Sampling, members: int, extra: int
    ) -> list[Group]:
        prompts = self.all_prompts(split)
        repeated = [(number, prompts[prompt], member) for number, prompt in numbers for member in range(members)]
        own = self.policy.causal_lm.hf.generation_config.eos_token_id
        ends = {*self.stop_tokens, self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        of_members = [prompt for _, prompt, _ in repeated]
        settings: dict[str, Any] = {
            "seeds": [(self.run_seed, number, member, *([extra] if extra else [])) for number, _, member in repeated],
            "sampling": sampling,
            "ends": ends,
        }
        with self.trainer.precision_plugin.forward_context():  # type: ignore[union-attr]
            if self.environment is None:
                ids = [prompt.ids for prompt in of_members]
                completions = self.engine.sample(self.policy, self.tokenizer, ids, **settings)
            else:
                of_run = self.engine, self.environment, self.policy, self.tokenizer
                completions = sample_episodes(*of_run, of_members, **settings)
        started = time.perf_counter()
        samples = [Scored(p, c, self.text_of(c)) for p, c in zip(of_members, completions, strict=True)]
        turns = [self.turns_of(completion) for completion in completions]
        texts = [of_completion[-1]["text"] for of_completion in turns]
        rows = [sample.prompt.row for sample in samples]
        if self.environment is not None:
            listed = [[turn["text"] for turn in of_completion] for of_completion in turns]
            rows = [beside(row, {"turns": of_row}) for row, of_row in zip(rows, listed, strict=True)]
        components = self.rewards.components(texts, rows, samples)
        is_measured = self.metrics is not None and split != "train"
        metrics = self.metrics.components(texts, rows, samples) if is_measured else np.empty((len(texts), 0))  # type: ignore[union-attr]
        groups = []
        for i, (_, prompt) in enumerate(numbers):
            of_prompt = slice(i * members, (i + 1) * members)
            group = Group(prompt, completions[of_prompt], components[of_prompt], np.zeros(members), metrics[of_prompt])
            if split == "train" and not self.engine.is_exact:
                group = self.__recomputed(group)
            penalties = self.policy.penalties(self.batch_of(split, [group])) if split == "train" else group.penalties
            groups.append(replace(group, penalties=penalties))
        if split == "train":
            self.seconds["rewarding"] += time.perf_counter() - started
        return groups

    def __recomputed(self, group: Group) -> Group:
        """The group with log-probabilities under the policy for all completions that carry loss, if they are needed."""
        logps = self.policy.recomputed(self.batch_of("train", [group]))
        if logps is None:
            return group
        completions, start = [], 0
        for completion in group.completions:
            is_kept = completion.is_finished or not self.mask_truncated
            end = start + len(completion.logps) * is_kept
            completions.append(completion._replace(policy_logps=logps[start:end] if is_kept else completion.logps))
            start = end
        return replace(group, completions=completions)

    def text_of(self, completion: Completion) -> str:
        """The text of a completion without special tokens, with the turns of an environment."""
        return str(self.tokenizer.decode(completion.ids, skip_special_tokens=True))

    def turns_of(self, completion: Completion) -> list[dict[str, str]]:
        """The turns of a completion: who wrote each (`by`: `policy` or `environment`), and its `text`."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [
            {"by": "policy" if is_sampled else "environment", "text": str(decode(ids))}
            for is_sampled, ids in completion.turns
        ]

    @staticmethod
    def numbered(plan: Plan, epoch: int, rows: Iterable[int]) -> list[tuple[int, int]]:
        """The number of the seed and the id of the prompts in some rows of an epoch's plan, as `groups` reads them."""
        return [(epoch * plan.rows + row, int(plan.row(row)[0])) for row in rows]

    def example(self, split: str, group: Group) -> Example:
        """A group as a tree: the prompt with the first completion, and the others after the prompt.

        With an environment, each is after the longest beginning that it shares with an earlier one.
        """
        prompt = self.all_prompts(split)[group.prompt].ids
        if self.environment is not None:
            return _tree(prompt, group.completions, self.mask_truncated)
        first, *others = group.completions
        segments = [Segment(len(prompt) + len(first.ids))]
        segments += [Segment(len(completion.ids), parent=0, shared=len(prompt)) for completion in others]
        trained = [c.is_finished or not self.mask_truncated for c in group.completions]
        return Example(
            np.concatenate([prompt, *(c.ids for c in group.completions)]).astype(np.int32),
            np.concatenate(
                [np.zeros(len(prompt), dtype=bool)]
                + [np.full(len(c.ids), kept) for c, kept in zip(group.completions, trained, strict=True)]
            ),
            tuple(segments),
        )

    def batch_of(self, split: str, groups: Sequence[Group], advantages: np.ndarray | None = None) -> Batch:
        """A batch of groups.

        Besides the keys of `Batch`: `advantages`, `rewards` (the totals), `components` (`[completions, rewards]`),
        `penalties` (of the KL), `metrics` (`[completions, metrics]`), `lengths` and `finished`, for each completion,
        `sampled_logps` and `entropies` for each target, and the number of `completions` per prompt; with `extra_rounds`
        in training, `extra_groups` for each completion; with an environment, the policy's `turns`; `policy_logps` for
        each target if they were recomputed; of several sources, the number of the one that each completion's prompt is
        from (`sources`).
        """
        examples = [self.example(split, group) for group in groups]
        batch: Any = collate([([g.prompt], [e]) for g, e in zip(groups, examples, strict=True)], self.pad_id)
        completions = [c for group in groups for c in group.completions]
        kept = [c for c in completions if c.is_finished or not self.mask_truncated]
        members = self.completions if split == "train" else self.eval_completions
        components = (
            np.concatenate([g.components for g in groups]) if groups else np.empty((0, len(self.rewards.names)))
        )
        penalties = np.concatenate([g.penalties for g in groups]) if groups else np.empty(0)
        batch["advantages"] = _floats([] if advantages is None else advantages.reshape(-1))
        batch["components"] = _floats(components)
        overlong = [self.overlong(g) for g in groups if split == "train"]
        penalised = np.concatenate(overlong) if overlong else 0.0
        batch["rewards"] = _floats(self.rewards.total(components) - penalties - penalised)
        batch["penalties"] = _floats(penalties)
        metrics = [group.metrics for group in groups if split != "train"]
        batch["metrics"] = _floats(np.concatenate(metrics) if metrics else np.empty((0, len(self.metric_names))))
        batch["lengths"] = _floats([len(c.ids) for c in completions])
        batch["finished"] = _floats([c.is_finished for c in completions])
        batch["sampled_logps"] = _floats(np.concatenate([c.logps for c in kept]) if kept else [])
        batch["entropies"] = _floats(np.concatenate([c.entropies for c in kept]) if kept else [])
        if self.environment is not None:
            batch["turns"] = _floats([len(c.replies) + 1 for c in completions])
        recomputed = [c.policy_logps for c in kept if c.policy_logps is not None]
        if recomputed:
            batch["policy_logps"] = _floats(np.concatenate(recomputed))
        if self.extra_rounds and split == "train":
            batch["extra_groups"] = _floats([group.extra for group in groups for _ in range(members)])
        reports = self.__reports.get(split, [])
        if len(reports) > 1:
            ends = np.cumsum([report["kept"] for report in reports])
            of_groups = np.searchsorted(ends, [group.prompt for group in groups], side="right")
            batch["sources"] = torch.as_tensor(np.repeat(of_groups, members))
        batch["completions"] = members
        return batch

    def full_batch(self, rows: int) -> Batch:
        """See `TextData`: groups with the longest prompt, and completions of `max_new_tokens`."""
        tokens, members = self.sampling.max_new_tokens, self.completions
        nothing = np.zeros(tokens, np.float32)
        # with an environment, completions share what they begin with, so no two of these begin alike
        completions = [Completion(np.full(tokens, i, np.int32), nothing, nothing, True) for i in range(members)]
        components = np.zeros((members, len(self.rewards.names)))
        groups = [Group(0, completions, components, np.zeros(members))] * rows
        prompts = self.__prompts
        self.__prompts = {"train": [Prompt([0] * self.room, {}, "")]}
        try:
            batch: Any = self.batch_of("train", groups, np.zeros((rows, members)))
        finally:
            self.__prompts = prompts
        return batch | {"on_policy": False}  # so that no ratio has to be compared with 1

    def totals(self, groups: Sequence[Group]) -> np.ndarray:
        """The total reward of each completion after penalties, `[groups, completions]`."""
        return np.stack([self.rewards.total(g.components) - g.penalties - self.overlong(g) for g in groups])

    def overlong(self, group: Group) -> np.ndarray:
        """What is taken from the reward of each completion of a group for its length, `[completions]`."""
        lengths = np.array([len(completion.ids) for completion in group.completions])
        over = lengths - (self.sampling.max_new_tokens - self.overlong_tokens)
        return self.overlong_penalty * np.clip(over, 0, None) / max(1, self.overlong_tokens)


def _texts_of(prompts: Sequence[Prompt]) -> Iterator[tuple[int, str]]:
    """The number and the text of each prompt's record."""
    return ((number, prompt.record.full_text()) for number, prompt in enumerate(prompts) if prompt.record is not None)


def _tree(prompt: list[int], completions: Sequence[Completion], mask_truncated: bool) -> Example:
    """A tree in which each completion continues the longest beginning that it shares with an earlier one.

    A token that several of them sampled is computed once, and carries loss in each.
    """
    paths = [np.concatenate([prompt, completion.ids]).astype(np.int32) for completion in completions]
    own, segments, masks = [], [], []
    for i, (path, completion) in enumerate(zip(paths, completions, strict=True)):
        shared = [_shared(path, other) for other in paths[:i]]
        # a segment needs a token of its own, also if an earlier completion has them all
        start = min(max(shared, default=0), len(path) - 1)
        segments.append(Segment(len(path) - start, shared.index(max(shared)) if i else -1, start))
        own.append(path[start:])
        kept = completion.is_sampled & (completion.is_finished or not mask_truncated)
        masks.append(np.concatenate([np.zeros(len(prompt), dtype=bool), kept]))
    ids = np.concatenate(own)
    return Example(ids, np.zeros(len(ids), dtype=bool), tuple(segments), path_masks=tuple(masks))


def _shared(path: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two paths begin with alike."""
    length = min(len(path), len(other))
    different = np.flatnonzero(path[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _floats(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float32))
