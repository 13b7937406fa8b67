"""What messages of a run say, under the names that keys have in an Oumi config."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.configs.params.base_params import fields_of
from oumi_pl.errors import UserError

PHRASES = {
    r"choose one with `template`: .*": "name one as model.chat_template, or say `default`",
    r"set data\.validation, to a source or to a share such as 0\.05": (
        "name a dataset in data.validation.datasets, and set training.eval_strategy"
    ),
    r"trainer\.precision: bf16-mixed": "training.mixed_precision_dtype: BF16",
    r"trainer\.precision: 16-mixed": "training.mixed_precision_dtype: FP16",
    r"trainer\.precision: (bf16|16)-true": "model.torch_dtype_str: bfloat16",
    r"with `columns`": "with dataset_kwargs, or prepare the rows as text_sft_jsonl",
    r"oumi_pl fit --resume (\S+)": r"training.resume_from_checkpoint: \1",
    r"export\.merge: true": "peft.peft_save_mode: MERGED",
    r"`lora: \{r: 16\}`": "training.use_peft: true",
    r"--resume\b": "training.resume_from_checkpoint",
}
"""What a native message says -> the same for an Oumi config; regular expressions."""

KEYS = {
    "data.max_length": "model.model_max_length",
    "data.template": "model.chat_template",
    "data.tokenizer": "model.tokenizer_name",
    "data.pad_token": "model.tokenizer_pad_token",
    "data.batch_size": "training.per_device_train_batch_size",
    "data.eval_batch_size": "training.per_device_eval_batch_size",
    "data.workers": "training.dataloader_num_workers",
    "data.seed": "training.data_seed",
    "data.streaming": "data.train.stream",
    "data.packing": "training.trainer_kwargs.packing",
    "data.validation": "data.validation.datasets",
    "data.trust_remote_code": "model.trust_remote_code",
    "model.dtype": "model.torch_dtype_str",
    "model.attn": "model.attn_implementation",
    "model.config": "model.model_kwargs",
    "model.freeze": "model.freeze_layers",
    "model.revision": "model.model_revision",
    "model.lora": "peft",
    "model.lora.r": "peft.lora_r",
    "model.lora.target_modules": "peft.lora_target_modules",
    "model.lora.modules_to_save": "peft.lora_modules_to_save",
    "model.quantization": "peft.q_lora",
    "model.gradient_checkpointing": "training.enable_gradient_checkpointing",
    "model.compile": "training.compile",
    "model.optimizer": "training.optimizer",
    "model.optimizer.lr": "training.learning_rate",
    "model.optimizer.weight_decay": "training.weight_decay",
    "model.schedule": "training.lr_scheduler_type",
    "model.schedule.warmup": "training.warmup_steps",
    "model.teacher": "training.gkd.teacher_model_name_or_path",
    "trainer.precision": "training.mixed_precision_dtype",
    "trainer.max_steps": "training.max_steps",
    "trainer.max_epochs": "training.num_train_epochs",
    "trainer.accumulate_grad_batches": "training.gradient_accumulation_steps",
    "trainer.gradient_clip_val": "training.max_grad_norm",
    "trainer.strategy": "fsdp.enable_fsdp",
    "trainer.deterministic": "training.use_deterministic",
    "trainer.logger": "training.enable_wandb",
    "checkpoint.every": "training.save_steps",
    "checkpoint.keep": "training.trainer_kwargs.save_total_limit",
    "checkpoint.monitor": "training.trainer_kwargs.metric_for_best_model",
    "export.enabled": "training.save_final_model",
    "val_every": "training.eval_steps",
    "seed_everything": "training.seed",
}
"""Key of a recipe -> the key of an Oumi config that sets it."""

RECIPE = "; keys that an Oumi config lacks are set in the recipe that `oumi_pl convert` prints"
_KEY = re.compile(
    r"(?<![\w./-])(-{2})?((?:data|model|trainer|checkpoint|export)(?:\.[a-z_]+)+|val_every|seed_everything)\b"
)
_FIELDS = frozenset(re.sub(r"\[\d+\]", "", path) for path, _ in fields_of(TrainingConfig))


def in_oumis_words(message: str) -> str:
    """A message of a run with the keys of an Oumi config for those of the recipe, as far as there are any."""
    for phrase, words in PHRASES.items():
        message = re.sub(phrase, words, message)
    lacks = False

    def renamed(match: re.Match[str]) -> str:
        nonlocal lacks
        dashes, key = match[1] or "", match[2]
        outer = key
        while outer not in KEYS and "." in outer:
            outer = outer.rpartition(".")[0]
        if key not in KEYS and (_known(key) or outer not in KEYS):
            lacks = lacks or not _known(key)
            return match[0]
        return dashes + KEYS.get(key, KEYS[outer])

    message = _KEY.sub(renamed, message)
    return message + RECIPE if lacks and RECIPE not in message else message


def _known(key: str) -> bool:
    """Whether an Oumi config has this key, or a section of this name; also names of files such as `data.json`."""
    return key in _FIELDS or any(field.startswith(f"{key}.") for field in _FIELDS) or _is_file(key)


def _is_file(key: str) -> bool:
    return key.rpartition(".")[2] in ("json", "jsonl", "parquet", "csv", "yaml", "py", "safetensors", "txt", "ckpt")


@contextmanager
def spoken() -> Iterator[None]:
    """Within it, warnings and errors of a run name the keys of an Oumi config.

    Raises:
        UserError: the one that was raised, in these words.
    """
    show = warnings.showwarning

    def showing(message: Any, category: Any, *rest: Any, **kwargs: Any) -> None:
        show(category(in_oumis_words(str(message))), category, *rest, **kwargs)

    warnings.showwarning = showing
    try:
        yield
    except UserError as error:
        raise UserError(in_oumis_words(str(error))) from error
    finally:
        warnings.showwarning = show
