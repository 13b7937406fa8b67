"""`export`, and the export at the end of a run: from whole and sharded checkpoints, and errors for other files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from oumi_pl.__main__ import main
from oumi_pl.commands.export import export_checkpoint
from oumi_pl.commands.serving import check_vllm
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model, model_card
from oumi_pl.models.lm import LM
from oumi_pl.models.lora import with_lora
from tests.models.test_export import assert_same, logits, names
from tests.models.test_lora import plain_tokenizer, pretrained
from tests.rollouts import stand_ins
from tests.tiny import LLAMA, conversations, write_jsonl

ROOT = Path(__file__).parents[2]


def recipe(path, model, **kwargs):
    """Writes a recipe and its rows."""
    rows = write_jsonl(path / "rows.jsonl", conversations(12))
    sections = {
        "model": {"class_path": "SFT", "init_args": model},
        "data": {"class_path": "SFTData", "init_args": {"train": rows, "batch_size": 4} | kwargs.pop("data", {})},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "runs_dir": str(path / "runs"),
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(sections | kwargs))
    return str(path / "recipe.yaml")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUMI_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, environment):
    """A run from random weights that keeps its best weights."""
    path = tmp_path_factory.mktemp("full")
    best = {"val_every": 1, "checkpoint": {"monitor": "val/loss", "every": 1, "keep": 5}}
    sgd = {"class_path": "SGD", "init_args": {"lr": 30.0}}  # so large that the second step spoils what the first did
    data = {"tokenizer": {"class_path": "ByteTokenizer"}, "validation": str(path / "rows.jsonl")}
    assert main(["fit", "--config", recipe(path, {"config": LLAMA, "optimizer": sgd}, data=data, **best)]) == 0
    return path / "runs" / "recipe"


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, environment):
    """A LoRA run on a pretrained folder, with a chat template whose tokens the base has no rows for."""
    path = tmp_path_factory.mktemp("lora")
    base = pretrained(path / "base", plain_tokenizer(), tie_word_embeddings=True)
    data = {"template": "chatml"}
    assert main(["fit", "--config", recipe(path, {"model": base, "lora": {"r": 4}}, data=data)]) == 0
    return path / "runs" / "recipe"


def state_of(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("model.hf."): value for name, value in saved.items()}


def test_a_run_exports_its_best_weights(full_run):
    best, last = (state_of(full_run / "checkpoints" / f"{name}.ckpt") for name in ("best", "step-00000002"))
    exported = AutoModelForCausalLM.from_pretrained(full_run / "model").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in exported.items())
    assert not all(torch.equal(value, last[name]) for name, value in exported.items())


def test_the_model_card_has_the_data_the_recipe_and_the_scores(full_run):
    card = (full_run / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "rows.jsonl`." in card
    assert "random weights" in card
    assert "max_steps: 2" in card
    best = torch.load(full_run / "checkpoints" / "best.ckpt", weights_only=True)["metrics"]
    assert f"| `val/loss` | {best['val/loss']:.4g} |" in card


def test_the_model_card_of_a_mixture_on_a_hub_model():
    config = {
        "model": {"class_path": "oumi_pl.modules.sft.SFT", "init_args": {"model": "someone/model"}},
        "data": {"init_args": {"train": ["someone/rows", {"path": "own.jsonl", "weight": 2.0}]}},
    }
    card = model_card(config, "seed: 1", {"val/loss": 1.23456}, "title", adapter=True)
    header = yaml.safe_load(card.split("---")[1])
    assert header == {"library_name": "peft", "tags": ["oumi_pl"], "base_model": "someone/model"}
    assert "A LoRA adapter" in card
    assert "(SFT) from `someone/model` on `someone/rows`, `own.jsonl`." in card
    assert "| `val/loss` | 1.235 |" in card


def test_the_five_lines_of_a_card_complete_a_chat_prompt(full_run, monkeypatch, capsys):
    card = (full_run / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 5
    assert str(full_run) not in card.split("## Recipe")[0]
    monkeypatch.chdir(full_run / "model")
    exec(code.replace("256", "4"))
    assert capsys.readouterr().out
    generation = GenerationConfig.from_pretrained(full_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(full_run / "model")
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends


def test_an_adapter_names_a_base_in_the_hubs_cache_by_its_id(tmp_path):
    base = pretrained(tmp_path / "models--org--base" / "snapshots" / "0f3a")
    tokenizer = plain_tokenizer()
    lm = LM(build_model(base, tokenizer=tokenizer, lora={"r": 4}))
    export_model(lm, tmp_path / "adapter", tokenizer, stop_tokens=[5])
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    )
    assert 5 in json.loads((tmp_path / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    card = model_card({"model": {"init_args": {"model": base}}}, "", {}, "title", parent="base, step 3 (model)")
    assert "base_model: org/base" in card
    assert "Training went on from base, step 3 (model)." in card


@pytest.mark.parametrize("what", [".", "checkpoints", "checkpoints/best.ckpt", "checkpoints/step-00000002.ckpt"])
def test_the_command_exports_runs_and_checkpoints(full_run, tmp_path, what, capsys):
    """A run folder stands for its best weights."""
    assert main(["export", "--checkpoint", str(full_run / what), "--output", str(tmp_path / "out")]) == 0
    file = "step-00000002" if "step" in what else "best"
    assert f"{file}.ckpt" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = state_of(full_run / "checkpoints" / f"{file}.ckpt")
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_run_merges_an_adapter_that_could_not_be_loaded_alone(lora_run, tmp_path, capsys):
    command = ["export", "--checkpoint", str(lora_run), "--output"]
    assert main([*command, str(tmp_path / "alone")]) == 2
    error = capsys.readouterr().err
    assert "2 rows more than the base model" in error
    assert "--merge" in error
    assert main([*command, str(tmp_path / "merged"), "--merge"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(lora_run / "model")
    assert_same(tmp_path / "merged", exported, 1e-6)
    assert "library_name: transformers" in (lora_run / "model" / "README.md").read_text()
    # merged from what was trained, not from where it began
    deltas = state_of(lora_run / "checkpoints" / "step-00000002.ckpt")
    rows = next(value for name, value in deltas.items() if "trainable_tokens" in name)
    torch.testing.assert_close(exported.model.embed_tokens.weight[-2:], rows, rtol=0, atol=0)


def test_an_adapter_of_a_run_alone(tmp_path, environment, capsys):
    path = tmp_path / "run"
    path.mkdir()
    base = pretrained(path / "base")
    assert main(["fit", "--config", recipe(path, {"model": base, "lora": {"r": 4}})]) == 0
    run = path / "runs" / "recipe"
    assert {"adapter_model.safetensors", "generation_config.json"} <= names(run / "model")
    assert "library_name: peft" in (run / "model" / "README.md").read_text()
    assert main(["export", "--checkpoint", str(run), "--output", str(tmp_path / "out")]) == 0
    assert_same(tmp_path / "out", AutoModelForCausalLM.from_pretrained(run / "model"))
    Path(base).rename(path / "elsewhere")
    capsys.readouterr()
    assert main(["export", "--checkpoint", str(run), "--output", str(tmp_path / "more")]) == 2
    error = capsys.readouterr().err
    assert f"no folder {base!r}" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["no file", "thing.ckpt"]),
        (lambda path: path.write_bytes(b""), ["can't be read as a checkpoint"]),
        (lambda path: path.write_bytes(os.urandom(4000)), ["can't be read as a checkpoint"]),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(3000)), ["can't be read as a checkpoint"]),
        (lambda path: torch.save({"weights": torch.ones(2)}, path), ["has no config"]),
        (lambda path: torch.save({"state_dict": {}, "config": ""}, path), ["has no config"]),
        (lambda path: path.mkdir(), ["no checkpoint in"]),
        (lambda path: (path.mkdir(), (path / "meta.pt").write_bytes(b"x")), ["can't be read as a checkpoint"]),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, capsys, make, words):
    make(tmp_path / "thing.ckpt")
    assert main(["export", "--checkpoint", str(tmp_path / "thing.ckpt"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_does_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": Evil(), "config": "{}"}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="can't be read"):
        export_checkpoint(tmp_path / "evil.ckpt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_outputs_and_names_are_checked_before_the_work(full_run, tmp_path, capsys, monkeypatch):
    command = ["export", "--checkpoint", str(full_run), "--output"]
    assert main([*command, str(full_run / "model")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out"), "--push_to_hub", "a/b/c"]) == 2
    assert "--push_to_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pushing_offline_keeps_the_folder(full_run, tmp_path, capsys):
    command = ["export", "--checkpoint", str(full_run), "--output", str(tmp_path / "out"), "--push_to_hub", "me/model"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE" in error
    assert "is written" in error
    assert len(error.splitlines()) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


SHARDED = """
import sys
import torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from oumi_pl.__main__ import main
if __name__ == "__main__":
    sys.exit(main(["fit", "--config", sys.argv[1]]))
"""


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), {"r": 4}])
def test_a_sharded_run(tmp_path, lora):
    """FSDP2 on two processes: the run exports its best weights, and its checkpoints can be exported too."""
    base = pretrained(tmp_path / "base", tie_word_embeddings=True)
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    }
    sections = {
        "data": {"validation": str(tmp_path / "rows.jsonl"), "batch_size": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 2, "strategy": strategy},
        "checkpoint": {"monitor": "val/loss", "mode": "max", "every": 1, "keep": 5},  # so that the first step is best
        "val_every": 1,
        "export": {"merge": lora is not None},
    }
    sgd = {"class_path": "SGD", "init_args": {"lr": 30.0 if lora else 0.1}}
    file = recipe(tmp_path, {"model": base, "lora": lora, "optimizer": sgd}, **sections)
    (tmp_path / "worker.py").write_text(SHARDED.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "worker.py"), file],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert not errors, done.stderr[-3000:]  # of the other rank
    run = tmp_path / "runs" / "recipe"
    assert "lm_head.weight" not in load_file(run / "model" / "model.safetensors"), "tied weights were written twice"
    live = AutoModelForCausalLM.from_pretrained(run / "model")
    assert json.loads((run / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert (run / "checkpoints" / "best.ckpt").is_dir()
    export_checkpoint(run / "checkpoints" / "best.ckpt", tmp_path / "best", merge=lora is not None)
    assert_same(tmp_path / "best", live)
    export_checkpoint(run / "checkpoints" / "step-00000002.ckpt", tmp_path / "last", merge=lora is not None)
    moved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "last")) - logits(live)
    assert moved.abs().max() > 1e-3


# ---- `--check vllm`


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the module."""
    stand_ins.install(monkeypatch)
    return stand_ins.LLM


def checked(run, path):
    return main(["export", "--checkpoint", str(run), "--output", str(path / "exported"), "--check", "vllm"])


def test_an_export_is_compared_with_what_vllm_serves(full_run, tmp_path, vllm, capsys):
    assert checked(full_run, tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"serves it as it was trained: 8 greedy completions of \d+ tokens, whose log-probabilities", out)
    (llm,) = vllm.built
    assert llm.options["dtype"] == "float32"
    assert llm.options["generation_config"] == "auto"  # end tokens are those that the folder names


def test_an_adapter_is_compared_too(tmp_path, vllm):
    tokenizer = ByteTokenizer().build()
    build_model(None, config=LLAMA, tokenizer=tokenizer).save_pretrained(tmp_path / "base")
    lora = {"r": 4, "init_lora_weights": False}
    model = LM(with_lora(build_model(str(tmp_path / "base")), lora))
    export_model(model, tmp_path / "adapter", tokenizer)
    checked = check_vllm(tmp_path / "adapter")
    assert checked.difference < 1e-4
    (llm,) = vllm.built
    assert llm.options["model"] == str(tmp_path / "base")
    assert llm.options["max_lora_rank"] == 8


def add_noise(served, monkeypatch):
    with torch.no_grad():
        for weight in served.hf.parameters():
            weight.add_(0.01 * torch.randn_like(weight))


def shift(served, monkeypatch):
    complete = served.complete
    shifted = lambda *args: (complete(*args)[0], [logp - 0.01 for logp in complete(*args)[1]], "stop")  # noqa: E731
    monkeypatch.setattr(served, "complete", shifted)


def end_early(served, monkeypatch):
    complete = served.complete
    cut = lambda *args: tuple(part[:3] for part in complete(*args))  # noqa: E731
    monkeypatch.setattr(served, "complete", cut)


FAULTS = {
    "serves another model than was trained": add_noise,
    "differ by up to 0.01 nats": shift,
    "ends completions elsewhere": end_early,
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_vllm_serves_otherwise_is_an_error(full_run, tmp_path, vllm, capsys, monkeypatch, message):
    load = stand_ins.Model.__init__

    def load_with_fault(self, *args):
        load(self, *args)
        FAULTS[message](self, monkeypatch)

    monkeypatch.setattr(stand_ins.Model, "__init__", load_with_fault)
    assert checked(full_run, tmp_path) == 2
    assert message in capsys.readouterr().err


def test_without_vllm_nothing_is_exported(full_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert checked(full_run, tmp_path) == 2
    assert "install the extra: pip install 'oumi_pl[vllm]'" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


# ---- GGUF


@pytest.fixture
def gguf_file():
    pytest.importorskip("gguf", reason="needs gguf: pip install 'oumi_pl[gguf]'")
    from oumi_pl.models import gguf_file

    return gguf_file


def to_gguf(run, output):
    return ["export", "--checkpoint", str(run), "--format", "gguf", "--output", str(output)]


def test_a_checkpoint_of_another_architecture_is_refused_before_it_is_written(
    lora_run, tmp_path, gguf_file, monkeypatch, capsys
):
    monkeypatch.delitem(gguf_file.ARCHITECTURES, "llama")
    monkeypatch.setattr("oumi_pl.commands.export._save", lambda *args, **kwargs: pytest.fail("written"))
    assert main(to_gguf(lora_run, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "--format gguf: the architecture llama is not written here" in message
    # commands that work as they are, of folders that exist then
    assert f"  oumi_pl export --checkpoint {lora_run} --output DIR --merge\n" in message
    assert "  python convert_hf_to_gguf.py DIR --outfile model.gguf --outtype f16" in message
    assert str(tmp_path) not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["modelfile", "write_gguf"])
def test_a_gguf_export_that_fails_leaves_nothing(full_run, tmp_path, gguf_file, monkeypatch, step):
    written = []
    whole = gguf_file.write_gguf
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *args, **kwargs: written.append(whole(*args, **kwargs)))

    def failing(*args, **kwargs):
        if step == "write_gguf":
            args[1].write_text("a part")
        raise UserError("no space left")

    monkeypatch.setattr(gguf_file, step, failing)
    assert main(to_gguf(full_run, tmp_path / "out")) == 2
    assert written == []  # what is written of the model is the last step
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_export_of_a_checkpoint_is_complete(full_run, tmp_path, gguf_file):
    (tmp_path / "out").mkdir()
    assert main(to_gguf(full_run, tmp_path / "out")) == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "out",
        "out/Modelfile",
        "out/model.gguf",
    ]
