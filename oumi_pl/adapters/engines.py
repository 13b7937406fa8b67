"""The engines' trainers, made for a model, an optimizer and arguments that stand. TRL is imported here, when needed."""

import warnings
from typing import Any, NamedTuple

from transformers import Trainer, TrainingArguments

from oumi_pl.adapters.driven import Driven, DrivenOnPairs
from oumi_pl.adapters.losses import INSTEAD, compute_loss_func, dpo_settings, is_plain
from oumi_pl.data.loader import as_it_is
from oumi_pl.errors import UserError


class Parts(NamedTuple):
    """What all engines' trainers are made of."""

    settings: dict[str, Any]
    """Fields of `transformers.TrainingArguments`."""
    processing_class: Any
    """The tokenizer: a copy, for engines set its pad token."""
    optimizers: tuple[Any, Any]
    """Optimizer and schedule."""
    callbacks: list[Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What all of them take besides their settings."""
        return {name: value for name, value in self._asdict().items() if name != "settings"}


class HFTrainer(Driven, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on our batches."""


def hf(module: Any, parts: Parts) -> HFTrainer:
    """`transformers.Trainer` for token losses; one that is not plain cross entropy is its `compute_loss_func`."""
    return HFTrainer(
        model=module.causal_lm.hf,
        args=_on_one_device(TrainingArguments(**parts.settings)),
        **parts.arguments,
        compute_loss_func=None if is_plain(module.loss) else compute_loss_func(module.loss),
    )


def import_trl() -> Any:
    """TRL.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError(
            f"--engine trl needs TRL, which can't be imported ({error}): pip install trl, {INSTEAD}"
        ) from error
    return trl


def trl_sft(module: Any, parts: Parts) -> Any:
    """`trl.SFTTrainer`."""
    trl = import_trl()

    class SFTTrainer(Driven, trl.SFTTrainer):  # type: ignore[name-defined]
        """TRL's on our batches."""

    # packing and max_length are those of our rows, which arrive as they are to be read
    args = trl.SFTConfig(
        **parts.settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **_without_router_loss(module)
    )
    return SFTTrainer(
        model=module.causal_lm.hf,
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_stand_in(),
        **parts.arguments,
        compute_loss_func=None if is_plain(module.loss) else compute_loss_func(module.loss),
    )


def trl_dpo(module: Any, parts: Parts) -> Any:
    """`trl.DPOTrainer`. Full training compares with a copy of the model, LoRA with the base, adapters disabled."""
    trl = import_trl()

    class DPOTrainer(DrivenOnPairs, trl.DPOTrainer):  # type: ignore[name-defined]
        """TRL's on our batches."""

    args = trl.DPOConfig(
        **parts.settings,
        max_length=None,
        disable_dropout=True,
        **dpo_settings(module.loss),
        **_without_router_loss(module),
    )
    hf = module.causal_lm.hf
    has_adapters = hasattr(hf, "peft_config")
    trainer = DPOTrainer(
        model=hf,
        ref_model=None if has_adapters else module.reference.opened.model.hf,
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_stand_in(),
        **parts.arguments,
    )
    if has_adapters and "ref" in hf.peft_config:
        # TRL adds a frozen copy of the adapter to compare with. Ours starts at zero, so that the base is the same, as
        # it is in our validation; the copy would be saved and exported beside the adapter.
        hf.delete_adapter("ref")
    return trainer


def _on_one_device(args: Any) -> Any:
    """Keeps an engine from wrapping the model in DataParallel because it sees several GPUs: the recipe says one."""
    args._n_gpu = min(1, args.n_gpu)
    return args


def _stand_in() -> Any:
    """A dataset of one row, for TRL looks at one when it is made; `get_train_dataloader` never reads it."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})


def _without_router_loss(module: Any) -> dict[str, float]:
    """TRL adds the balancing loss of mixtures of experts unless it is told not to; recipes ask for it in the config."""
    has_router = hasattr(module.causal_lm.base.config.get_text_config(), "output_router_logits")
    return {"router_aux_loss_coef": 0.0} if has_router else {}


def made(make: Any, module: Any, parts: Parts) -> Any:
    """An engine's trainer; what it finds wrong with the settings is the user's to mend.

    Raises:
        UserError: it refused them.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # what is to change in later releases
            return make(module, parts)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--engine: {' '.join(str(error).split())[:300]}; {INSTEAD[3:]}") from error
