"""The page "Python and notebooks": each of its blocks runs, in order and in one process, and does what it says."""

import json
import re
from pathlib import Path

import pytest
import torch

from oumi_pl.modules.sft import SFT
from tests.tiny import distance

FOLDER = Path(__file__).parents[2] / "recipes" / "notebooks"
PAGE = FOLDER / "README.md"
NOTEBOOK = FOLDER / "first_steps.ipynb"


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that all blocks leave, and the initial weights of the module that was thawed."""
    folder = tmp_path_factory.mktemp("page")
    names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        for i, block in enumerate(blocks(), 1):
            exec(compile(block, f"<block {i} of the page>", "exec"), names)
        yield names


def test_a_run_takes_twenty_lines():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_run_learns_and_its_sources_are_named(page):
    assert float(page["trainer"].callback_metrics["val/loss"]) < 4.0
    kept = {source["source"]: source["kept"] for source in page["mixed"].report()["train"]["sources"]}
    assert kept == {"sums": 3, "rows": 400, "file": 100}


def test_losses_logits_and_log_probabilities_are_those_of_transformers(page):
    """A plain forward pass, example by example."""
    batch, hf = page["batch"], page["module"].causal_lm.hf
    logps, logits, start = [], [], 0
    data = page["data"]
    with torch.no_grad():
        for i in range(8):
            example = data.examples("validation")[i]
            ids = torch.from_numpy(example.input_ids).long()
            out = hf(ids[None]).logits[0, :-1][torch.from_numpy(example.loss_mask)[1:]]
            targets = ids[torch.from_numpy(example.loss_mask)]
            logits.append(out)
            logps.append(out.log_softmax(-1).gather(1, targets[:, None])[:, 0])
            start += len(ids)
    assert start == batch["input_ids"].numel()
    torch.testing.assert_close(page["logps"], torch.cat(logps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(page["logits"], torch.cat(logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(page["losses"], -page["logps"], atol=1e-5, rtol=1e-5)
    assert page["hidden"].shape == (len(batch["targets"]), 32)


def test_answers_are_scored_by_all_their_tokens(page):
    hf, tokenizer = page["module"].causal_lm.hf, page["data"].tokenizer
    expected = []
    for option in page["options"]:
        prompt, answer = (tokenizer.encode(text) for text in (page["question"], option))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = hf(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(logps[len(prompt) - 1 :].sum())
    torch.testing.assert_close(page["scores"], torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_perplexity_and_preferences(page):
    assert page["perplexity"].keys() == {"small", "large"}
    assert all(1 < value < 100 for value in page["perplexity"].values())
    assert (page["better"].chosen_logratios - page["better"].rejected_logratios).mean() > 0
    assert float(page["ratios"].mean()) > 0.5


def test_norms_of_layers_are_logged_and_thawed_layers_move(page):
    logged = page["normed"].callback_metrics
    assert 0 < float(logged["grad_norm/0"]) < float(logged["train/grad_norm"])
    assert page["thawed"].causal_lm.base.model.layers[0].self_attn.q_proj.weight.requires_grad
    moments = page["thawed"].trainer.optimizers[0].state
    thawed = page["thawed"].causal_lm.base.model.layers[0].self_attn.q_proj.weight
    assert int(moments[thawed]["step"]) == 2, "of 4 steps"


def test_checkpoints_are_averaged(page):
    states = [torch.load(path, weights_only=True)["state_dict"] for path in page["last"]]
    assert distance(states[0], states[2]) > 1e-3
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    assert distance(dict(page["averaged"].state_dict()), mean) < 1e-6


def test_seeds_differ_and_notebooks_show_pages(page):
    assert len(set(page["values"])) == 3
    for name, text in {
        "data": "carry loss",
        "module": "parameters, ",
        "history": "Loss, nats per target token",
        "samples": "completion",
    }.items():
        html = page[name]._repr_html_()
        assert html.startswith("<iframe srcdoc=")
        assert text in html
        assert len(html) < 200_000
    assert "not built yet" in SFT(config=page["shape"])._repr_html_()


def test_data_that_can_not_be_shown_say_why(page):
    html = page["SFTData"]("nothing.jsonl", tokenizer=page["ByteTokenizer"]())._repr_html_()
    assert "no such file or directory" in html


# ---- the notebook


def cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def htmls(notebook):
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    return ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]


def shows_preview_curves_samples_and_layers(notebook):
    preview, history, samples, module = htmls(notebook)
    return (
        "carry loss" in preview
        and "Loss, nats per target token" in history
        and "Say it very loudly" in samples
        and "parameters" in module
    )


def test_the_notebook_holds_small_outputs_of_all_its_cells():
    notebook = json.loads(NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    assert shows_preview_curves_samples_and_layers(notebook)
    assert not [line for cell in cells(notebook) for line in "".join(cell["source"]).splitlines() if len(line) > 120]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in cells(notebook):
        cell["outputs"] = []
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    assert shows_preview_curves_samples_and_layers(notebook)
    samples = "".join(output["text"] for output in cells(notebook)[2]["outputs"] if output["output_type"] == "stream")
    assert "SHIRT!" in samples.partition("step 200")[2], "it learns"
