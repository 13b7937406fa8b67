"""GRPO against TRL's GRPOTrainer on the same completions: losses, gradient norms, metrics and weights.

TRL's `rollout_func` returns the completions that our run sampled, and its own code does the rest: rewards, advantages,
log-probabilities before the update and under the reference, loss, and the division over micro-batches.
"""

import json

import lightning as L
import numpy as np
import pytest
import torch

from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.losses.policy import BNPOLoss, CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts.advantages import GroupMean
from oumi_pl.rollouts.sampling import Sampling
from tests.tiny import LLAMA, distance, trainer, weights

PROMPTS, BATCH, GROUP, EPOCHS, LR, CLIP = 8, 4, 3, 1, 0.05, 0.5
SAMPLING = Sampling(max_new_tokens=6, temperature=1.5)
CASES = {
    "grpo": ({"loss": GRPOLoss(0.05)}, {"loss_type": "grpo", "epsilon": 0.05}),
    "bnpo": ({"loss": BNPOLoss(0.05)}, {"loss_type": "bnpo", "epsilon": 0.05}),
    "dapo": ({"loss": DAPOLoss(0.03, 0.05)}, {"loss_type": "dapo", "epsilon": 0.03, "epsilon_high": 0.05}),
    "dr_grpo": (
        {"loss": DrGRPOLoss(0.05), "advantage": GroupMean("none")},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.05},
    ),
    "gspo": (
        {"loss": GSPOLoss(0.02, 0.03)},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    # TRL's bound is that of the ratio itself
    "cispo": ({"loss": CISPOLoss(0.05)}, {"loss_type": "cispo", "epsilon_high": 1.05}),
    "scaled by batch": (
        {"loss": GRPOLoss(0.05), "advantage": GroupMean("batch")},
        {"loss_type": "grpo", "scale_rewards": "batch", "epsilon": 0.05},
    ),
    "k3": (
        {"loss": GRPOLoss(0.05), "kl": 0.2},
        {"loss_type": "grpo", "beta": 0.2, "use_bias_correction_kl": False, "epsilon": 0.05},
    ),
    "corrected k3": (
        {"loss": DAPOLoss(0.05, 0.05), "kl": 0.2, "kl_corrected": True},
        {"loss_type": "dapo", "beta": 0.2, "epsilon": 0.05},
    ),
}
"""Name -> arguments of our module, and of TRL's config."""


class Updates(L.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.rows.append({k.removeprefix("train/"): float(v) for k, v in trainer.logged_metrics.items()})


def sgd(params):
    return torch.optim.SGD(params, lr=LR, momentum=0.5)


def module(**kwargs):
    return GRPO(config=LLAMA | {"initializer_range": 0.2}, optimizer=sgd, **kwargs)


def reward(completion, row):
    """Varies between completions, so that none has exactly the mean of its group."""
    return float(np.sin(sum(map(ord, completion)))) + len(row["prompt"]) % 3


def samples(tmp_path, **kwargs):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "say " + "ab" * i}) + "\n" for i in range(PROMPTS)))
    settings = {"max_length": 128, "sampling": SAMPLING, "completions": GROUP, "seed": 0} | kwargs
    return RolloutData(str(file), tokenizer=ByteTokenizer(), reward=reward, **settings)


def ours(tmp_path, micro_batches, data=None, **kwargs):
    """Trains; returns the module, the data with all groups as `sampled`, and the metrics of the updates."""
    record, policy = Updates(), module(**kwargs)
    built = samples(tmp_path, batch_size=BATCH // micro_batches, **data or {})
    built.sampled, original = [], built.groups

    def groups(*args):
        built.sampled.append(original(*args))
        return built.sampled[-1]

    built.groups = groups
    L.seed_everything(3)
    loop = trainer(max_epochs=EPOCHS, accumulate_grad_batches=micro_batches, gradient_clip_val=CLIP, callbacks=[record])
    loop.fit(policy, built)
    return policy, built, record.rows


def theirs(tmp_path, made, micro_batches, sign=1.0, **settings):
    """TRL's run on the completions of ours; returns its model and the metrics of the updates."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    logged, prompts = [], made.all_prompts("train")
    rollout = iter([[group for group in groups for _ in group.completions] for groups in made.sampled])
    members = iter([[c for group in groups for c in group.completions] for groups in made.sampled])

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged.append(dict(logs))

    def completions(texts, trainer):
        groups, completions = next(rollout), next(members)
        assert texts == [prompts[group.prompt].row["prompt"] for group in groups]
        return {
            "prompt_ids": [prompts[group.prompt].ids for group in groups],
            "completion_ids": [c.ids.tolist() for c in completions],
            "logprobs": [c.logps.tolist() for c in completions],
        }

    def rewards(prompts, completions, **kwargs):
        return [sign * reward(c, {"prompt": prompt}) for prompt, c in zip(prompts, completions, strict=True)]

    L.seed_everything(3)
    # TRL reads the reference from the folder that the model came from
    module().build(made.tokenizer).hf.save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    optimizer = sgd(model.parameters())
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH * GROUP // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=GROUP,
        max_completion_length=SAMPLING.max_new_tokens,
        temperature=SAMPLING.temperature,
        num_iterations=made.iterations,
        shuffle_dataset=False,
        num_train_epochs=1,
        disable_dropout=True,
        mask_truncated_completions=made.mask_truncated,
        max_grad_norm=CLIP,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    order = [int(i) for epoch in range(EPOCHS) for row in range(PROMPTS) for i in made.plan(epoch).row(row)]
    run = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [prompts[i].row["prompt"] for i in order]}),
        processing_class=made.tokenizer,
        callbacks=[Log()],
        rollout_func=completions,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    run.train()
    return run.model, logged


def assert_equal(updates, logged, iterations=1, micro_batches=1, ratio="token", masked=False):
    assert len(updates) == len(logged) == EPOCHS * PROMPTS // BATCH * iterations
    for number, (ours, theirs) in enumerate(zip(updates, logged, strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=5e-6)  # terms of 5 nats cancel
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        if number % iterations == 0:
            assert ours["reward"] == pytest.approx(theirs["reward"], rel=1e-5)
            assert ours["length"] == pytest.approx(theirs["completions/mean_length"], rel=1e-5)
        if micro_batches == 1:  # TRL averages the means of the micro-batches
            if number % iterations == 0 and not masked:  # later, ours is the entropy of the sampled distribution
                assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
            if "kl" in theirs:
                assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-4, abs=1e-7)
            if "clip_ratio/low_mean" in theirs and ratio == "token":  # sequences weigh by their tokens here
                assert ours["clipped/low"] == pytest.approx(theirs["clip_ratio/low_mean"], abs=1e-6)
                assert ours["clipped/high"] == pytest.approx(theirs["clip_ratio/high_mean"], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_equals_trl(tmp_path, name):
    """Two updates per rollout, so that ratios matter."""
    kwargs, settings = CASES[name]
    policy, built, updates = ours(tmp_path, 1, {"iterations": 2}, **kwargs)
    model, logged = theirs(tmp_path, built, 1, **settings)
    assert_equal(updates, logged, 2, ratio=settings.get("importance_sampling_level", "token"))
    if "clip_ratio/low_mean" in logged[1]:
        assert 0.05 < logged[1]["clip_ratio/region_mean"] < 0.95
    assert distance(weights(policy), {name: p.detach() for name, p in model.named_parameters()}) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_two_micro_batches_of_an_update_equal_trl(tmp_path, name):
    kwargs, settings = CASES[name]
    policy, built, updates = ours(tmp_path, 2, **kwargs)
    model, logged = theirs(tmp_path, built, 2, **settings)
    assert_equal(updates, logged, micro_batches=2)
    assert distance(weights(policy), {name: p.detach() for name, p in model.named_parameters()}) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_bnpo_of_trl_averages_over_each_micro_batch_and_ours_over_the_update(tmp_path):
    kwargs, settings = CASES["bnpo"]
    _, built, updates = ours(tmp_path, 2, **kwargs)
    _, logged = theirs(tmp_path, built, 2, **settings)
    with pytest.raises(AssertionError):
        assert_equal(updates, logged, micro_batches=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_truncated_completions_are_masked_as_in_trl(tmp_path, name):
    kwargs, settings = CASES[name]
    policy, built, updates = ours(tmp_path, 1, {"mask_truncated": True}, **kwargs)
    assert (
        0
        < sum(c.is_finished for groups in built.sampled for g in groups for c in g.completions)
        < EPOCHS * PROMPTS * GROUP
    )
    model, logged = theirs(tmp_path, built, 1, **settings)
    assert_equal(updates, logged, masked=True)  # TRL's metrics of tokens leave these out as well
    assert distance(weights(policy), {name: p.detach() for name, p in model.named_parameters()}) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_other_rewards_would_be_caught(tmp_path):
    kwargs, settings = CASES["grpo"]
    _, built, updates = ours(tmp_path, 1, **kwargs)
    _, logged = theirs(tmp_path, built, 1, sign=-1.0, **settings)
    with pytest.raises(AssertionError):
        assert_equal(updates, logged)
