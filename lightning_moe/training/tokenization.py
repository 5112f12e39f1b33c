"""From a corpus to packed rows: read, render, tokenise, pack.

Where a tokenizer begins a text with its beginning-of-text token (Mixtral, DeepSeek), every document and instruction
does too; where it begins with none (the shipped one, Qwen), none is added. Conversations begin as their template says.
"""

# T tokens

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from lightning_moe.assets import resolve_asset
from lightning_moe.files import NativeErrors
from lightning_moe.training.corpora import Corpus, Record, read_records
from lightning_moe.training.examples import Example, instruction_example, message_examples, text_of
from lightning_moe.training.long_texts import Piece, batches, pieces
from lightning_moe.training.packing import Rows, TokenSpan, pack_examples, pack_stream

_LOG = logging.getLogger(__name__)

_RECORDS_AT_ONCE = 256
# What transformers raises for files that it cannot read.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """What the libraries raise for a tokenizer's files becomes a ValueError that names the source."""
    try:
        with NativeErrors():
            yield
    except _UNREADABLE as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"No tokenizer found at {source!r} ({told}). "
            "Give a folder with tokenizer.json, `asset:small_moe`, or a hub name."
        ) from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, `asset:small_moe`, or the hub.

    Raises:
        ValueError: There is none, it cannot be read, it would need code of its own, or it has no end-of-text token.
    """
    location = resolve_asset(source)
    with _readable(source):
        _check_class(location)
        # Without this answer transformers asks on the terminal whether to run the code of a folder.
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"`model_max_length` is {str(tokenizer.model_max_length)[:40]!r}, not a number")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {source!r} has no end-of-text token, which separates documents. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer


def _check_class(location: str) -> None:
    """Refuses a class that is no tokenizer's: transformers would load any of its own, a model with its weights too."""
    config = Path(location) / "config.json"
    named = get_tokenizer_config(location).get("tokenizer_class")
    if named is None and config.is_file():
        named = PreTrainedConfig.get_config_dict(location)[0].get("tokenizer_class")
    found = tokenizer_class_from_name(named) if isinstance(named, str) else None
    if isinstance(found, type) and not issubclass(found, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer_class` is {named}, which is no tokenizer")


def corpus_rows(
    corpus: Corpus,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    keep_last: bool,
    sample: int = 0,
) -> Rows:
    """Read, tokenise and pack one corpus; `keep_last` keeps the last, partial window of text, padded.

    Sample s takes the tokens from `s * max_tokens` to `(s + 1) * max_tokens`, so that samples share none.

    Raises:
        ValueError: See `read_records`; or the corpus has no text, is shorter than one row, no example in it has a
            token with loss, or it is too short for that sample.
    """
    if sample and corpus.max_tokens is None:
        raise ValueError(f"Corpus {name!r} needs `max_tokens`, which says how much text each of the samples takes.")
    records = read_records(corpus, name=name)
    padding: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if corpus.format == "text":
        stream_T = _stream(records, corpus=corpus, name=name, tokenizer=tokenizer, sample=sample)
        _check_stream(stream_T, name=name, sequence_length=sequence_length, keep_last=keep_last)
        rows = pack_stream(stream_T, sequence_length=sequence_length, padding=padding, keep_last=keep_last)
    else:
        examples = _examples(records, corpus=corpus, name=name, tokenizer=tokenizer)
        spans = list(_token_spans(examples, corpus=corpus, name=name, tokenizer=tokenizer, sample=sample))
        _check_sample(sum(len(span.input_ids) for span in spans), corpus=corpus, name=name, sample=sample)
        rows = pack_examples(spans, sequence_length=sequence_length, padding=padding)
        _check_examples(spans, name=name, sequence_length=sequence_length)
    _LOG.info("corpus %s: %d tokens in %d rows of %d", name, rows.num_tokens, len(rows), sequence_length)
    return rows


def _check_stream(stream_T: Tensor, *, name: str, sequence_length: int, keep_last: bool) -> None:
    if len(stream_T) == 0:
        raise ValueError(f"Corpus {name!r} is empty: all its documents are empty texts. Give a source with text.")
    if not keep_last and len(stream_T) < sequence_length:
        raise ValueError(
            f"Corpus {name!r} has {len(stream_T)} tokens, less than one row of {sequence_length} to train on. "
            "Give more text, raise `max_tokens`, or lower `sequence_length`."
        )


def _check_examples(spans: list[TokenSpan], *, name: str, sequence_length: int) -> None:
    lost = sum(not any(span.learn[:sequence_length]) for span in spans)
    if lost == len(spans):
        raise ValueError(
            f"Corpus {name!r}: in all of its {lost} examples the prompt fills the row of {sequence_length} tokens "
            "and leaves no answer to learn. Raise the sequence length of its role (or `max_tokens`, if no example "
            "fits in it)."
        )
    if lost:
        _LOG.warning(
            "corpus %s: left out %d of %d examples whose prompt fills a row of %d",
            name,
            lost,
            len(spans),
            sequence_length,
        )


def _check_sample(num_tokens: int, *, corpus: Corpus, name: str, sample: int) -> None:
    """A later sample is about as long as the first one, or it would not show the spread of equal samples."""
    if sample and corpus.max_tokens is not None and 2 * num_tokens < corpus.max_tokens:
        raise ValueError(
            f"Corpus {name!r} has {num_tokens} tokens left for sample {sample} of {corpus.max_tokens}: "
            f"{sample + 1} samples that share no text do not fit. Lower its `max_tokens`, take fewer samples, or give "
            "more text."
        )


def _stream(
    records: Iterator[Record], *, corpus: Corpus, name: str, tokenizer: PreTrainedTokenizerBase, sample: int
) -> Tensor:
    """Tokens of all non-empty documents, each begun as the tokenizer does and ended by end of text; a sample's part."""
    texts = (text_of(record, field=corpus.fields[0], name=name) for record in records)
    if corpus.separator is not None:
        texts = iter([corpus.separator.join(texts)])
    beginning = _beginning(tokenizer)
    skipped = sample * (corpus.max_tokens or 0)
    parts, left = [np.empty(0, dtype=np.int32)], None if corpus.max_tokens is None else skipped + corpus.max_tokens
    for piece, ids in _tokenise((text for text in texts if text), name=name, tokenizer=tokenizer):
        begin, end = beginning if piece.begins else [], [tokenizer.eos_token_id] if piece.ends else []
        parts.append(np.array([*begin, *ids, *end], dtype=np.int32)[:left])
        if left is not None:
            left -= len(parts[-1])
            if left == 0:
                break
    stream_T = torch.from_numpy(np.concatenate(parts))[skipped:]
    _check_sample(len(stream_T), corpus=corpus, name=name, sample=sample)
    return stream_T


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token if the tokenizer itself puts it before a text, else nothing.

    Asked of a text that is not empty: where both tokens are one, an empty text cannot tell beginning from end.
    """
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else []


def _tokenise(
    texts: Iterable[str], *, name: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Piece, list[int]]]:
    """Tokens of every text, of a long one piece by piece."""

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    cut = chain.from_iterable(pieces(text, tokenize=lambda part: ids_of([part])[0]) for text in texts)
    with tqdm(desc=f"tokenise {name}", unit=" texts", delay=10) as bar:
        for batch in batches(cut):
            yield from zip(batch, ids_of([piece.text for piece in batch]), strict=True)
            bar.update(sum(piece.ends for piece in batch))


def _whole(tokenised: Iterator[tuple[Piece, list[int]]]) -> list[int]:
    """Tokens of the next text."""
    ids: list[int] = []
    for piece, more in tokenised:
        ids += more
        if piece.ends:
            break
    return ids


def _examples(
    records: Iterator[Record], *, corpus: Corpus, name: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    if corpus.format == "instruction":
        end = str(tokenizer.eos_token)
        return (instruction_example(record, corpus=corpus, name=name, end_of_text=end) for record in records)
    field = corpus.fields[0]
    return chain.from_iterable(message_examples(record[field], name=name, tokenizer=tokenizer) for record in records)


def _token_spans(
    examples: Iterator[Example], *, corpus: Corpus, name: str, tokenizer: PreTrainedTokenizerBase, sample: int
) -> Iterator[TokenSpan]:
    """Tokenise the segments of each example by themselves, as generation does with a prompt; those of a sample."""
    skipped = sample * (corpus.max_tokens or 0)
    beginning = [] if corpus.format == "messages" else _beginning(tokenizer)
    num_tokens = 0
    while batch := list(islice(examples, _RECORDS_AT_ONCE)):
        tokenised = _tokenise(
            (segment.text for example in batch for segment in example), name=name, tokenizer=tokenizer
        )
        for example in batch:
            parts = [(False, beginning), *((segment.learn, _whole(tokenised)) for segment in example)]
            ids = [token for _, part in parts for token in part]
            num_tokens += len(ids)
            if corpus.max_tokens is not None and num_tokens > skipped + corpus.max_tokens:
                return
            if num_tokens <= skipped:
                continue
            yield TokenSpan(input_ids=ids, learn=[learn for learn, part in parts for _ in part])
