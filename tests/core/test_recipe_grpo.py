"""TRL_GRPO and VERL_GRPO as recipes: objective, rewards and rollouts; Oumi's rewards and prompts."""

import json

import pytest
import yaml

from oumi_pl.commands.convert import convert
from oumi_pl.core.configs import TrainerType, TrainingConfig, TrainingParams
from oumi_pl.core.recipe import formats, rewards, to_recipe
from oumi_pl.core.trainers import to_hf
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Text
from tests.command_line import CommandLine, jsonl
from tests.core.oumi import recipe, section, tiny_model

LETTERS = {"dataset_name": "oumi-ai/oumi-letter-count"}
GRPO = {"training__trainer_type": "TRL_GRPO", "training__reward_functions": '["count_letters"]'}
PLACE = "oumi_pl.core.recipe"


def grpo(dataset=None, kwargs=None, **changes):
    settings = GRPO | ({"training__trainer_kwargs": json.dumps(kwargs)} if kwargs else {}) | changes
    return recipe(dataset or LETTERS, **settings)


def test_defaults_are_those_of_trl():
    made = grpo()
    assert section(made, "model")["loss"] == {
        "class_path": "DAPOLoss",
        "init_args": {"epsilon": 0.2, "epsilon_high": 0.2},
    }
    assert not {"kl", "kl_corrected", "advantage"} & set(section(made, "model"))
    assert section(made, "model")["optimizer"]["init_args"]["lr"] == 5e-5  # and not TRL's own 1e-6
    assert made.tree["data"] == {
        "class_path": "RolloutData",
        "init_args": {
            "train": {"format": f"{PLACE}.formats.letter_count", "path": "oumi-ai/oumi-letter-count"},
            "batch_size": 1,
            "reward": f"{PLACE}.rewards.count_letters",
            "completions": 8,
            "sampling": {"max_new_tokens": 512, "temperature": 0.9},
            "max_length": 1536,
        },
    }


@pytest.mark.parametrize(
    ("kwargs", "loss"),
    [
        ({"loss_type": "grpo"}, ("GRPOLoss", 0.2, 0.2)),
        ({"loss_type": "bnpo", "epsilon_high": 0.3}, ("BNPOLoss", 0.2, 0.3)),
        ({"loss_type": "dr_grpo"}, ("DrGRPOLoss", 0.2, 0.2)),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, ("GSPOLoss", 0.2, 0.2)),
    ],
)
def test_losses(kwargs, loss):
    name, low, high = loss
    expected = {"class_path": name, "init_args": {"epsilon": low, "epsilon_high": high}}
    assert section(grpo(kwargs=kwargs), "model")["loss"] == expected


def test_the_bound_of_cispo_is_that_of_the_ratio():
    made = grpo(kwargs={"loss_type": "cispo", "epsilon_high": 1.28})
    assert section(made, "model")["loss"] == {"class_path": "CISPOLoss", "init_args": {"epsilon_high": 0.28}}


def test_penalty_advantages_and_weights_of_rewards():
    kwargs = {
        "beta": 0.04, "scale_rewards": False, "reward_weights": [1.0, 0.5], "num_iterations": 2,
        "sync_ref_model": True, "ref_model_sync_steps": 64, "mask_truncated_completions": True,
    }  # fmt: skip
    made = grpo(kwargs=kwargs, training__reward_functions='["count_letters", "org.rewards.short"]')
    model, data = section(made, "model"), section(made, "data")
    assert (model["kl"], model["kl_corrected"], model["sync_every"]) == (0.04, True, 64)
    assert model["advantage"] == {"class_path": "GroupMean", "init_args": {"scale": "none"}}
    assert data["reward"] == {f"{PLACE}.rewards.count_letters": 1.0, "org.rewards.short": 0.5}
    assert (data["iterations"], data["mask_truncated"]) == (2, True)
    assert "kl_corrected" not in section(grpo(kwargs={"beta": 0.04, "use_bias_correction_kl": False}), "model")


@pytest.mark.parametrize(
    ("size", "count", "expected", "notes"),
    [(16, 3, (2, 3), False), (8, 1, (1, None), False), (2, 8, (1, 2), True), (2, 1, (1, None), True)],
)
def test_a_micro_batch_of_completions_is_one_of_prompts(size, count, expected, notes):
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
    made = grpo(**{f"training__{name}": value for name, value in sizes.items()})
    assert section(made, "data")["batch_size"] == expected[0]
    assert made.tree["trainer"].get("accumulate_grad_batches") == expected[1]
    assert bool(made.comments.get("data.init_args.batch_size")) == notes


def test_completions_of_several_updates():
    made = grpo(kwargs={"steps_per_generation": 8}, training__gradient_accumulation_steps=2)
    assert section(made, "data")["steps_per_rollout"] == 4
    made = grpo(kwargs={"generation_batch_size": 24})
    assert section(made, "data")["steps_per_rollout"] == 3


VLLM = {"kwargs": {"vllm_mode": "colocate"}, "training__grpo__use_vllm": True}


@pytest.mark.parametrize("engine", [None, "lightning"])
def test_vllm_in_the_process_samples_where_it_is_installed(monkeypatch, engine):
    monkeypatch.setattr("oumi_pl.core.recipe.grpo.find_spec", lambda name: object())
    more = {"training__grpo__vllm_gpu_memory_utilization": 0.4}
    made = grpo(**VLLM | {"kwargs": {"vllm_mode": "colocate", "vllm_max_model_length": 99}}, engine=engine, **more)
    arguments = {"gpu_memory_utilization": 0.4, "options": {"max_model_len": 99}}
    assert section(made, "data")["engine"] == {"class_path": "VLLM", "init_args": arguments}
    assert "engine" not in made.tree  # Lightning
    assert made.became["training.grpo.use_vllm"] == "data.engine VLLM"
    assert any("can't sample with vLLM here" in text for text in made.comments.get("", [])) is (engine is None)
    assert "engine" not in section(grpo(engine=engine), "data")


@pytest.mark.parametrize(
    ("installed", "changes", "remedy"),
    [
        (False, {}, "not installed: pip install 'oumi_pl[vllm]'"),
        (True, {"kwargs": {"vllm_mode": "server"}}, "start `vllm serve` as VLLMServer describes"),
        (True, {"engine": "trl"}, "name lightning"),
        (True, {"devices": "2"}, "on one device alone: start a server"),
    ],
)
def test_generate_samples_with_a_note_where_vllm_can_not(monkeypatch, installed, changes, remedy):
    monkeypatch.setattr("oumi_pl.core.recipe.grpo.find_spec", lambda name: object() if installed else None)
    changes = dict(changes)
    monkeypatch.setenv("WORLD_SIZE", changes.pop("devices", "1"))
    made = grpo(**VLLM | changes)
    assert "engine" not in section(made, "data")
    (note,) = (text for text in made.comments["data.init_args"] if "generate, and not by vLLM" in text)
    assert remedy in note
    assert made.became["training.trainer_kwargs.vllm_mode"].startswith("nothing: completions are sampled by generate")


REFUSED = {
    "rewards missing": ({"training__reward_functions": "null"}, r"training\.reward_functions: missing: .*gsm8k"),
    "a reward": ({"training__reward_functions": '["count_leters"]'}, r"'count_leters'; did you mean 'count_letters'"),
    "arguments of rewards": (
        {"training__reward_function_kwargs": '{"gsm8k": {"method": "flexible"}}'},
        r"training\.reward_function_kwargs.* is set, and has no counterpart",
    ),
    "weights": ({"kwargs": {"reward_weights": [1, 2]}}, r"training\.trainer_kwargs\.reward_weights: 2 weights of 1"),
    "a loss": ({"kwargs": {"loss_type": "sapo"}}, r"training\.trainer_kwargs\.loss_type: no counterpart of 'sapo'"),
    "sequences": (
        {"kwargs": {"importance_sampling_level": "sequence"}},
        r"importance_sampling_level: sequence is for loss_type grpo",
    ),
    "cispo": ({"kwargs": {"loss_type": "cispo"}}, r"epsilon_high: TRL's cispo bounds the ratio itself"),
    "entropy": ({"kwargs": {"entropy_coef": 0.1}}, r"training\.trainer_kwargs\.entropy_coef: 0\.1 has no counterpart"),
    "delta": ({"kwargs": {"delta": 2.0}}, r"training\.trainer_kwargs\.delta: 2\.0 has no counterpart"),
    "a repetition penalty": ({"training__grpo__repetition_penalty": 1.1}, r"training\.grpo\.repetition_penalty"),
    "a part of an update": (
        {"kwargs": {"steps_per_generation": 3}, "training__gradient_accumulation_steps": 2},
        r"steps_per_generation: 1\.5 updates",
    ),
    "an argument": ({"kwargs": {"num_iteration": 2}}, r"num_iteration: has no counterpart; did you mean"),
    "answers": ({"dataset": {"dataset_name": "yahma/alpaca-cleaned"}}, r"TRL_GRPO reads prompts, e\.g\. openai/gsm8k"),
    "packing": ({"data__train__pack": True}, r"data\.train\.pack: prompts are not packed"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        grpo(**changes)


def test_prompts_are_for_grpo():
    with pytest.raises(UserError, match=r"data\.train\.datasets: these are prompts, which TRL_GRPO and VERL_GRPO"):
        recipe(LETTERS)


# ---- verl

VERL = """
model: {model_name: org/model}
data:
  train: {datasets: [{dataset_name: openai/gsm8k, subset: main}]}
  validation: {datasets: [{dataset_name: openai/gsm8k, subset: main, split: test}]}
training:
  trainer_type: VERL_GRPO
  max_steps: 10
  save_steps: 5
  eval_strategy: steps
  eval_steps: 2
  learning_rate: 1.0e-6
  reward_functions: [gsm8k]
  enable_tensorboard: false
  grpo: {use_vllm: true, temperature: 1.0}
  verl_config_overrides:
    data: {train_batch_size: 256, max_prompt_length: 512, max_response_length: 256}
    actor_rollout_ref:
      actor: {use_kl_loss: true, kl_loss_coef: 0.001, kl_loss_type: low_var_kl, ppo_mini_batch_size: 64,
              ppo_micro_batch_size_per_gpu: 4}
      rollout: {log_prob_micro_batch_size_per_gpu: 8, tensor_model_parallel_size: 1, n: 16}
      ref: {log_prob_micro_batch_size_per_gpu: 4}
    algorithm: {kl_ctrl: {kl_coef: 0.001}}
    trainer: {val_before_train: false, n_gpus_per_node: 1, nnodes: 1}
"""


def verl(tmp_path, devices=1, **overrides):
    tree = yaml.safe_load(VERL)
    for path, value in overrides.items():
        *sections, key = path.split("__")
        node = tree["training"]["verl_config_overrides"]
        for name in sections:
            node = node.setdefault(name, {})
        node[key] = value
    (tmp_path / "verl.yaml").write_text(yaml.safe_dump(tree))
    return to_recipe(TrainingConfig.from_yaml(tmp_path / "verl.yaml"), None, devices)


def test_verl(tmp_path):
    made = verl(tmp_path, devices=2)
    model, data, loop = section(made, "model"), section(made, "data"), made.tree["trainer"]
    assert model["loss"] == {"class_path": "DAPOLoss", "init_args": {"epsilon": 0.2, "epsilon_high": 0.2}}
    assert (model["kl"], model.get("kl_corrected"), model.get("dtype")) == (0.001, None, None)
    assert model["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.01}}
    assert "schedule" not in model
    # 64 prompts of an update on 2 devices; 256 prompts are sampled at once
    assert (data["batch_size"], loop["accumulate_grad_batches"], data["steps_per_rollout"]) == (1, 32, 4)
    assert (data["completions"], data["max_length"], data["eval_completions"]) == (16, 768, 1)
    assert data["sampling"] == {"max_new_tokens": 256, "temperature": 1.0}
    assert (loop["max_steps"], made.tree["val_every"], made.tree["checkpoint"]["every"]) == (40, 8, 20)
    assert (loop["gradient_clip_val"], loop["precision"]) == (1.0, "bf16-mixed")
    assert made.became["training.verl_config_overrides.actor_rollout_ref.rollout.n"] == "data.completions"
    assert made.became["training.verl_config_overrides.trainer.nnodes"].startswith("nothing: as many devices")


VERL_REFUSED = {
    "unknown": ({"actor_rollout_ref__actor__ppo_minibatch_size": 8}, r"ppo_minibatch_size: 8 .*ppo_mini_batch"),
    "a critic": ({"algorithm__adv_estimator": "gae"}, r"algorithm\.adv_estimator: 'gae' has no counterpart"),
    "a penalty in the reward": ({"algorithm__use_kl_in_reward": True}, r"algorithm\.use_kl_in_reward: True"),
    "entropy": ({"actor_rollout_ref__actor__entropy_coeff": 0.01}, r"actor\.entropy_coeff: 0\.01 has no counterpart"),
    "k1": ({"actor_rollout_ref__actor__kl_loss_type": "kl"}, r"kl_loss_type: 'kl' has no counterpart"),
    "a metric of groups": (
        {"algorithm__filter_groups": {"enable": True, "metric": "length"}}, r"filter_groups\.metric: 'length' has no"
    ),
    "one completion": ({"actor_rollout_ref__rollout__n": 1}, r"rollout\.n: missing, or 1"),
    "updates": ({"actor_rollout_ref__actor__ppo_mini_batch_size": 48}, r"48 prompts of an update don't divide"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), VERL_REFUSED.values(), ids=VERL_REFUSED)
def test_keys_of_verl_are_refused_by_their_path(tmp_path, overrides, message):
    with pytest.raises(UserError, match=rf"^training\.verl_config_overrides\..*{message}"):
        verl(tmp_path, **overrides)


@pytest.mark.parametrize(("most", "rounds"), [(0, 10), (10, 9), (1, 0)])
def test_dynamic_sampling_of_dapo_becomes_extra_rounds(tmp_path, most, rounds):
    groups = {"enable": True, "metric": "acc", "max_num_gen_batches": most}
    made = verl(tmp_path, algorithm__filter_groups=groups, data__gen_batch_size=512)
    assert section(made, "data")["extra_rounds"] == rounds
    assert "same reward" in made.comments["data.init_args.extra_rounds"][0]
    place = "training.verl_config_overrides.algorithm.filter_groups"
    assert made.became[f"{place}.max_num_gen_batches"] == "data.extra_rounds"
    assert "extra_rounds" not in section(verl(tmp_path, algorithm__filter_groups=groups | {"enable": False}), "data")


@pytest.mark.parametrize("place", ["reward_model__overlong_buffer", "reward_model__reward_kwargs__overlong_buffer_cfg"])
def test_the_overlong_buffer_of_dapo_becomes_the_penalty_of_long_completions(tmp_path, place):
    made = verl(tmp_path, **{place: {"enable": True, "len": 64, "penalty_factor": 0.5}})
    data = section(made, "data")
    assert (data["overlong_tokens"], data["overlong_penalty"]) == (64, 0.5)
    assert "overlong_tokens" not in section(verl(tmp_path, **{place: {"enable": False, "len": 64}}), "data")


def test_devices_that_do_not_divide_an_update(tmp_path):
    with pytest.raises(UserError, match="64 prompts of an update can't be divided among 3 devices"):
        verl(tmp_path, devices=3)


# ---- rewards and prompts


@pytest.mark.parametrize(
    ("completion", "value"),
    [(r"\boxed{3}", 0.0), (r"\boxed{4}", 1 / 1.5 - 2), ("3", -3.0), (r"\boxed{3} \boxed{3}", -3.0)],
)
def test_count_letters(completion, value):
    assert rewards.count_letters(completion, {"metadata": {"letter_count_integer": 3}}) == pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "value"), [("#### 1,072", 1.0), ("so 1072", 0.0), ("#### 3\n#### 1072", 1.0), ("#### 1072.0", 0.0)]
)
def test_gsm8k(completion, value):
    assert rewards.gsm8k(completion, {"answer": "1000 + 72 #### 1,072"}) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>x</think>\n<answer> (79 + 8) </answer>", 1.0),
        ("<answer>79 + 8 = 87</answer>", 0.0),
        ("<answer>79 + 8</answer>\nthere", 0.0),
        ("<answer>79</answer>", 0.0),
        ("<answer>79 - 8</answer>", 0.0),
    ],
)
def test_countdown(completion, value):
    assert rewards.countdown(completion, {"nums": [79, 8], "target": 87}) == value


def test_lengths():
    assert rewards.soft_5tokens_completions("a b c d e", {}) == pytest.approx(1.0)
    assert rewards.soft_10tokens_completions("a b c d e", {}) == pytest.approx(0.5 * 2.718281828**0.5)
    assert rewards.sharp_20tokens_completions("a b c d e", {}) == -15
    assert (rewards.sharp_5tokens_completions("a", {}), rewards.sharp_10tokens_completions("a", {})) == (-4, -9)
    assert rewards.soft_20tokens_completions("", {}) == pytest.approx(0.05 * 2.718281828**0.95)


def test_prompts_of_registered_datasets():
    asked = formats.gsm8k({"question": "1 + 1?", "answer": "#### 2"}).messages
    assert asked == ({"role": "user", "content": f"1 + 1? {formats.STEP_BY_STEP}"},)
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]
    system, user = formats.letter_count({"messages": turns}).messages
    assert (system["role"], user["content"]) == ("system", "How many?")
    assert [turn["role"] for turn in formats.berry_bench({"messages": turns}).messages] == ["system", "user"]
    (turn,) = formats.countdown({"nums": [79, 8], "target": 87}).messages
    assert "numbers [79, 8], create an equation that equals 87." in turn["content"]
    assert turn["content"].endswith("step by step.\n<think>")
    assert formats.prompt({"prompt": "SUBREDDIT"}) == Text("SUBREDDIT")
    assert isinstance(formats.prompt({"prompt": turns[:1]}), Conversation)
    with pytest.raises(UserError, match="'nums' has to be a list of whole numbers"):
        formats.countdown({"nums": "79"})


# ---- runs

RUN = {
    "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": "out/run",
    "enable_tensorboard": False, "grpo": {"num_generations": 4, "max_completion_length": 8, "temperature": 1.0},
}  # fmt: skip
ROWS = {
    "openai/gsm8k": ({"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)),
    "oumi-ai/oumi-letter-count": (
        {
            "messages": [{"role": "user", "content": f"How many x in {'x' * i}?"}],
            "metadata": {"letter_count_integer": i},
        }
        for i in range(8)
    ),
    "d1shs0ap/countdown": ({"nums": [i, 1], "target": i + 1} for i in range(8)),
    "trl-lib/tldr": ({"prompt": f"SUBREDDIT: r/{i}\nTL;DR:", "completion": "short"} for i in range(8)),
}
REWARD = {
    "openai/gsm8k": "gsm8k", "oumi-ai/oumi-letter-count": "count_letters", "d1shs0ap/countdown": "countdown",
    "trl-lib/tldr": "soft_20tokens_completions",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tiny_model(folder / "tiny")
    for name, content in ROWS.items():
        (folder / f"{name.replace('/', '-')}.jsonl").write_text(jsonl(*content))
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_converted_recipe_runs(rows, name, tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    dataset = {"dataset_name": name, "dataset_path": str(rows / f"{name.replace('/', '-')}.jsonl")}
    training = RUN | {"trainer_type": "TRL_GRPO", "reward_functions": [REWARD[name]]}
    tree = {
        "model": {"model_name": str(rows / "tiny")},
        "training": training,
        "data": {"train": {"datasets": [dataset]}},
    }
    line.write("oumi.yaml", json.dumps(tree))
    line.write("native.yaml", convert(line.directory / "oumi.yaml", [], "lightning"))
    line.works("fit", "--config", "native.yaml", "--trainer.accelerator", "cpu")
    assert line.state("out/run")["status"] == "finished"
    assert set(line.column("out/run", "train/reward")) == {1, 2}


LETTER_COUNTING = """
model: {model_max_length: 8192, torch_dtype_str: float32, attn_implementation: sdpa}
training:
  save_steps: 500
  learning_rate: 5e-7
  lr_scheduler_type: cosine
  warmup_steps: 20
  reward_functions: [count_letters]
  enable_gradient_checkpointing: false
  gradient_checkpointing_kwargs: {use_reentrant: false}
  ddp_find_unused_parameters: false
  optimizer: adafactor
  grpo: {num_generations: 4, use_vllm: true, vllm_gpu_memory_utilization: 0.4, epsilon: 1e-4}
  dataloader_num_workers: auto
  dataloader_prefetch_factor: 32
  logging_steps: 10
  include_performance_metrics: false
  trainer_kwargs: {vllm_mode: colocate}
"""
TLDR = """
model: {model_max_length: 8192, torch_dtype_str: float32, attn_implementation: sdpa}
training:
  save_steps: 500
  reward_functions: [soft_20tokens_completions]
  optimizer: adamw_torch
  empty_device_cache_steps: 1
  compile: false
  grpo: {use_vllm: true, vllm_gpu_memory_utilization: 0.4, num_generations: 4}
  log_model_summary: false
  trainer_kwargs: {vllm_mode: colocate, beta: 0.04, num_iterations: 2}
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "text"), [("oumi-ai/oumi-letter-count", LETTER_COUNTING), ("trl-lib/tldr", TLDR)])
def test_what_oumis_configs_set_trains_in_trl(rows, name, text, tmp_path, monkeypatch, capsys):
    line, tree = CommandLine(tmp_path, monkeypatch, capsys), yaml.safe_load(text)
    dataset = {"dataset_name": name, "dataset_path": str(rows / f"{name.replace('/', '-')}.jsonl")}
    tree["data"] = {"train": {"datasets": [dataset]}}
    tree["model"]["model_name"] = str(rows / "tiny")
    tree["training"] |= {"trainer_type": "TRL_GRPO", "max_steps": 2, "per_device_train_batch_size": 2}
    tree["training"] |= {"output_dir": "out/run", "enable_tensorboard": False}
    tree["training"]["grpo"]["max_completion_length"] = 8
    line.write("oumi.yaml", json.dumps(tree))
    line.works("train", "-c", "oumi.yaml")
    assert (line.state("out/run")["status"], line.state("out/run")["step"]) == ("finished", 2)
    assert (line.directory / "out/run/model.safetensors").exists()
    assert set(line.column("out/run", "train/reward")) == {1, 2}


# ---- Oumi's own configs (configs/examples of oumi 0.9), all that have no images

CONFIGS = {
    "grpo_tldr": """
model: {model_name: Qwen/Qwen2-0.5B-Instruct, model_max_length: 8192, torch_dtype_str: bfloat16,
  attn_implementation: sdpa}
data:
  train:
    datasets:
    - {dataset_name: trl-lib/tldr, split: train}
training:
  trainer_type: TRL_GRPO
  save_steps: 500
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  reward_functions: [soft_20tokens_completions]
  enable_gradient_checkpointing: false
  gradient_checkpointing_kwargs: {use_reentrant: false}
  ddp_find_unused_parameters: false
  optimizer: adamw_torch
  empty_device_cache_steps: 1
  compile: false
  grpo: {use_vllm: true, vllm_gpu_memory_utilization: 0.4}
  dataloader_num_workers: auto
  dataloader_prefetch_factor: 32
  max_steps: 500
  logging_steps: 10
  log_model_summary: false
  output_dir: output/tldr.grpo
  include_performance_metrics: false
  enable_wandb: true
  trainer_kwargs: {vllm_mode: colocate}
""",
    "letter_counting/grpo": """
model: {model_name: meta-llama/Llama-3.2-3B-Instruct, model_max_length: 8192, torch_dtype_str: bfloat16,
  attn_implementation: sdpa}
data:
  train:
    datasets:
    - {dataset_name: oumi-ai/oumi-letter-count, split: train}
training:
  trainer_type: TRL_GRPO
  save_steps: 500
  max_steps: 500
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 5e-7
  lr_scheduler_type: cosine
  warmup_steps: 20
  reward_functions: [count_letters]
  enable_gradient_checkpointing: false
  gradient_checkpointing_kwargs: {use_reentrant: false}
  ddp_find_unused_parameters: false
  optimizer: adafactor
  grpo: {num_generations: 4, use_vllm: true, vllm_gpu_memory_utilization: 0.4, epsilon: 1e-4}
  dataloader_num_workers: auto
  dataloader_prefetch_factor: 32
  logging_steps: 10
  output_dir: output/letter_counting.grpo
  include_performance_metrics: false
  enable_wandb: true
  trainer_kwargs: {vllm_mode: colocate}
""",
    "grpo_verl_countdown": """
model: {model_name: d1shs0ap/cognitive-behaviors-Llama-3.2-3B}
data:
  train:
    datasets:
    - {dataset_name: d1shs0ap/countdown, split: train}
  validation:
    datasets:
    - {dataset_name: d1shs0ap/countdown, split: test}
training:
  trainer_type: VERL_GRPO
  num_train_epochs: 1
  save_steps: -1
  eval_strategy: steps
  eval_steps: 50
  learning_rate: 1.0e-06
  enable_gradient_checkpointing: true
  reward_functions: [countdown]
  grpo: {max_completion_length: 1024, use_vllm: true, temperature: 1.0, vllm_gpu_memory_utilization: 0.4}
  verl_config_overrides:
    data: {train_batch_size: 64, val_batch_size: 640, max_prompt_length: 256}
    actor_rollout_ref:
      model: {use_remove_padding: true}
      actor: {use_kl_loss: true, kl_loss_coef: 0.001, kl_loss_type: low_var_kl, ppo_mini_batch_size: 16,
        ppo_micro_batch_size_per_gpu: 2}
      rollout: {log_prob_micro_batch_size_per_gpu: 2, tensor_model_parallel_size: 2, n: 16}
      ref:
        log_prob_micro_batch_size_per_gpu: 1
        fsdp_config: {param_offload: true}
    algorithm:
      kl_ctrl: {kl_coef: 0.001}
    trainer: {critic_warmup: 0, val_before_train: false, n_gpus_per_node: 2, nnodes: 1}
  output_dir: output/grpo_verl_countdown
  run_name: grpo_verl_countdown
  enable_wandb: true
""",
    "grpo_verl_gsm8k": """
model: {model_name: Qwen/Qwen2.5-0.5B-Instruct}
data:
  train:
    datasets:
    - {dataset_name: openai/gsm8k, subset: main, split: train}
  validation:
    datasets:
    - {dataset_name: openai/gsm8k, subset: main, split: test}
training:
  trainer_type: VERL_GRPO
  num_train_epochs: 15
  save_steps: 10
  eval_strategy: steps
  eval_steps: 10
  learning_rate: 1.0e-06
  enable_gradient_checkpointing: true
  reward_functions: [gsm8k]
  grpo: {use_vllm: true, temperature: 1.0, vllm_gpu_memory_utilization: 0.4}
  verl_config_overrides:
    data: {train_batch_size: 256, max_prompt_length: 512, max_response_length: 256}
    actor_rollout_ref:
      actor: {use_kl_loss: true, kl_loss_coef: 0.001, kl_loss_type: low_var_kl, ppo_mini_batch_size: 64,
        ppo_micro_batch_size_per_gpu: 4}
      rollout: {log_prob_micro_batch_size_per_gpu: 8, tensor_model_parallel_size: 1, n: 16}
      ref: {log_prob_micro_batch_size_per_gpu: 4}
    algorithm:
      kl_ctrl: {kl_coef: 0.001}
    trainer: {val_before_train: false, n_gpus_per_node: 1, nnodes: 1}
  output_dir: output/grpo_verl_gsm8k
  run_name: grpo_verl_gsm8k
""",
}
SMALL = {
    "TRL_GRPO": {"training.per_device_train_batch_size": 4, "training.grpo.max_completion_length": 8},
    "VERL_GRPO": {
        "training.grpo.max_completion_length": 8, "training.verl_config_overrides.data.max_response_length": 8,
        "training.verl_config_overrides.data.max_prompt_length": 900,  # a token for each byte
        "training.verl_config_overrides.data.train_batch_size": 4,
        "training.verl_config_overrides.actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "training.verl_config_overrides.actor_rollout_ref.rollout.n": 4,
    },
}  # fmt: skip
"""What makes them small enough for a test."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if "verl" in name else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_oumis_configs_convert_and_the_recipes_run(rows, name, tmp_path, monkeypatch, capsys):
    line, tree = CommandLine(tmp_path, monkeypatch, capsys), yaml.safe_load(CONFIGS[name])
    line.write("whole.yaml", yaml.safe_dump(tree))
    whole = yaml.safe_load(convert(line.directory / "whole.yaml", [], "lightning"))
    assert (whole["model"]["class_path"], whole["data"]["class_path"]) == ("GRPO", "RolloutData")
    for source in [entry for split in tree["data"].values() for entry in split["datasets"]]:
        source["dataset_path"] = str(rows / f"{source['dataset_name'].replace('/', '-')}.jsonl")
        source["split"] = "train"
        source.pop("subset", None)  # local files have none
    tree["model"]["model_name"] = str(rows / "tiny")
    tree["training"] |= {"max_steps": 1, "output_dir": "out/run", "enable_wandb": False, "enable_tensorboard": False}
    if "validation" in tree["data"]:
        tree["training"]["eval_steps"] = 1
    line.write("oumi.yaml", yaml.safe_dump(tree))
    small = [f"--{key}={value}" for key, value in SMALL[tree["training"]["trainer_type"]].items()]
    line.write("native.yaml", convert(line.directory / "oumi.yaml", small, "lightning"))
    line.works("fit", "--config", "native.yaml", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    assert line.state("out/run")["status"] == "finished"
    assert line.column("out/run", "train/reward")
    assert bool(line.column("out/run", "val/reward")) == ("validation" in tree["data"])


def test_trl_has_the_section_of_grpo():
    values = TrainingParams(enable_tensorboard=False, per_device_train_batch_size=8)
    values.grpo.max_completion_length, values.grpo.vllm_gpu_memory_utilization = 16, 0.4
    made = to_hf(values, TrainerType.TRL_GRPO)
    assert (made.max_completion_length, made.num_generations, made.temperature) == (16, 8, 0.9)
    assert made.vllm_gpu_memory_utilization == 0.3  # TRL's own: it is not used
