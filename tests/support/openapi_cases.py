"""Requests that schemathesis generates from the published OpenAPI document."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from fusion_edge.benchmarks.serving.generated_requests import has_deadline


def check_cases(base_url: str, examples: int) -> Counter[int]:
    """Send ``examples`` valid and as many invalid requests to each operation that has parameters or a body.

    Returns the statuses. Raises an error for a response that the document does not have, a server error among them (but
    504 where the request has a deadline), and for an invalid request that is accepted. Valid ones may be refused: a
    schema cannot say that a picture is readable.
    """
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        has_arguments = bool(operation.body) or bool(operation.path_parameters)
        modes = tuple(map(GenerationMode, ("positive", "negative")))
        for mode in modes[: 1 + bool(operation.body)]:

            @hypothesis.settings(
                max_examples=examples if has_arguments else 1,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case[Any]) -> None:
                response = case.call()
                statuses[response.status_code] += 1
                is_late = response.status_code == 504 and has_deadline(case.headers, case.body)
                excluded: list[Any] = [positive_data_acceptance, *([not_a_server_error] if is_late else [])]
                if response.status_code == 413:  # a refusal, which schemathesis does not count as one
                    excluded.append(negative_data_rejection)
                case.validate_response(response, excluded_checks=excluded)

            check()
    return statuses
