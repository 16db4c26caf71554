"""The bodies of OpenAI's completions and chat completions, as far as a plain language model can do what they ask."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.errors import UserError
from megallama.generation.sampling import MOST_SEED, Sampling

MOST_CHOICES, MOST_STOPS, MOST_TOKENS = 128, 16, 1_000_000
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Id = Annotated[int, Field(ge=0, strict=True)]
_Neutral = Literal[0] | None
Body = TypeVar("Body", bound="Asked")


class StreamOptions(BaseModel):
    """What comes with a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request hold. Keys that would change the text and are not implemented are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=1e6)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1e-3, le=1e3)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: _Neutral = None
    presence_penalty: _Neutral = None
    user: str | None = None

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn; by `seed` where none is given, and at temperature 1, as OpenAI's."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            self.top_k,
            self.top_p,
            seed if self.seed is None else self.seed,
            self.min_p,
            self.repetition_penalty or 1.0,
        )

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[_Id] | list[list[_Id]]
    echo: bool | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    logit_bias: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatCompletion(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    logprobs: Literal[False] | None = None
    logit_bias: None = None


def parse(kind: type[Body], content: bytes) -> Body:
    """The body of a request; UserError with the first key that is wrong and what it may be."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where} is not known here; leave it out") from None
        given = "" if first["type"] in ("missing", "json_invalid") else f", not {str(first['input'])[:40]!r}"
        raise UserError(f"{where}: {first['msg'].lower()}{given}; mend the request") from None
