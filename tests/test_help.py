"""`--help`: every option says what it is, in sentences, with its unit; no line is wider than the terminal."""

import re

import pytest

from lightning_moe import cli
from lightning_moe.allocation import PRESETS

pytestmark = pytest.mark.docs

CLASSES = {group: f"callbacks.{name}" for group, name in cli.CALLBACK_GROUPS.items()}
CLASSES |= {"model": "lightning_moe.training.module.RecoveryModule"}
# What jsonargparse says of the options that it adds itself, and of a flag that takes a file of settings.
ITS_OWN = ("Show the help for", "Path to a configuration file", "Print the configuration after")


def shown(arguments: list[str], *, columns: int, monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    """Option -> what is said of it before its type and default."""
    said: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        begins = re.match(r"  (--?[\w.]+)", line)
        if begins:
            name = begins[1]
            said[name] = " ".join(re.split(r"  +", line.strip(), maxsplit=1)[1:])
        elif name and line.startswith(" " * 24):
            said[name] += " " + line.strip()
        else:
            name = None
    return {option: re.split(r" ?\((?:required, )?type:", words)[0].strip() for option, words in said.items()}


def poor(said: dict[str, str]) -> list[str]:
    """Options without a sentence: a capital, a number or a quoted name first, a full stop last."""
    own = {option: words for option, words in said.items() if not words.startswith(ITS_OWN)}
    return [option for option, words in own.items() if not re.fullmatch(r"[A-Z0-9`\[].{8,}[.)]", words)]


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_option_of_a_command_is_a_sentence(name, monkeypatch, capsys):
    said = options(shown([name, "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys))
    assert len(said) > 2
    assert poor(said) == []


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_records_of_a_command_explain_their_fields(name, monkeypatch, capsys):
    said = options(shown([name, "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys))
    for option in (option for option in said if option.endswith(".help")):
        inner = options(shown([name, option], columns=120, monkeypatch=monkeypatch, capsys=capsys))
        assert inner, option
        assert poor(inner) == [], option


@pytest.mark.parametrize("group", sorted(CLASSES))
def test_every_argument_of_a_group_of_fit_is_a_sentence(group, monkeypatch, capsys):
    arguments = ["fit", f"--{group}.help", CLASSES[group]]
    said = options(shown(arguments, columns=120, monkeypatch=monkeypatch, capsys=capsys))
    assert all(option.startswith(f"--{group}.") for option in said)
    assert said
    assert poor(said) == []


def test_no_option_of_fit_is_left_without_help(monkeypatch, capsys):
    said = options(shown(["fit", "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys))
    assert len(said) > 50
    assert [option for option, words in said.items() if not words] == []


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("name", [*sorted(cli.COMMANDS), "fit", "validate"])
def test_help_fits_the_terminal(name, columns, monkeypatch, capsys):
    text = shown([name, "--help"], columns=columns, monkeypatch=monkeypatch, capsys=capsys)
    assert [line for line in text.splitlines() if len(line) > columns] == []


@pytest.mark.parametrize(
    "arguments", [["fit", f"--{group}.help", kind] for group, kind in CLASSES.items()] + [["compare", "--grid.help"]]
)
def test_help_of_one_class_fits_too_and_names_the_program(arguments, monkeypatch, capsys):
    text = shown(arguments, columns=80, monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith("usage: python -m lightning_moe SUBCOMMAND [--config FILE] [options]\n")
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_overview_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli.overview().splitlines()[1:]
    assert [line for line in lines if len(line) > columns] == []
    assert (len([line for line in lines if line.startswith("  ")]) == 10) is (columns == 200)


@pytest.mark.parametrize("name", [*sorted(cli.COMMANDS), "fit", "validate"])
def test_help_begins_with_what_the_command_does(name, monkeypatch, capsys):
    text = shown([name, "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys)
    usage, _, summary, *_ = text.splitlines()
    assert usage == f"usage: python -m lightning_moe {name} [--config FILE] [options]"
    monkeypatch.setenv("COLUMNS", "200")
    assert f"  {name:<10} {summary}\n" in cli.overview()


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_sizes_have_their_unit(name, monkeypatch, capsys):
    said = options(shown([name, "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys))
    units = {"_gb": "GiB", "budget": "GB", "sequence_length": "Tokens", "batch_size": "(Rows|Sequences)"}
    for option, words in said.items():
        for ending, unit in units.items():
            if option.endswith(ending):
                assert re.search(unit, words), f"{option}: {words}"


def test_every_method_is_named(monkeypatch, capsys):
    said = options(shown(["plan", "--help"], columns=120, monkeypatch=monkeypatch, capsys=capsys))
    aliases = {"expert_dropping", "channel_ranking"}  # what plans of these classes carry
    named = set(re.findall(r"`(\w+)`", said["--method"]))
    assert set(PRESETS) - aliases <= named


def test_a_poor_help_would_be_found():
    text = "options:\n  --a A                 (type: int, default: 3)\n  --b B                 lower case.\n"
    text += "  --c C                 Rows of a batch. (type: int, default: 1)\n"
    assert poor(options(text)) == ["--a", "--b"]
