"""Reward models against TRL's RewardTrainer on the same pairs in the same order: losses, gradient norms and weights."""

import lightning as L
import pytest
import torch

from oumi_pl.losses.reward import BradleyTerry
from oumi_pl.models.lm import documents, forest
from oumi_pl.optim.schedules import Linear
from tests.modules.test_dpo import Record
from tests.modules.test_reward import paths
from tests.parity.test_trl_dpo import BATCH, CLIP, DROPOUT, LORA, MICRO, ROWS, trainable
from tests.tiny import distance, pairs, reward, reward_data, trainer, weights, write_jsonl

CENTER, LR = 0.05, 1e-3


def ours(tmp_path, loss, **kwargs):
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(pairs(ROWS))]
    write_jsonl(tmp_path / f"pairs-{ROWS}-0.jsonl", rows)
    record, data = Record(), reward_data(tmp_path, ROWS, batch_size=BATCH)

    def adamw(params):
        return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)

    module = reward(None, adamw, DROPOUT, loss=loss, schedule=Linear(3), **kwargs)
    L.seed_everything(3)
    loop = trainer(max_epochs=2, accumulate_grad_batches=MICRO, gradient_clip_val=CLIP, callbacks=[record])
    loop.fit(module, data)
    return module, data, record.updates


def theirs(tmp_path, model, data, loss, adapters=None):
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    logged = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged.append(logs)

    rows = {"chosen_ids": [], "rejected_ids": []} | ({"margin": []} if loss.needs_margins else {})
    for i in (int(i) for epoch in range(2) for i in data.plan(epoch).example_ids):
        example = data.examples("train")[i]
        for name, path in zip(("chosen_ids", "rejected_ids"), paths(example), strict=True):
            rows[name].append(path.tolist())
        if loss.needs_margins:
            rows["margin"].append(example.fields["margin"])
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=MICRO,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=3,
        max_grad_norm=CLIP,
        center_rewards_coefficient=loss.center_rewards_coefficient or None,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    run = trl.RewardTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=data.tokenizer,
        callbacks=[Log()],
        peft_config=LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA) if adapters else None,
    )
    if adapters:  # theirs are drawn anew
        missing = run.model.load_state_dict(adapters, strict=False)
        assert not missing.unexpected_keys
    run.train()
    return run.model, logged


def start(data, **kwargs):
    """The model that our run started from."""
    L.seed_everything(3)
    return reward(config=DROPOUT, **kwargs).build(data.tokenizer).hf


def assert_equal(updates, logged):
    assert len(logged) == 10
    names = {"loss": "loss", "grad_norm": "grad_norm", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    for name, their_name in names.items():
        values = [row[their_name] for row in logged]
        assert [update[name] for update in updates] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    means = [(update["rewards/chosen"] + update["rewards/rejected"]) / 2 for update in updates]
    assert means == pytest.approx([row["mean_reward"] for row in logged], rel=1e-5, abs=1e-6)
    assert abs(means[-1] - means[0]) > 5e-3, "nothing moved"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [BradleyTerry(center_rewards_coefficient=CENTER), BradleyTerry(margin=True)])
def test_equals_trl(tmp_path, loss):
    module, data, updates = ours(tmp_path, loss)
    assert module.causal_lm.layout is forest
    model, logged = theirs(tmp_path, start(data), data, loss)
    assert_equal(updates, logged)
    # Adam divides by the gradient's own size, which makes rounding visible where gradients are tiny
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert distance(weights(module), expected) < 1e-4
    module, _, updates = ours(tmp_path, loss, share_prompt=False)
    assert module.causal_lm.layout is documents
    assert_equal(updates, logged)


@pytest.mark.filterwarnings("ignore")
def test_lora_equals_trl(tmp_path):
    loss = BradleyTerry()
    module, data, updates = ours(tmp_path, loss, lora=LORA)
    # the seed gives the head of our LoRA model; without LoRA the same seed gives the same head
    adapters = {name: p.detach().clone() for name, p in trainable(start(data, lora=LORA)).items()}
    assert "base_model.model.score.modules_to_save.default.weight" in adapters
    model, logged = theirs(tmp_path, start(data), data, loss, adapters)
    assert_equal(updates, logged)
    expected = {name: p.detach() for name, p in trainable(model).items()}
    assert distance({name: p.detach() for name, p in trainable(module.causal_lm.hf).items()}, expected) < 1e-4
