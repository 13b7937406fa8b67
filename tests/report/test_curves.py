"""Curves: which panels there are, and what is drawn of long, short and broken series."""

import math
import random
import time
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from oumi_pl.report import curves
from oumi_pl.report.curves import POINTS, envelope, smooth, thin, window_of


def column(values, every=1):
    return [every * (i + 1) for i in range(len(values))], list(values)


def titles(metrics):
    return [panel.title for panel in curves.panels(metrics)]


def test_smoothed_is_the_mean_of_the_neighbours_there_are():
    assert smooth([1, 2, 3, 4, 5], 3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert smooth([1, math.nan, 3, math.inf, 5], 3).tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(smooth([math.nan] * 3, 3)).all()
    assert all(window_of(n) % 2 == 1 for n in range(1, 3000, 7))


def test_a_long_line_keeps_its_spikes():
    values = [1.0] * 100_000
    values[54_321], values[100], values[7] = 9.0, -3.0, math.nan
    middle, low, high = envelope(range(100_000), values)
    assert len(middle) <= POINTS / 2
    assert (low.min(), high.max()) == (-3.0, 9.0)
    assert abs(middle[high.argmax()] - 54_321) < 100_000 / POINTS * 2
    x, y = thin(range(100_000), range(100_000))
    assert len(x) <= POINTS
    assert (y[0], y[-1]) == (0, 99_999)


def test_the_panels_are_those_of_the_metrics():
    loss = {"train/loss": column([2, 1]), "val/loss": column([1.5], 2), "val/nll": column([1.5], 2)}
    assert titles(loss) == ["Loss, nats per target token"]
    assert titles(loss | {"val/nll": column([1.4], 2)})[1] == "Cross-entropy, nats per target token"
    pairs = loss | {f"{split}/rewards/margins": column([0, 1]) for split in ("train", "val")}
    assert titles(pairs)[:2] == ["Loss per pair", "Reward margin: chosen minus rejected"]
    single = pairs | {"train/rewards/sign_accuracy": column([0.5, 1])}
    assert titles(single)[0] == "Loss per row"
    assert "Share of rewards with the right sign" in titles(single)
    text = {"val/perplexity": column([8.0]), "val/bits_per_byte": column([2.0]), "val/bits_per_byte/web": column([1.0])}
    assert titles(text) == ["Bits per byte, validation", "Perplexity, validation"]
    assert titles({"val/perplexity": column([8.0]), **loss}) == ["Loss, nats per target token"]
    labels = [line.label for line in curves.panels(text)[0].lines]
    assert labels == ["all", "web"]


@pytest.mark.parametrize("values", [[1.0], [math.nan] * 4, [0.0, -1.0, math.inf] * 9])
def test_any_series_is_drawn_without_a_warning(tmp_path, values, recwarn):
    metrics = {"train/loss": column(values), "train/grad_norm": column(values), "val/loss": column(values[:1])}
    curves.png(metrics, "$a_b", tmp_path / "c.png", resumed=[1])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    drawn = [curves.svg(panel, metrics) for panel in curves.panels(metrics)]
    assert all(text.startswith("<svg") and text.endswith("</svg>") for text in drawn)
    assert ("not finite" in drawn[0]) == (not all(map(math.isfinite, values)))
    assert not [str(w.message) for w in recwarn]


def test_metrics_without_a_known_name_have_a_panel_each(tmp_path):
    """Those of a module of the user's, or of a file whose first line is damaged."""
    metrics = {"arb_up/grod": column([2, 1]), "speed": column([3]), r"a$\frac_{c$": column([1])}
    assert titles(metrics) == [*metrics]
    assert titles({f"m{i}": column([i]) for i in range(50)}) == [f"m{i}" for i in range(12)]
    curves.png(metrics, "run", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = curves.panels({"4 <x>": column([2, 1])})
    assert "4 &lt;x&gt;" in curves.svg(panel, {"4 <x>": column([2, 1])})
    assert titles(metrics | {"train/loss": column([1])}) == ["Loss, nats per target token"]


def test_a_source_may_have_any_name(tmp_path):
    sources = ["_corpus", "a$b_{c$", "<b>&amp", r"\frac$\frac$"]
    metrics = {f"val/bits_per_byte{name}": column([2.0, 1.0]) for name in ["", *(f"/{source}" for source in sources)]}
    curves.png(metrics, "run", tmp_path / "c.png")
    (panel,) = curves.panels(metrics)
    named = "".join(ElementTree.fromstring(curves.svg(panel, metrics)).itertext())
    assert [name for name in ["all", *sources] if f"{name} 1" not in named] == []


def test_drawing_leaves_the_settings_of_others_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    curves.png({"train/loss": column([2, 1])}, "", tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_names_in_several_drawings_of_a_page_differ():
    metrics = {"train/loss": column([2, 1, 3]), "train/lr": column([1, 2, 3])}
    first, second = (curves.svg(panel, metrics) for panel in curves.panels(metrics))
    named = [{part.split('"')[0] for part in text.split(' id="')[1:]} for text in (first, second)]
    assert named[0]
    assert not named[0] & named[1]
    assert "var(--c0)" in first
    assert "http" not in first.replace("http://www.w3.org", "")


def test_a_hundred_thousand_steps_are_drawn_in_seconds(tmp_path):
    rng = random.Random(0)
    series = column([rng.gauss(3, 1) for _ in range(100_000)])
    names = ("loss", "lr", "grad_norm", "tokens_per_second", "mean_token_accuracy", "mfu")
    metrics = {f"train/{name}": series for name in names}
    begun = time.process_time()
    curves.png(metrics, "long", tmp_path / "c.png")
    size = sum(len(curves.svg(panel, metrics)) for panel in curves.panels(metrics))
    assert time.process_time() - begun < 4, "about 1.3 s on one core; each point drawn, it would be half a minute"
    assert size < 300_000
