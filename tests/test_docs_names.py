"""What the pages name exists: links and anchors, files, commands with their flags, settings, names of Python."""

import re

import pytest
from docs_commands import is_python_name, is_setting, is_test, named_settings, python_names, unknown_flags
from docs_names import anchors, code, exists, links, named_files
from docs_pages import ROOT, blocks, pages, prose

pytestmark = pytest.mark.docs

every_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_links_lead_to_a_page_and_a_heading(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_exist(page):
    assert [name for name in named_files(page) if not exists(name, page=page)] == []


@every_page
def test_flags_are_those_of_their_command(page):
    unrun = [line for block in blocks(page) if "not run" in block.says for line in block.text.splitlines()]
    assert {text: flags for text in [*code(page), *unrun] if (flags := unknown_flags(text))} == {}


@every_page
def test_settings_can_be_given(page):
    assert [name for name in named_settings(page) if not is_setting(name)] == []


@every_page
def test_names_of_python_can_be_imported(page):
    assert [name for name in python_names(page) if not is_python_name(name)] == []


@every_page
def test_named_tests_are_there(page):
    assert [name for name in re.findall(r"tests/\w+\.py::\w+", prose(page)) if not is_test(name)] == []


def test_every_page_is_found_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
            waiting += [target for target in targets if target.suffix == ".md"]
    assert set(pages()) <= seen


# The checks themselves.


def test_a_wrong_flag_setting_or_name_would_be_found():
    assert unknown_flags("plan --budget 3GB --prune_ratoi 0.5") == ["prune_ratoi"]
    assert unknown_flags("python -m lightning_moe calibrate --prune_ratio 0.5") == ["prune_ratio"]
    assert unknown_flags("fit --pruning.ratio 0.5 --pruning.prune_ratio 0.5") == ["pruning.ratio"]
    assert unknown_flags("--no_such_option") == ["no_such_option"]
    assert not is_setting("recovery.adapter.rank")
    assert is_setting("recovery.adapter.expert_rank")
    assert not is_setting("data.text")
    assert not is_python_name("lightning_moe.surgery.stages.cut")
    assert is_python_name("lightning_moe.surgery.stages.cut_in_stages")
    assert is_test("tests/test_docs_names.py::test_named_tests_are_there")
    assert not is_test("tests/test_docs_names.py::test_named")


def test_a_wrong_path_or_anchor_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The `x` of *y*, z\n\n```bash\n# no heading\n```\n[a](b.md#c) `scripts/nothing.py` `runs/x`\n")
    assert anchors(page) == {"the-x-of-y-z"}
    assert links(page) == ["b.md#c"]
    assert list(named_files(page)) == ["scripts/nothing.py"]
    assert not exists("scripts/nothing.py", page=page)
    assert not exists("scripts/bench_{load,nothing}.py", page=page)
    assert exists("scripts/bench_{load,dora}.py", page=page)
    assert not exists("nothing.csv", page=page)


@pytest.mark.parametrize("fence", ["```python title=x", "~~~python", "```c++"])
def test_a_fence_that_would_hide_its_block_is_refused(fence, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{fence}\nraise SystemExit\n{fence[:3]}\n")
    with pytest.raises(AssertionError, match="not a plain fence"):
        list(blocks(page))
