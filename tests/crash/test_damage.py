"""Damaged files end in one message, or in a right run: a fixed part of what `damage.py` tries at random."""

import json
import random
from pathlib import Path

import pytest
import torch

from oumi_pl.report.record import Record
from oumi_pl.runs.folders import State
from tests.crash.damage import CASES, VALUES, as_link, as_pipe, damages, hostile, trial, world
from tests.crash.harness import Child, copy, works


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return world(tmp_path_factory.mktemp("damage") / "base")


def assert_no_deviation(base, place, case, content):
    result, text = trial(base, place, case, content)
    assert result in ("success", "refused"), text
    return result, text


FIXED = {
    "runs/r/run.json": (b"[" * 100_000, b"\xff{", b'{"step": 1e999, "recipe": "\\u001b[31m\\ud800"}', as_pipe, as_link),
    "runs/r/run.json#report": (json.dumps({"times": 3, "model": {"trainer": []}, "steps": {}}).encode(), as_pipe),
    "runs/r/run.json#resume": tuple(json.dumps(dict.fromkeys(State.__annotations__, v)).encode() for v in VALUES),
    "runs/r/metrics.csv#report": (b"step,train/loss\n1,x\n\xb2,1\n9e9,1\n2,0.5\n", b"\0", as_link),
    "runs/r/data.json": (b'{"train": {"lengths": [[]], "kept": {}}}', as_pipe),
    "runs/r/config.yaml#compare": (b"a: &a [b]\n", b"a: &a [*a, *a]\n"),
}


@pytest.mark.parametrize(
    ("case", "number"), [(case, i) for case, contents in FIXED.items() for i in range(len(contents))]
)
def test_damaged_run_folders_are_shown_or_refused(base, tmp_path, case, number):
    assert_no_deviation(base, tmp_path, case, FIXED[case][number])


def test_a_run_goes_on_with_damaged_metrics_and_says_so(base, tmp_path):
    lines = (base / "runs/r/metrics.csv").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\xfe,\0,3\n"
    result, text = assert_no_deviation(base, tmp_path, "runs/r/metrics.csv#resume", b"".join(lines))
    assert result == "success"
    assert "1 damaged lines are left out" in text


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("generation_config.json", "eos_token_id", {}),
        pytest.param("generation_config.json", "eos_token_id", 1e400, marks=pytest.mark.slow),
        ("tokenizer_config.json", "model_max_length", ""),
    ],
)
def test_values_of_a_model_that_are_no_numbers_are_named_by_generate(base, tmp_path, file, key, value):
    content = json.loads((base / "model" / file).read_text()) | {key: value}
    result, text = assert_no_deviation(base, tmp_path, f"model/{file}#generate", json.dumps(content).encode())
    assert result == "refused"
    assert f"{key} in the {file} of model is" in text


def without(*names):
    """Removes parts of a checkpoint."""

    def change(file):
        content = torch.load(file, weights_only=True)
        for name in names:
            del content[name]
        torch.save(content, file)

    return change


def with_other_shapes(file):
    content = torch.load(file, weights_only=True)
    state = content["optimizer_states"][0]["state"]
    first = next(iter(state))
    state[first]["exp_avg"] = torch.zeros(3)
    torch.save(content, file)


CHECKPOINT = "runs/r/checkpoints/step-00000004.ckpt"


@pytest.mark.parametrize("name", ["SFTData", "rng", "optimizer_states", "lr_schedulers", "loops"])
def test_a_checkpoint_without_a_part_is_refused(base, tmp_path, name):
    result, text = assert_no_deviation(base, tmp_path, CHECKPOINT, without(name))
    assert result == "refused", text
    assert name in text or "weights only" in text


def test_a_checkpoint_with_other_shapes_is_refused(base, tmp_path):
    result, text = assert_no_deviation(base, tmp_path, CHECKPOINT, with_other_shapes)
    assert result == "refused"
    assert "exp_avg of shape [3] for a weight of" in text


def test_a_config_of_fewer_layers_than_the_weights_is_refused(base, tmp_path):
    config = json.loads((base / "model/config.json").read_text())
    config["num_hidden_layers"] = 0
    _, text = assert_no_deviation(base, tmp_path, "model/config.json", json.dumps(config).encode())
    assert "has weights of more layers than its config.json" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_damage_at_random_places_is_refused_or_harmless(base, tmp_path, case):
    rng = random.Random(case)
    every = [*damages(base / case.partition("#")[0], rng, 3)]
    for _, content in rng.sample(every, min(8, len(every))):
        assert_no_deviation(base, tmp_path, case, content)


# ---- hostile folders


HOSTILE = [(case, what) for case in CASES for what, _ in hostile(Path(case))]
FAST = {("runs/r/checkpoints/step-00000004.ckpt#export", what) for what in ("code", "folder with code")}


@pytest.mark.parametrize(
    ("case", "what"), [pytest.param(*one, marks=[] if one in FAST else pytest.mark.slow) for one in HOSTILE]
)
def test_what_others_put_in_the_place_of_a_file_is_refused_or_harmless(base, tmp_path, case, what):
    assert_no_deviation(base, tmp_path, case, dict(hostile(Path(case)))[what])


def test_the_page_shows_nothing_through_links(base, tmp_path):
    result, text = assert_no_deviation(base, tmp_path, "runs/r/data.json", lambda file: None)
    assert result == "success", text
    record = Record(copy(base, tmp_path / "other") / "runs/r")
    secret = tmp_path / "secret.yaml"
    secret.write_text("a: secret\n")
    for name in ("recipe.yaml", "config.yaml", "run.json"):
        (record.folder / name).unlink(missing_ok=True)
        (record.folder / name).symlink_to(secret)
    assert (record.recipe_text, record.config, record.state) == ("", {}, {})


def test_an_export_deletes_no_folder_that_it_did_not_make(base, tmp_path):
    folder = copy(base, tmp_path / "copy")
    (folder / "out.half").mkdir()
    (folder / "out.half/precious").touch()
    works(folder, "export", "--checkpoint", "runs/r", "--output", "out")
    assert (folder / "out.half/precious").exists()
    assert (folder / "out/model.safetensors").exists()


def test_a_comparison_overwrites_no_file(base, tmp_path):
    folder = copy(base, tmp_path / "copy")
    (folder / "mine.png").write_text("mine")
    child = Child(folder, "runs", "compare", "r", "s", "--output", "mine.png")
    assert child.wait() == 2
    assert "--output: mine.png exists; name another file" in child.text
    assert (folder / "mine.png").read_text() == "mine"
