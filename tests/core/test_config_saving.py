"""A configuration that is saved is read back the same."""

from dataclasses import dataclass
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, Optional

import pytest

from oumi_pl.core.configs import BaseConfig, OumiConfigError, TrainingConfig, TrainingParams, TrainTarget
from tests.core.oumi_yaml import load, refused

SAVED = {
    "numbers": {"a": 5e-5, "b": 10**12, "c": True, "d": None},
    "texts like numbers": {"a": "1e3", "b": "1_0", "c": "no", "d": "null", "e": "2020-01-01", "f": "", "g": "nan"},
    "texts like references": {"a": "${training.seed}", "b": "${", "c": "???"},
    "texts like YAML": {"a": "x: y", "b": "- z", "c": "a\nb", "d": " ü# ", "e": "'"},
    "nested": {"a": {"b": [{"c": [1, [2]]}]}, "d": [], "e": {}},
}


@pytest.mark.parametrize("given", SAVED.values(), ids=SAVED)
def test_saved_and_read_back(tmp_path, given):
    config = load("training.trainer_type=SFT", "deepspeed.offload_optimizer.device=NVME", "deepspeed.zero_stage=ZERO_2")
    config.data.train.collator_name = "text_completions_only_with_padding"
    config.data.train.train_target = TrainTarget.ALL_ASSISTANT_TURNS
    config.deepspeed.deepspeed_config_path = Path("ds.json")
    config.training.trainer_kwargs = given
    config.training.run_name = "1e3"
    config.to_yaml(tmp_path / "saved.yaml")
    read = TrainingConfig.from_yaml(tmp_path / "saved.yaml")
    config.deepspeed.deepspeed_config_path = "ds.json"
    assert read == config


def test_enums_are_saved_by_name():
    stream = StringIO()
    load("training.trainer_type=TRL_SFT").to_yaml(stream)
    assert "trainer_type: TRL_SFT\n" in stream.getvalue()
    assert TrainingConfig.from_str(stream.getvalue()) == load("training.trainer_type=TRL_SFT")


def test_what_yaml_has_no_word_for_is_left_out(tmp_path):
    config = load()
    config.training.trainer_kwargs = {"f": print, "g": [(1, 2, print)]}
    with pytest.warns(UserWarning, match="can't be written as YAML and is left out") as warned:
        config.to_yaml(tmp_path / "saved.yaml")
    places = [str(warning.message).partition(":")[0] for warning in warned]
    assert places == ["training.trainer_kwargs.f", "training.trainer_kwargs.g[0][2]"]
    assert TrainingConfig.from_yaml(tmp_path / "saved.yaml").training.trainer_kwargs == {"g": [[1, 2]]}


def test_no_folder_to_save_to(tmp_path):
    path = tmp_path / "gone/c.yaml"
    assert refused(load().to_yaml, path) == f"{path}: can't be written: No such file or directory"


def test_it_is_logged_as_yaml(caplog):
    with caplog.at_level("INFO"):
        load("training.seed=7").print_config()
    assert "  seed: 7\n" in caplog.text


def test_sections_give_their_fields_in_order():
    assert list(dict(TrainingParams()))[:2] == ["use_peft", "trainer_type"]


class Color(Enum):
    RED = "red"


@dataclass
class Own(BaseConfig):
    """A user's config: fields without a default, and of types that Oumi's own have not."""

    name: str
    color: Color
    folder: Path
    content: bytes
    anything: Any
    limit: Optional[int]  # noqa: UP045 - as many write it
    rate: float = 0.5
    more: Any = None


def test_a_config_of_the_users_own_is_saved_and_read_back(tmp_path):
    config = Own("n", Color.RED, Path("a/b"), b"\x00text", anything=None, limit=None, more=[1, {"x": 2}])
    config.to_yaml(tmp_path / "own.yaml")
    assert Own.from_yaml(tmp_path / "own.yaml") == config
    changed = Own.from_yaml_and_arg_list(tmp_path / "own.yaml", ["--limit=3", "--rate=1", "--color=RED"])
    assert (changed.limit, changed.rate, changed.folder) == (3, 1.0, Path("a/b"))
    with pytest.raises(OumiConfigError, match="color: missing, and there is no default"):
        Own.from_str("name: n")
