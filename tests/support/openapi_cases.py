"""Requests that schemathesis generates from the published OpenAPI document."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance


def check_cases(base_url: str, examples: int) -> Counter[int]:
    """Send ``examples`` valid and as many invalid requests to each operation that has parameters or a body.

    Returns the statuses. Raises an error for a response that the document does not have, a server error among them, and
    for an invalid request that is accepted. Valid ones may be refused: a schema cannot say that a picture is readable.
    """
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # an error raises
        has_arguments = bool(operation.body) or bool(operation.path_parameters)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + bool(operation.body)]:

            @hypothesis.settings(
                max_examples=examples if has_arguments else 1,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                response = case.call()
                statuses[response.status_code] += 1
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            check()
    return statuses
