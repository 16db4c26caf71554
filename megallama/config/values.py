"""What the values of keys have in common: a section, numbers and tokens as people write them, names, bounds."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen mapping with no unknown keys; the sentence under each field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _number_from_text(value: object) -> object:
    """`3e-4` in YAML 1.1 is text, since it has no point; take it for the number that it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST_TOKENS = 10**18


def _tokens_from_text(value: object) -> object:
    """`3T`, `1.5e9`, `20_000_000` and 3.0e12 as the whole number that each is, without rounding."""
    if not isinstance(value, str | float):
        return value
    text = str(value).strip().upper()
    unit = _SUFFIXES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit
    except ArithmeticError:
        number = Decimal("nan")
    if not number.is_finite() or abs(number) > _MOST_TOKENS:
        raise PydanticCustomError("tokens", "a whole number of tokens up to 1e18, such as 300B, 1.5e9 or 3T")
    whole = max(1, int(number))
    if number != whole:
        raise PydanticCustomError("tokens", "a whole number of tokens, at least 1; write {whole}", {"whole": whole})
    return whole


MOST_LAYERS, MOST_WIDTH, MOST_SEQUENCES, MOST_RANKS, MOST_STEPS = 2_000, 10**7, 10**9, 10**6, 10**12
"""Far beyond any run: a number above them is a slip of the hand, and would keep a plan busy for hours."""
MOST_PIPELINE, MOST_STAGES = 128, 512
"""A plan lays every action of every rank out in time."""
MOST_PATTERNS, MOST_SOURCES, MOST_RAMP_STAGES, MOST_PROFILED, MOST_AVERAGED = 256, 10_000, 64, 1_000, 1_000
MOST_WINDOW, MOST_REWINDS = 10_000, 1_000
"""A checkpoint has the numbers of a window, and what its run passed over at each rewind."""
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 1000
"""Linux's limit on a component of a path, and sbatch's on a path, less what stands before and behind it."""


def _name(value: str) -> str:
    """A name or a path: it goes to files, logs, job files and terminals, some of which a line end would split."""
    if not value.isprintable():
        raise PydanticCustomError("name", "text without line ends, control characters and others that do not print")
    encoded = value.encode()
    if max(map(len, encoded.split(b"/"))) > MOST_NAME_BYTES or len(encoded) > MOST_PATH_BYTES:
        raise PydanticCustomError("name", f"names of at most {MOST_NAME_BYTES} bytes, {MOST_PATH_BYTES} in a path")
    return value


Name = Annotated[str, AfterValidator(_name)]
Real = Annotated[float, BeforeValidator(_number_from_text)]
Tokens = Annotated[
    int,
    Field(ge=1, le=_MOST_TOKENS),
    BeforeValidator(
        _tokens_from_text,
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=r"^[0-9][0-9_.]*([eE][+-]?[0-9]+)?[kKmMbBtT]?$")],
    ),
]
Decay = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number_from_text)]


LayersPerStage = Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_LAYERS)], ...], Field(max_length=MOST_LAYERS)]


def tuple_from_list(value: object) -> object:
    """Behind a validator of the section before it a list is not taken for a tuple any more."""
    return tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[Name, ...], Field(max_length=MOST_PATTERNS), BeforeValidator(tuple_from_list)]
SET_NAME = "[A-Za-z0-9_-]{1,64}"


def _check_set_names(sets: dict[str, str]) -> dict[str, str]:
    for name in sets:
        if not re.fullmatch(SET_NAME, name) or name in ("train", "validation"):
            rule = "names of 1 to 64 letters, digits, _ and -, and neither train nor validation, unlike {name}"
            raise PydanticCustomError("set_name", rule, {"name": repr(name[:60])})
    return sets


Sets = Annotated[
    dict[str, Name],
    AfterValidator(_check_set_names),
    Field(json_schema_extra={"propertyNames": {"pattern": f"^{SET_NAME}$"}}),
]
Steps = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MOST_STEPS)], ...],
    Field(max_length=MOST_PROFILED),
    BeforeValidator(tuple_from_list),
]
Ranks = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MOST_RANKS)], ...],
    Field(min_length=1, max_length=MOST_PROFILED),
    BeforeValidator(tuple_from_list),
]
CheckpointPath = Annotated[Name, Field(pattern="/|^step_")]
"""Told from a word by its slash, or by the name of its folder."""


def refused(sentence: str) -> PydanticCustomError:
    """A refusal that is a whole sentence, about several keys."""
    return PydanticCustomError("sentence", "{sentence}", {"sentence": sentence})
