"""`compare` from the command line: each engine in a process of its own, a table, a picture, an exit code."""

import pytest

from tests.command_line import CommandLine


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_recipe_on_two_engines(cli):
    code, out, err = cli.run("compare", "--config", "r.yaml", "--engines", "lightning,trl", "--steps", "3")
    assert code == 0, err
    assert "trl equals lightning in all 3 steps, within 1e-05" in out
    files = cli.files()
    assert {"runs/r-compare/steps.csv", "runs/r-compare/compare.png"} <= files
    assert not any("weights" in name for name in files)
    assert "is not empty" in cli.run("compare", "--config", "r.yaml")[2]


@pytest.mark.slow
def test_rounding_is_measured_where_engines_differ_by_little(cli, monkeypatch):
    """With a tolerance that no engine meets, the first engine is run again with other micro-batches."""
    monkeypatch.setattr("oumi_pl.compare.run.TOLERANCE", 1e-12)
    cli.recipe({"data.init_args.batch_size": 4, "trainer.accumulate_grad_batches": 2})
    code, out, err = cli.run("compare", "--config", "r.yaml", "--engines", "lightning,hf", "--steps", "3")
    assert code == 0, out + err
    assert "lightning: each step from the first engine's weights, in 4 micro-batches of 2 per update" in err
    assert "or 4 times lightning's rounding (lightning cut into other micro-batches differs from itself by loss" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engines", "lightning,tlr"), "unknown engine 'tlr'; did you mean 'trl'?"),
        (("--engines", "lightning"), "name two or three different ones of lightning, hf, trl"),
        (("--config", "dpo/hh_small", "--engines", "lightning,hf"), "hf can't train DPO; these can: lightning, trl"),
        (("--steps", "0"), "--steps is 0, but has to be at least 1"),
        (("--step", "3"), "--step"),
        (("--config", "nope"), "no recipe 'nope'"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(cli, options, message):
    assert message in cli.fails("compare", "--config", "r.yaml", *options)


def test_an_engine_that_refuses_the_recipe_is_named(cli):
    cli.recipe({"trainer.gradient_clip_val": 1.0, "trainer.gradient_clip_algorithm": "value"})
    code, _, err = cli.run("compare", "--config", "r.yaml", "--engines", "hf,lightning", "--steps", "1")
    assert code == 2
    assert "error: hf: trainer.gradient_clip_algorithm: --engine hf clips by norm" in err
