"""Configs and values of the thin commands: no class is made of them, nothing grows without bound, one line says why."""

from itertools import product

import pytest
import yaml
from jsonargparse import get_loader

from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.allocation.units import parse_bytes, parse_params
from lightning_moe.cli import main
from lightning_moe.commands._recovering import ShortRecovery
from lightning_moe.commands._tasks import TaskRequest
from lightning_moe.commands._yaml import check_yaml
from lightning_moe.evaluation.compare import CONTROL
from lightning_moe.evaluation.compare.grid import Grid
from lightning_moe.training.memory import RecoveryRun

DATA = {"tokenizer": "asset:small_moe"}
COMPARE = {"model": "asset:small_moe", "out": "results", "data": DATA}


def stopped(capsys, *arguments):
    """What a command says when it refuses, in one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip()
    assert stop.value.code in (1, 2)
    assert len(said.splitlines()) == 1
    return said


def test_a_command_leaves_the_parser_s_loader_as_it_was(capsys):
    before = get_loader("yaml")
    stopped(capsys, "plan")
    assert get_loader("yaml") is before


def with_config(folder, content):
    file = folder / "config.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return "--config", file


def evil_class(folder, monkeypatch):
    """A module on the path that says when it is imported."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    return {"class_path": "evil.Evil", "init_args": {}}


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("plan", ("method_args",)),
        ("plan", ("method_args", "align")),
        ("compare", ("grid",)),
        ("compare", ("grid", "methods")),
        ("compare", ("stages",)),
        ("compare", ("matrix",)),
        ("compare", ("recovery",)),
        ("compare", ("recovery", "adapter")),
        ("compare", ("data",)),
        ("compare", ("data", "train", "a")),
        ("calibrate", ("data", "calibration", "a")),
        ("teach", ("data", "train", "a")),
        ("prune", ("data", "calibration", "a")),
        ("evaluate", ("tasks",)),
        ("export", ("formats",)),
    ],
)
@pytest.mark.parametrize("form", ["mapping", "path"])
def test_no_class_is_made_or_imported_of_a_thin_command_s_config(tmp_path, monkeypatch, capsys, command, place, form):
    content = evil_class(tmp_path, monkeypatch)
    content = content if form == "mapping" else content["class_path"]
    for key in reversed(place):
        content = {key: [content] if key in ("methods", "stages", "tasks", "formats") else content}
    for key, value in (COMPARE if command == "compare" else {}).items():
        content.setdefault(key, value)
    assert "evil" in yaml.safe_dump(content)
    said = stopped(capsys, command, *with_config(tmp_path, content))
    assert "No module" not in said
    assert not (tmp_path / "ran").exists()


def test_settings_of_a_method_are_plain_values_of_every_kind(tmp_path, capsys):
    """Null, a number, a flag and a word arrive as they are: the method and not the parser speaks of them."""
    values = {"align": None, "layer_floor": 0.5, "expert_floor": 1, "protect_super_experts": False, "criterion": "no"}
    flags = ("--statistics", tmp_path / "s", "--out", tmp_path / "p.json", "--prune_ratio", "0.5")
    said = stopped(capsys, "plan", *flags, *with_config(tmp_path, {"method_args": values}))
    assert "criterion" in said
    said = stopped(capsys, "plan", *flags, "--method_args.align", "null", "--method_args.criterion", "taylor")
    assert "There is no file of statistics" in said or "There is no" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 60 + "]" * 60, "line 1 is nested more than 50 levels deep"),
        ("a: " + "[" * 30_000 + "]" * 30_000, "nested more than 50 levels deep"),
        ("\n".join(" " * depth + "a:" for depth in range(60)), "nested more than 50 levels deep"),
        ("a: &a\n  b: *a", "contains itself by an alias"),
        ("a: 1\nb: 2\na: 3", "line 3: the key `a` stands twice"),
        (
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)),
            "has more than 100000 values, by aliases that repeat one another",
        ),
    ],
)
def test_yaml_without_bounds_is_refused_before_it_is_built(tmp_path, capsys, text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        check_yaml(text)
    for command in ("plan", "fit"):
        said = stopped(capsys, command, *with_config(tmp_path, text))
        assert f"The config '{tmp_path / 'config.yaml'}' cannot be read: " in said
        assert message in said


def test_yaml_of_people_is_read():
    check_yaml("a: &common {x: 1}\nb:\n  <<: *common\n  y: [1, 2]\nc: *common\n")
    check_yaml("")
    check_yaml("just a word")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("prune_ratio: " + "9" * 5000, "config.yaml' cannot be read: line 1 has a number of more than 100 digits"),
        ("", "config.yaml' cannot be read: it is empty"),
        ("- 1\n- 2", "config.yaml' cannot be read: it is no mapping of settings"),
        ("null", "config.yaml' cannot be read: it is no mapping of settings"),
        ("data:\n", "config.yaml' cannot be read: its only key has no value"),
        ("a: [", "while parsing a flow"),
    ],
)
def test_configs_that_are_none_are_told_in_one_line(tmp_path, capsys, text, message):
    assert message in stopped(capsys, "plan", *with_config(tmp_path, text))


def test_a_config_of_other_letters_is_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfem\x00")
    said = stopped(capsys, "plan", "--config", tmp_path / "config.yaml")
    assert f"The config '{tmp_path / 'config.yaml'}' cannot be read: 'utf-8' codec can't decode byte 0xff" in said


@pytest.mark.parametrize("text", ["1e99GB", "-1GB", "nan", "infGB", "", "GB", "1.5.5GB", "0x10GB", "١٢ ZB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is not a size in bytes"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="is not a number of parameters"):
        parse_params(text)


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "99999999999TB"])
def test_sizes_beyond_any_disk_are_refused(text):
    with pytest.raises(ValueError, match="is more than a size in bytes can be"):
        parse_bytes(text)


def test_whole_numbers_beyond_any_disk_are_refused():
    for value in (10**400, -(10**400)):
        with pytest.raises(ValueError, match="a number of 1329 bits is not a size in bytes"):
            parse_bytes(value)
    assert parse_bytes("8EB".replace("E", "T")) == 8 * 10**12


ODD = ("nan", "inf", "-1", "1e308", "99999999999999999999")


@pytest.mark.parametrize("flag", ["prune_ratio", "keep_ratio", "active", "budget", "stored_params"])
@pytest.mark.parametrize("value", ODD)
def test_plan_refuses_odd_numbers(tmp_path, capsys, flag, value):
    flags = ("--statistics", tmp_path / "s", "--out", tmp_path / "p.json", "--model", "asset:small_moe")
    said = stopped(capsys, "plan", *flags, f"--{flag}={value}")
    assert flag in said or value in said
    assert not (tmp_path / "p.json").exists()


OF_CONFIG = ("ratio", "keep_ratio", "fit", "align", "fit_training", "sequence_length", "batch_size")
# Sizes that every model fits into, and a block that no width is made of.
ANSWERED = [("fit", ODD[-1]), ("align", ODD[-1]), ("fit_training", ODD[-1])]


@pytest.mark.parametrize(("flag", "value"), [pair for pair in product(OF_CONFIG, ODD) if pair not in ANSWERED])
def test_plan_from_a_config_refuses_odd_numbers(capsys, flag, value):
    asked = [] if flag in ("ratio", "keep_ratio", "fit") else ["--ratio", "0.5"]
    asked += ["--fit_training", "8GB"] if flag in ("sequence_length", "batch_size") else []
    said = stopped(capsys, "plan", "--config_json", "asset:small_moe", *asked, f"--{flag}={value}")
    assert flag in said or value in said or "a number of" in said


OF_DATA = ("sequence_length", "calibration_sequence_length", "batch_size", "num_workers", "seed")


@pytest.mark.parametrize("flag", OF_DATA)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "99999999999999999999"])
@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_commands_with_text_refuse_odd_numbers(tmp_path, capsys, command, flag, value):
    flags = ("--model", "asset:small_moe", "--out", tmp_path / "out", "--data.tokenizer", "asset:small_moe")
    said = stopped(capsys, command, *flags, f"--data.{flag}={value}")
    assert flag in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sequence_length", "batch_size"])
def test_memory_is_counted_for_runs_that_can_be(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number from 1 to 16,777,216, got 1000000000000"):
        RecoveryRun(**{name: 10**12})


def test_ranks_have_a_highest():
    with pytest.raises(ValueError, match=r"`attention_rank` must be 0 \(no adapter\) or a positive rank up to 65536"):
        AdapterConfig(attention_rank=10**12)


def test_a_grid_is_not_filled_with_samples_without_end():
    with pytest.raises(ValueError, match="`samples` of the grid must be at most 1000, got 1000000000000"):
        Grid(methods=["reap"], ratios=[0.5], samples=10**12).rows()


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1e-4])
@pytest.mark.parametrize("name", ["expert_learning_rate", "router_learning_rate", "attention_learning_rate"])
def test_learning_rates_of_a_short_recovery_are_rates(name, rate):
    asked = ShortRecovery(rows=["dense_nf4"], steps=1, **{name: rate})
    with pytest.raises(ValueError, match=rf"`recovery\.{name}` must be a finite number >= 0, got"):
        asked.check([CONTROL])


def test_seeds_are_those_that_generators_take():
    with pytest.raises(ValueError, match=r"`recovery\.seed` must be from 0 to 4294967295, got -1"):
        ShortRecovery(rows=["dense_nf4"], steps=1, seed=-1).check([CONTROL])
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"`seed` must be from 0 to 4294967295, got {seed}"):
            TaskRequest(tasks=["piqa"], limit=None, seed=seed, allow_code_execution=False)
