"""Trainers of transformers and TRL under Oumi's names: their arguments, what they save, and adapters in every mode."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from oumi_pl.core.configs import PeftSaveMode, TrainerType, TrainingParams
from oumi_pl.core.trainers import HuggingFaceTrainer, Trainer, build_trainer, to_hf
from oumi_pl.core.trainers.collate import default_collator
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.core.test_trainer import Points, Regression, llama, params, token_rows

IDS = torch.tensor([[5, 6, 7, 8]])


def test_parameters_become_the_arguments_of_transformers():
    made = to_hf(
        TrainingParams(
            output_dir="out",
            trainer_type=TrainerType.HF,
            optimizer="adafactor",
            warmup_ratio=0.25,
            max_grad_norm=None,
            save_steps=0,
            save_epoch=True,
            enable_tensorboard=False,
            dataloader_prefetch_factor=4,
            dep_log_level="error",
            trainer_kwargs={"save_total_limit": 2},
        )
    )
    assert (made.optim, made.warmup_steps, made.max_grad_norm) == ("adafactor", 0.25, 0.0)
    assert (made.save_strategy, made.save_total_limit, made.learning_rate) == ("epoch", 2, 5e-5)
    assert made.dataloader_prefetch_factor is None  # nothing is read ahead without workers
    assert (made.report_to, made.log_level) == ([], "error")


def test_a_warmup_ratio_of_one_is_the_whole_run():
    """Transformers takes a float of 1 for one step."""
    made = to_hf(TrainingParams(warmup_ratio=1.0, enable_tensorboard=False))
    assert made.get_warmup_steps(1000) == 1000


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TRL_SFT", "SFTConfig"), ("TRL_DPO", "DPOConfig"), ("TRL_KTO", "KTOConfig"), ("TRL_GKD", "GKDConfig")],
)
def test_each_type_has_its_class_and_never_its_defaults(kind, name):
    made = to_hf(TrainingParams(enable_tensorboard=False, trainer_kwargs={"max_length": 77}), TrainerType[kind])
    assert (type(made).__name__, made.max_length, made.learning_rate) == (name, 77, 5e-5)
    assert (made.gradient_checkpointing, made.logging_steps) == (False, 50)


def test_gkd_has_its_section():
    values = TrainingParams(enable_tensorboard=False)
    values.gkd.lmbda, values.gkd.beta = 0.0, 0.7
    made = to_hf(values, TrainerType.TRL_GKD)
    assert (made.lmbda, made.beta, made.temperature, made.seq_kd) == (0.0, 0.7, 0.9, False)
    assert made.teacher_model_init_kwargs == {"dtype": "auto"}


def test_keywords_that_are_repeated_or_unknown_are_refused():
    values = TrainingParams(enable_tensorboard=False)
    values.trainer_kwargs = {"learning_rate": 1.0}
    with pytest.raises(UserError, match="learning_rate is set by a field of training already"):
        to_hf(values)
    values.trainer_kwargs = {"max_lenght": 5}
    with pytest.raises(UserError, match="SFTConfig has no 'max_lenght'; did you mean 'max_length'"):
        to_hf(values, TrainerType.TRL_SFT)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("optimizer", "adamw_torc", "optimizer: .* mean 'adamw_torch'"), ("lr_scheduler_type", "cosin", "mean 'cosine'")],
)
def test_names_that_transformers_does_not_have_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        to_hf(TrainingParams(enable_tensorboard=False, **{name: value}))


def built(kind, path, model=None, rows=None, callbacks=None, **values):
    rows = rows or datasets.Dataset.from_list([{"input_ids": r["input_ids"]} for r in token_rows(6)])
    return build_trainer(TrainerType[kind])(
        model=model or llama(),
        tokenizer=ByteTokenizer().build(),
        args=params(path, trainer_type=TrainerType[kind], **values),
        train_dataset=rows,
        **({"callbacks": callbacks} if callbacks else {}),
    )


def test_sft_by_trl(tmp_path):
    trainer = built("TRL_SFT", tmp_path, max_steps=2)
    assert isinstance(trainer, HuggingFaceTrainer)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    model = trainer.hf_trainer.model
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model.eval()(IDS).logits)


def test_dpo_by_trl(tmp_path):
    turns = [{"prompt": "a?", "chosen": "yes", "rejected": "no"}] * 4
    trainer = build_trainer(TrainerType.TRL_DPO)(
        model=llama(),
        ref_model=llama(),
        processing_class=ByteTokenizer().build(),
        args=params(tmp_path, trainer_type=TrainerType.TRL_DPO, max_steps=2, trainer_kwargs={"beta": 0.3}),
        train_dataset=datasets.Dataset.from_list(turns),
    )
    trainer.train()
    first = trainer.hf_trainer.state.log_history[0]
    assert (first["loss"], trainer.hf_trainer.args.beta) == (pytest.approx(0.6931, abs=1e-3), 0.3)


def test_the_trainer_of_transformers_evaluates_and_resumes(tmp_path):
    class Adds(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logs["mine"] = 1.0

    def made(**values):
        return build_trainer(TrainerType.HF)(
            model=llama(),
            tokenizer=ByteTokenizer().build(),
            args=params(tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, **values),
            train_dataset=token_rows(8),
            eval_dataset=token_rows(2),
            data_collator=default_collator(ByteTokenizer().build()),
            callbacks=[Adds()],
        )

    trainer = made(max_steps=2)
    assert trainer.get_last_eval_metrics() == {}
    trainer.train()
    assert trainer.get_last_eval_metrics()["eval_loss"] > 0
    names = [type(c).__name__ for c in trainer.hf_trainer.callback_handler.callbacks]
    assert names[:2] == ["DefaultFlowCallback", "Adds"]
    longer = made(max_steps=4)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert longer.hf_trainer.state.global_step == 4
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: its file model\.safetensors is not what"):
        made(max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_oumis_own_trainer_and_the_recipes(tmp_path):
    trainer = build_trainer(TrainerType.OUMI)(
        model=Regression(), args=params(tmp_path), train_dataset=Points(), training_config=None
    )
    assert isinstance(trainer, Trainer)
    for kind in ("SFT", "DPO", "KTO", "PRETRAIN"):
        with pytest.raises(UserError, match=rf"{kind} builds its own model and data"):
            build_trainer(TrainerType[kind])


def test_callbacks_of_lightning_are_not_for_transformers(tmp_path):
    from lightning.pytorch.callbacks import Timer

    with pytest.raises(UserError, match="Timer is none of transformers'"):
        built("HF", tmp_path, callbacks=[Timer()])


# ---- adapters


def adapted(**lora):
    model = llama()
    model.save_pretrained  # noqa: B018 - the base has no name: what is saved has to suffice
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora))


def saved(owner, path, mode, **lora):
    """Trains an adapter for two steps, saves it in a mode; its logits and the base's before."""
    model = adapted(**lora)
    with model.disable_adapter():
        base = model.eval()(IDS).logits.detach()
    if owner == "OUMI":
        values = params(path, max_steps=2, learning_rate=0.1)
        trainer = Trainer(model, ByteTokenizer().build(), values, token_rows(4))
    else:
        trainer = built("TRL_SFT", path, model, max_steps=2, learning_rate=0.1)
    trainer.train()
    trainer.save_model(SimpleNamespace(peft=SimpleNamespace(peft_save_mode=PeftSaveMode[mode])))
    logits = model.eval()(IDS).logits.detach()
    assert (logits - base).abs().max() > 1e-3
    return logits, base


OWNERS = ["OUMI", "TRL_SFT"]


@pytest.mark.parametrize("owner", OWNERS)
def test_the_adapter_alone(tmp_path, owner):
    logits, _ = saved(owner, tmp_path, "ADAPTER_ONLY")
    assert not (tmp_path / "model.safetensors").exists()
    assert (PeftModel.from_pretrained(llama(), tmp_path).eval()(IDS).logits == logits).all()


@pytest.mark.parametrize("owner", OWNERS)
def test_merged(tmp_path, owner):
    logits, _ = saved(owner, tmp_path, "MERGED")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-5, atol=1e-6)
    assert (PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()(IDS).logits == logits).all()


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_adapter_and_a_clean_base(tmp_path, owner, lora):
    logits, base = saved(owner, tmp_path, "ADAPTER_AND_BASE_MODEL", **lora)
    both = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(both(IDS).logits, logits, rtol=1e-5, atol=1e-6)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).unlink()
    alone, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(alone(IDS).logits, base)


def test_an_adapter_is_resumed_to_the_bit(tmp_path):
    def trained(path, **values):
        values = params(path, learning_rate=0.1, save_steps=2, **values)
        trainer = Trainer(adapted(lora_dropout=0.1), ByteTokenizer().build(), values, token_rows(6))
        trainer.train()
        return trainer.model

    whole = trained(tmp_path / "whole", max_steps=4, lr_scheduler_type="constant")
    trained(tmp_path / "cut", max_steps=2, lr_scheduler_type="constant")
    more = {"max_steps": 4, "lr_scheduler_type": "constant", "try_resume_from_last_checkpoint": True}
    resumed = trained(tmp_path / "cut", **more)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
