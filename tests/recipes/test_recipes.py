"""Every shipped recipe parses, instantiates and runs two steps, with hub names replaced by a tiny local model."""

import json

import pytest
import torch
import transformers
import yaml

from oumi_pl.__main__ import main
from oumi_pl.config import files as recipe_files
from oumi_pl.data.tokenizers import ByteTokenizer
from tests.tiny import LLAMA, conversations, write_jsonl

ALPACA = [{"instruction": f"Say {i}.", "input": "", "output": "x" * (i + 1)} for i in range(40)]
ULTRAFEEDBACK = [
    {
        "prompt": f"Say {i}.",
        "chosen": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}!"}],
        "rejected": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}?"}],
        "score_chosen": 8.0,
        "score_rejected": 2.5,
    }
    for i in range(40)
]
HH = [
    {"chosen": f"\n\nHuman: Say {i}.\n\nAssistant: {i}!", "rejected": f"\n\nHuman: Say {i}.\n\nAssistant: No."}
    for i in range(40)
]
KTO_MIX = [
    {
        "prompt": [{"role": "user", "content": f"Say {i}."}],
        "completion": [{"role": "assistant", "content": f"{i}!"}],
        "label": i % 2 == 0,
    }
    for i in range(40)
]
GSM8K = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1} #### {i + 1}"} for i in range(40)]
COUNTDOWN = [{"nums": [i, 1], "target": i + 1} for i in range(40)]
RECIPES = recipe_files.names()


TEXTS = [{"text": f"Document {i}: " + "one more word " * (i % 5 + 3)} for i in range(80)]


def rows_like(source):
    """Rows of the shape that a hub data set has."""
    shapes = {"alpaca": ALPACA, "ultrafeedback": ULTRAFEEDBACK, "hh-rlhf": HH, "kto-mix": KTO_MIX}
    if isinstance(source, dict) and "format" in source:
        shapes |= {"gsm8k": GSM8K, "countdown": COUNTDOWN}
    shapes |= dict.fromkeys(("fineweb", "c4", "my_texts", "train.txt"), TEXTS)
    return next((rows for name, rows in shapes.items() if name in str(source)), None) or conversations(40)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = ByteTokenizer().build()
    config = transformers.AutoConfig.for_model(**(LLAMA | {"vocab_size": len(tokenizer)}))
    torch.manual_seed(0)  # some random models rank all pairs of a recipe right, which is worth a warning
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_there_are_recipes():
    names = {f"quickstart/{name}" for name in ("sft", "dpo", "kto", "distill", "pretrain")} | {
        "sft/gsm8k_small",
        "dpo/hh_small",
    }
    assert names <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_says_what_it_is(name):
    lines = (recipe_files.shipped() / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 50
    assert f"python -m oumi_pl fit --config {name}" in header
    assert "Hardware:" in header


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_two_steps(name, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((recipe_files.shipped() / f"{name}.yaml").read_text())
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    args = ["--trainer.max_steps=2", "--trainer.max_epochs=null", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    args += ["--samples.rows=0", "--val_every=2", "--trainer.strategy=auto", "--trainer.accumulate_grad_batches=1"]
    args += [] if name.startswith("quickstart/") else ["--report=false"]
    if "model" in model:
        args.append(f"--model.model={tiny_model}")
    if "teacher" in model:
        args.append(f"--model.teacher={tiny_model}")
    if "quantization" in model:
        args.append("--model.quantization=null")  # needs a CUDA device
    if recipe["model"]["class_path"] == "Pretrain":
        args += ["--max_tokens=null", "--data.batch_size=2", "--data.workers=0"]
        args += ["--model.shape=1m"] if "shape" in model else []
        args += ["--model.compile=false"] if "compile" in model else []  # takes a C++ compiler, and minutes
    if isinstance(data.get("tokenizer"), str):
        args.append(f"--data.tokenizer={tiny_model}")
    prompts = recipe["data"]["class_path"] == "RolloutData"
    if prompts:
        args += ["--data.sampling.max_new_tokens=8"] if not name.startswith("quickstart/") else []
    if not str(data["train"]).startswith("bundled/"):
        write_jsonl(tmp_path / "rows.jsonl", rows_like(data["train"]))
        local = {"path": "rows.jsonl", "config": None, "split": "train"}
        args += [f"--data.train={json.dumps(data['train'] | local) if prompts else 'rows.jsonl'}"]
        args += ["--data.validation=0.2", "--data.batch_size=2"]
        args += ["--data.max_length=" + ("64" if "train.txt" in str(data["train"]) else "1024" if prompts else "256")]
    assert main(["fit", "--config", name, *args]) == 0
    run = tmp_path / "runs" / name.replace("/", "-")
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["step"]) == ("finished", 2)
    if name.startswith("quickstart/"):  # what is shown first is as it should be
        assert not state.get("warnings")
    assert {"config.yaml", "data.json", "metrics.csv", "checkpoints", "model"} <= {p.name for p in run.iterdir()}
    scores = recipe["model"]["class_path"] == "Reward"
    auto = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(run / "model", **({"num_labels": 1} if scores else {}))
    assert loaded.config.model_type == (model.get("config") or {}).get("model_type", "llama")
