"""Signals that come before training has started."""

import os
import signal

import lightning as L
import pytest

from oumi_pl.callbacks.stopping import Preemption, Stopped
from tests.tiny import data, fit, module


class Terminate(L.Callback):
    """Sends SIGTERM once Lightning has installed its handler, and before `Preemption` has installed its own."""

    handler: object = None

    def on_train_start(self, trainer, pl_module):
        self.handler = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_training_ends_the_run_after_its_first_update(tmp_path):
    terminate, sft = Terminate(), module()
    with pytest.raises(Stopped) as stopped:
        fit(sft, data(tmp_path), max_steps=3, callbacks=[terminate, Preemption()])
    assert stopped.value.signal == "SIGTERM"
    assert sft.trainer.global_step == 1
    assert "_HandlersCompose" in type(terminate.handler).__name__, "Lightning's handler was not installed yet"
    assert not sft.trainer.received_sigterm, "Lightning would end the run in its own way"
