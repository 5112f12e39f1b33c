"""Every fenced block of every page runs, in the order of the page; see `docs_pages` for the comments that steer it."""

from pathlib import Path

import pytest
from docs_pages import ROOT, blocks, pages
from docs_runner import make_workplace, own_tables, run_page

pytestmark = [
    pytest.mark.docs,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

# The guides run in `test_docs_guides`, which also looks at what came out.
GUIDES = [ROOT / "lightning_moe" / name / "README.md" for name in ("models", "criteria")]
WITH_BLOCKS = [page for page in pages() if any(blocks(page)) and page not in GUIDES]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_the_page_runs(page, tmp_path, monkeypatch):
    make_workplace(tmp_path, monkeypatch=monkeypatch)
    with own_tables():
        run_page(page)


def test_programs_whose_lines_a_page_shows_are_run_by_a_test():
    shown = {Path(block.says["lines of"]) for page in pages() for block in blocks(page) if "lines of" in block.says}
    runs = (ROOT / "tests" / "test_foreign_loop_examples.py").read_text(encoding="utf-8")
    assert {file.stem for file in shown} == {"lightning_loop", "pytorch_loop", "transformers_trainer"}
    assert all(f'example("{file.stem}").main(' in runs for file in shown)


def test_few_blocks_are_not_run():
    unrun = [block for page in pages() for block in blocks(page) if "not run" in block.says]
    assert len(unrun) <= 3
    assert all(len(block.says["not run"].split()) > 3 for block in unrun)
