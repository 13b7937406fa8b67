"""The progress display: what it shows in terminals of several widths, what in a file, and that it damages nothing."""

import io
import logging
import re
import sys
import time
from contextlib import suppress
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch

from oumi_pl.callbacks import progress as pace_module
from oumi_pl.callbacks.progress import Pace, ProgressLine
from oumi_pl.config.cli import CLI
from oumi_pl.terminal import screen
from oumi_pl.terminal.screen import ERASE, Line, clock, working

STYLE = re.compile(r"\033\[[0-9;]*m")
FULL = {
    "epoch": 1.5,
    "train/lr": 2.5e-4,
    "train/grad_norm": 1.234,
    "train/rewards/accuracies": 0.75,
    "train/rewards/margins": 0.123,
}


class Terminal(io.StringIO):
    """What a terminal is told; `screen` is what then stands on it, each line as it was last."""

    encoding = "utf-8"

    def isatty(self):
        return True

    @property
    def screen(self):
        return [STYLE.sub("", line.split(ERASE)[-1]) for line in self.getvalue().split("\n")]


@pytest.fixture
def on_terminal(monkeypatch):
    """Called in a test, lets both streams go to one terminal; pytest takes them itself when a test begins."""
    built = Terminal()
    monkeypatch.setenv("TERM", "xterm")

    def begin(width=120):
        built.width = width
        monkeypatch.setattr(sys, "stderr", built)
        monkeypatch.setattr(sys, "stdout", built)
        return built

    for module in ("oumi_pl.terminal.screen", "oumi_pl.callbacks.progress"):
        monkeypatch.setattr(f"{module}.terminal_width", lambda: built.width)
    monkeypatch.setattr("oumi_pl.callbacks.progress.EVERY", 0.0)
    yield begin
    if Line.current is not None:
        Line.current.close()


def made_run(metrics=FULL, total=12_000):
    """A trainer and a module with what the display reads."""
    metrics = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer = SimpleNamespace(
        callbacks=[],
        callback_metrics=metrics,
        global_step=0,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
        num_val_batches=[8],
    )
    module = SimpleNamespace(
        total_steps=lambda: total,
        units=itemgetter("targets"),
        device=torch.device("cpu"),
        details=("kl",),
        last_update={},
    )
    return trainer, module


def train(display, trainer, module, losses):
    if not trainer.global_step:
        display.on_train_start(trainer, module)
    for loss in losses:
        display.on_train_batch_start(trainer, module, None, 0)
        trainer.global_step += 1
        module.last_update = {"loss": 10.0 * loss, "targets": 10.0, "tokens": 1000.0}
        display.on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (60, ["loss", "left"], ["tokens/s", "lr", "epoch", "GB"]),
        (80, ["━", "loss", "lr", "tokens/s", "left"], ["GB", "accuracy", "grad", "elapsed"]),
        (120, ["━", "loss", "lr", "tokens/s", "left", "epoch", "GB", "accuracy"], ["elapsed"]),
        (200, ["━", "loss", "lr", "tokens/s", "left", "epoch", "GB", "accuracy", "margin", "grad", "elapsed"], []),
    ],
)
def test_the_bar_fits_the_terminal_and_drops_what_matters_least(on_terminal, width, there, gone):
    terminal = on_terminal(width)
    display, (trainer, module) = ProgressLine(), made_run()
    trainer.global_step = 5_999
    display.on_train_start(trainer, module)
    train(display, trainer, module, [2.5])
    (shown,) = terminal.screen
    assert len(shown) < width
    assert "6,000/12,000" in shown
    assert [figure for figure in there if figure not in shown] == []
    assert [figure for figure in gone if figure in shown] == []


def test_half_of_the_bar_is_full_half_way(on_terminal):
    terminal = on_terminal(200)
    display, (trainer, module) = ProgressLine(), made_run(total=4)
    train(display, trainer, module, [1.0, 1.0])
    full = terminal.getvalue().split(ERASE)[-1]
    filled, empty = full.count("━"), full.count("─")
    assert abs(filled - empty) <= 1
    assert filled + empty >= 10


def test_the_loss_is_the_mean_of_the_last_updates(on_terminal):
    terminal = on_terminal()
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [4.0, 3.0, 5.5])
    assert "loss 4.1667" in terminal.screen[-1]
    display._shown = 0.0  # time to draw again
    train(display, trainer, module, [1.0] * 20)
    assert "loss 1.0000" in terminal.screen[-1]


def test_what_others_print_comes_above_the_bar_and_whole(on_terminal):
    terminal = on_terminal()
    handler = logging.StreamHandler(sys.stderr)  # made before, as libraries do
    logging.getLogger("someone").addHandler(handler)
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [1.0])
    print("printed")
    print("warned", file=sys.stderr)
    logging.getLogger("someone").warning("logged")
    train(display, trainer, module, [1.0])
    logging.getLogger("someone").removeHandler(handler)
    *above, bar = terminal.screen
    assert above[0] == "printed"
    assert above[1] == "warned"
    assert above[2] == "logged"
    assert "2/12,000" in bar


def test_the_streams_are_given_back_and_nothing_is_left_of_the_bar(on_terminal):
    terminal = on_terminal()
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [1.0])
    assert sys.stdout is not terminal
    display.on_exception(trainer, module, KeyboardInterrupt())
    assert sys.stdout is terminal
    assert sys.stderr is terminal
    print("error: something")
    assert terminal.screen == ["error: something", ""]
    assert "\033[?25l" not in terminal.getvalue(), "the cursor is never hidden"


def test_whoever_kept_the_stream_of_a_bar_that_is_gone_does_not_bring_it_back(on_terminal):
    terminal = on_terminal()
    line, other = Line(), Line()
    line.show("the bar")
    held = sys.stderr
    line.close()
    held.write("after\n")
    assert terminal.screen == ["after", ""]
    other.show("another bar")
    held.write("above\n")
    assert terminal.screen == ["after", "above", "another bar"]
    sys.stderr = held  # as the end of `redirect_stderr` does
    line.show("the bar")
    print("once")
    assert terminal.screen == ["after", "above", "once", "the bar"]


def test_lines_that_alternate_give_the_streams_back(on_terminal):
    terminal = on_terminal()
    first, second = Line(), Line()
    for i in range(50):
        first.show(f"first {i}")
        second.show(f"second {i}")
    assert sys.stderr._stream is terminal
    print("half a", end="")
    first.show("first")
    print(" line")
    first.close()
    second.close()
    assert (sys.stdout, sys.stderr, Line.current) == (terminal, terminal, None)
    assert terminal.screen == ["half a", " line", ""]


def test_no_bar_outlives_the_command(on_terminal):
    terminal = on_terminal()

    class Run(CLI):
        def __init__(self):
            self.config_init = {"engine": "lightning", "ckpt_path": None, "dry_run": True}
            self.subcommand, self.resume, self.trainer, self.model, self.datamodule = None, None, None, None, None

    def fails(*_):
        Line().show("the bar")
        raise RuntimeError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("oumi_pl.config.cli.dry_run", fails)
        Run()._run_subcommand("fit")
    assert (sys.stdout, sys.stderr, terminal.screen) == (terminal, terminal, [""])


def test_a_stream_that_is_closed_or_no_stream_at_all_harms_nothing(on_terminal, monkeypatch):
    terminal = on_terminal()
    monkeypatch.setattr(sys, "stdout", object())
    line = Line()
    line.show("the bar")
    terminal.close()
    line.show("still")
    line.close()
    assert sys.stderr is terminal
    line.show("no more")
    line.close()
    assert sys.stderr is terminal


def test_on_a_dumb_terminal_nothing_is_rewritten(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    display, (trainer, module) = ProgressLine(every_seconds=0.0), made_run(total=2)
    train(display, trainer, module, [1.0, 1.0])
    display.on_train_end(trainer, module)
    assert terminal.getvalue().startswith("step 1/2  epoch")
    assert "\033" not in terminal.getvalue()
    assert "\r" not in terminal.getvalue()


def test_validation_has_a_bar_and_leaves_a_line_with_the_best(on_terminal):
    terminal = on_terminal()
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [1.0])
    for loss in (3.0, 2.0, 2.5):
        display.on_validation_start(trainer, module)
        for i in range(4):
            display.on_validation_batch_end(trainer, module, None, None, i)
        assert "validating  batch 4/8" in terminal.screen[-1]
        trainer.callback_metrics |= {"val/loss": torch.tensor(loss), "val/kl": torch.tensor(9.0)}
        display.on_validation_end(trainer, module)
        train(display, trainer, module, [1.0])
    kept = [line for line in terminal.screen if "val/loss" in line]
    assert kept[0] == "step 1  val/loss 3  best so far"
    assert kept[1] == "step 2  val/loss 2  best so far"
    assert kept[2] == "step 3  val/loss 2.5  (best 2 at step 2)"


def test_saving_is_shown_while_it_lasts(on_terminal):
    terminal = on_terminal()
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [1.0])
    with working("saving step-00000001.ckpt"):
        assert terminal.screen == ["saving step-00000001.ckpt …"]
        with suppress(OSError), working("sending it"):
            assert terminal.screen == ["sending it …"]
            raise OSError
        assert terminal.screen == ["saving step-00000001.ckpt …"]
    assert "1/12,000" in terminal.screen[-1]
    train(display, trainer, module, [1.0])
    assert "2/12,000" in terminal.screen[-1]


def test_in_a_file_there_are_names_and_values_now_and_then(capsys):
    display, (trainer, module) = ProgressLine(every_seconds=0.0), made_run(total=3)
    train(display, trainer, module, [2.0, 2.0])
    display.every_seconds = 1000.0
    train(display, trainer, module, [2.0])
    display.on_train_end(trainer, module)
    *lines, end = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, "the last update is told in any case"
    words = lines[-1].split()
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    assert pairs["step"] == "3/3"
    assert pairs["loss"] == "2.0000"
    assert pairs["lr"] == "2.5e-04"
    assert {"epoch", "grad_norm", "tokens/s", "memory_gb", "elapsed", "left", "accuracy", "margin"} < pairs.keys()
    assert end == "trained 3 steps in 0:00"


def test_another_rank_shows_nothing(capsys):
    display, (trainer, module) = ProgressLine(every_seconds=0.0), made_run()
    display.disable()
    train(display, trainer, module, [1.0, 1.0])
    display.on_validation_start(trainer, module)
    display.on_validation_end(trainer, module)
    display.on_train_end(trainer, module)
    assert capsys.readouterr().err == ""


def test_the_time_left_counts_updates_and_pauses_apart(monkeypatch):
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace_module, "worked", lambda: spent[0])
    pace = Pace()
    pace.begin(0)
    for step in range(1, 101):
        now[0] += 2.0 if step != 50 else 60.0  # one that hung
        pace.update_ends(step, tokens=100.0)
    assert pace.seconds_per_update == 2.0
    assert pace.left(100) == pytest.approx(200.0)
    pace.validation_begins()
    now[0] += 30.0  # of which 10 went into samples
    spent[0] += 10.0
    pace.validation_ends()
    now[0], spent[0] = now[0] + 20.0, spent[0] + 20.0  # and then it was saved
    now[0] += 2.0
    pace.update_ends(101, tokens=100.0)
    assert pace.seconds_per_update == 2.0
    assert pace.left(100) == pytest.approx(200.0 + 50.0), "50 seconds of pauses for each 100 updates"


def test_a_step_costs_next_to_nothing_between_two_looks(monkeypatch):
    display, (trainer, module) = ProgressLine(every_seconds=1e9), made_run(total=10**9)
    train(display, trainer, module, [1.0])
    start = time.process_time()
    train(display, trainer, module, [1.0] * 1000)
    assert (time.process_time() - start) / 1000 < 2e-4


def test_short_work_says_nothing_and_long_work_what_it_was(monkeypatch, capsys):
    with working("loading a small model"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(screen, "SHOW_AFTER_PLAIN", 0.0)
    with working("loading a large model"):
        time.sleep(0.2)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "loading a large model ..."
    assert last.startswith("loading a large model: 0.")


def test_a_spinner_turns_on_a_terminal_while_something_is_loaded(on_terminal, monkeypatch):
    terminal = on_terminal()
    monkeypatch.setattr(screen, "SHOW_AFTER", 0.0)
    with working("loading a model"):
        while not (shown := terminal.screen[-1]):
            time.sleep(0.01)
    assert "loading a model 0:00" in shown
    assert terminal.screen == [""]


def test_clocks():
    assert [clock(s) for s in (7, 754, 3723, 273_600)] == ["0:07", "12:34", "1:02:03", "3 d 4 h"]


def test_a_narrow_terminal_tears_no_value_from_its_name(on_terminal):
    terminal = on_terminal(48)  # the name alone would have room
    display, (trainer, module) = ProgressLine(), made_run()
    train(display, trainer, module, [1.0])
    trainer.callback_metrics |= {"val/loss": torch.tensor(0.25), "val/mean_token_accuracy": torch.tensor(0.5)}
    display.on_validation_start(trainer, module)
    display.on_validation_end(trainer, module)
    output = [line.strip() for line in terminal.screen[-4:]]
    assert "step 1  val/loss 0.25" in output
    assert any("val/mean_token_accuracy 0.5" in line for line in output)
    assert any(line.endswith("best so far") for line in output)
