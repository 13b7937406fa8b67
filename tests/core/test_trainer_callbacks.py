"""Callbacks of transformers in Oumi's own trainer hear what they hear in transformers.Trainer, and are obeyed."""

import json

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from oumi_pl.core.trainers import Trainer
from oumi_pl.core.trainers.collate import default_collator
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.core.test_trainer import Points, Regression, Worse, llama, logged, params, rows_of, token_rows

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_") and name != "on_prediction_step"]


class Recorder(TrainerCallback):
    """Writes down each event with the step, the epoch, and the names in a log."""

    def __init__(self):
        self.events = []


def _recording(event):
    def hear(self, args, state, control, logs=None, metrics=None, **kwargs):
        told = {"grad_norm", "loss", "learning_rate", "eval_loss"} & (logs or metrics or {}).keys()
        self.events.append((event, state.global_step, round(state.epoch, 6), state.max_steps, tuple(sorted(told))))

    return hear


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))

RUNS = {
    "steps": {"max_steps": 4, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2},
    "epochs": {
        "num_train_epochs": 2,
        "save_steps": 0,
        "save_epoch": True,
        "eval_strategy": "epoch",
        "logging_steps": 5,
    },
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_order_of_events_is_that_of_transformers(tmp_path, kind):
    common = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_first_step": True}
    ours, theirs = Recorder(), Recorder()
    values = params(tmp_path / "ours", **({"max_steps": -1} | RUNS[kind] | common))
    Trainer(
        llama(), ByteTokenizer().build(), values, token_rows(8), eval_dataset=token_rows(2), callbacks=[ours]
    ).train()
    arguments = {"use_cpu": True, "report_to": "none", "disable_tqdm": True} | RUNS[kind] | common
    if arguments.pop("save_epoch", False):
        arguments |= {"save_strategy": "epoch", "save_steps": 500}
    hf = transformers.Trainer(
        llama(),
        transformers.TrainingArguments(output_dir=str(tmp_path / "theirs"), **arguments),
        train_dataset=token_rows(8),
        eval_dataset=token_rows(2),
        data_collator=default_collator(ByteTokenizer().build()),
        callbacks=[theirs],
    )
    hf.train()
    assert len({event for event, *_ in ours.events}) >= 12
    assert ours.events == theirs.events


def trained(path, callbacks, model=None, **values):
    values = {"learning_rate": 0.5, "max_steps": 12, "optimizer": "sgd"} | values
    evaluated = Points(4) if values.get("eval_strategy") else None
    trainer = Trainer(
        model or Regression(),
        args=params(path, **values),
        train_dataset=Points(),
        callbacks=callbacks,
        eval_dataset=evaluated,
    )
    trainer.train()
    return trainer


BEST = {"metric_for_best_model": "eval_loss"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "per_device_eval_batch_size": 4}


def test_transformers_early_stopping_stops(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    extra = BEST | {"load_best_model_at_end": True}
    trained(tmp_path, [stopping], Worse(), trainer_kwargs=extra, **EVALUATED)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert logged(tmp_path, "val/loss") == [1, 0, 1, 2]
    assert (state["global_step"], state["best_global_step"], state["best_metric"]) == (4, 2, 0)
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["layer.weight"], best["layer.weight"])


def test_its_patience_is_resumed(tmp_path):
    trained(tmp_path, [EarlyStoppingCallback(3)], Worse(), trainer_kwargs=BEST, **(EVALUATED | {"max_steps": 4}))
    model, stopping = Worse(), EarlyStoppingCallback(3)
    model.evaluations = 4
    trained(tmp_path, [stopping], model, trainer_kwargs=BEST, try_resume_from_last_checkpoint=True, **EVALUATED)
    assert logged(tmp_path, "val/loss") == [1, 0, 1, 2, 3]


def test_a_metric_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match="did you mean 'eval_loss'"):
        trained(tmp_path, [], trainer_kwargs={"metric_for_best_model": "los"}, **EVALUATED)


def test_what_a_callback_switches_on_is_done(tmp_path):
    class Switches(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2
            control.should_log = state.global_step == 3
            control.should_evaluate = state.global_step == 4
            control.should_epoch_stop = state.global_step == 1
            control.should_training_stop = state.global_step == 5
            return control

        def on_log(self, args, state, control, logs, **kwargs):
            logs["mine"] = 1.5

    trained(tmp_path, [Switches()], eval_strategy="epoch", logging_steps=0)
    assert [(row["global_step"], "train/loss" in row, "val/loss" in row) for row in rows_of(tmp_path)] == [
        (1, False, True),  # the end of the first epoch
        (3, True, False),
        (4, False, True),
        (5, False, True),
        (5, False, False),
    ]
    assert {row["mine"] for row in rows_of(tmp_path)} == {1.5}
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_epoch_that_is_stopped_is_not_gone_on_with(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    seen = []

    class Spy(Regression):
        def forward(self, x, y):
            seen.append(y.tolist())
            return super().forward(x, y)

    trained(tmp_path, [Stops()], Spy(), max_steps=2, data_seed=3)
    orders = [torch.randperm(10, generator=torch.Generator().manual_seed(3 + epoch)) for epoch in (0, 1)]
    assert seen == [Points().y[order[:2]].tolist() for order in orders]


def test_callbacks_are_given_what_they_ask_for(tmp_path):
    found = {}

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, train_dataloader, **kwargs):
            found.update(args=args, model=model, optimizer=optimizer, schedule=lr_scheduler, loader=train_dataloader)

    model = Regression()
    trained(tmp_path, [Asks()], model, max_steps=1)
    assert isinstance(found["args"], transformers.TrainingArguments)
    assert (found["args"].max_steps, found["args"].load_best_model_at_end) == (1, False)
    assert found["model"] is model
    assert isinstance(found["optimizer"], torch.optim.SGD)
    assert found["schedule"].last_epoch == 1
    assert len(found["loader"]) == 5


def test_callbacks_of_lightning_hear_and_are_obeyed_too(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    stopping = L.pytorch.callbacks.EarlyStopping("val/loss", patience=2)
    trained(tmp_path, [checkpoint, stopping, EarlyStoppingCallback(9)], Worse(), trainer_kwargs=BEST, **EVALUATED)
    assert logged(tmp_path, "val/loss") == [1, 0, 1, 2]
    assert float(checkpoint.best_model_score) == 0.0
