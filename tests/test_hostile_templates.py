"""Chat templates that do not end: a program of the tokenizer's folder gets so much computing time and no more."""

import signal
import threading

import pytest

from lightning_moe.training import examples
from lightning_moe.training.time_limit import CpuLimit
from lightning_moe.training.tokenization import load_tokenizer

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
SHORT = 0.05  # seconds; each of these takes some seconds of its own
LOOPS = [
    "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(22) }}",
    "{{ (messages | length + 8) ** (2 * 10 ** 6) > 1 }}",  # one operation, in C
    "{{ 10 ** (2 * 10 ** 6) > 1 }}",  # a constant: jinja computes it when it compiles the template, and drops errors
    "{% set text = messages[0].content * 9999 %}{% for i in range(999) %}{{ text | wordwrap(3) | length }}{% endfor %}",
]


@pytest.fixture
def tokenizer():
    return load_tokenizer("asset:small_moe")


def own_signal(_number, _frame):
    raise AssertionError("not ours")


@pytest.fixture
def somebody_s_signal():
    earlier = signal.signal(signal.SIGVTALRM, own_signal)
    yield
    signal.signal(signal.SIGVTALRM, earlier)


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_does_not_end_is_told_in_one_line(monkeypatch, tokenizer, template):
    monkeypatch.setattr(examples, "_LONGEST_RENDERING", SHORT)
    tokenizer.chat_template = template
    told = r"^The chat template of '.*' cannot write .*: it has computed for 0.05 seconds, and no end is in sight"
    with pytest.raises(ValueError, match=told):
        list(examples.message_examples(TALK, name="own", tokenizer=tokenizer))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_a_template_that_ends_leaves_nothing_behind(tokenizer):
    rendered = list(examples.message_examples(TALK, name="own", tokenizer=tokenizer))
    assert [segment.text for segment in rendered[0]][1].startswith("good day")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def compute(seconds: float) -> int:
    """Loops for a multiple of that time, and says how far it came."""
    with CpuLimit(seconds):
        return sum(1 for _ in range(10**7))


def test_the_limit_ends_a_loop():
    with pytest.raises(TimeoutError, match=r"it has computed for 0\.02 seconds, and no end is in sight"):
        compute(0.02)


def test_somebody_else_s_signal_stays_theirs(somebody_s_signal):
    assert compute(0.02) == 10**7
    assert signal.getsignal(signal.SIGVTALRM) is own_signal


def test_another_thread_is_not_limited():
    counted = []
    thread = threading.Thread(target=lambda: counted.append(compute(0.02)))
    thread.start()
    thread.join()
    assert counted == [10**7]


def test_an_error_is_not_lost_where_nobody_hears_it():
    """Python prints and drops what `__del__` raises: the attempt after that one ends the block."""

    class Slow:
        def __del__(self):
            for _ in range(10_000):
                pass

    def make_many():
        with CpuLimit(0.01):
            for _ in range(3000):
                Slow()
                for _ in range(10_000):
                    pass

    with pytest.raises(TimeoutError, match="no end is in sight"):
        make_many()
