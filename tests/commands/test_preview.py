"""`preview`: the data of a recipe as `fit` reads them, no weights, one message for a mistake."""

import pytest

from oumi_pl.commands import preview as command
from tests.command_line import GONE, CommandLine, jsonl
from tests.tiny import pairs


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a preview builds a model")

    monkeypatch.setattr("oumi_pl.models.build.build_model", refuse)
    monkeypatch.setattr("oumi_pl.modules.base.build_model", refuse)


def test_shows_rows_and_the_report_and_leaves_nothing_behind(cli):
    before = cli.files()
    out = cli.works("preview", "--config", "r.yaml", "-n", 2)
    assert "train row 2" in out
    assert "train row 3" not in out
    assert "rows.jsonl:1 · " in out
    assert out.count("⟦") == 3  # in the legend, and an answer in each row
    assert "<|im_start|>assistant⏎\n⟦" in out
    assert "rows and tokens" in out
    assert "tokenizer: ByteTokenizer, 260 tokens" in out
    assert "\x1b" not in out
    assert cli.files() == before


def test_takes_overrides_and_several_recipes_as_fit_does(cli):
    cli.write("more.yaml", "data: {init_args: {max_length: 90, overflow: drop}}")
    cli.write("mine.jsonl", jsonl({"prompt": "two and two? ", "completion": "four"}))
    out = cli.works("preview", "--config", "r.yaml", "--config", "more.yaml", "--data.train", "mine.jsonl")
    assert "two and two? ⟦four<|im_end|>⟧" in out
    assert "data.max_lenght" in cli.fails("preview", "--config", "r.yaml", "--data.max_lenght", 3)
    assert "did you mean '--rows'?" in cli.fails("preview", "--config", "r.yaml", "--row-s", 3)


def test_rows_are_chosen(cli):
    out = cli.works("preview", "--config", "r.yaml", "--row", 7, 3, "--tokens")
    assert out.index("train row 7") < out.index("train row 3")
    assert "258  <|im_start|>" in out
    out = cli.works("preview", "--config", "r.yaml", "--data.max_length", 70, "--cut", "-n", 1)
    assert out.count("━━ train row") == 1
    assert "cut off here" in out
    assert "no train row was cut" in cli.works("preview", "--config", "r.yaml", "--data.max_length", 900, "--cut")


def test_packs(cli):
    out = cli.works("preview", "--config", "r.yaml", "--packs", "--data.packing", "true", "--data.max_length", 400)
    assert "packs of the first micro-batch: 2 of 400 tokens" in out
    assert "(row " in out
    assert "packing is off" in cli.fails("preview", "--config", "r.yaml", "--packs")


def test_pairs_show_the_prompt_once(cli):
    cli.write("pairs.jsonl", jsonl(*pairs(3)))
    cli.recipe({"model.class_path": "DPO", "data.class_path": "DPOData", "data.init_args.train": "pairs.jsonl"})
    out = cli.works("preview", "--config", "r.yaml", "-n", 1)
    assert out.count("<|im_start|>user") == 1
    assert out.index("── prompt, the same for both") < out.index("── chosen (") < out.index("── rejected (")
    assert "saved by sharing prompts" in out


def test_documents_that_are_streamed_are_not_read_to_the_end(cli):
    good = jsonl(*({"text": f"document {i} " * 9} for i in range(600)))
    cli.write("text.jsonl", good + "{broken")
    settings = {"streaming": True, "shuffle_buffer": 2, "max_length": 64, "train": "text.jsonl"}
    cli.recipe(
        {"model.class_path": "Pretrain", "data.class_path": "PretrainData"}
        | {f"data.init_args.{key}": value for key, value in settings.items()}
    )
    out = cli.works("preview", "--config", "r.yaml", "--row", 3)
    assert "train row 3" in out
    assert "tokenized while it is streamed" in out
    assert "cut from one stream" in cli.fails("preview", "--config", "r.yaml", "--cut")


def test_the_tokenizer_of_a_recipe_that_was_not_run_is_that_recipes(cli):
    cli.write("pairs.jsonl", jsonl(*pairs(3)))
    changes = {"model.class_path": "DPO", "data.class_path": "DPOData", "data.init_args.train": "pairs.jsonl"}
    changes |= {"model.init_args.model": "recipe:quickstart/sft", "model.init_args.config": GONE}
    cli.recipe(changes | {"data.init_args.tokenizer": GONE})
    out = cli.works("preview", "--config", "r.yaml")
    assert "recipe:quickstart/sft has no finished run in runs yet" in out
    assert "260 tokens" in out


def test_the_reference_and_the_teacher_are_named(cli):
    cli.write("pairs.jsonl", jsonl(*pairs(3)))
    changes = {"model.class_path": "DPO", "data.class_path": "DPOData", "data.init_args.train": "pairs.jsonl"}
    cli.recipe(changes)
    assert "reference: the model at the start" in cli.works("preview", "--config", "r.yaml")
    cli.recipe(changes | {"model.init_args.reference": "org/older"})
    assert "reference: org/older" in cli.works("preview", "--config", "r.yaml")
    cli.recipe({"model.class_path": "Distill", "model.init_args.teacher": "org/large"})
    assert "teacher: org/large" in cli.works("preview", "--config", "r.yaml")


def test_a_page(cli):
    cli.write("rows.jsonl", jsonl({"prompt": "<script>alert(1)</script>", "completion": "no"}))
    cli.works("preview", "--config", "r.yaml", "--html", "page.html")
    cli.works("preview", "--config", "r.yaml", "--html", "page.html")
    page = (cli.directory / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;" in page
    assert "exists" in cli.fails("preview", "--config", "r.yaml", "--html", "rows.jsonl")
    assert "no folder" in cli.fails("preview", "--config", "r.yaml", "--html", "no/page.html")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--row", "17"], "--row 17: the train split has rows 1 to 16"),
        (["--split", "trian"], "did you mean 'train'?"),
        (["--split", "validation"], "names no source in data.validation"),
        (["--rows", "0"], "has to be at least 1"),
        (["--row", "1", "--cut"], "not allowed with argument"),
        (["--data.train", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_mistakes_are_one_message(cli, args, message):
    assert message in cli.fails("preview", "--config", "r.yaml", *args)


def test_says_what_it_needs(cli):
    assert "preview needs a recipe" in cli.fails("preview")
    assert "no recipe 'quickstart/stf'; did you mean" in cli.fails("preview", "--config", "quickstart/stf")


def test_help_has_an_example_of_the_main_uses(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    for use in ("--row 17 --tokens", "--longest", "--cut", "--html mine.html"):
        assert use in out


def test_sources_of_a_mixture_are_distinguished(cli):
    cli.write("more.jsonl", jsonl({"prompt": "a? ", "completion": "b"}, {"prompt": "", "completion": ""}))
    mixture = [{"path": "rows.jsonl", "weight": 3}, {"path": "more.jsonl", "weight": 1}]
    cli.recipe({"data.init_args.train": mixture, "data.init_args.validation": "rows.jsonl"})
    out = cli.works("preview", "--config", "r.yaml", "--row", 17, "--data.max_length", 256)
    assert "more.jsonl:1 · " in out
    table = [line.split() for line in out[out.index("sources of train") :].splitlines()]
    lines = {name: cells for name, *cells in filter(None, table) if len(cells) == 7}
    assert lines["rows.jsonl"][:4] == ["16", "16", "0", "75.0%"]
    assert lines["more.jsonl"][:4] == ["2", "1", "1", "25.0%"]
    # 13 and 4 rows of an epoch of 17, and their tokens and targets
    shares = [[float(share.strip(",%")) for share in lines[name][4:]] for name in ("rows.jsonl", "more.jsonl")]
    assert [own[0] for own in shares] == [76.5, 23.5]
    assert [sum(both) for both in zip(*shares, strict=True)] == pytest.approx([100, 100, 100])
    assert shares[0][1] > 90  # the other source has short rows
