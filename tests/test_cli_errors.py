"""What a user can get wrong on the command line: one clear line, no traceback."""

import re

import pytest
import torch
import yaml
from cli_runs import CONFIGS, quickstart, run, save_job
from tiny_runs import save_model

from lightning_moe import cli
from lightning_moe.commands import exporting
from lightning_moe.files import write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_job(tmp_path_factory.mktemp("cli_errors"))


def refused(capsys, *, match, code, call):
    """The process stops with this code and says one line, which matches."""
    with pytest.raises(SystemExit) as stopped:
        call()
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("python -m lightning_moe:")]
    assert stopped.value.code == code
    assert len(lines) == 1
    assert error.endswith(f"{lines[0]}\n")
    assert "Traceback" not in error
    assert re.search(match, lines[0]), lines[0]


WRONG_FLAGS = {
    "unknown method": (["--pruning.method", "magic"], 1, r"one of \['exact_global', .* got 'magic'"),
    "ratio above 1": (["--pruning.prune_ratio", "1.5"], 1, r"fit: `prune_ratio` must be in \[0, 1\), got 1.5"),
    "ratio below 0": (["--pruning.prune_ratio", "-0.5"], 1, r"fit: `prune_ratio` must be in \[0, 1\), got -0.5"),
    "ratio that is no number": (
        ["--pruning.prune_ratio", "half"],
        2,
        r"`prune_ratio`: Expected a number\. Got half\. `python",
    ),
    "negative rank": (["--recovery.adapter.expert_rank", "-2"], 1, "`expert_rank` must be 0 .* got -2"),
    "no ranks": (
        [f"--recovery.adapter.{part}_rank=0" for part in ("expert", "router", "attention")],
        1,
        "Every adapter rank is 0 and `train_norms` is off",
    ),
    "unknown model folder": (
        ["--model.init_args.source", "./nowhere/model"],
        1,
        "There is no model at './nowhere/model': no folder with a config.json",
    ),
    "unknown asset": (
        ["--model.init_args.source", "asset:large_moe"],
        1,
        "No shipped file or folder is called 'large_moe'",
    ),
    "bad optimizer": (["--model.init_args.optimizer", "sgd"], 2, r"'adamw', 'adamw8bit', 'paged_adamw8bit'.*sgd"),
    "bad quantize": (["--recovery.quantize", "int8"], 2, r"'nf4', 'none'.*int8"),
    "bad export format": (["--export.formats", "[gguf]"], 2, r"'adapter', 'merged'.*gguf"),
    "no export format": (["--export.formats", "[]"], 1, "Name at least one export format"),
    "warmup out of range": (["--model.init_args.warmup_ratio", "1.5"], 1, "`warmup_ratio` is a share .* got 1.5"),
    "misspelled callback key": (["--pruning.prune_ration", "0.5"], 2, "'prune_ration' is not accepted.*--help"),
    "misspelled data key": (["--data.sequence_lenght", "8"], 2, "sequence_lenght"),
    "misspelled group": (["--prunning.prune_ratio", "0.5"], 2, "prunning"),
    "bad method setting": (["--pruning.method_args", "{aling: 8}"], 1, r"has the settings .* got \['aling'\]"),
    "align": (["--pruning.method_args", "{align: 0}"], 1, "`align` must be a whole number >= 1, got 0"),
    "two ways to prune": (["--pruning.schedule", "[[1, 0.5]]"], 1, "Give exactly one of `prune_ratio`, `keep_ratio`"),
    "missing config": (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    "unknown tokenizer": (
        ["--data.tokenizer", "./nowhere/tokenizer"],
        1,
        "No tokenizer found at './nowhere/tokenizer'",
    ),
    "rows too short": (["--data.sequence_length", "1"], 1, "`sequence_length` must be at least 2, got 1"),
    "statistics that are none": (
        ["--calibration.file", str(CONFIGS / "quickstart.yaml")],
        1,
        "not a readable|not a valid",
    ),
    "precision": (["--trainer.precision", "bf16-true"], 1, "`precision: bf16-true` would cast them"),
    "report name": (["--report.name", "a/b"], 1, "must be a plain file name, got 'a/b'"),
}


@pytest.mark.parametrize("mistake", list(WRONG_FLAGS))
def test_a_mistake_in_the_quickstart_is_one_line(mistake, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags, code, match = WRONG_FLAGS[mistake]
    refused(capsys, match=match, code=code, call=lambda: quickstart(folder, *flags))


def test_a_misspelled_key_in_a_file(folder, capsys):
    wrong = folder / "wrong.yaml"
    wrong.write_text("recovery: {class_path: callbacks.Recovery, init_args: {adaptor: {expert_rank: 2}}}\n")
    refused(capsys, match="adaptor", code=2, call=lambda: quickstart(folder, "--config", str(wrong)))


def test_yaml_that_is_none(folder, capsys):
    wrong = folder / "broken.yaml"
    wrong.write_text("trainer: [unclosed\n")
    refused(capsys, match="broken.yaml|pars", code=2, call=lambda: quickstart(folder, "--config", str(wrong)))


CORPORA = {
    "missing": (None, "Corpus 'a': no file found at '.*corpus_missing.jsonl'"),
    "empty": ("", "Corpus 'a': .*(empty|no records|cannot read)"),
    "other field": ('{"content": "x"}\n', "Corpus 'a': .* has no field 'text', only content"),
    "no JSON": ("not json\n", "Corpus 'a': cannot read"),
    "too short": ('{"text": "x"}\n', "Corpus 'a' has . tokens, less than one row of 32 to train on"),
}


@pytest.mark.parametrize("kind", list(CORPORA))
def test_a_corpus_that_cannot_be_used(kind, folder, capsys):
    content, match = CORPORA[kind]
    file = folder / f"corpus_{kind.replace(' ', '_')}.jsonl"
    if content is not None:
        file.write_text(content)
    (folder / "corpus.yaml").write_text(yaml.safe_dump({"data": {"train": {"a": {"source": str(file)}}}}))
    arguments = ("--config", str(folder / "corpus.yaml"))
    refused(capsys, match=match, code=1, call=lambda: quickstart(folder, *arguments))


def test_a_model_type_that_is_not_supported(folder, capsys, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1, hidden_size=64).save_pretrained(tmp_path)
    flags = ("--model.init_args.source", str(tmp_path))
    refused(capsys, match="llama.*qwen3_moe", code=1, call=lambda: quickstart(folder, *flags))


def test_nf4_needs_whole_blocks(folder, capsys, tmp_path):
    source = save_model(tmp_path / "narrow", hidden_size=96)
    flags = ("--model.init_args.source", source)
    refused(capsys, match="multiple of 64", code=1, call=lambda: quickstart(folder, *flags))


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["plan", "--statistics", "nowhere", "--out", "x", "--prune_ratio", "0.5"], 1, "There is no .* at 'nowhere'"),
        (["plan", "--statistics", "x", "--out", "x", "--prune_ratio", "0.5", "--method", "magic"], 1, "got 'magic'"),
        (["plan", "--statistics", "x", "--out", "x"], 1, "how much to cut: `prune_ratio`, `keep_ratio`, `budget`"),
        (["plan", "--out", "x"], 1, "name `statistics` .*name its `config_json`. Got `out`"),
        (["plan", "--prune_ration", "1"], 2, "prune_ration"),
        (["plan", "--bits", "8"], 2, r"plan: `bits`: Expected one of 4, 16\. Got 8\. `python"),
        (["plan", "--corpora", "code"], 2, r"`corpora`: Expected a list, such as `\[one, two\]`\. Got code\. `"),
        (["plan", "--method_args", "align=16"], 2, r"Expected a mapping, such as `{name: value}`\. Got align=16\."),
        (["fit"], 2, "fit: the following arguments are required: `data.tokenizer`, `model`"),
        (["pruned"], 2, "unknown subcommand 'pruned'. Did you mean `prune`\\? "),
        (["--config", "x.yaml", "fit"], 2, "subcommand comes first .*, got '--config'. It is one of calibrate, plan"),
        (["report", "--folder", "nowhere"], 1, "There are no rows of results below 'nowhere/stages'"),
        (["export", "--model", "./nowhere/x", "--out", "x", "--formats", "[gguf]"], 2, "gguf"),
        (["export", "--model", "./nowhere/x", "--out", "x", "--formats", "[ragged]"], 1, "There is no model at"),
        (
            ["evaluate", "--model", "./nowhere/x", "--out", "x", "--data.tokenizer", "asset:small_moe"],
            1,
            "There is no model",
        ),
        (["calibrate", "--model", "x", "--out", "x", "--data.tokenizer", "t", "--device", "tpu"], 2, "tpu"),
    ],
)
def test_mistakes_of_the_other_commands(arguments, code, match, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(capsys, match=match, code=code, call=lambda: cli.main(arguments))


def test_a_plan_of_another_model_is_refused_by_prune(folder, capsys, tmp_path):
    out, data = tmp_path, ("--config", folder / "data.yaml")
    run("calibrate", *data, "--model", folder / "model", "--out", out / "s.safetensors")
    run("plan", "--statistics", out / "s.safetensors", "--out", out / "plan.json", "--prune_ratio", 0.5)
    other = save_model(out / "other", seed=1)
    arguments = (*data, "--model", other, "--plan", out / "plan.json", "--out", out / "pruned")
    refused(capsys, match="The plan was made for another model", code=1, call=lambda: run("prune", *arguments))


def test_a_report_without_the_unpruned_model_says_what_to_run(folder, capsys, tmp_path):
    row = {"name": "cut", "nll": 1.0, "prune_ratio": 0.5}
    write_json(tmp_path / "stages" / "cut.json", row)
    match = "compares with a row named `dense`, and there is none: run `evaluate --name dense` on the unpruned model"
    refused(capsys, match=match, code=1, call=lambda: run("report", "--folder", tmp_path))


@pytest.mark.parametrize("mistake", ["foreign folder", "tokenizer"])
def test_an_export_is_refused_before_anything_is_packed(mistake, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "export_streamed", None)
    source = save_model(tmp_path / "model")
    wrong = tmp_path / ("out/nf4/thesis.tex" if mistake == "foreign folder" else "model/tokenizer.json")
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text("{years of work")
    match = "holds something other than a model" if mistake == "foreign folder" else "No tokenizer found at '.*model'"
    arguments = ("--model", source, "--out", tmp_path / "out", "--formats", "[nf4]")
    refused(capsys, match=match, code=1, call=lambda: run("export", *arguments))
    assert wrong.read_text() == "{years of work"


def test_the_environment_asks_for_the_traceback(folder, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="prune_ratio"):
        quickstart(folder, "--pruning.prune_ratio", "1.5")


@pytest.mark.parametrize("name", ["calibrate", "prune", "plan"])
def test_an_interruption_is_one_line(name, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_command", interrupted)
    goes_on = "" if name == "plan" else "; the same command goes on where it stopped"
    refused(capsys, match=rf"{name}: interrupted{goes_on}\.$", code=130, call=lambda: cli.main([name]))
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(KeyboardInterrupt):
        cli.main([name])


def test_a_matrix_that_cannot_be_solved_is_one_line(capsys, monkeypatch):
    def singular(*_):
        torch.linalg.inv(torch.zeros(2, 2))

    monkeypatch.setattr(cli, "run_command", singular)
    refused(capsys, match="prune: .*singular", code=1, call=lambda: cli.main(["prune"]))


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    def broken(**_):
        raise KeyError("a mistake of ours")

    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    monkeypatch.setattr(cli, "command_parser", lambda name: cli.CommandParser())
    with pytest.raises(KeyError, match="a mistake of ours"):
        cli.main(["report"])


def test_one_line_of_what_the_parser_says():
    told = (
        'Parser key "x":\n  Does not validate against any of the Union subtypes\n  Subtypes: [1]\n  Errors:\n'
        "    - `a` must be 1.\n    - Expected a <class 'NoneType'>\n  Given value type: <class 'int'>\n  Given value: 3"
    )
    assert cli.one_line(ValueError(told)) == "`x`: `a` must be 1. Got 3."
    flag = "Expected a <class 'float'>\n  Given value: NestedArg(key='prune_ratio', val='half')"
    assert cli.one_line(ValueError(flag)) == "Expected a number. Got half."
    assert cli.one_line(ValueError()) == "ValueError"
