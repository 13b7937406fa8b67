"""KTO against TRL's KTOTrainer on the same rows in the same order: losses, gradient norms, metrics and weights.

TRL estimates the KL divergence on each micro-batch, ours on the update: one micro-batch per update makes them equal.
"""

from copy import deepcopy

import lightning as L
import pytest
import torch

from oumi_pl.losses.responses import APOZeroUnpaired, KTOLoss
from oumi_pl.optim.schedules import Linear
from tests.parity.test_trl_dpo import start as dpo_start
from tests.parity.test_trl_dpo import trainable
from tests.tiny import distance, kto, kto_data, trainer, weights

ROWS, BATCH, LR, CLIP, BETA = 20, 4, 3e-3, 0.5, 0.3
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
DROPOUT = {"attention_dropout": 0.1}
CLASS_WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.4}
LOGGED = (
    *("loss", "grad_norm", "kl"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
)
LOSSES = {"kto": KTOLoss(BETA), "apo_zero_unpaired": APOZeroUnpaired(BETA)}


class Updates(L.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({k.removeprefix("train/"): float(v) for k, v in trainer.logged_metrics.items()})


def ours(tmp_path, loss="kto", **kwargs):
    record, data = Updates(), kto_data(tmp_path, ROWS, batch_size=BATCH)

    def adamw(params):
        return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)

    module = kto(None, adamw, DROPOUT, schedule=Linear(3), loss=LOSSES[loss], **CLASS_WEIGHTS, **kwargs)
    L.seed_everything(3)
    trainer(max_epochs=2, gradient_clip_val=CLIP, callbacks=[record]).fit(module, data)
    return module, data, record.rows


def rows(data):
    """Both epochs, in the order of our plan, with our mismatched responses.

    Tokens after the last target, which nothing looks at, are left out.
    """
    data.mismatches = True  # which a loss without the divergence has turned off
    examples = data.examples("train")
    built = {"prompt_ids": [], "completion_ids": [], "KL_completion_ids": [], "label": []}
    for i in (int(i) for epoch in range(2) for i in data.plan(epoch).example_ids):
        built["label"].append(examples[i].fields["desirable"] == 1.0)
        for name, example in (("", examples[i]), ("KL_", examples[data.mismatched_ids("train", [i])[0]])):
            border, targets = int(example.loss_mask.argmax()), example.target_tokens
            assert example.loss_mask[border : border + targets].all()
            built[f"{name}completion_ids"].append(example.input_ids[border : border + targets].tolist())
        built["prompt_ids"].append(examples[i].input_ids[:border].tolist())
    return built


def theirs(tmp_path, model, data, loss="kto", adapters=None):
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    logged = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged.append({name: value for name, value in logs.items() if name in LOGGED})

    class Tokenized(trl.KTOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    args = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        loss_type=loss,
        beta=BETA,
        **CLASS_WEIGHTS,
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


def assert_equal(updates, logged, kl=True):
    assert len(logged) == 10
    assert not kl or max(line["kl"] for line in logged) > 0.1, "the divergence does not matter"
    assert min(line["loss"] for line in logged) < 0.45, "nothing moved"
    # rewards are small differences of sums of some hundred nats, which TRL takes apart in float32
    for ours, theirs in zip(updates, logged, strict=True):
        if not kl:
            theirs.pop("kl")
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=5e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_trl(tmp_path, loss):
    module, data, updates = ours(tmp_path, loss)
    model, logged = theirs(tmp_path, dpo_start(data), data, loss)
    assert_equal(updates, logged, kl=loss == "kto")
    # Adam divides by the gradient's own size, which makes rounding visible where gradients are tiny
    assert distance(weights(module), {name: p.detach() for name, p in model.named_parameters()}) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_lora_equals_trl(tmp_path):
    module, data, updates = ours(tmp_path, lora=LORA)
    adapters = {name: p.detach().clone() for name, p in trainable(dpo_start(data, lora=LORA)).items()}
    model, logged = theirs(tmp_path, dpo_start(data), data, adapters=adapters)
    assert_equal(updates, logged)
    expected = {name: p.detach() for name, p in trainable(model).items()}
    assert distance({name: p.detach() for name, p in trainable(module.causal_lm.hf).items()}, expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_another_mismatch_would_be_caught(tmp_path, monkeypatch):
    _, data, updates = ours(tmp_path)
    partners = data.mismatched("train").partners
    data.mismatched("train").partners = partners[::-1].copy()
    _, logged = theirs(tmp_path, dpo_start(data), data)
    with pytest.raises(AssertionError):
        assert_equal(updates, logged)
