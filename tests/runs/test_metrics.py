"""`metrics.csv`: a line per step, new columns on the way, and a resume that cuts back."""

import csv

from oumi_pl.runs.metrics import MetricsCSV


def lines(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def logged(file, steps, **kwargs):
    logger = MetricsCSV()
    logger.open(file, **kwargs)
    for step in steps:
        logger.log_metrics({"train/loss": step / 3}, step)
        if step % 2 == 0:
            logger.log_metrics({"val/loss": float(step)}, step)
    return logger


def test_training_and_validation_of_a_step_share_a_line(tmp_path):
    file = tmp_path / "metrics.csv"
    logged(file, range(1, 5)).finalize("success")
    assert [line["step"] for line in lines(file)] == ["1", "2", "3", "4"]
    assert [line["val/loss"] for line in lines(file)] == ["", "2.0", "", "4.0"]
    assert float(lines(file)[0]["train/loss"]) == 1 / 3, "values are written to the last bit"


def test_a_resume_truncates_and_continues_the_file(tmp_path):
    file, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    logged(whole, range(1, 7)).finalize("success")
    logged(file, range(1, 6))  # killed: the line of step 5 was never written
    with file.open("a") as out:
        out.write("5,0.3")  # and half a line was
    resumed = logged(file, range(5, 7), step=4, row={"step": 4, "train/loss": 4 / 3, "val/loss": 4.0})
    resumed.finalize("success")
    assert lines(file) == lines(whole)


def test_the_checkpoints_line_replaces_one_that_a_kill_lost(tmp_path):
    file = tmp_path / "metrics.csv"
    logged(file, range(1, 4))  # the line of step 3 is still in memory when the process dies
    assert [line["step"] for line in lines(file)] == ["1", "2"]
    logged(file, [4], step=3, row={"step": 3, "train/loss": 1.0}).finalize("success")
    assert [(line["step"], line["train/loss"]) for line in lines(file)][2:] == [("3", "1.0"), ("4", str(4 / 3))]


def test_a_line_is_on_disk_before_the_checkpoint_and_gets_the_validation_of_its_step(tmp_path):
    file = tmp_path / "metrics.csv"
    logger = logged(file, [1])
    logger.flush()
    assert [line["step"] for line in lines(file)] == ["1"]
    logger.log_metrics({"val/loss": 7.0}, 1)
    logger.log_metrics({"train/loss": 5.0}, 2)
    logger.log_metrics({"train/loss": 5.0}, 3)
    assert [(line["step"], line["val/loss"]) for line in lines(file)] == [("1", "7.0"), ("2", "")]


def test_the_line_of_the_checkpoint_is_written_at_once(tmp_path):
    """A run may have nothing left to train."""
    file = tmp_path / "metrics.csv"
    MetricsCSV().open(file, step=2, row={"step": 2, "train/loss": 0.5})
    assert [(line["step"], line["train/loss"]) for line in lines(file)] == [("2", "0.5")]
