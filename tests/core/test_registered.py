"""Data sets and models of a user's own file, which OUMI_EXTRA_DEPS_FILE lists, are found by the names in a config."""

import csv
import datetime
import json
import sys
from pathlib import Path

import pytest
import yaml

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.datasets import (
    BaseExperimentalGrpoDataset,
    BaseMapDataset,
    BasePretrainingDataset,
    BaseSftDataset,
)
from oumi_pl.core.recipe import to_recipe
from oumi_pl.core.registry import REGISTRY, RegistryType, register, register_dataset
from oumi_pl.core.types.conversation import ContentItem, Conversation, Message, Role, Type
from oumi_pl.data.formats import function_at
from oumi_pl.errors import UserError
from oumi_pl.train import train
from tests.command_line import jsonl
from tests.core.oumi import recipe, section, tiny_model

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}.", "number": i} for i in range(8)]

FILE = """
import torch
from oumi_pl.core.datasets import BaseDpoDataset, BaseExperimentalKtoDataset, BaseMapDataset, BaseSftDataset
from oumi_pl.core.models import BaseModel
from oumi_pl.core.registry import RegistryType, register, register_dataset
from oumi_pl.core.types.conversation import Conversation, Message, Role


@register_dataset("my/questions")
class Questions(BaseSftDataset):
    default_dataset = "my/questions"

    def __init__(self, *, greeting="", **kwargs):
        self.greeting = greeting
        super().__init__(**kwargs)

    def transform_conversation(self, example):
        turns = [
            Message(role=Role.USER, content=self.greeting + example["question"]),
            Message(role=Role.ASSISTANT, content=example["answer"]),
        ]
        return Conversation(messages=turns)


@register_dataset("my/pairs")
class Pairs(BaseDpoDataset):
    def transform_preference(self, samples):
        return super().transform_preference(
            {"prompt": samples["question"], "chosen": samples["answer"], "rejected": "No idea."}
        )


@register_dataset("my/labels")
class Labels(BaseExperimentalKtoDataset):
    def transform(self, sample):
        return {"prompt": sample["question"], "completion": sample["answer"], "label": sample["number"] % 2 == 0}


@register_dataset("my/points")
class Points(BaseMapDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample):
        x = torch.tensor([float(sample["number"])])
        return {"x": x, "y": 2 * x + 1}


@register("my-line", RegistryType.MODEL)
class Line(BaseModel):
    def __init__(self, slope=0.0):
        super().__init__(slope=slope)
        self.slope = torch.nn.Parameter(torch.tensor(slope))
        self.offset = torch.nn.Parameter(torch.tensor(0.0))

    @property
    def criterion(self):
        return torch.nn.MSELoss()

    def forward(self, x, y=None):
        predicted = self.slope * x + self.offset
        return {"loss": self.criterion(predicted, y), "logits": predicted}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the user's file, its rows and a tiny model; what it registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(jsonl(*ROWS))
    (tmp_path / "my_oumi_things.py").write_text(FILE)
    (tmp_path / "deps.txt").write_text(f"# mine\n\n{tmp_path / 'my_oumi_things.py'}\n")
    monkeypatch.setenv("OUMI_EXTRA_DEPS_FILE", str(tmp_path / "deps.txt"))
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(REGISTRY, "_values", {})
    monkeypatch.setattr(REGISTRY, "_loaded", None)
    monkeypatch.setattr(REGISTRY, "_modules", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_oumi_things", raising=False)
    return tmp_path


def training(folder, name, trainer_type="TRL_SFT", model="tiny", **kwargs):
    dataset = {"dataset_name": name, "dataset_path": "rows.jsonl"} | kwargs
    run = {"trainer_type": trainer_type, "output_dir": "out/run", "max_steps": 2, "enable_tensorboard": False}
    run |= {"per_device_train_batch_size": 4, "learning_rate": 0.01}
    tree = {"model": {"model_name": model}, "data": {"train": {"datasets": [dataset]}}, "training": run}
    (folder / "oumi.yaml").write_text(yaml.safe_dump(tree))
    return TrainingConfig.from_yaml(folder / "oumi.yaml")


def rows_of(source):
    return [json.loads(line) for line in Path(source["path"]).read_text().splitlines()]


def test_conversations_of_a_users_class_are_a_source(files):
    tiny_model(files / "tiny")
    given = training(files, "My/Questions", dataset_kwargs={"greeting": "Hello! "})
    converted = to_recipe(given, "lightning")
    source = section(converted, "data")["train"]
    assert source["name"] == "My/Questions"
    first = rows_of(source)[0]
    assert first["messages"] == [
        {"role": "user", "content": "Hello! What is 0?"},
        {"role": "assistant", "content": "It is 0."},
    ]
    assert any("the 8 rows that Questions gave" in text for text in converted.comments["data.init_args.train"])
    assert section(to_recipe(given, "lightning"), "data")["train"] == source  # the same rows, the same file
    train(given)
    with (files / "out/run/metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("name", "trainer_type", "module", "columns"),
    [
        ("my/pairs", "TRL_DPO", "DPO", {"prompt", "chosen", "rejected"}),
        ("my/labels", "TRL_KTO", "KTO", {"prompt", "completion", "label"}),
    ],
)
def test_pairs_and_labels_of_a_users_class_are_sources(files, name, trainer_type, module, columns):
    tiny_model(files / "tiny")
    converted = to_recipe(training(files, name, trainer_type), "lightning")
    assert converted.tree["model"]["class_path"] == module
    rows = rows_of(section(converted, "data")["train"])
    assert len(rows) == 8
    assert set(rows[0]) == columns


def test_a_registered_model_trains_on_oumis_own_trainer(files):
    given = training(files, "my/points", "OUMI", model="my-line")
    given.model.load_pretrained_weights = False
    given.model.model_kwargs = {"slope": 1.0}
    given.training.max_steps = 40
    given.training.optimizer, given.training.learning_rate, given.training.max_grad_norm = "sgd", 0.02, 0
    train(given)
    from my_oumi_things import Line

    line = Line.from_pretrained(files / "out/run")
    assert line.slope.item() == pytest.approx(2, abs=0.2)


def test_a_registered_model_needs_oumis_trainer_and_registered_rows(files):
    given = training(files, "my/points", "TRL_SFT", model="my-line")
    with pytest.raises(UserError, match=r"training\.trainer_type: TRL_SFT trains language models.*set OUMI"):
        train(given)
    with pytest.raises(UserError, match=r"model\.model_name: 'my-line' is registered: `train` trains it"):
        to_recipe(training(files, "my/questions", "OUMI", model="my-line"))
    given = training(files, "my/points", "OUMI", model="my-line")
    with pytest.raises(UserError, match=r"model\.load_pretrained_weights: .*set it to false"):
        train(given)
    given.model.load_pretrained_weights = False
    given.model.freeze_layers = ["layers"]
    with pytest.raises(UserError, match=r"model\.freeze_layers: the model has no module 'layers'"):
        train(given)
    given.model.attn_implementation = "eager"
    with pytest.raises(UserError, match=r"model\.attn_implementation: is for models of transformers"):
        train(given)
    given = training(files, "text_sft", "OUMI", model="my-line")
    given.model.load_pretrained_weights = False
    with pytest.raises(UserError, match=r"datasets\[0\]\.dataset_name: 'text_sft' is not registered"):
        train(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import oumi.core.datasets", r"can't be imported: .*write oumi_pl in place of oumi"),
        ("1 / 0", r"can't be imported: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_file_that_can_not_be_imported_is_named(files, monkeypatch, text, message):
    (files / "my_oumi_things.py").write_text(text)
    if "oumi.core" in text:
        monkeypatch.setitem(sys.modules, "oumi", None)
    with pytest.raises(UserError, match=message) as error:
        recipe()
    assert "my_oumi_things.py" in str(error.value)


def test_a_file_with_the_name_of_another_module_is_imported_by_its_path(files):
    text = "from oumi_pl.core.registry import RegistryType, register\n"
    text += "register('{0}', RegistryType.REWARD_FUNCTION)(lambda **kwargs: '{0}')\n"
    paths = [files / "datasets.py", files / "a/rewards.py", files / "b/rewards.py"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(path.relative_to(files)))
    (files / "deps.txt").write_text("".join(f"{path}\n" for path in paths))
    assert set(REGISTRY.get_all(RegistryType.REWARD_FUNCTION)) == {"datasets.py", "a/rewards.py", "b/rewards.py"}
    assert REGISTRY.get("b/rewards.py", RegistryType.REWARD_FUNCTION)() == "b/rewards.py"


def test_listed_files_import_one_another_once(files):
    (files / "my_oumi_user.py").write_text("from my_oumi_things import Questions\n")
    (files / "my_package").mkdir()
    (files / "my_package/__init__.py").write_text("from . import part")
    (files / "my_package/part.py").write_text("import my_oumi_things")
    names = ("my_oumi_user.py", "my_package", "my_oumi_things.py")
    (files / "deps.txt").write_text("".join(f"{files / name}\n" for name in names))
    try:
        assert REGISTRY.get_dataset("my/questions").__module__ == "my_oumi_things"
    finally:
        for name in ("my_oumi_user", "my_package", "my_package.part"):
            sys.modules.pop(name, None)


def test_a_file_that_failed_is_imported_again_at_the_next_look_up(files):
    path = files / "my_oumi_things.py"
    path.write_text(f"{FILE}\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            REGISTRY.get_dataset("my/questions")
    path.write_text(FILE)
    assert REGISTRY.get_dataset("my/questions").__name__ == "Questions"


def test_a_cleared_registry_runs_the_files_again(files):
    first = REGISTRY.get_dataset("my/questions")
    REGISTRY.clear()
    again = REGISTRY.get_dataset("my/questions")
    assert again.__name__ == "Questions"
    assert again is not first


def test_a_listed_file_that_is_missing_is_named(files):
    (files / "deps.txt").write_text("# mine\ngone.py\n")
    with pytest.raises(UserError, match=r"OUMI_EXTRA_DEPS_FILE: .*deps\.txt:2: no file 'gone\.py'"):
        REGISTRY.get_dataset("my/questions")


def test_a_list_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(REGISTRY, "_loaded", None)
    monkeypatch.setenv("OUMI_EXTRA_DEPS_FILE", "gone.txt")
    with pytest.raises(UserError, match=r"OUMI_EXTRA_DEPS_FILE: no file 'gone\.txt'"):
        recipe()


def test_errors_of_the_users_code_name_the_row_and_the_line(files):
    (files / "rows.jsonl").write_text(jsonl(ROWS[0], {"question": "a"}))
    text = FILE.replace('content=example["answer"]', 'content=example["answer"][:5]')
    (files / "my_oumi_things.py").write_text(text)
    tiny_model(files / "tiny")
    with pytest.raises(UserError, match=r"datasets\[0\]: row 2: Questions raised TypeError: .*my_oumi_things.py:\d+"):
        to_recipe(training(files, "my/questions"), "lightning")


class Tokens(BaseSftDataset):
    def transform_conversation(self, example):
        return Conversation(messages=[])

    def tokenize(self, sample):
        return {"input_ids": [1]}


class Points(BaseMapDataset):
    def transform(self, sample):
        return {}


class Pile(BasePretrainingDataset):
    default_dataset = "my/pile"


class Prompts(BaseExperimentalGrpoDataset):
    def transform(self, sample):
        return super().transform(sample) | {"day": datetime.date(2020, 1, 1)}


def test_classes_whose_tokens_would_not_be_read_are_refused(files):
    register_dataset("my/tokens")(Tokens)
    with pytest.raises(UserError, match=r"dataset_name: Tokens\.tokenize would not be called.*; override transform"):
        recipe({"dataset_name": "my/tokens"})
    register_dataset("my/bare")(Points)
    with pytest.raises(UserError, match=r"Points is registered, but derives from none of BaseSftDataset"):
        recipe({"dataset_name": "my/bare"})
    with pytest.raises(UserError, match="'MY/bare' is already registered"):
        register("MY/bare", RegistryType.DATASET)(Points)


def test_documents_of_a_users_class_are_read_by_the_recipe(files):
    register_dataset("my/pile")(Pile)
    dataset = {"dataset_name": "my/pile", "dataset_kwargs": {"seq_length": 16, "dataset_text_field": "body"}}
    converted = recipe(dataset)
    assert section(converted, "data")["train"] == {"path": "my/pile", "columns": {"text": "body"}}
    assert section(converted, "data")["max_length"] == 16


def test_an_unknown_argument_of_documents_is_refused(files):
    register_dataset("my/pile")(Pile)
    dataset = {"dataset_name": "my/pile", "dataset_kwargs": {"seq_length": 16, "dataset_text_feild": "body"}}
    with pytest.raises(UserError, match=r"datasets\[0\]: Pile has no argument 'dataset_text_feild'; did you mean"):
        recipe(dataset)


def test_columns_of_a_users_prompts_reach_the_rewards(files):
    register_dataset("my/prompts")(Prompts)
    (files / "rows.jsonl").write_text(jsonl({"prompt": "What? ", "target": 3}))
    dataset = {"dataset_name": "my/prompts", "dataset_path": "rows.jsonl"}
    changes = {"training__trainer_type": "TRL_GRPO", "training__reward_functions": '["gsm8k"]'}
    made = recipe(dataset, model__model_name=tiny_model(files / "tiny"), **changes)
    assert rows_of(section(made, "data")["train"]) == [{"prompt": "What?", "target": 3, "day": "2020-01-01"}]


def test_bytes_of_an_image_are_refused():
    image = ContentItem(type=Type.IMAGE_BINARY, binary=b"png")
    conversation = Conversation(messages=[Message(role=Role.USER, content=[image])])
    with pytest.raises(UserError, match="a message of the user has an image_binary with binary; only text"):
        conversation.to_dict()


def test_conversations_survive_json():
    def weather(city: str):
        """Tells the weather.

        Args:
            city: Where.
        """

    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    image = ContentItem(type=Type.IMAGE_URL, content="http://x")
    said = Conversation(
        conversation_id="7",
        messages=[
            Message(role=Role.USER, content=[ContentItem(type="text", content="a"), image]),
            Message(role="assistant", tool_calls=[call]),
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
        ],
        tools=[weather],
        metadata={"k": 1},
    )
    again = Conversation.from_json(said.to_json())
    assert again.to_dict() == said.to_dict()
    assert again.to_dict()["messages"][1] == {"role": "assistant", "tool_calls": [call], "content": None}
    assert again.tools[0]["function"]["name"] == "weather"
    assert again[0].contains_images()
    assert again[0].compute_flattened_text_content() == "a"
    assert again.last_message(Role.TOOL).content == "sun"
    assert again.append_id_to_string("Bad.") == "Bad. Conversation id: 7."
    for wrong, message in (
        ({"role": "usr", "content": "a"}, "role: 'usr' is unknown; did you mean 'user'"),
        ({"role": "user"}, "neither content nor tool_calls"),
    ):
        with pytest.raises(UserError, match=message):
            Conversation(messages=[wrong])


def test_a_registered_reward_is_called_as_trl_calls_it(files):
    calls = []

    @register("My_reward", RegistryType.REWARD_FUNCTION)
    def count(completions, prompts, target, **kwargs):
        calls.append((completions, prompts, target))
        return [len(turns[0]["content"]) for turns in completions]

    converted = recipe(
        {"dataset_name": "openai/gsm8k"},
        training__trainer_type="TRL_GRPO",
        training__reward_functions='["my_reward"]',
    )
    path = section(converted, "data")["reward"]
    assert path == "oumi_pl.core.recipe.registered_rewards.my_reward"
    reward = function_at(path, "reward")
    prompt = [{"role": "user", "content": "q"}]
    assert reward(["a", "bcd"], [{"prompt": prompt, "target": 1}, {"prompt": prompt, "target": 2}]) == [1.0, 3.0]
    said = [[{"role": "assistant", "content": text}] for text in ("a", "bcd")]
    assert calls == [(said, [prompt, prompt], [1, 2])]
    with pytest.raises(UserError, match=r"reward_functions: no counterpart of 'my_rewrd'; did you mean 'my_reward'"):
        recipe(
            {"dataset_name": "openai/gsm8k"},
            training__trainer_type="TRL_GRPO",
            training__reward_functions='["my_rewrd"]',
        )
