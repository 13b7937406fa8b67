"""Layouts that are tried have the update of the recipe."""

from dataclasses import replace

import pytest

from oumi_pl.commands.plan import Printer
from oumi_pl.planning import fit
from oumi_pl.planning.cards import CARDS
from oumi_pl.planning.fit import MOST_DEVICES, Layout, Search
from oumi_pl.planning.tracker import Costs, Kind
from oumi_pl.planning.update import Estimate, Settings

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


WEIGHTS = 32e9
"""Bytes that the ranks of `search` divide among them; a row of a micro-batch has 1e9 more on each."""


def planned(settings):
    """An estimate of what the options say."""
    options = dict(zip(settings.overrides[::2], settings.overrides[1::2], strict=True))
    layout = Layout(
        int(options.get("--data.batch_size", RECIPE.batch_size)),
        int(options.get("--trainer.accumulate_grad_batches", RECIPE.micro_batches)),
        options.get("--model.gradient_checkpointing") == "true",
        settings.devices,
    )
    held = {Kind.PARAMETERS: int(WEIGHTS) // layout.devices}
    rows = layout.batch_size * 10**9
    return Estimate(
        peak=held | {Kind.ACTIVATIONS: rows // 2 if layout.gradient_checkpointing else rows},
        held=held,
        costs=Costs(),
        tokens=layout.rows,
        targets=layout.rows,
        data_ranks=layout.devices,
        sharded=True,
        strategy="Sharded",
        precision="32-true",
        ways_to_hold_less=("--model.lora.r 16: only adapters have gradients and optimizer state",),
        **layout._asdict(),
    )


@pytest.fixture
def search(monkeypatch):
    """Returns a function that searches within some GB, and the output of the advice."""
    monkeypatch.setattr(fit, "estimate", planned)
    settings = Settings((), devices=RECIPE.devices)
    return lambda memory: Search(settings, planned(settings), memory * 1e9)


def advice(capsys, search):
    assert Printer(CARDS["h100"], 0.5, search).advice() == 1
    return capsys.readouterr().out.splitlines()


def test_the_fewest_devices_that_fit_have_the_same_update(search, capsys):
    result = search(13).with_more_devices(RECIPE)
    assert Layout.of(result) == Layout(4, 3, False, 4)
    (line,) = advice(capsys, search(13))
    assert line == "what fits       4 devices --trainer.accumulate_grad_batches 3 (12.0 GB each, the same update)"


def test_an_update_that_cannot_be_divided_is_said_to_grow(search, capsys):
    (line,) = advice(capsys, search(3.2))
    assert line == (
        "what fits       32 devices --data.batch_size 2 --trainer.accumulate_grad_batches 1 "
        "(3.0 GB each, updates of 64 rows, not 48)"
    )


def test_no_number_of_devices_is_enough(search, capsys):
    lines = advice(capsys, search(0.5))
    assert f"more than {MOST_DEVICES} devices would be needed" in lines[1]
    assert lines[3].strip() == "cards with more memory"
    assert lines[2].strip() == "--model.lora.r 16: only adapters have gradients and optimizer state"


def test_devices_that_hold_everything_do_not_help(search):
    searched = search(13)
    searched.start = replace(searched.start, sharded=False)
    assert searched.with_more_devices(RECIPE) is None


def test_the_fastest_of_both_layouts_has_the_largest_batch_that_fits(search):
    result = search(21).fastest(lambda result: result.micro_batches)
    assert Layout.of(result) == Layout(6, 4, True, 2)
