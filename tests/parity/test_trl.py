"""SFT against TRL's SFTTrainer on the same examples in the same order: losses, gradient norms and weights."""

import lightning as L
import pytest
import torch

from oumi_pl.optim.schedules import Linear
from tests.tiny import data, distance, module, trainer, weights

ROWS, BATCH, MICRO, LR, CLIP = 12, 2, 2, 1e-2, 0.5


class Record(L.Callback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def ours(tmp_path):
    record, sft_data = Record(), data(tmp_path, ROWS, batch_size=BATCH, group_by_length=False)
    sft = module(lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.1), schedule=Linear(2))
    L.seed_everything(3)
    loop = trainer(max_epochs=2, accumulate_grad_batches=MICRO, gradient_clip_val=CLIP, callbacks=[record])
    loop.fit(sft, sft_data)
    return sft, sft_data, record


def theirs(tmp_path, model, sft_data):
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    losses, norms = [], []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])
                norms.append(logs["grad_norm"])

    # both epochs, in the order of our plan
    ids = [int(i) for epoch in range(2) for i in sft_data.plan(epoch).example_ids]
    examples = [sft_data.examples("train")[i] for i in ids]
    rows = {
        "input_ids": [e.input_ids.tolist() for e in examples],
        "labels": [
            [t if m else -100 for t, m in zip(e.input_ids.tolist(), e.loss_mask, strict=True)] for e in examples
        ],
    }
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=MICRO,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=CLIP,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=sft_data.tokenizer,
        callbacks=[Log()],
    ).train()
    return losses, norms


@pytest.mark.filterwarnings("ignore")
def test_equals_trl(tmp_path):
    sft, sft_data, record = ours(tmp_path)
    start = module()
    L.seed_everything(3)
    model = start.build(sft_data.tokenizer).hf
    losses, norms = theirs(tmp_path, model, sft_data)
    assert len(losses) == 6
    assert record.losses == pytest.approx(losses, rel=1e-5)
    assert record.norms == pytest.approx(norms, rel=1e-5)
    # Adam divides by the gradient's own size, which makes rounding visible where gradients are tiny
    assert distance(weights(sft), {name: p.detach() for name, p in model.named_parameters()}) < 1e-4
