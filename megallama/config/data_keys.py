"""The keys of the section `data`: datasets and their mixture, tokenizer, samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from megallama.config.values import MOST_SEQUENCES, MOST_SOURCES, MOST_STEPS, Name, Real, Section, refused


class MixtureSource(Section):
    """One dataset of a mixture."""

    path: Name = Field(min_length=1)
    """Prefix of an indexed dataset, as data.path."""
    weight: Real = Field(gt=0)
    """Its part of the samples; weights need not sum to 1."""
    name: Annotated[Name, Field(min_length=1)] | None = None
    """What the run calls it; null means the last part of `path`. Its order of samples is drawn from it."""
    epochs: Annotated[Real, Field(gt=0)] | None = None
    """How often the run may read it; a run that would read more is refused at its start. null for no limit."""

    @property
    def called(self) -> str:
        """Its name, resolved."""
        return self.name or self.path.rstrip("/").rpartition("/")[2] or self.path


MixtureSources = Annotated[tuple[MixtureSource, ...], Field(min_length=1, max_length=MOST_SOURCES)]


class MixtureStage(Section):
    """The sources of a mixture from a step on."""

    from_step: int = Field(ge=0, le=MOST_STEPS)
    """Steps done when it begins; that of the first stage is 0."""
    sources: MixtureSources
    """What is read from there on; a source of an earlier stage goes on where it was."""


def _form_of_mixture(value: object) -> str:
    """Whether a mixture is written as one list of sources or as stages."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    staged = {"from_step", "sources"} & first.keys() if isinstance(first, dict) else isinstance(first, MixtureStage)
    return "stages" if staged else "sources"


Mixture = Annotated[
    Annotated[MixtureSources, Tag("sources")]
    | Annotated[tuple[MixtureStage, ...], Field(max_length=MOST_SOURCES), Tag("stages")],
    Discriminator(_form_of_mixture),
]


class DataConfig(Section):
    """Datasets and tokenizer."""

    path: Name | None = None
    """Prefix of an indexed dataset, PATH.bin and PATH.idx, written by `megallama data build` or Megatron-LM."""
    mixture: Mixture | None = None
    """In place of `path`: several datasets by weight, as a list of sources, or as stages that begin at given steps."""
    tokenizer: Name = "bytes"
    """`bytes`, a tiktoken encoding (r50k_base), a tiktoken rank file, a folder from `tokenizer train`, or hf:FILE."""
    sequence_length: int = Field(default=2048, ge=1, le=MOST_SEQUENCES)
    """Predicted tokens per sample."""
    validation_path: Name | None = None
    """Prefix of a separate validation dataset; null uses the tail of `path`, or of each source of the mixture."""
    validation_fraction: Real = Field(default=0.01, ge=0, lt=1)
    """Share of the documents, at the end of each dataset, that is held out if validation_path is null."""
    pack: Literal["all", "one"] = "all"
    """all: samples are cut from all documents in a row; one: each is one document, cut off or filled up."""
    document_mask: bool = False
    """Attention and positions stay within documents: tokens see those of their own, and each begins at position 0."""
    truncate: Literal["first", "last"] = "first"
    """pack=one: which tokens are kept of a document that is longer than sequence_length."""
    pad: Literal["right", "left"] = "right"
    """pack=one: where a sample is filled up whose document is shorter; no label counts there, and no token sees it."""
    eod_mask_loss: bool = False
    """Exclude the prediction of end-of-document tokens from the loss."""

    @property
    def documents_apart(self) -> bool:
        """Whether attention has to know documents; what fills up a sample at its end is seen by none anyway."""
        return self.document_mask or self.pad == "left"

    @property
    def stages(self) -> tuple[MixtureStage, ...]:
        """The stages of the mixture, the one list of sources being the only stage; none with `path`."""
        stages: list[MixtureStage] = []
        sources: list[MixtureSource] = []
        for each in self.mixture or ():
            if isinstance(each, MixtureStage):
                stages.append(each)
            else:
                sources.append(each)
        return tuple(stages) or ((MixtureStage(from_step=0, sources=tuple(sources)),) if sources else ())

    @model_validator(mode="after")
    def _one_source_of_data(self) -> Self:
        if (self.path is None) == (self.mixture is None):
            raise refused(_SOURCE_SAID[self.path is None].format(path=self.path))
        if wrong := _wrong_mixture(self.stages):
            raise refused(f"data.mixture: {wrong}")
        return self


_SOURCE_SAID = {
    False: "data.path={path} and data.mixture both say what the run reads; leave one of them out, or set one to null: "
    "data.path=null or data.mixture=null",
    True: "data.path is missing; write it in the file or give data.path=VALUE, or several datasets as data.mixture",
}


def _wrong_mixture(stages: tuple[MixtureStage, ...]) -> str | None:
    """What is wrong between the stages of a mixture or their sources, and how to mend it."""
    if stages and stages[0].from_step:
        return f"the first stage is from_step={stages[0].from_step}; let it begin with the run, from_step=0"
    for one, other in pairwise(stages):
        if other.from_step <= one.from_step:
            return (
                f"the stage from_step={other.from_step} follows from_step={one.from_step}; use from_step="
                f"{one.from_step + 1} or more"
            )
    paths: dict[str, str] = {}
    names: dict[str, str] = {}
    for stage in stages:
        seen: set[str] = set()
        for source in stage.sources:
            name, path = source.called, source.path
            if name in seen or paths.setdefault(name, path) != path:
                return f"two sources have the name {name}; give one of them another name"
            if names.setdefault(path, name) != name:
                return f"{path} has two names, {names[path]} and {name}; use one source, with the sum of the weights"
            seen.add(name)
    return None
