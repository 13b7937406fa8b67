"""What the tests of converted configs share: configs from a few keys, recipes of them, a tiny model in a folder."""

import json

import transformers

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe import to_recipe
from oumi_pl.data.tokenizers import ByteTokenizer
from tests.tiny import LLAMA


def config(tree=None, **changes):
    """A config that trains on alpaca, with fields changed by their dotted path, `.` written as `__`."""
    tree = tree or {
        "model": {"model_name": "org/model"},
        "data": {"train": {"datasets": [{"dataset_name": "yahma/alpaca-cleaned"}]}},
        "training": {"trainer_type": "TRL_SFT", "enable_tensorboard": False},
    }
    args = [f"--{path.replace('__', '.')}={value}" for path, value in changes.items()]
    return TrainingConfig.from_yaml_and_arg_list(None, [*_typed(tree), *args])


def _typed(tree, place=""):
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith("kwargs"):
            yield from _typed(value, f"{place}{key}.")
        else:
            yield f"--{place}{key}={json.dumps(value)}"


def recipe(dataset=None, engine="lightning", **changes):
    """The recipe of such a config; `dataset` replaces the training set."""
    if dataset is not None:
        datasets = dataset if isinstance(dataset, list) else [dataset]
        changes["data__train__datasets"] = json.dumps(datasets)
    return to_recipe(config(**changes), engine)


def section(made, name):
    """The arguments of a section of a recipe."""
    return made.tree[name]["init_args"]


def tiny_model(folder):
    """A tiny Llama with a tokenizer of bytes and ChatML as its template."""
    tokenizer = ByteTokenizer().build()
    shape = transformers.AutoConfig.for_model(**(LLAMA | {"vocab_size": len(tokenizer)}))
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
