"""Warnings of preference training: each comes once, when what it warns of is there, and not otherwise."""

from types import SimpleNamespace

import pytest

from oumi_pl.callbacks.advice import DISPLACED, PreferenceWarnings
from oumi_pl.losses.preference import Sigmoid, SimPO


def run(updates, loss=None, pairs=16):
    """Feeds updates of `(accuracy, chosen reward, rejected reward)` to the callback, as means over pairs."""
    callback = PreferenceWarnings()
    for step, (accuracy, chosen, rejected) in enumerate(updates, start=1):
        means = {"accuracies": accuracy, "chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        counts = {f"rewards/{name}": value * pairs for name, value in means.items()} | {"rows": float(pairs)}
        loop = SimpleNamespace(_should_accumulate=lambda: False)
        reference = SimpleNamespace(kind="adapters" if (loss or Sigmoid()).needs_reference else "none")
        module = SimpleNamespace(last_update=counts, reference=reference)
        callback.on_train_batch_end(SimpleNamespace(fit_loop=loop, global_step=step, callbacks=[]), module)


START = (0.5, 0.0, 0.0)


def test_right_at_once_is_reported_once(recwarn):
    run([START, *[(1.0, 0.2, -0.2)] * 4])
    assert len(recwarn) == 1
    assert "all 32 pairs are ranked correctly after 3 updates" in str(recwarn[0].message)


@pytest.mark.parametrize(
    "updates",
    [
        [START, (1.0, 0.1, -0.1), (0.9, 0.1, -0.1), *[(1.0, 0.1, -0.1)] * 30],  # one wrong answer early on
        [*[START] * 4, (1.0, 0.1, -0.1), *[(1.0, 0.1, -0.1)] * 30],  # too few pairs early on, right later
    ],
)
def test_right_in_the_end_is_what_training_is_for(updates, recwarn):
    run(updates)
    assert not recwarn


def falling(n):
    return [(0.8, -0.1 * i, -0.3 * i) for i in range(1, n + 1)]


def test_likelihoods_that_fall_on_both_sides_are_reported_once(recwarn):
    run([START, *falling(3 * DISPLACED)])
    assert len(recwarn) == 1
    assert f"for {DISPLACED} updates the chosen responses have become less likely" in str(recwarn[0].message)


@pytest.mark.parametrize(
    "updates",
    [
        falling(DISPLACED - 1),
        [*falling(DISPLACED - 1), (0.8, 0.1, -1.0), *falling(DISPLACED - 1)],
        [(0.8, 0.1 * i, -0.3 * i) for i in range(60)],  # the chosen ones gain
        [(0.8, -3.0 + 0.01 * i, -6.0 + 0.04 * i) for i in range(60)],  # the margin shrinks
    ],
)
def test_other_ways_to_learn_are_not(updates, recwarn):
    run(updates)
    assert not recwarn


def test_without_a_reference_falling_means_nothing(recwarn):
    run(falling(60), loss=SimPO())
    assert not recwarn


def test_modules_without_pairs_are_left_alone():
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(_should_accumulate=lambda: False), global_step=1)
    PreferenceWarnings().on_train_batch_end(trainer, SimpleNamespace(last_update={"loss": 1.0}, reference=None))
