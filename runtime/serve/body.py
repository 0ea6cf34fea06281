"""The body of a request: JSON, then a validated :class:`ChatRequest`."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.fields import path_of

MAX_PUNCTUATION = 10_000
"""Limit of commas, colons, brackets and braces, which bounds the values of a JSON text before it is parsed. Those in
texts count, too: base64 has none, and questions that fit the model have few."""

T = TypeVar("T", bound=BaseModel)

_UNKNOWN = "extra_forbidden"
_MAX_DIGITS = 400  # a float has at most 309 before the point
_PUNCTUATION = (b",", b":", b"[", b"{")
_BLOCK = 64 << 10


def parse_body(body: bytes, kind: type[T]) -> T:
    """Return the object of a JSON body. Raise :class:`ApiError` with the path of a field that is not valid."""
    try:
        return kind.model_validate(parse_json(body))
    except ValidationError as invalid:
        raise _api_error(invalid) from None


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text. Duplicate keys and numbers that are not finite are errors."""
    _check_punctuation(body)
    try:
        return json.loads(
            body.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except ValueError as error:
        reason = str(error)
    raise ApiError(400, f"The body is not valid JSON: {reason}; expected one JSON object.", code="invalid_json")


def _check_punctuation(body: bytes) -> None:
    """Refuse a body of many values: each takes up to a hundred times its bytes, and other threads wait for the parser.

    Counts block by block, so that a dense body is refused by its beginning.
    """
    count = 0
    for begin in range(0, len(body), _BLOCK):
        block = body[begin : begin + _BLOCK]
        count += sum(map(block.count, _PUNCTUATION))
        if count > MAX_PUNCTUATION:
            message = f"The body has more than {MAX_PUNCTUATION} commas, colons and brackets; send a shorter one."
            raise ApiError(413, message, code="too_many_values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {short_repr(name)} is given twice")
            seen.add(name)
    return result


def _integer(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


def _float(digits: str) -> float:
    _check_digits(digits)
    return float(digits)


def _check_digits(digits: str) -> None:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _api_error(invalid: ValidationError) -> ApiError:
    """Return the error of the first unknown field, else of the first invalid one."""
    errors = invalid.errors(include_url=False, include_input=False, include_context=False)
    error = next((one for one in errors if one["type"] == _UNKNOWN), errors[0])
    path = path_of(error["loc"])
    if error["type"] == _UNKNOWN:
        return ApiError(400, f"{path} is an unknown field; remove it.", path, "unknown_field")
    if error["type"] == "missing":
        return ApiError(400, f"{path} is missing; add it.", path, "missing_field")
    if error["type"] == "model_type":  # pydantic's message names a class of Python
        return ApiError(400, f"{path or 'The body'}: expected an object.", path or None, "invalid_value")
    message = f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    return ApiError(400, f"{path or 'The body'}: {message}.", path or None, "invalid_value")
