"""The command line on tiny models: every config parses, every stage runs alone, every mistake is one clear line."""

import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import yaml
from cli_runs import CONFIGS, quickstart, run, save_job
from transformers import AutoModelForCausalLM

import callbacks
from lightning_moe import __version__, cli
from lightning_moe.allocation import TBCoverage, build_method
from lightning_moe.evaluation.stages import load_stages
from lightning_moe.files import read_json
from lightning_moe.records import PrunePlan

HUB = re.compile(r"paper_a_|qwen3_30b")
PAPER_B = re.compile(r"paper_b_")
COMMAND_OF = {"quickstart_calibrate": "calibrate", "quickstart_compare": "compare", "quickstart_teach": "teach"}
COMMAND_OF |= {"smollm2_dense_tasks": "evaluate"} | {
    f"compare_{name}": "compare" for name in ("quick", "small", "smollm2", "smollm2_tasks", "matrix")
}
BELOW = {
    "recover_small": "quickstart.yaml",
    "early_stopping": "quickstart.yaml",
    "my_model": "recovery.yaml",
    "ddp_recovery": "recovery.yaml",
    "fsdp2_recovery": "recovery.yaml",
}


class ParseOnly(cli.CompressionCLI):
    """Stops after the parser: nothing is built, downloaded or run."""

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parse(monkeypatch, *arguments, command="fit"):
    monkeypatch.setattr(cli, "CompressionCLI", ParseOnly)
    monkeypatch.setattr(sys, "argv", ["lightning_moe"])  # LightningCLI warns when it gets both
    return cli.train([command, *arguments]).config[command]


def stacked(path):
    """The `--config` arguments that the header of a config asks for, itself the last."""
    if path.parent.name == "data":
        below = ["quickstart.yaml"]
    elif PAPER_B.search(path.name):
        below = ["paper_b.yaml"]
    elif HUB.search(path.name):
        below = ["paper_a.yaml", "data/c4.yaml", "data/alpaca.yaml"]
    else:
        below = [BELOW[path.stem]] if path.stem in BELOW else []
    return [part for file in [*(CONFIGS / name for name in below), path] for part in ("--config", str(file))]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_as_its_header_says(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = "validate" if path.stem.startswith("paper_b") else COMMAND_OF.get(path.stem, "fit")
    assert f"python -m lightning_moe {command}" in header or path.parent.name == "data"
    if command not in ("fit", "validate"):
        assert cli.command_parser(command).parse_args(stacked(path)).model == yaml.safe_load(path.read_text())["model"]
        return
    config = parse(monkeypatch, *stacked(path), command=command)
    written = yaml.safe_load(path.read_text())
    # What the overlay says is what comes out; what it does not say stays as it was below.
    for group in set(written) & set(cli.CALLBACK_GROUPS):
        for key, value in written[group]["init_args"].items():
            assert config[group].init_args[key] == value or isinstance(value, dict)
    if HUB.search(path.name):
        assert config.recovery.init_args.adapter.router_rank == 4
        assert config.trainer.gradient_clip_val == 0.5
        assert set(config.data.calibration) == {"c4"}
        assert set(config.data.train) == {"alpaca"}
        assert config.data.tokenizer == config.model.init_args.source


def test_paper_a_overlays_keep_the_method_below(monkeypatch):
    config = parse(monkeypatch, *stacked(CONFIGS / "paper_a_qwen15_p25_q4.yaml"))
    assert config.pruning.init_args.method == "paper_a"
    assert config.pruning.init_args.prune_ratio == 0.25
    assert config.model.init_args.router_learning_rate == 1e-6
    ours = parse(monkeypatch, *stacked(CONFIGS / "qwen3_30b_24gb.yaml"))
    assert (ours.pruning.init_args.method, ours.pruning.init_args.method_args) == ("exact_global", {"align": 64})
    assert ours.model.init_args.optimizer == "paged_adamw8bit"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("paper_b_*.yaml")), ids=lambda path: path.stem)
def test_paper_b_overlays_cover_wikitext_and_c4(path, monkeypatch):
    config = parse(monkeypatch, *stacked(path), command="validate")
    given = config.expert_pruning.init_args
    assert (given.method, given.prune_ratio, config.pruning) == ("tb_coverage", None, None)
    assert given.keep_ratio == int(path.stem[-2:]) / 100
    assert build_method(given.method, **given.method_args) == TBCoverage()
    assert list(config.data.calibration) == ["wikitext2", "c4"]
    assert list(config.data.validation) == ["wikitext2", "c4"]
    assert config.data.tokenizer == config.model.init_args.source
    assert config.model.init_args.source in ("Qwen/Qwen1.5-MoE-A2.7B", "deepseek-ai/deepseek-moe-16b-base")


def test_data_configs_parse_for_calibrate_too():
    for path in sorted((CONFIGS / "data").glob("*.yaml")):
        arguments = ["--config", str(CONFIGS / "quickstart_calibrate.yaml"), "--config", str(path)]
        data = cli.command_parser("calibrate").parse_args(arguments).data
        written = yaml.safe_load(path.read_text())["data"]
        assert set(data.calibration) == set(written.get("calibration", data.calibration))


def test_one_value_of_a_callback_is_overridden_by_flag(monkeypatch):
    flags = ["--pruning.prune_ratio", "0.25", "--recovery.adapter.expert_rank", "5", "--report.name", "other"]
    config = parse(monkeypatch, *stacked(CONFIGS / "quickstart.yaml"), *flags)
    assert config.pruning.init_args.prune_ratio == 0.25
    assert config.recovery.init_args.adapter.expert_rank == 5
    assert config.recovery.init_args.quantize == "nf4"
    assert config.report.init_args.name == "other"
    assert config.export.init_args.adapter_dtype == "float16"


def test_pretraining_has_no_compression(monkeypatch):
    config = parse(monkeypatch, *stacked(CONFIGS / "pretrain_small_moe.yaml"))
    assert all(config[group] is None for group in ("calibration", "pruning", "recovery", "report"))


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_option_of_a_command_has_a_help_text(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m lightning_moe {name}" in capsys.readouterr().out
    without = [action.dest for action in cli.command_parser(name)._actions if not action.help and action.dest != "data"]
    assert without == []


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_every_option_of_training_has_a_help_text(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for group in (*cli.CALLBACK_GROUPS, "data.sequence_length", "data.calibration", "model"):
        assert f"--{group}" in shown
    assert "Tokens in a training row" in shown


@pytest.mark.parametrize("group", sorted(cli.CALLBACK_GROUPS))
def test_every_argument_of_a_callback_has_a_help_text(group, capsys):
    callback = getattr(callbacks, cli.CALLBACK_GROUPS[group])
    with pytest.raises(SystemExit):
        cli.main(["fit", f"--{group}.help", f"callbacks.{callback.__name__}"])
    shown = " ".join(capsys.readouterr().out.split())
    for line in (callback.__doc__ or "").partition("Args:")[2].strip().splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and re.fullmatch(r"[a-z_]+", name):
            assert f"--{group}.{name}" in shown
            assert text.split("`")[0].strip()[:30] in shown


def test_overview_lists_every_subcommand(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in ("calibrate", "plan", "prune", "fit", "validate", "evaluate"))
    assert all(f"\n  {name}" in shown for name in ("compare", "export", "report"))
    assert cli.TRACEBACK_VARIABLE in shown


def test_versions_in_one_line(capsys):
    cli.main(["--version"])
    begins = rf"lightning_moe {__version__} \(Python 3\.[\d.]+, torch {re.escape(torch.__version__)}, "
    line = begins + r".*lightning \d[\d.]+\)\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_moe", "prun"], capture_output=True, text=True, cwd=CONFIGS.parent, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "python -m lightning_moe: unknown subcommand 'prun'. Did you mean `prune`? "
        "`python -m lightning_moe --help` lists them.\n"
    )
    assert done.stdout == ""


# The stages, each alone from files.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_job(tmp_path_factory.mktemp("cli"))


def test_the_stages_alone_from_files(folder, caplog):
    out, data = folder / "stages_run", ("--config", folder / "data.yaml")
    statistics, plan = out / "statistics.safetensors", out / "plans" / "half.json"
    run("calibrate", *data, "--model", folder / "model", "--out", statistics)
    run(
        "plan",
        "--statistics",
        statistics,
        "--out",
        plan,
        "--prune_ratio",
        0.5,
        "--method_args",
        "{align: 8, expert_floor: 8}",
    )
    assert PrunePlan.load(plan).num_kept == 256
    run("plan", "--statistics", statistics, "--out", out / "kept.json", "--keep_ratio", 0.75)
    kept = PrunePlan.load(out / "kept.json")
    assert (kept.prune_ratio, kept.num_kept, kept.align) == (0.25, 384, 16)
    run("prune", *data, "--model", folder / "model", "--plan", plan, "--out", out / "pruned")
    assert AutoModelForCausalLM.from_pretrained(out / "pruned").generate(max_new_tokens=2).numel()
    run("evaluate", *data, "--model", folder / "model", "--out", out, "--name", "dense")
    (said,) = (record.message for record in caplog.records if record.message.startswith("dense: "))
    assert said.startswith("dense: ")
    assert said.endswith(f" active. Written to {out / 'stages' / 'dense.json'}.")
    run("evaluate", *data, "--model", out / "pruned", "--out", out, "--name", "half_nf4", "--prune_ratio", 0.5)
    run("export", "--model", out / "pruned", "--out", out / "exports", "--formats", "[ragged, padded]")
    assert [row["format"] for row in read_json(out / "exports" / "exports.json", what="")] == ["ragged", "padded"]
    assert (out / "exports" / "padded" / "tokenizer.json").is_file()  # written by `prune` beside the model
    run("report", "--folder", out, "--statistics", statistics)
    summary = read_json(out / "summary.json", what="summary")
    assert summary["dense"]["bytes"] > summary["stages"][0]["bytes"]
    assert summary["stages"][0]["name"] == "half_nf4"
    assert summary["control"] is None
    assert (out / "report" / "report.html").is_file()


def test_compare_makes_its_rows(folder):
    out, data = folder / "compare_run", ("--config", folder / "data.yaml")
    run("calibrate", *data, "--model", folder / "model", "--out", out / "s.safetensors", "--moments", "false")
    stages = [
        {"name": "cut", "prune_ratio": 0.5},
        {"name": "cut_nf4", "prune_ratio": 0.5, "bits": 4},
        {"name": "uniform", "prune_ratio": 0.5, "method": "uniform", "repair": False},
    ]
    (folder / "compare.yaml").write_text(yaml.safe_dump({"stages": stages}))
    arguments = ("--model", folder / "model", "--statistics", out / "s.safetensors", "--out", out)
    run("compare", *data, "--config", folder / "compare.yaml", *arguments)
    rows = load_stages(out)
    assert set(rows) == {"dense", "cut", "cut_nf4", "uniform"}
    assert rows["cut_nf4"]["bits"] == 4
    assert not rows["uniform"]["repair"]


def test_stock_and_nf4_exports_of_a_dense_model(folder):
    out = folder / "dense_exports"
    run("export", "--model", folder / "model", "--out", out, "--formats", "[stock, nf4]")
    assert not (out / "stock" / "tokenizer.json").exists()  # there was none beside the model
    assert [row["format"] for row in read_json(out / "exports.json", what="")] == ["stock", "nf4"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_fit_with_the_quickstart_config(folder):
    quickstart(folder, "--pruning.prune_ratio", "0.25", "--report.name", "recovered_25_nf4")
    rows = load_stages(folder / "fit")
    assert set(rows) == {"recovered_25_nf4", "recovered_25_nf4_merged"}
    assert rows["recovered_25_nf4"]["prune_ratio"] == 0.25


def test_another_package_called_callbacks_is_noticed(monkeypatch):
    monkeypatch.setattr(cli, "callbacks", ModuleType("callbacks"))
    with pytest.raises(SystemExit, match=r"Another package called `callbacks` .* shadows ours"):
        cli.main(["--help"])
