"""Messages of a run name the keys of the Oumi config that was given, and none that it doesn't have."""

import re
import warnings

import pytest

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.configs.params.base_params import fields_of
from oumi_pl.core.words import KEYS, RECIPE, in_oumis_words, spoken
from oumi_pl.errors import UserError


@pytest.mark.parametrize(
    ("native", "ours"),
    [
        ("data.max_length is 9", "model.model_max_length is 9"),
        ("raise trainer.max_steps", "raise training.max_steps"),
        ("pass --trainer.max_epochs 3", "pass --training.num_train_epochs 3"),
        (
            "no rows are held out; set data.validation, to a source or to a share such as 0.05",
            "no rows are held out; name a dataset in data.validation.datasets, and set training.eval_strategy",
        ),
        (
            "trainer.precision: bf16-mixed with model.dtype: float32 computes in half precision",
            "training.mixed_precision_dtype: BF16 with model.torch_dtype_str: float32 computes in half precision",
        ),
        (
            "the tokenizer has no chat template; choose one with `template`: chatml, llama3, or a .jinja file",
            "the tokenizer has no chat template; name one as model.chat_template, or say `default`",
        ),
        ("model.schedule.warmup takes 1 steps", "training.warmup_steps takes 1 steps"),
        ("set model.text_only: true", "set model.text_only: true"),
        ("data.train.datasets[0] is empty", "data.train.datasets[0] is empty"),
        ("can't read /home/x/data.json, nor my/model.dtype", "can't read /home/x/data.json, nor my/model.dtype"),
        ("drop such rows with data.overflow: drop", f"drop such rows with data.overflow: drop{RECIPE}"),
    ],
)
def test_keys_of_the_recipe_become_those_of_the_config(native, ours):
    assert in_oumis_words(native) == ours


def test_every_key_that_is_named_instead_is_one_of_oumis():
    fields = {re.sub(r"\[\d+\]", "", path) for path, _ in fields_of(TrainingConfig)} | {"peft"}
    for key in KEYS.values():
        assert key in fields or key.startswith("training.trainer_kwargs."), key


def test_warnings_and_errors_of_a_run_are_in_these_words():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match=r"^model\.chat_template: no"), spoken():
            warnings.warn("data.batch_size is small", UserWarning, stacklevel=1)
            raise UserError("data.template: no")
        warnings.warn("data.batch_size", UserWarning, stacklevel=1)
    said = [str(warning.message) for warning in caught]
    assert said == ["training.per_device_train_batch_size is small", "data.batch_size"]
