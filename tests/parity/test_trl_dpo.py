"""DPO against TRL's DPOTrainer on the same pairs in the same order: losses, gradient norms, rewards and weights."""

from copy import deepcopy

import lightning as L
import pytest
import torch

from oumi_pl.models.lm import documents, forest
from oumi_pl.optim.schedules import Linear
from tests.parity.test_trl import Record
from tests.tiny import distance, dpo, dpo_data, trainer, weights

ROWS, BATCH, MICRO, LR, CLIP, BETA = 20, 2, 2, 3e-3, 0.5, 0.1
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
DROPOUT = {"attention_dropout": 0.1}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Rewards(Record):
    def __init__(self):
        super().__init__()
        self.margins = []

    def on_train_batch_end(self, trainer, *_):
        super().on_train_batch_end(trainer)
        if len(self.margins) < len(self.losses):
            self.margins.append(float(trainer.callback_metrics["train/rewards/margins"]))


def ours(tmp_path, **kwargs):
    record, data = Rewards(), dpo_data(tmp_path, ROWS, batch_size=BATCH)

    def adamw(params):
        return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)

    module = dpo(None, adamw, DROPOUT, schedule=Linear(3), **kwargs)
    L.seed_everything(3)
    loop = trainer(max_epochs=2, accumulate_grad_batches=MICRO, gradient_clip_val=CLIP, callbacks=[record])
    loop.fit(module, data)
    return module, data, record


def rows(data):
    """Both epochs, in the order of our plan. Tokens after the last target, which nothing looks at, are left out."""
    examples = data.examples("train")
    built = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for i in (int(i) for epoch in range(2) for i in data.plan(epoch).example_ids):
        ids, mask = examples[i].input_ids, examples[i].loss_mask
        chosen, rejected = examples[i].segments
        start, border = rejected.shared, chosen.length
        built["prompt_ids"].append(ids[:start].tolist())
        for name, part in (("chosen_ids", slice(start, border)), ("rejected_ids", slice(border, None))):
            targets = int(mask[part].sum())
            assert mask[part][:targets].all()
            built[name].append(ids[part][:targets].tolist())
    return built


def theirs(tmp_path, model, data, adapters=None):
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    logged = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged.append((logs["loss"], logs["grad_norm"], logs["rewards/margins"]))

    class Tokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=MICRO,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        beta=BETA,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=3,
        max_grad_norm=CLIP,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    run = Tokenized(
        model=model,
        ref_model=None if adapters else deepcopy(model),
        args=args,
        train_dataset=Dataset.from_dict(rows(data)),
        processing_class=data.tokenizer,
        callbacks=[Log()],
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **LORA) if adapters else None,
    )
    if adapters:  # theirs are drawn anew
        missing = run.model.load_state_dict(adapters, strict=False)
        assert not missing.unexpected_keys
    run.train()
    return run.model, logged


def start(data, **kwargs):
    """The model that our run started from."""
    L.seed_everything(3)
    return dpo(config=DROPOUT, **kwargs).build(data.tokenizer).hf


def assert_equal(record, logged):
    losses, norms, margins = zip(*logged, strict=True)
    assert len(losses) == 10
    assert max(losses) > 0.71, "nothing moved"
    assert record.losses == pytest.approx(losses, rel=1e-5)
    assert record.norms == pytest.approx(norms, rel=1e-5)
    assert record.margins == pytest.approx(margins, rel=1e-5, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_equals_trl(tmp_path):
    module, data, record = ours(tmp_path)
    assert module.causal_lm.layout is forest
    model, logged = theirs(tmp_path, start(data), data)
    assert_equal(record, logged)
    # Adam divides by the gradient's own size, which makes rounding visible where gradients are tiny
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert distance(weights(module), expected) < 1e-4
    module, _, record = ours(tmp_path, share_prompt=False)
    assert module.causal_lm.layout is documents
    assert_equal(record, logged)
    assert distance(weights(module), expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_lora_equals_trl(tmp_path):
    module, data, record = ours(tmp_path, lora=LORA)
    adapters = {name: p.detach().clone() for name, p in trainable(start(data, lora=LORA)).items()}
    model, logged = theirs(tmp_path, start(data), data, adapters)
    assert_equal(record, logged)
    expected = {name: p.detach() for name, p in trainable(model).items()}
    assert distance({name: p.detach() for name, p in trainable(module.causal_lm.hf).items()}, expected) < 1e-4
