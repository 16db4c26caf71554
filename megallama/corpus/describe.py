"""What `megallama data info` says of a dataset, for programs and for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megallama.corpus.excerpts import compression, first_and_last, known_tokenizer
from megallama.corpus.lengths import count_lengths
from megallama.data.indexed import IndexedDataset
from megallama.data.info import open_described
from megallama.errors import UserError, printable
from megallama.text.tokenizer import Tokenizer

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
EXCERPT_TOKENS, EXCERPT_CHARACTERS = 72, 72
WHOLE_TOKENS = 1 << 20
"""What is shown of one document at most."""
BAR = 40


def describe(prefix: str, spec: str | None, count: int) -> dict[str, Any]:
    """Facts about a dataset, as JSON, with excerpts of `count` documents.

    `spec` names the tokenizer if the dataset does not. UserError if the dataset cannot be read, or was made with
    another tokenizer.
    """
    dataset, info = open_described(prefix)
    tokenizer, unknown = known_tokenizer(prefix, info, spec)
    sample = None
    try:
        sample = compression(dataset, tokenizer) if tokenizer else None
    except UserError as error:
        if spec is not None:
            raise
        unknown = str(error)
    made_by = info or tokenizer
    eod_id = made_by.eod_id if made_by else None
    lengths = count_lengths(dataset, eod_id)
    longest = len(dataset.document(lengths.longest))
    return {
        "prefix": prefix,
        "documents": dataset.num_documents,
        "tokens": len(dataset.tokens),
        "dtype": dataset.tokens.dtype.name,
        "tokenizer": info.tokenizer if info else spec,
        "vocab_size": made_by.vocab_size if made_by else None,
        "eod_id": eod_id,
        "fingerprint": made_by.fingerprint if made_by else None,
        "text_unknown": unknown or None,
        "bytes_per_token": sample.text_bytes / sample.tokens if sample and sample.tokens else None,
        "sampled_tokens": sample.tokens if sample else None,
        "empty_documents": lengths.empty,
        "mean": len(dataset.tokens) / dataset.num_documents,
        "quantiles": {f"{share:g}": lengths.quantile(share) for share in QUANTILES},
        "longest": {"document": lengths.longest, "tokens": longest, "share": longest / len(dataset.tokens)},
        "histogram": [bin._asdict() for bin in lengths.histogram()],
        "shown": [
            _excerpt(dataset, tokenizer, number, EXCERPT_TOKENS)
            for number in first_and_last(count, dataset.num_documents)
        ],
    }


def show(prefix: str, spec: str | None, number: int) -> dict[str, Any]:
    """Document `number` alone, as JSON; UserError as of `describe`, and if the dataset has no such document."""
    dataset, info = open_described(prefix)
    if number >= dataset.num_documents:
        raise UserError(
            f"--document {number} is not in the dataset {prefix}; it has documents 0 to {dataset.num_documents - 1}"
        )
    tokenizer, unknown = known_tokenizer(prefix, info, spec)
    return {**_excerpt(dataset, tokenizer, number, WHOLE_TOKENS), "text_unknown": unknown or None}


def _excerpt(dataset: IndexedDataset, tokenizer: Tokenizer | None, number: int, limit: int) -> dict[str, Any]:
    document = dataset.document(number)
    ids = document[:limit].tolist()
    text = tokenizer.decode(ids) if tokenizer else None
    return {"document": number, "tokens": len(document), "ids": ids, "text": text}


def description(facts: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what `describe` found: nothing in them moves the cursor of a terminal."""
    rate, sampled, longest = facts["bytes_per_token"], facts["sampled_tokens"], facts["longest"]
    share = f"{longest['share']:.1%}" if longest["share"] >= 0.001 else "less than 0.1%"
    rows: dict[str, Any] = {
        **{name: facts[name] for name in ("prefix", "documents", "tokens", "dtype", "tokenizer")},
        **{name: facts[name] for name in ("vocab_size", "eod_id", "fingerprint")},
        "text": rate and f"{rate:.3f} bytes per token, in {sampled:,} tokens from all over the dataset",
        "empty": f"{facts['empty_documents']:,} documents",
        "mean": f"{facts['mean']:,.1f} tokens",
        "quantiles": "  ".join(f"{float(share):.0%} {length:,}" for share, length in facts["quantiles"].items()),
        "longest": f"{longest['tokens']:,} tokens, {share} of all: document {longest['document']:,}",
    }
    for name, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) else "unknown" if value is None else printable(str(value))
        yield f"{name:12} {shown}"
    yield from _why(facts)
    yield ""
    yield from _bars(facts["histogram"])
    if facts["shown"]:
        yield ""
    for excerpt in facts["shown"]:
        text, more = _text(excerpt), excerpt["tokens"] > len(excerpt["ids"])
        cut = printable(text)[:EXCERPT_CHARACTERS]
        dots = " ..." if more or len(printable(text)) > len(cut) else ""
        yield f"document {excerpt['document']:,}, {excerpt['tokens']:,} tokens: {cut}{dots}"


def document_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what `show` found, which are those of the document."""
    yield from _why(shown)
    yield f"document {shown['document']:,}, {shown['tokens']:,} tokens:"
    yield from ("\t".join(map(printable, line.split("\t"))) for line in _text(shown).split("\n"))
    if shown["tokens"] > len(shown["ids"]):
        yield f"... and {shown['tokens'] - len(shown['ids']):,} tokens more"


def _why(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["text_unknown"]:
        yield f"The text is unknown: {printable(facts['text_unknown'])}."


def _text(excerpt: Mapping[str, Any]) -> str:
    """Ids where the text is not known."""
    return " ".join(map(str, excerpt["ids"])) if excerpt["text"] is None else str(excerpt["text"])


def _bars(histogram: Sequence[Mapping[str, int]]) -> Iterator[str]:
    most = max(bin["documents"] for bin in histogram)
    total = sum(bin["tokens"] for bin in histogram)
    yield f"{'tokens in a document':>25} {'documents':>13} {'of tokens':>10}"
    for bin in histogram:
        span = f"{bin['at_least']:,}" if bin["below"] <= 2 else f"{bin['at_least']:,} to {bin['below'] - 1:,}"
        bar = "#" * -(-BAR * bin["documents"] // most)
        yield f"{span:>25} {bin['documents']:13,} {bin['tokens'] / total:10.1%} {bar}".rstrip()
