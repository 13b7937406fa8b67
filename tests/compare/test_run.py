"""The first difference is named, in the order in which one difference causes the next."""

import numpy as np
import pytest

from oumi_pl.compare import report
from oumi_pl.compare.run import Engine, Outcome, _Tests, allowed, first_difference, other_cut

LINE = {"batch": "aa", "target_tokens": 7.0, "lr": 1e-3, "loss": 2.0, "grad_norm": 0.5, "seconds": 0.1}


def engine(name="hf", steps=3, at=None, **changes):
    lines = []
    for step in range(1, steps + 1):
        own = changes if step == at else {}
        lines.append(
            LINE | {"step": step, "update": 1e-7, "weights": 1e-6, "rounding": 1e-9, "peak_memory_gb": 1.0} | own
        )
    return Engine(name, lines, lines)


LEAD = engine("lightning")


def test_within_the_tolerance_nothing_differs():
    assert first_difference(LEAD, engine(at=2, loss=2.0 * (1 + 5e-6), update=9e-6), 1e-5) is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch": "bb", "loss": 3.0, "lr": 1.0}, "batch"),
        ({"target_tokens": 8.0, "loss": 3.0}, "target_tokens"),
        ({"lr": 2e-3, "update": 1.0}, "lr"),
        ({"loss": 2.0001, "grad_norm": 1.0}, "loss"),
        ({"grad_norm": 0.51, "update": 0.1}, "grad_norm"),
        ({"update": 2e-5}, "update"),
        ({"loss": float("nan")}, "loss"),
        ({"update": float("nan")}, "update"),
    ],
)
def test_the_cause_is_named_and_not_its_consequence(changes, what):
    difference = first_difference(LEAD, engine(at=2, **changes), 1e-5)
    assert (difference.what, difference.step) == (what, 2)
    verdict = report.verdict("hf", "lightning", 3, Outcome(difference))
    assert verdict.startswith(f"hf differs from lightning first in {what} at step 2 (")


def test_the_allowed_distance_of_updates_accounts_for_the_rounding_of_weights():
    """Updates that agree to 1e-5, added to weights of which they are the last digits."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=100_000).astype(np.float32)
    for rate in (1e-2, 1e-4, 1e-6):
        update = rate * rng.normal(size=len(weights))
        other = update * (1 + 1e-5 * rng.normal(size=len(weights)))
        ours, theirs = (np.float32(weights + u).astype(float) for u in (update, other))
        moved = ours - weights
        distance = np.linalg.norm(theirs - ours) / np.linalg.norm(moved)
        rounding = np.abs(moved * ours).sum() * np.finfo(np.float32).eps / (moved**2).sum()
        limit = allowed({"rounding": rounding}, 1e-5)
        assert limit / 4 < distance < 1.5 * limit
        assert allowed({"rounding": rounding}, 1e-7) < distance


def judged(other, *, recut=None, whole=None, tolerance=None):
    """The outcome with runs that are stand-ins: the lead with other micro-batches, and an engine with a single one."""
    asked = []

    def run(name, cut):
        asked.append((name, cut))
        return recut if name == "lightning" else whole

    return _Tests(LEAD, run, (4, 2)).outcome(other, tolerance, None), asked


def test_what_the_lead_differs_by_from_itself_is_rounding():
    """A gradient norm that differs by 1.5e-5, as on a trained model, whose gradients nearly cancel."""
    other, recut = engine(at=2, grad_norm=0.5 * (1 + 1.5e-5)), engine("lightning", at=3, grad_norm=0.5 * (1 + 1.2e-5))
    outcome, asked = judged(other, recut=recut)
    assert outcome.difference is None
    assert asked == [("lightning", (2, 4))]
    verdict = report.verdict("hf", "lightning", 3, outcome)
    assert "hf equals lightning in all 3 steps, within 1e-05, or 4 times lightning's rounding" in verdict
    assert "differs from itself by loss 0.0e+00, grad_norm 1.2e-05" in verdict
    # not if the lead's own rounding is small, if a tolerance is named, or if the difference is no rounding
    assert judged(other, recut=engine("lightning"), whole=other)[0].difference.what == "grad_norm"
    named, asked = judged(other, recut=recut, whole=other, tolerance=1e-5)
    assert named.difference is not None
    assert asked == [("hf", (8, 1))]
    far = engine(at=2, grad_norm=0.51)
    assert judged(far, recut=engine("lightning", at=1, grad_norm=0.6), whole=far)[0].difference is not None


def test_the_named_cause_is_one_that_was_tried():
    other = engine(at=2, grad_norm=0.6)
    outcomes = [judged(other, recut=engine("lightning"), whole=whole)[0] for whole in (engine(), other)]
    assert [outcome.whole for outcome in outcomes] == [True, False]
    sentences = [report.verdict("hf", "lightning", 3, outcome) for outcome in outcomes]
    assert "so micro-batches are weighed otherwise" in sentences[0]
    assert "so weighing micro-batches is not the cause" in sentences[1]
    lone = _Tests(LEAD, None, (1, 1))
    assert lone.outcome(other, None, None).whole is None
    assert "micro-batch" not in report.verdict("hf", "lightning", 3, lone.outcome(other, None, None))


def test_an_update_is_cut_into_as_many_rows():
    assert [other_cut(sizes) for sizes in ((4, 1), (3, 2), (1, 4), (1, 1))] == [(2, 2), (1, 6), (2, 2), None]


def test_an_engine_that_stops_early_differs():
    difference = first_difference(LEAD, engine(steps=2), 1e-5)
    assert (difference.what, difference.step) == ("steps", 3)


def test_table_csv_and_picture_show_all_engines(tmp_path):
    engines = [LEAD, engine(at=2, loss=2.5)]
    assert "2.0e-01" in report.table(engines)  # 0.5 of 2.5
    report.write_csv(engines, tmp_path / "steps.csv")
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    report.picture(engines, "title", tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
