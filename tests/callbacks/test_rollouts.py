"""`rollouts.jsonl` has every completion once, even if the run is killed; each warning appears once, when it should."""

import json
import time
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.rollouts import WINDOW, Rollouts, RolloutWarnings, cut_after
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.errors import UserError
from oumi_pl.rollouts.advantages import BatchMean, GroupMean
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.folders import saved_steps
from tests.modules.test_grpo import PROMPTS, SAMPLING, Logged, grpo, rollouts, run
from tests.tiny import data as sft_data
from tests.tiny import module as sft
from tests.tiny import trainer

TWICE = {"batch_size": 2, "steps_per_rollout": 2, "iterations": 2}


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text("utf-8").split("\n") if line]


def test_each_completion_is_written_once_with_its_rewards_and_advantage(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    samples = run(tmp_path, grpo(), data=TWICE, callbacks=[folder, Rollouts()])
    written = lines(folder.directory)
    # 4 updates of at most 2 prompts, in two blocks, each trained on twice: updates 1, 2, 1, 2, 3, 4, 3, 4
    assert [line["update"] for line in written] == [1] * 6 + [2] * 6 + [5] * 6 + [6] * 3
    sampled = [(group, i) for groups in samples.sampled for group in groups for i in range(3)]
    assert len(sampled) == len(written) == PROMPTS * 3
    for line, (group, i) in zip(written, sampled, strict=True):
        prompt = samples.all_prompts("train")[group.prompt]
        assert line["origin"] == prompt.origin
        assert samples.tokenizer.encode(line["prompt"], add_special_tokens=False) == prompt.ids
        assert line["completion"] == samples.text_of(group.completions[i])
        assert line["rewards"] == {"vowels": group.components[i, 0]}
        assert line["total"] == group.components[i, 0]
        assert line["advantage"] == pytest.approx(GroupMean()(group.components.T)[0, i])
        assert (line["length"], line["finished"]) == (len(group.completions[i].ids), group.completions[i].is_finished)


def test_several_micro_batches_write_one_update(tmp_path):
    folders = [RunFolder(tmp_path, f"run-{i}", "run", "{}") for i in range(2)]
    run(tmp_path, grpo(), callbacks=[folders[0], Rollouts()], max_steps=1)
    run(tmp_path, grpo(), 4, {"batch_size": 1}, [folders[1], Rollouts()], max_steps=1)
    whole, parts = (lines(folder.directory) for folder in folders)
    assert len(whole) == 12
    assert whole == parts


def saved_run(path, name, limit=50.0):
    """A run with a checkpoint after each of its 8 updates."""
    checkpoints = Checkpoints(every=1, keep=20)
    folder = RunFolder(path, name, "run", "{}")
    options = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    run(path, grpo(), data=TWICE, callbacks=[folder, Rollouts(limit), checkpoints], **options)
    return folder.directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("whole"), "run")


@pytest.mark.parametrize(("step", "limit"), [(3, 50.0), (5, 50.0), (1, 0.003), (7, 0.003)])
def test_a_killed_and_resumed_run_writes_the_same_file_as_an_uninterrupted_one(tmp_path, whole, step, limit):
    """Also if the file reached its largest size before or after the checkpoint."""
    directory = whole if limit == 50.0 else saved_run(tmp_path, "small", limit)
    file = directory / "rollouts.jsonl"
    expected = file.read_bytes()
    assert (b"stopped" in expected) == (limit < 1)
    file.write_bytes(expected + b'{"update": 9, "comple')  # the line that the kill cut short
    L.seed_everything(1)
    folder = RunFolder(directory.parent, "run", "run", "{}", resume=directory)
    resuming = trainer(max_epochs=1, plugins=[AtomicCheckpointIO()], callbacks=[folder, Rollouts(limit)])
    checkpoint = saved_steps(directory / "checkpoints")[step - 1]
    resuming.fit(grpo(), rollouts(directory.parent, **TWICE), ckpt_path=str(checkpoint))
    assert folder.directory == directory
    assert file.read_bytes() == expected


def test_the_file_ends_at_its_largest_size_with_a_last_line_that_says_so(tmp_path, capsys):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    run(tmp_path, grpo(), data={"batch_size": 1}, callbacks=[folder, Rollouts(0.0025)])
    *written, last = lines(folder.directory)
    assert (folder.directory / "rollouts.jsonl").stat().st_size < 2500 + 150  # with the last line
    assert 0 < len(written) < PROMPTS * 3
    end = written[-1]["update"] + 1
    assert last == {"update": end, "stopped": "rollouts.max_megabytes, which is 0.0025, was reached"}
    assert capsys.readouterr().err.count(f"rollouts.jsonl ends before update {end}: rollouts.max_megabytes") == 1


def test_0_writes_no_file_and_less_is_refused(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    run(tmp_path, grpo(), callbacks=[folder, Rollouts(0)], max_steps=1)
    assert not (folder.directory / "rollouts.jsonl").exists()
    with pytest.raises(UserError, match=r"rollouts\.max_megabytes is -1"):
        Rollouts(-1)


def test_lines_of_later_updates_and_incomplete_lines_are_removed(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    text = ['{"update": 1, "completion": "\u2028"}\n', '{"update": 2}\n', '{"update": 3}\n', '{"upd']
    file.write_text("".join(text), encoding="utf-8")
    assert cut_after(file, 2) == (len("".join(text[:2]).encode()), False)
    assert file.read_text("utf-8") == "".join(text[:2])
    assert cut_after(tmp_path / "none.jsonl", 2) == (0, False)


def test_data_that_sample_nothing_write_no_file(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    callbacks = [folder, Rollouts(), RolloutWarnings()]
    trainer(max_steps=1, callbacks=callbacks).fit(sft(), sft_data(tmp_path))
    assert not (folder.directory / "rollouts.jsonl").exists()


# ---- seconds


def test_seconds_of_generating_rewarding_and_training_are_logged(tmp_path):
    samples = rollouts(tmp_path, **TWICE)

    def slow(completion, row):
        time.sleep(0.01)
        return float(len(completion))

    samples.rewards.functions = {"slow": slow}
    logged = Logged()
    started = time.perf_counter()
    trainer(max_epochs=1, callbacks=[Rollouts(), logged]).fit(grpo(), samples)
    took = time.perf_counter() - started
    names = ("generating", "rewarding", "training")
    generating, rewarding, training = ([update[f"train/seconds/{name}"] for update in logged.updates] for name in names)
    # 12 completions of 10 ms in the first update, 9 in the fifth; the others train on the same ones
    assert [seconds > 0 for seconds in rewarding] == [True, False, False, False] * 2
    assert [seconds > 0 for seconds in generating] == [True, False, False, False] * 2
    assert 0.12 < rewarding[0] < 0.12 + 0.2
    assert min(training) > 0
    assert sum(generating) + sum(rewarding) + sum(training) < took


# ---- warnings


def warned(updates, *, validations=(), completions=12, rewards=("right", "short"), advantage=None, callback=None):
    """Feeds updates of means by name, and validations as `(after update, reward)`, to the callback."""
    callback = callback or RolloutWarnings()
    names = SimpleNamespace(names=list(rewards))
    prompts = {"validation": range(100)}
    data = SimpleNamespace(
        samples=True, sampling=SAMPLING, completions=4, mask_truncated=False, success=1.0, rewards=names,
        all_prompts=prompts.__getitem__,
    )  # fmt: skip
    usual = {"reward": 0.5, "entropy": 1.0, "groups_without_variance": 0.2, "truncated": 0.1}
    usual |= {f"rewards/{name}": 0.5 for name in rewards} | {f"squares/rewards/{name}": 0.5 for name in rewards}
    module = SimpleNamespace(advantages=advantage or GroupMean())
    run_trainer = SimpleNamespace(
        datamodule=data, fit_loop=SimpleNamespace(_should_accumulate=lambda: False), callbacks=[],
        state=SimpleNamespace(fn="fit"), sanity_checking=False,
    )  # fmt: skip
    for number, means in enumerate(updates, 1):
        sums = {name: value * completions for name, value in (usual | means).items()}
        module.last_update = sums | {"rows": float(completions), "targets": float(completions)}
        callback.on_train_batch_end(run_trainer, module)
        for reward in (reward for after, reward in validations if after == number):
            run_trainer.callback_metrics = {"val/reward": reward, "val/reward_std": 0.5}
            callback.on_validation_end(run_trainer, module)
    return callback


FALLING = [{"entropy": 1.0}] * WINDOW + [{"entropy": 0.05}] * 2 * WINDOW
SEEN = {
    "all completions of a prompt got the same reward in 85% of the groups": [{"groups_without_variance": 0.85}],
    "35% of the completions were cut at 6 tokens": [{"truncated": 0.35}],
    "the entropy of the policy fell from 1 to 0.0": FALLING,
    "the reward short was 1 for all completions of 20 updates": [{"rewards/short": 1.0, "squares/rewards/short": 1.0}],
}


@pytest.mark.parametrize("message", SEEN)
def test_each_warning_comes_once(message, recwarn):
    updates = SEEN[message]
    callback = warned(updates if len(updates) > 1 else updates * 3 * WINDOW)
    assert [message in str(warning.message) for warning in recwarn] == [True]
    resumed = RolloutWarnings()
    resumed.load_state_dict(callback.state_dict())
    warned(updates[-1:] * WINDOW, callback=resumed)
    assert len(recwarn) == 1


UNSEEN = {
    "usual": [{}] * 60,
    "too few updates": [{"groups_without_variance": 1.0, "truncated": 1.0}] * (WINDOW - 1),
    "a bad stretch": [*[{}] * 15, *[{"groups_without_variance": 1.0, "truncated": 0.5}] * 8, *[{}] * 15],
    "solved": [*[{}] * WINDOW, *[{"entropy": 0.01, "reward": 0.97}] * WINDOW],
    "a reward that varied once": [
        *[{"rewards/short": 1.0, "squares/rewards/short": 1.0}] * (WINDOW - 1),
        {"rewards/short": 0.9, "squares/rewards/short": 0.9},
    ],
}


@pytest.mark.parametrize("name", UNSEEN)
def test_runs_that_learn_are_not_warned(name, recwarn):
    warned(UNSEEN[name], validations=[(10, 0.5), (20, 0.45), (30, 0.5)])
    assert not recwarn


def test_no_warning_about_groups_without_variance_with_a_batch_baseline(recwarn):
    warned([{"groups_without_variance": 1.0}] * 60, advantage=BatchMean())
    assert not recwarn


def test_a_single_reward_gets_no_warning_about_constant_rewards(recwarn):
    warned([{"rewards/right": 1.0, "squares/rewards/right": 1.0}] * 60, rewards=["right"])
    assert not recwarn


RISING = [{"reward": 0.3 + 0.01 * i} for i in range(60)]


def test_a_training_reward_that_rises_while_validation_falls_is_warned_about(recwarn):
    warned(RISING, validations=[(10, 0.5), (20, 0.6), (30, 0.5), (40, 0.4), (50, 0.3)])
    assert len(recwarn) == 1
    expected = "the training reward rises (0.445 to 0.645), while that of held-out prompts falls (0.6 to 0.4)"
    assert expected in str(recwarn[0].message)


@pytest.mark.parametrize(
    ("updates", "rewards"),
    [
        (RISING, (0.5, 0.6, 0.5, 0.55, 0.5)),  # within the noise of 100 prompts
        (RISING[::-1], (0.7, 0.6, 0.5, 0.4, 0.3)),  # both fall
        (RISING, (0.1, 0.2, 0.3, 0.4, 0.5)),  # both rise
    ],
)
def test_no_overfitting_warning_if_rewards_move_together_or_by_chance(updates, rewards, recwarn):
    warned(updates, validations=list(zip(range(10, 60, 10), rewards, strict=True)))
    assert not recwarn


def test_a_batch_baseline_is_recognised_by_its_advantages():
    constant = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert np.any(BatchMean()(constant))
    assert not np.any(GroupMean()(constant))
