"""A base in MXFP4 is read as bfloat16, trained, and exported without a trace of the quantization."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from oumi_pl.core.recipe import to_recipe
from oumi_pl.models.build import build_model
from tests.core.oumi import config

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "layer_types": ["full_attention"],
}
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_weights_are_those_of_the_blocks_and_scales(tmp_path):
    shape = AutoConfig.for_model("gpt_oss", **SHAPE)
    state = {name: value.clone() for name, value in AutoModelForCausalLM.from_config(shape).state_dict().items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(120, 128, (experts, outer, inner // 32), dtype=torch.uint8)
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    written = shape.to_dict() | {"architectures": ["GptOssForCausalLM"]}
    (base / "config.json").write_text(json.dumps(written | {"quantization_config": {"quant_method": "mxfp4"}}))
    kwargs = '{"quantization_config": {"quant_method": "mxfp4"}}'
    recipe = to_recipe(config(model__model_name=str(base), model__model_kwargs=kwargs), "lightning")
    args = recipe.tree["model"]["init_args"]
    model = build_model(args["model"], config=args["config"], dtype="bfloat16")
    expected = convert_moe_packed_tensors(state[f"{EXPERTS}_blocks"], state[f"{EXPERTS}_scales"])
    trained = dict(model.named_parameters())[EXPERTS]
    assert trained.requires_grad
    assert torch.equal(trained, expected)
    model.save_pretrained(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
