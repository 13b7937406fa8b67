"""Layouts that are tried have the update of the recipe."""

import pytest

from oumi_pl.planning.fit import Layout

RECIPE = Layout(batch_size=4, micro_batches=6, gradient_checkpointing=False, devices=2)


def test_other_micro_batches_have_the_same_rows():
    assert RECIPE.with_batch_size(8) == Layout(8, 3, False, 2)
    assert RECIPE.with_batch_size(8).rows == RECIPE.rows == 48


@pytest.mark.parametrize(
    ("devices", "batch_size", "micro_batches", "rows"),
    [
        (4, 4, 3, 48),
        (8, 3, 2, 48),
        (16, 3, 1, 48),
        (32, 2, 1, 64),  # 48 rows can't be divided among 32
        (64, 1, 1, 64),
    ],
)
def test_more_devices_divide_the_update(devices, batch_size, micro_batches, rows):
    layout = RECIPE.on(devices)
    assert layout == Layout(batch_size, micro_batches, False, devices)
    assert layout.rows == rows


def test_the_options_of_a_layout():
    assert RECIPE.options(RECIPE) == []
    recomputing = RECIPE.with_batch_size(8)._replace(gradient_checkpointing=True)
    assert " ".join(recomputing.options(RECIPE)) == (
        "--data.batch_size 8 --trainer.accumulate_grad_batches 3 --model.gradient_checkpointing true"
    )
