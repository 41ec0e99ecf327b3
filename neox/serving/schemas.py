"""The bodies of requests and answers, from which the OpenAPI schema is made.

Requests are strict: no text for numbers, no unknown parameters, so that nothing that a client asks
for is silently left out. What is not supported is declared with the one value that it may have.

Validation ends with the first thing that is wrong wherever a body has room for many: 1 MiB of wrong
elements would keep the event loop busy for seconds, collecting hundreds of thousands of errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 128  # OpenAI's limits
MOST_LOGPROBS = 20

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(max_length=1 << 24)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]

UNKNOWN = "unknown_parameter"  # an error's type; its context has the name

# Said instead of what pydantic says.
NOT_SUPPORTED = {
    "suffix": "suffix is not supported: the model only continues a text",
    "logit_bias": "logit_bias is not supported",
    "presence_penalty": "presence_penalty is not supported, only 0; repetition_penalty is",
    "frequency_penalty": "frequency_penalty is not supported, only 0; repetition_penalty is",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_others(cls, body: Any) -> Any:
        """As `extra` says, but of one unknown name only."""
        if isinstance(body, dict):
            for name in body.keys() - cls.model_fields.keys():
                name = name.encode(errors="replace").decode()  # it may have lone surrogates
                raise PydanticCustomError(UNKNOWN, "there is no such parameter", {"name": name})
        return body


class StreamOptions(_Body):
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(False, description="Nothing is added in any case.")


class Generation(_Body):
    """What both of OpenAI's endpoints take."""

    model: str | None = Field(None, description="A name of /v1/models; the base model by default.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(0, ge=0, lt=1 << 31, description="0 keeps all tokens.")
    repetition_penalty: float | None = Field(1.0, gt=0, le=100)
    presence_penalty: float | None = Field(0.0, ge=0, le=0)
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    min_tokens: int | None = Field(0, ge=0, lt=1 << 31)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Not read.")


class CompletionRequest(Generation):
    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=2048)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=2048)]
    )
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Only what n is.")
    suffix: Literal[""] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class PromptRequest(BaseModel):
    """The body of POST /prompt/; what else it holds is not read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    input: Text
    length: int | float | str = Field(description="Tokens of prompt and completion together.")
    temperature: int | float | str = 1.0
    output: Any = Field(None, description="Not read.")


class CompleteRequest(BaseModel):
    """The body of POST /complete; what else it holds is not read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    context: Text
    top_p: float = Field(1.0, ge=0, le=1)
    temp: float = Field(1.0, ge=0, le=100)


# Answers


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class Answer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class PromptAnswer(BaseModel):
    output: str


class CompleteAnswer(BaseModel):
    completion: str


class Health(BaseModel):
    status: Literal["ready", "loading", "stopping", "failed"]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


class PlainErrorBody(BaseModel):
    error: str
