"""Responses besides answers: models, states, errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelInfo(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["fusion-edge"]


class ModelList(BaseModel):
    """A list of one model."""

    object: Literal["list"]
    data: list[ModelInfo]


class Status(BaseModel):
    """The state of the server."""

    status: Literal["loading", "ready", "draining", "failed"]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail
