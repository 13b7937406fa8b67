"""Rows as axolotl and LLaMA-Factory read them, their token losses, and which parameters they train."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from oumi_pl.__main__ import main
from oumi_pl.convert import formats
from oumi_pl.convert.axolotl_data import TEMPLATES
from oumi_pl.convert.losses import EntropyWeighted, ProbabilityWeighted
from oumi_pl.convert.train_only import TrainOnly
from oumi_pl.data.template import load_template
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from tests.tiny import LLAMA, write_jsonl

ROW = {"instruction": "Add", "input": "1, 2", "output": "3"}
SHORT = {"instruction": "Say hi", "input": "", "output": "hi"}


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("alpaca", ROW, f"{formats.WITH_INPUT}\n\n### Instruction:\nAdd\n\n### Input:\n1, 2\n\n### Response:\n"),
        ("alpaca", SHORT, f"{formats.WITHOUT_INPUT}\n\n### Instruction:\nSay hi\n\n### Response:\n"),
        ("alpaca_chat", ROW, f"SYSTEM: {formats.WITH_INPUT}\nUSER: Add\n1, 2\nASSISTANT:"),
        ("alpaca_chat", SHORT, f"SYSTEM: {formats.WITHOUT_INPUT}\nUSER: Say hi\nASSISTANT:"),
        (
            "alpaca_chatml",
            ROW,
            f"<|im_start|>system\n{formats.WITH_INPUT}<|im_end|>\n"
            "<|im_start|>user\nAdd\n1, 2<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("alpaca_phi", ROW, f"<|system|>\n{formats.WITH_INPUT}<|end|>\n<|user|>\nAdd<|end|>1, 2<|assistant|>"),
        ("alpaca_phi", SHORT, f"<|system|>\n{formats.WITHOUT_INPUT}<|end|>\n<|user|>\nSay hi<|end|>\n<|assistant|>\n"),
    ],
)
def test_axolotls_instructions_are_text_with_its_headings(name, row, prompt):
    text = getattr(formats, name)(row)
    assert (text.prompt, text.text) == (prompt, row["output"])


def test_llama_factory_joins_instruction_and_input_by_a_line_and_v1_by_nothing():
    assert formats.joined_alpaca(ROW).messages[0]["content"] == "Add\n1, 2"
    assert formats.joined_alpaca(SHORT).messages[0]["content"] == "Say hi"
    assert formats.concatenated_alpaca(ROW).messages[0]["content"] == "Add1, 2"
    turns = formats.joined_alpaca(ROW | {"history": [["a", "b"]], "system": "s"}).messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    pair = formats.joined_alpaca_pair(ROW | {"chosen": "3", "rejected": "4"})
    assert [one.messages[-1]["content"] for one in (pair.chosen, pair.rejected)] == ["3", "4"]
    assert formats.joined_alpaca_feedback(ROW | {"label": False}).label is False
    with pytest.raises(UserError, match="instead of true or false"):
        formats.joined_alpaca_feedback(ROW | {"label": "no"})


def test_a_system_turn_is_dropped():
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert [turn["role"] for turn in formats.without_system({"messages": turns}).messages] == ["user", "assistant"]


WRITTEN = {
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "falcon_h1": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "llama3": "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
        for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))
    ),
    "gemma3": "<start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "phi_35": "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n",
}
"""axolotl's name of a template -> what it writes for three turns, but for BOS and EOS at the ends."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_by_axolotls_name_writes_axolotls_text(name):
    tokenizer = ByteTokenizer().build()
    template = load_template(tokenizer, TEMPLATES[name])
    messages = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    text = tokenizer.apply_chat_template(messages, chat_template=template.text, tokenize=False)
    assert text.removesuffix(tokenizer.eos_token) in (
        WRITTEN[name],
        f"<bos>{WRITTEN[name]}",
        WRITTEN[name].strip("\n"),
    ), text


def test_token_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 30, dtype=torch.float64, requires_grad=True), torch.randint(30, (6,))
    p = logits.softmax(-1)
    nll = -p.gather(1, targets[:, None])[:, 0].log()
    torch.testing.assert_close(ProbabilityWeighted()(logits, targets), nll * nll.neg().exp())
    likeliest = p.sort(descending=True).values[:, :20]
    likeliest = likeliest / likeliest.sum(-1, keepdim=True)
    entropy = -(likeliest * likeliest.log()).sum(-1)
    torch.testing.assert_close(EntropyWeighted(2.0, scale=3.0)(logits, targets), nll * (entropy / 3) ** 2)
    # the weights get no gradient
    (actual,) = torch.autograd.grad(ProbabilityWeighted()(logits, targets).sum(), logits)
    (wanted,) = torch.autograd.grad((nll * nll.detach().neg().exp()).sum(), logits)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({"last_layers": 1}, {"3"}),
        ({"last_layers": -1}, {"0"}),
        ({"last_layers": 2, "spread": True}, {"1", "3"}),
        ({"patterns": ["^model.layers.2.mlp", "^lm_head.weight$"]}, {"2", "head"}),
        ({"patterns": ["model.layers.[0-1]+.block_sparse_moe.gate$"]}, set()),
        ({"patterns": [r"model\.layers\..*mlp"]}, {"0", "1", "2", "3"}),
    ],
)
def test_layers_and_patterns_choose_what_is_trained(arguments, trained):
    names = [f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("mlp.up_proj", "norm")] + [
        "lm_head.weight"
    ]
    chosen = TrainOnly(**arguments).trained(names)
    assert {name.split(".")[2] if "layers" in name else "head" for name in chosen} == trained
    if "patterns" in arguments:
        assert not any("norm" in name for name in chosen)


def test_layers_that_are_no_equal_blocks_are_refused():
    with pytest.raises(UserError, match="4 layers are no 3 equal blocks"):
        TrainOnly(last_layers=3, spread=True).trained([f"layers.{i}.w" for i in range(4)])


def test_a_converted_config_trains_its_last_layer_alone(tmp_path, monkeypatch, capsys):
    """From LLaMA-Factory's YAML over `convert` to `fit`, without anything in between."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    tokenizer = ByteTokenizer().build()
    build_model(None, config=LLAMA | {"vocab_size": len(tokenizer)}).save_pretrained("base")
    tokenizer.save_pretrained("base")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/rows.jsonl", [ROW | {"output": str(i)} for i in range(8)])
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    values = {"model_name_or_path": "base", "stage": "sft", "finetuning_type": "freeze", "freeze_trainable_layers": 1}
    values |= {"dataset": "rows", "max_steps": 1, "template": "chatml", "learning_rate": 0.1, "output_dir": "runs/mine"}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(values))
    assert main(["convert", "f.yaml", "--max_steps", "2"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config", "recipe.yaml", "--trainer.accelerator", "cpu"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "runs/mine/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}
