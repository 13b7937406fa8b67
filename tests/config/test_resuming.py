"""What a run's config has otherwise than the recipe that is named beside `--resume` is told."""

import pytest

from oumi_pl.config.files import differing

RUN = {
    "seed_everything": 1,
    "model": {
        "class_path": "oumi_pl.modules.sft.SFT",
        "init_args": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.999]}},
            "lora": {"r": 8},
            "model": "/runs/quickstart-sft/model",
        },
    },
    "data": {"class_path": "oumi_pl.data.sft.SFTData", "init_args": {"train": [{"path": "a.jsonl", "weight": 1.0}]}},
    "trainer": {"max_steps": 3},
}


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"model": {"class_path": "SFT", "init_args": {"optimizer": "AdamW", "lora": {"r": 8}}}},
        {"model": {"init_args": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": "1e-3"}}}}},
        {"model": {"init_args": {"model": "recipe:quickstart/sft"}}},
        {"data": {"class_path": "SFTData", "init_args": {"train": [{"path": "a.jsonl", "weight": 1}]}}},
    ],
)
def test_the_same_in_other_words(recipe):
    assert differing(recipe, RUN) == []


def test_other_values_are_named_by_their_option():
    recipe = {
        "model": {"class_path": "DPO", "init_args": {"optimizer": {"init_args": {"lr": 1e-4}}, "dtype": "bfloat16"}},
        "data": {"init_args": {"train": [{"path": "b.jsonl"}]}},
        "trainer": {"max_steps": 5},
    }
    assert differing(recipe, RUN) == [
        ("model", "oumi_pl.modules.sft.SFT", "DPO"),
        ("model.optimizer.lr", 0.001, 1e-4),
        ("model.dtype", None, "bfloat16"),
        ("data.train", [{"path": "a.jsonl", "weight": 1.0}], [{"path": "b.jsonl"}]),
        ("trainer.max_steps", 3, 5),
    ]
