"""Examples with a prompt that carries no loss: instructions in Alpaca's form, conversations through a chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_moe.training.corpora import Corpus, Record
from lightning_moe.training.time_limit import CpuLimit

# The prompts of Stanford Alpaca, on whose data paper A recovers.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


# Of a program in jinja: its own, and whatever Python raises for what it computes.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    TimeoutError,
)
_LONGEST_RENDERING = 30.0  # seconds of computing; a long conversation takes milliseconds


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of an example's text; `learn` says whether its tokens carry loss."""

    text: str
    learn: bool


Example = tuple[Segment, ...]


def text_of(record: Record, *, field: str, name: str) -> str:
    """Return a field that must be a string.

    Raises:
        ValueError: It is something else.
    """
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"Corpus {name!r}: field {field!r} must hold text, got {type(value).__name__}: {str(value)[:60]!r}. "
            "Name the field that holds the text."
        )
    return value


def instruction_example(record: Record, *, corpus: Corpus, name: str, end_of_text: str) -> Example:
    """Alpaca's prompt without loss, then the output and the end-of-text token with loss; an empty input is left out."""
    instruction = text_of(record, field=corpus.instruction_field, name=name)
    output = text_of(record, field=corpus.output_field, name=name)
    given = ""
    if corpus.input_field is not None and record[corpus.input_field] is not None:
        given = text_of(record, field=corpus.input_field, name=name)
    prompt = (_WITH_INPUT if given else _WITHOUT_INPUT).format(instruction=instruction, input=given)
    return Segment(text=prompt, learn=False), Segment(text=output + end_of_text, learn=True)


def message_examples(messages: Any, *, name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """Yield a conversation as one example, loss on what the assistant writes, the template's end of turn included.

    A template that renders earlier turns anew once later ones follow (Qwen3 drops their thoughts) cannot be one
    sequence: then each such turn becomes an example of its own, with the conversation before it as its prompt.

    Raises:
        ValueError: Not a list of `{role, content}`, no chat template, no assistant turn, or a template that changes its
            own prompt.
    """
    _check_messages(messages, name=name, tokenizer=tokenizer)
    segments: list[Segment] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:index], tokenizer=tokenizer, prompt=True)
        turn = _render(messages[: index + 1], tokenizer=tokenizer, prompt=False)
        if not turn.startswith(prompt):
            raise ValueError(
                f"Corpus {name!r}: the chat template does not continue its own prompt, got {turn[:80]!r}. "
                "Use another tokenizer, or format 'text' on conversations written out."
            )
        if not prompt.startswith(written):
            yield tuple(segments)
            segments, written = [], ""
        segments += [Segment(text=prompt[len(written) :], learn=False), Segment(text=turn[len(prompt) :], learn=True)]
        written = turn
    yield tuple(segments)


def _render(messages: Sequence[dict[str, Any]], *, tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    """The template is a program of the tokenizer's folder; jinja keeps it away from files, names and code.

    Raises:
        ValueError: it fails on these messages, or does not end.
    """
    try:
        with CpuLimit(_LONGEST_RENDERING):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except _TEMPLATE_ERRORS as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} cannot write {str(messages)[:60]!r}: {told:.200}. Look "
            "at the conversation, or use another tokenizer."
        ) from error
    assert isinstance(text, str)
    return text


def _check_messages(messages: Any, *, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Corpus {name!r}: the tokenizer {tokenizer.name_or_path!r} has no chat template, "
            "which format 'messages' needs. Use the tokenizer of a chat model."
        )
    is_list = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    )
    if not is_list:
        raise ValueError(f"Corpus {name!r}: messages must be a list of {{role, content}}, got {str(messages)[:60]!r}.")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(
            f"Corpus {name!r}: a conversation has no assistant turn to learn from: {str(messages)[:60]!r}. Remove it."
        )
