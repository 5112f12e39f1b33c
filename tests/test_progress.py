"""Bars only where somebody watches."""

import io
import sys

import pytest
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from lightning_moe.progress import hidden, quiet_transformers


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_a_bar_is_shown_on_a_terminal_only(stream, progress, shown):
    out = stream()
    list(tqdm(range(3), file=out, disable=hidden(progress=progress)))
    assert bool(out.getvalue()) == shown


@pytest.mark.parametrize(("stream", "enabled"), [(Terminal, True), (io.StringIO, False)])
def test_bars_of_transformers_are_off_inside_and_as_before_outside(stream, enabled, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    assert transformers_logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert transformers_logging.is_progress_bar_enabled() == enabled
    assert transformers_logging.is_progress_bar_enabled()


def test_who_turned_them_off_finds_them_off():
    transformers_logging.disable_progress_bar()
    try:
        with quiet_transformers():
            pass
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()
