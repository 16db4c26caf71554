"""The public corpora that `megallama data fetch` knows by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicCorpus:
    """A dataset of the Hugging Face hub, or a part of it."""

    repository: str
    files: str
    """The pattern of its training files."""
    size: str
    licence: str
    content: str
    renamed: tuple[str, str] | None = None
    """How its files must end for `data build` to know their format, where that is not how they end on the hub."""


PUBLIC_CORPORA = {
    "tinystories": PublicCorpus(
        "roneneldan/TinyStories",
        "data/train-*.parquet",
        "about 1 GB in 4 files",
        "CDLA-Sharing-1.0",
        "two million short stories by GPT-3.5 and GPT-4, arXiv 2305.07759",
    ),
    "pile-uncopyrighted": PublicCorpus(
        "monology/pile-uncopyrighted",
        "train/*.jsonl.zst",
        "about 330 GB in 30 files",
        "those of its sources",
        "the Pile without its books, subtitles and OpenWebText2, arXiv 2101.00027",
    ),
    "fineweb-10bt": PublicCorpus(
        "HuggingFaceFW/fineweb",
        "sample/10BT/*.parquet",
        "about 30 GB",
        "ODC-By 1.0",
        "10 billion tokens of filtered Common Crawl, arXiv 2406.17557",
    ),
    "fineweb-100bt": PublicCorpus(
        "HuggingFaceFW/fineweb",
        "sample/100BT/*.parquet",
        "about 300 GB",
        "ODC-By 1.0",
        "100 billion tokens of the same",
    ),
    "fineweb-edu-10bt": PublicCorpus(
        "HuggingFaceFW/fineweb-edu",
        "sample/10BT/*.parquet",
        "about 30 GB",
        "ODC-By 1.0",
        "10 billion tokens of its educational pages",
    ),
    "fineweb-edu-100bt": PublicCorpus(
        "HuggingFaceFW/fineweb-edu",
        "sample/100BT/*.parquet",
        "about 300 GB",
        "ODC-By 1.0",
        "100 billion tokens of the same",
    ),
    "c4": PublicCorpus(
        "allenai/c4",
        "en/c4-train.*.json.gz",
        "about 300 GB in 1024 files",
        "ODC-By 1.0",
        "cleaned Common Crawl of April 2019, in English, arXiv 1910.10683",
        (".json.gz", ".jsonl.gz"),
    ),
    "wikipedia-en": PublicCorpus(
        "wikimedia/wikipedia",
        "20231101.en/*.parquet",
        "about 12 GB in 41 files",
        "CC BY-SA 3.0 and GFDL",
        "English Wikipedia of November 2023 as plain text",
    ),
}
