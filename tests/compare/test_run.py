"""The first difference is named, in the order in which one difference causes the next."""

import numpy as np
import pytest

from oumi_pl.compare import report
from oumi_pl.compare.run import Engine, allowed, first_difference

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
    verdict = report.verdict("hf", "lightning", 3, difference, 1e-5)
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
