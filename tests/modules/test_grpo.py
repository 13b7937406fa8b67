"""Online training: updates against a plain loop with full logits, for any layout, and exact resumes."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.policy import BNPOLoss, DrGRPOLoss, GRPOLoss, ReinforceLoss
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts.advantages import GroupMean, LeaveOneOut
from oumi_pl.rollouts.sampling import Generate, Sampling
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.folders import saved_steps
from tests.tiny import LLAMA, distance, sgd, trainer, weights

PROMPTS = 7
SAMPLING = Sampling(max_new_tokens=6, temperature=1.5)


def vowels(completion, row):
    """Varies from one completion of a random model to the next, and from row to row."""
    return sum(ord(letter) % 7 for letter in completion) / 10 + len(row["prompt"]) % 3


def rollouts(path, **kwargs):
    file = path / "prompts.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"prompt": "say " + "ab" * i}) + "\n" for i in range(PROMPTS)))
    defaults = {"tokenizer": ByteTokenizer(), "max_length": 128, "batch_size": 4, "completions": 3, "seed": 0}
    defaults |= {"train": str(file)}
    return RolloutData(**defaults | {"reward": vowels, "sampling": SAMPLING} | kwargs)


def grpo(**kwargs):
    return GRPO(config=LLAMA | {"initializer_range": 0.2}, **{"optimizer": sgd} | kwargs)


def run(path, module, micro_batches=1, data=None, callbacks=(), **kwargs):
    """Trains; returns the data module, with all groups that were sampled as `sampled`, and their extra rounds."""
    samples = rollouts(path, **data or {})
    samples.sampled, samples.rounds, original = [], [], samples.groups

    def groups(*args):
        samples.rounds.append(args[4] if len(args) > 4 else 0)
        samples.sampled.append(original(*args))
        return samples.sampled[-1]

    samples.groups = groups
    L.seed_everything(1)
    options = {"max_epochs": 1, "accumulate_grad_batches": micro_batches} | kwargs
    trainer(callbacks=list(callbacks), **options).fit(module, samples)
    return samples


def plain_loop(path, module, updates, prompts, reward=vowels):
    """SGD written out: each completion as a row of its own, full logits, the objective's formula, one division."""
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(module)
    hf = module.build(ByteTokenizer().build()).hf.eval()
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    losses = []
    for groups in updates:
        total, completions, tokens = 0.0, 0, 0
        for group in groups:
            texts = [ByteTokenizer().build().decode(c.ids, skip_special_tokens=True) for c in group.completions]
            rewards = torch.tensor([reward(text, prompts[group.prompt].row) for text in texts])
            advantages = rewards - rewards.mean()
            if isinstance(module.advantage, GroupMean) and module.advantage.scale == "group":
                advantages = advantages / (rewards.std() + 1e-4)
            elif isinstance(module.advantage, LeaveOneOut):
                advantages = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
            for completion, advantage in zip(group.completions, advantages, strict=True):
                ids = torch.tensor([*prompts[group.prompt].ids, *completion.ids], dtype=torch.long)
                n = len(completion.ids)
                logits = hf(input_ids=ids[None]).logits[0, -n - 1 : -1] / SAMPLING.temperature
                logps = logits.log_softmax(-1).gather(-1, ids[-n:, None]).sum(-1)
                weight = {GRPOLoss: 1 / n, DrGRPOLoss: 1 / SAMPLING.max_new_tokens}.get(type(module.loss), 1.0)
                # on-policy every objective is REINFORCE, up to weights; the ratio of 1 gives the value
                value = logps if isinstance(module.loss, ReinforceLoss) else torch.exp(logps - logps.detach())
                total = total - weight * (advantage * value).sum()
                completions, tokens = completions + 1, tokens + n
        units = tokens if module.loss.unit == "targets" else completions
        optimizer.zero_grad()
        (total / units).backward()
        optimizer.step()
        losses.append(float(total.detach()) / units)
    return {name: p.detach() for name, p in hf.named_parameters()}, losses


OBJECTIVES = {
    "grpo": {},
    "dr_grpo": {"loss": DrGRPOLoss(), "advantage": GroupMean("none")},
    "bnpo": {"loss": BNPOLoss()},
    "rloo": {"loss": ReinforceLoss(), "advantage": LeaveOneOut()},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_a_plain_loop_with_any_micro_batches(tmp_path, name):
    module = grpo(**OBJECTIVES[name])
    samples = run(tmp_path, module)
    assert [len(groups) for groups in samples.sampled] == [4, 3]
    expected, _ = plain_loop(tmp_path, grpo(**OBJECTIVES[name]), samples.sampled, samples.all_prompts("train"))
    assert distance(weights(module), expected) < 5e-6
    for batch_size, micro_batches in ((2, 2), (1, 4)):
        other = grpo(**OBJECTIVES[name])
        cut = run(tmp_path, other, micro_batches, {"batch_size": batch_size})
        assert same(cut.sampled, samples.sampled)
        assert distance(weights(other), expected) < 5e-6


def test_an_epoch_that_ends_within_an_update(tmp_path):
    samples = run(tmp_path, module := grpo(), 2, {"batch_size": 2}, limit_train_batches=3)
    first, second = samples.sampled  # 4 prompts and 3, of which the third micro-batch trains 2
    expected, _ = plain_loop(tmp_path, grpo(), [first, second[:2]], samples.all_prompts("train"))
    assert distance(weights(module), expected) < 5e-6


def test_the_first_epoch_in_one_micro_batch_the_second_in_two(tmp_path):
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    samples = run(tmp_path, module := grpo(), 1, {"batch_size": 4}, callbacks=[schedule], max_epochs=2)
    assert [len(groups) for groups in samples.sampled] == [4, 3, 7]
    expected, _ = plain_loop(tmp_path, grpo(), samples.sampled, samples.all_prompts("train"))
    assert distance(weights(module), expected) < 1e-5


def same(ours, theirs):
    """Whether the same tokens were sampled."""
    pairs = [
        (a, b) for x, y in zip(ours, theirs, strict=True) for g, h in zip(x, y, strict=True)
        for a, b in zip(g.completions, h.completions, strict=True)
    ]  # fmt: skip
    return all(np.array_equal(a.ids, b.ids) for a, b in pairs)


FAULTS = {
    "a mean of means": (LanguageModule, "share", lambda self, batch: 1 / max(1, len(batch["rewards"]))),
    "advantages of other completions": (GRPO, "advantages", lambda self, rewards: -self.advantage(rewards)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_be_caught(tmp_path, fault, monkeypatch):
    samples = run(tmp_path, grpo())
    expected, _ = plain_loop(tmp_path, grpo(), samples.sampled, samples.all_prompts("train"))
    monkeypatch.setattr(*FAULTS[fault])
    module = grpo()
    run(tmp_path, module, 2, {"batch_size": 2}, max_steps=2)
    assert distance(weights(module), expected) > 1e-4


class Padded(Generate):
    """Trains on padding after the end of a completion."""

    def sample(self, policy, tokenizer, prompts, **kwargs):
        completions = super().sample(policy, tokenizer, prompts, **kwargs)
        pads = np.array([tokenizer.pad_token_id], dtype=np.int32), np.zeros(1, dtype=np.float32)
        return [
            completion._replace(
                ids=np.append(completion.ids, pads[0]),
                logps=np.append(completion.logps, pads[1]),
                entropies=np.append(completion.entropies, pads[1]),
            )
            for completion in completions
        ]


def test_padding_that_carries_loss_would_be_caught(tmp_path):
    samples = run(tmp_path, module := grpo(), max_steps=1)
    padded = run(tmp_path, other := grpo(), max_steps=1, data={"engine": Padded()})
    assert same([samples.sampled[0]], [cut_last(padded.sampled[0])])
    assert distance(weights(module), weights(other)) > 1e-4


def train_prompts(monkeypatch, first):
    """Lets the prompt's tokens from `first` on carry loss, as part of the first completion; all counts agree."""
    original_example, original_batch = RolloutData.example, RolloutData.batch_of

    def own(samples, split, group):
        """Which tokens of a prompt carry loss; nothing predicts the first."""
        mask = np.zeros(len(samples.all_prompts(split)[group.prompt].ids), dtype=bool)
        mask[first:] = True
        mask[0] = False
        return mask

    def example(self, split, group):
        right = original_example(self, split, group)
        mask, prompt = right.loss_mask.copy(), own(self, split, group)
        mask[: len(prompt)] = prompt
        return replace(right, loss_mask=mask)

    def batch_of(self, split, groups, *args):
        batch, start = original_batch(self, split, groups, *args), 0
        for group in groups:
            trained, sampled = int(own(self, split, group).sum()), sum(len(c.ids) for c in group.completions)
            for name in ("sampled_logps", "entropies"):
                value = batch[name]
                batch[name] = torch.cat([value[:start], value.new_zeros(trained), value[start:]])
            start += trained + sampled
        assert len(batch["sampled_logps"]) == len(batch["targets"])
        return batch

    monkeypatch.setattr(RolloutData, "example", example)
    monkeypatch.setattr(RolloutData, "batch_of", batch_of)


@pytest.mark.parametrize("first", [0, -1], ids=["all of the prompt", "its last token"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_prompt_tokens_that_carry_loss_would_be_caught(tmp_path, name, first, monkeypatch):
    samples = run(tmp_path, right := grpo(**OBJECTIVES[name]), max_steps=1)
    expected, _ = plain_loop(tmp_path, grpo(**OBJECTIVES[name]), samples.sampled[:1], samples.all_prompts("train"))
    assert distance(weights(right), expected) < 5e-6
    train_prompts(monkeypatch, first)
    wrong = run(tmp_path, module := grpo(**OBJECTIVES[name]), max_steps=1)
    assert same(wrong.sampled[:1], samples.sampled[:1])
    assert distance(weights(module), expected) > 1e-4


def cut_last(groups):
    """Groups without the last token of each completion."""
    return [replace(group, completions=[c._replace(ids=c.ids[:-1]) for c in group.completions]) for group in groups]


class Logged(L.Callback):
    def __init__(self):
        self.updates, self.validations = [], []

    def on_validation_end(self, trainer, *_):
        metrics = trainer.callback_metrics
        self.validations.append({k: float(v) for k, v in metrics.items() if k.startswith("val/")})

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.updates.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def test_on_policy_the_ratio_is_1_and_sampled_equals_recomputed(tmp_path):
    logged = Logged()
    run(tmp_path, grpo(), callbacks=[logged])
    for update in logged.updates:
        assert update["train/sampling_difference"] < 1e-5
        assert update["train/clipped/low"] == update["train/clipped/high"] == 0
        assert 0 < update["train/entropy"] < np.log(300)


def test_completions_do_not_depend_on_micro_batches_or_ranks(tmp_path):
    together = run(tmp_path, grpo(), data={"prompts_per_call": 8}, max_steps=1).sampled[0]
    apart = run(tmp_path, grpo(), data={"prompts_per_call": 1}, max_steps=1).sampled[0]
    assert same([together], [apart])
    other = run(tmp_path, grpo(), data={"seed": 1}, max_steps=1).sampled[0]
    assert {tuple(c.ids) for g in other for c in g.completions} != {tuple(c.ids) for g in apart for c in g.completions}


WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.modules.test_grpo import DYNAMIC, Logged, grpo, of_two_sources, run
from tests.tiny import weights
out = Path(sys.argv[1])
for name, data in (("weights", of_two_sources(out)), ("dynamic", DYNAMIC | {{"prompts_per_call": 1}})):
    module, logged = grpo(), Logged()
    run(out, module, 2, data | {{"batch_size": 1}}, callbacks=[logged], devices=2, strategy="ddp")
    if module.global_rank == 0:
        torch.save((weights(module), logged.updates, logged.validations), out / (name + ".pt"))
"""


def of_two_sources(path):
    """Settings with 7 prompts of two files, of which a validation has 3 and 2; each row names its file."""
    lines = [
        json.dumps({"prompt": "say " + "ab" * i, "of": "easy" if i % 3 else "hard"}) + "\n" for i in range(PROMPTS)
    ]
    files = {}
    for split, taken in (("train", lines), ("validation", lines[:5])):
        for name in ("easy", "hard"):
            files[split, name] = path / split / f"{name}.jsonl"
            files[split, name].parent.mkdir(exist_ok=True)
            files[split, name].write_text("".join(line for line in taken if f'"{name}"' in line))
    return {s: [str(file) for (split, _), file in files.items() if split == s] for s in ("train", "validation")}


def rewards_by_source(samples, groups):
    """The mean reward of the completions of each source, counted by hand."""
    decode, by_source = ByteTokenizer().build().decode, {}
    for split, group in groups:
        row = samples.all_prompts(split)[group.prompt].row
        rewards = [vowels(decode(c.ids, skip_special_tokens=True), row) for c in group.completions]
        by_source.setdefault(row["of"], []).extend(rewards)
    return {name: np.mean(rewards) for name, rewards in by_source.items()}


def assert_rewards_are_those_of_sources(logged, samples, prefix):
    """`logged` are metrics, and `samples` the data module and the groups that they are of."""
    expected = {f"{prefix}/{name}": mean for name, mean in rewards_by_source(*samples).items()}
    assert {k: v for k, v in logged.items() if k.startswith(f"{prefix}/")} == pytest.approx(expected, rel=1e-6)


def check_rewards_of_sources(path, micro_batches, **sizes):
    """Those of each update, over micro-batches, and of validation, against a count by hand."""
    logged = Logged()
    samples = run(path, grpo(), micro_batches, of_two_sources(path) | sizes, callbacks=[logged])
    assert len(logged.updates) == 4
    for update, groups in zip(logged.updates, samples.sampled[:4], strict=True):
        assert_rewards_are_those_of_sources(update, (samples, [("train", group) for group in groups]), "train/reward")
    (validation,) = logged.validations
    of_validation = [("validation", group) for groups in samples.sampled[4:] for group in groups]
    assert_rewards_are_those_of_sources(validation, (samples, of_validation), "val/reward")
    return samples, logged


def test_sums_of_rewards_wait_for_no_device():
    """Tensors without values, which can't be waited for: an index by a mask is refused."""
    rollouts = {name: torch.empty(6, device="meta") for name in ("rewards", "lengths", "finished")}
    rollouts |= {"completions": 2, "sources": torch.empty(6, dtype=torch.int64, device="meta")}
    data = SimpleNamespace(rewards=SimpleNamespace(names=["vowels"]), source_names=lambda split: ["a", "b"])
    sums = GRPO._GRPO__reward_sums(SimpleNamespace(data=data), rollouts, "train")
    assert all(value.is_meta and value.shape == () for value in sums.values())
    assert len([name for name in sums if name.startswith("sources/")]) == 4


@pytest.mark.parametrize(("micro_batches", "sizes"), [(1, (2, 5)), (2, (1, 2))])
def test_each_source_has_its_reward(tmp_path, micro_batches, sizes):
    batch_size, eval_batch_size = sizes
    sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
    samples, logged = check_rewards_of_sources(tmp_path, micro_batches, **sizes)
    counts = [len([name for name in update if name.startswith("train/reward/")]) for update in logged.updates]
    assert {*counts} == {1, 2}, "an update without prompts of a source has none of it"
    assert samples.validation_metrics == ["val/pass@1", "val/reward/easy", "val/reward/hard"]


def test_a_single_source_has_no_reward_of_its_own(tmp_path):
    logged = Logged()
    samples = run(tmp_path, grpo(), data={"validation": str(tmp_path / "prompts.jsonl")}, callbacks=[logged])
    assert not [name for name in logged.validations[0] | logged.updates[0] if "/reward/" in name]
    assert samples.validation_metrics == ["val/pass@1"]


def test_rewards_of_another_source_would_be_caught(tmp_path, monkeypatch):
    original = RolloutData.batch_of

    def batch_of(*args):
        batch = original(*args)
        return batch | {"sources": 1 - batch["sources"]}

    monkeypatch.setattr(RolloutData, "batch_of", batch_of)
    with pytest.raises(AssertionError):
        check_rewards_of_sources(tmp_path, 1, batch_size=2)


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, data in (("weights", of_two_sources(tmp_path)), ("dynamic", DYNAMIC)):
        module, logged = grpo(), Logged()
        run(tmp_path, module, data=data, callbacks=[logged])
        trained, updates, validations = torch.load(tmp_path / f"{name}.pt")
        assert distance(trained, weights(module)) < 5e-6
        for ours, theirs in zip([*updates, *validations], [*logged.updates, *logged.validations], strict=True):
            of_sources = {key: value for key, value in theirs.items() if "/reward/" in key}
            assert {key: value for key, value in ours.items() if "/reward/" in key} == pytest.approx(
                of_sources, rel=1e-5
            )
            assert of_sources or name == "dynamic"


# ---- several updates per rollout


def test_rollouts_are_used_for_several_updates(tmp_path):
    logged = Logged()
    data = {"batch_size": 2, "steps_per_rollout": 2, "iterations": 2}
    samples = run(tmp_path, grpo(), data=data, callbacks=[logged])
    # 4 updates of prompts: two blocks of two, each trained on twice
    assert [len(groups) for groups in samples.sampled] == [4, 3]
    assert len(logged.updates) == 8
    moved = [update["train/sampling_difference"] for update in logged.updates]
    assert max(moved[0], moved[4]) < 1e-5 < min(moved[1:4] + moved[5:])


@pytest.mark.parametrize(
    ("step", "engine"), [*((step, Generate) for step in range(1, 8)), (1, "Warmer"), (6, "Warmer")]
)
def test_a_resumed_run_is_bit_identical(tmp_path, step, engine):
    engine = Warmer() if engine == "Warmer" else engine()
    data = {"batch_size": 2, "steps_per_rollout": 2, "iterations": 2, "engine": engine}
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2), "kl": 0.1}
    callbacks = [Checkpoints(every=1, keep=20)]
    callbacks[0].directory = tmp_path / "checkpoints"
    whole = grpo(**adam)
    options = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_epochs": 1}
    run(tmp_path, whole, data=data, callbacks=callbacks, **options)
    resumed = grpo(**adam)
    samples = rollouts(tmp_path, **data)
    L.seed_everything(1)
    trainer(max_epochs=1, plugins=[AtomicCheckpointIO()]).fit(
        resumed, samples, ckpt_path=str(saved_steps(tmp_path / "checkpoints")[step - 1])
    )
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- an engine that samples from another distribution than the policy


class Warmer(Generate):
    """Samples at another temperature, as an engine whose log-probabilities are not the policy's."""

    is_exact = False

    def sample(self, policy, tokenizer, prompts, *, sampling, **kwargs):
        warmer = replace(sampling, temperature=1.4 * sampling.temperature)
        return super().sample(policy, tokenizer, prompts, sampling=warmer, **kwargs)


def weighted_loop(path, blocks, prompts, most, iterations=1):
    """`plain_loop` for GRPO with clipped ratios, and tokens weighted by `min(policy / engine, most)`."""
    L.seed_everything(1)
    module = grpo()
    trainer(max_epochs=1).strategy.connect(module)
    hf = module.build(ByteTokenizer().build()).hf.eval()
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)

    def logps_of(prompt, completion):
        ids = torch.tensor([*prompt.ids, *completion.ids], dtype=torch.long)
        n = len(completion.ids)
        logits = hf(input_ids=ids[None]).logits[0, -n - 1 : -1] / SAMPLING.temperature
        return logits.log_softmax(-1).gather(-1, ids[-n:, None]).squeeze(-1)

    bounded = 0
    for groups in blocks:
        old = [[logps_of(prompts[g.prompt], c).detach() for c in g.completions] for g in groups]
        for _ in range(iterations):
            total, completions = 0.0, 0
            for group, before in zip(groups, old, strict=True):
                rewards = torch.tensor(group.components[:, 0], dtype=torch.float32)
                advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
                for completion, then, advantage in zip(group.completions, before, advantages, strict=True):
                    now = logps_of(prompts[group.prompt], completion)
                    for i in range(len(now)):
                        weight = min(float((then[i] - completion.logps[i]).exp()), most)
                        bounded += weight == most
                        ratio = (now[i] - then[i]).exp()
                        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                        total = total - weight * surrogate / len(now)
                    completions += 1
            optimizer.zero_grad()
            (total / completions).backward()
            optimizer.step()
    return {name: p.detach() for name, p in hf.named_parameters()}, bounded


@pytest.mark.parametrize("iterations", [1, 2])
def test_completions_of_another_distribution_are_weighted_as_in_a_plain_loop(tmp_path, iterations):
    logged, module = Logged(), grpo(max_importance_ratio=1.3)
    data = {"engine": Warmer(), "iterations": iterations}
    samples = run(tmp_path, module, data=data, callbacks=[logged])
    prompts = samples.all_prompts("train")
    expected, bounded = weighted_loop(tmp_path, samples.sampled, prompts, 1.3, iterations)
    assert bounded
    assert distance(weights(module), expected) < 1e-6
    for update in logged.updates:
        assert 0 < update["train/importance/truncated"] < 1
        assert update["train/importance/mean"] < 1.3
        assert update["train/sampling_difference"] > 0.05
    cut = grpo(max_importance_ratio=1.3)
    run(tmp_path, cut, 4, data | {"batch_size": 1})
    assert distance(weights(cut), expected) < 1e-6
    # without weights, and without their bound, the update is another one
    for fault in ({"max_importance_ratio": None}, {"max_importance_ratio": 100.0}):
        run(tmp_path, other := grpo(**fault), data=data)
        assert distance(weights(other), expected) > 1e-4


def test_importance_weights_do_nothing_if_the_policy_itself_samples(tmp_path):
    trained = []
    for most in (None, 0.5):
        logged, module = Logged(), grpo(max_importance_ratio=most)
        run(tmp_path, module, data={"iterations": 2}, callbacks=[logged])
        assert not any("importance" in name for name in logged.updates[0])
        trained.append(weights(module))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    with pytest.raises(UserError, match="max_importance_ratio is 0, but has to be above 0, or null"):
        grpo(max_importance_ratio=0)


def test_log_probabilities_of_the_policy_are_those_of_the_tokens_that_carry_loss(tmp_path):
    sampling = replace(SAMPLING, stop=tuple("abcdefghijklmnopqrstuvwxyz"))
    data = {"engine": Warmer(), "iterations": 2, "mask_truncated": True, "sampling": sampling}
    samples = run(tmp_path, grpo(), data=data, max_steps=1)
    groups = samples.sampled[0]
    finished = [c for group in groups for c in group.completions if c.is_finished]
    truncated = [c for group in groups for c in group.completions if not c.is_finished]
    assert finished
    assert truncated
    assert all(len(c.policy_logps) == len(c.ids) and np.abs(c.policy_logps - c.logps).max() > 0 for c in finished)
    batch = samples.batch_of("train", groups)
    assert len(batch["policy_logps"]) == len(batch["targets"]) == sum(len(c.ids) for c in finished)


# ---- other prompts in place of groups without variance


def sometimes(completion, row):
    """Varies among the completions of two prompts in three; the others are hopeless."""
    return 0.0 if len(row["prompt"]) % 3 == 0 else float(ord((completion or "a")[0]) % 2)


DYNAMIC = {"reward": sometimes, "extra_rounds": 2, "completions": 2}


class Trained(L.Callback):
    """The groups of each update."""

    def __init__(self):
        self.updates = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.updates.append(trainer.datamodule.train_loader.trained.groups)


def test_groups_without_variance_are_replaced_in_a_bounded_number_of_rounds(tmp_path):
    logged, trained = Logged(), Trained()
    samples = run(tmp_path, grpo(), data=DYNAMIC, callbacks=[logged, trained])
    rounds = iter(samples.sampled)
    assert len(samples.sampled) > 2
    for kept, update in zip(trained.updates, logged.updates, strict=True):
        groups, extra = next(rounds), [0] * len(kept)
        for number in (1, 2):
            if same_rewards := [i for i, group in enumerate(groups) if np.ptp(group.components) == 0]:
                others = next(rounds)
                assert len(others) == len(same_rewards)
                for i, other in zip(same_rewards, others, strict=True):
                    extra[i], groups[i] = number, other if np.ptp(other.components) else groups[i]
        assert [group.prompt for group in kept] == [group.prompt for group in groups]
        assert same([kept], [groups])
        left = [np.ptp(group.components) == 0 for group in kept]
        assert update["train/groups_without_variance"] == pytest.approx(np.mean(left), abs=1e-6)
        assert update["train/extra_groups"] == pytest.approx(np.mean(extra), abs=1e-6)
    assert next(rounds, None) is None
    before = run(tmp_path, grpo(), data=DYNAMIC | {"extra_rounds": 0}).sampled
    assert np.mean([samples.has_variance(group) for group in before[0]]) < np.mean(
        [samples.has_variance(group) for group in trained.updates[0]]
    )


def test_updates_of_replaced_groups_equal_a_plain_loop_with_any_micro_batches(tmp_path):
    expected = None
    for batch_size, micro_batches, per_call in ((4, 1, 8), (1, 4, 1)):
        trained, module = Trained(), grpo()
        data = DYNAMIC | {"batch_size": batch_size, "prompts_per_call": per_call}
        samples = run(tmp_path, module, micro_batches, data, [trained])
        if expected is None:
            prompts = samples.all_prompts("train")
            expected, _ = plain_loop(tmp_path, grpo(), trained.updates, prompts, sometimes)
        assert distance(weights(module), expected) < 5e-6


class Dies(Generate):
    """Dies at a call."""

    def __init__(self, call):
        self.left = call

    def sample(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            raise ConnectionAbortedError
        return super().sample(*args, **kwargs)


def test_a_run_with_extra_rounds_resumes_bit_identically(tmp_path):
    data = DYNAMIC | {"batch_size": 2, "steps_per_rollout": 2, "iterations": 2}
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2)}
    options = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_epochs": 1}

    def saving(folder):
        callback = Checkpoints(every=1, keep=20)
        callback.directory = tmp_path / folder
        return [callback]

    whole = grpo(**adam)
    samples = run(tmp_path, whole, data=data, callbacks=saving("whole"), **options)
    assert samples.rounds == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ConnectionAbortedError):  # in the last extra round, after rounds that no checkpoint holds
        dying = data | {"engine": Dies(len(samples.rounds))}
        run(tmp_path, grpo(**adam), data=dying, callbacks=saving("killed"), **options)
    of_whole = saved_steps(tmp_path / "whole")
    for checkpoint in (saved_steps(tmp_path / "killed")[-1], of_whole[1], of_whole[5]):
        resumed = grpo(**adam)
        L.seed_everything(1)
        trainer(max_epochs=1, plugins=[AtomicCheckpointIO()]).fit(
            resumed, rollouts(tmp_path, **data), ckpt_path=str(checkpoint)
        )
        assert all(torch.equal(weights(resumed)[name], theirs) for name, theirs in weights(whole).items())


def test_extra_rounds_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"data\.extra_rounds is -1, but has to be at least 0"):
        rollouts(tmp_path, extra_rounds=-1)
    with pytest.raises(UserError, match=r"data\.extra_rounds: without a reward, no group"):
        rollouts(tmp_path, reward=None, extra_rounds=1)


# ---- the penalty


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_the_penalty_is_0_at_the_start_and_keeps_the_policy_near_the_reference(tmp_path, kl_in, lora):
    moved = []
    for kl in (0.0, 1.0):
        logged = Logged()
        options = {"kl": kl, "kl_in": kl_in, "kl_estimator": "k2" if kl_in == "loss" else "k1", "lora": lora}
        module = grpo(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), **options)
        run(tmp_path, module, callbacks=[logged], max_steps=6, max_epochs=None)
        moved.append(logged.updates)
        if kl and kl_in == "loss":
            assert logged.updates[0]["train/kl"] < 1e-9
            assert logged.updates[-1]["train/kl"] > 1e-5
    assert moved[0][0]["train/reward"] == pytest.approx(moved[1][0]["train/reward"], abs=1e-4)


MISTAKES = {
    "greedy completions of a prompt are all the same": ({"sampling": Sampling(6, temperature=0.0)}, {}),
    "with top_p, top_k or min_p": ({"sampling": Sampling(6, top_p=0.9)}, {}),
    "does not correct for a policy that has moved": ({"iterations": 2}, {"loss": ReinforceLoss()}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_settings_that_would_give_wrong_gradients_are_refused(tmp_path, message):
    data, module = MISTAKES[message]
    with pytest.raises(UserError, match=message):
        run(tmp_path, grpo(**module), data=data)


def test_data_with_answers_are_refused(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"prompt": "2 + 3", "chosen": "5", "rejected": "6"}) + "\n")
    with pytest.raises(UserError, match="RolloutData does so, DPOData reads answers"):
        trainer(max_steps=1).fit(grpo(), DPOData(str(rows), tokenizer=ByteTokenizer(), max_length=64))


def test_a_penalty_without_a_gradient_is_refused():
    with pytest.raises(UserError, match="the gradient of k1 in the loss is 0 on average"):
        grpo(kl=0.1, kl_estimator="k1")


# ---- what is logged


def short(completion, row):
    return float(len(completion) < 4)


def words(completion, row):
    return float(len(completion.split()))


def test_rewards_are_logged_by_component_with_their_spread(tmp_path):
    logged = Logged()
    samples = run(tmp_path, grpo(), data={"reward": [vowels, short]}, callbacks=[logged])
    for update, groups in zip(logged.updates, samples.sampled, strict=True):
        values = np.concatenate([group.components for group in groups])
        for i, name in enumerate(("vowels", "short")):
            assert update[f"train/rewards/{name}"] == pytest.approx(values[:, i].mean(), rel=1e-5)
            assert update[f"train/rewards/{name}_std"] == pytest.approx(values[:, i].std(), rel=1e-4)
        totals = values.sum(1)
        assert update["train/reward"] == pytest.approx(totals.mean(), rel=1e-5)
        assert update["train/reward_std"] == pytest.approx(totals.std(), rel=1e-4)
        assert not {"train/weight", "train/rows"} & update.keys()


def test_the_kl_is_logged_wherever_the_penalty_goes(tmp_path):
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2), "kl": 0.1}
    by_place = {}
    for kl_in, estimator in (("loss", "k3"), ("reward", "k3")):
        logged = Logged()
        run(tmp_path, grpo(kl_in=kl_in, kl_estimator=estimator, **adam), callbacks=[logged], max_steps=2)
        by_place[kl_in] = [update["train/kl"] for update in logged.updates]
    assert max(by_place["loss"][0], by_place["reward"][0]) < 1e-6
    assert min(by_place["loss"][1], by_place["reward"][1]) > 1e-4


def validated(path, loss=None, **data):
    """Metrics of a validation of untrained weights, and the groups that were sampled for it."""
    file = path / "prompts.jsonl"
    data = {"validation": str(file), "success": 2.0} | data
    samples = rollouts(path, **data)
    samples.sampled, original = [], samples.groups
    samples.groups = lambda *args: samples.sampled.append(original(*args)) or samples.sampled[-1]
    L.seed_everything(1)
    runner = trainer()
    runner.validate(grpo(loss=loss), samples, verbose=False)
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    return metrics, [group for groups in samples.sampled for group in groups]


def test_validation_estimates_pass_at_k_and_logs_any_function(tmp_path):
    settings = {"eval_completions": 4, "pass_at": [1, 2, 4], "metrics": [words, short]}
    metrics, groups = validated(tmp_path, **settings)
    solved = np.stack([group.components[:, 0] >= 2 for group in groups])
    assert 0 < solved.mean() < 1
    for k in (1, 2, 4):
        subsets = [[any(chosen) for chosen in itertools.combinations(row, k)] for row in solved.tolist()]
        assert metrics[f"val/pass@{k}"] == pytest.approx(np.mean(subsets), rel=1e-6)
    decode = ByteTokenizer().build().decode
    texts = [decode(c.ids, skip_special_tokens=True) for group in groups for c in group.completions]
    assert metrics["val/words"] == pytest.approx(np.mean([words(text, {}) for text in texts]), rel=1e-6)
    assert metrics["val/short"] == pytest.approx(np.mean([short(text, {}) for text in texts]), rel=1e-6)
    assert "val/groups_without_variance" in metrics
    in_parts, _ = validated(tmp_path, **settings, eval_batch_size=2, prompts_per_call=1)
    assert in_parts == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("loss", [GRPOLoss(), BNPOLoss()])
def test_a_greedy_validation_logs_minus_the_reward_and_nothing_that_needs_several(tmp_path, loss):
    metrics, _ = validated(tmp_path, loss)
    assert metrics["val/loss"] == pytest.approx(-metrics["val/reward"])
    assert set(metrics) == {f"val/{name}" for name in ("loss", "reward", "reward_std", "length", "truncated", "pass@1")}


def test_a_metric_with_the_name_of_another_is_refused(tmp_path):
    def length(completion, row):
        return 0.0

    with pytest.raises(UserError, match="val/length is logged already"):
        validated(tmp_path, metrics=[length])


def test_a_metric_that_fails_names_the_row_and_its_key(tmp_path):
    def wrong(completion, row):
        return row["no_such_column"]

    with pytest.raises(UserError, match=r"data\.metrics: wrong failed for the row \{'prompt': 'say '\}"):
        validated(tmp_path, metrics=[wrong])


def test_long_completions_lose_reward_in_training_alone(tmp_path):
    overlong = {"overlong_tokens": 4, "overlong_penalty": 0.5, "validation": str(tmp_path / "prompts.jsonl")}
    samples = run(tmp_path, grpo(), data=overlong, max_steps=1)
    group = samples.sampled[0][0]
    lengths = np.array([len(completion.ids) for completion in group.completions])
    expected = 0.5 * np.maximum(0, lengths - 2) / 4
    assert lengths.max() == SAMPLING.max_new_tokens
    assert samples.overlong(group) == pytest.approx(expected)
    totals = samples.totals([group])[0]
    assert totals == pytest.approx(group.components[:, 0] - expected)
    trained = samples.batch_of("train", [group])["rewards"].numpy()
    assert trained == pytest.approx(totals, abs=1e-6)
    samples.eval_completions = 3
    assert samples.batch_of("validation", [group])["rewards"].numpy() == pytest.approx(group.components[:, 0])


@pytest.mark.parametrize("wrong", [{"overlong_tokens": 7}, {"overlong_tokens": -1}, {"overlong_penalty": -1.0}])
def test_penalties_of_long_completions_are_checked(tmp_path, wrong):
    with pytest.raises(UserError, match=f"data.{min(wrong)} is"):
        rollouts(tmp_path, **wrong)
