"""``fusion-run --choices``: ask which of several answers is right."""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, dataclass
from typing import Any

from fusion_edge.runtime.choices import Choice, check_choices
from fusion_edge.runtime.cli.stage_display import StageDisplay
from fusion_edge.runtime.conversation import Conversation
from fusion_edge.runtime.errors import UsageError


def choice_list(text: str) -> tuple[str, ...]:
    """Parse choices separated by commas. Quotes keep the commas of a choice, as in CSV."""
    try:
        (row,) = csv.reader([text], skipinitialspace=True, strict=True)
        return check_choices(row)
    except (csv.Error, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of choices such as yes,no or '\"yes, it is\",no'"
        ) from None
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class ChoosingConversation:
    """Asks the questions of a conversation with the same choices."""

    conversation: Conversation
    choices: tuple[str, ...]
    deadline: float | None
    query_length: int | None

    def ask(self, question: str) -> Choice:
        """Return the choice, and show the stages meanwhile."""
        with StageDisplay() as display:
            return self.conversation.choose(
                question,
                self.choices,
                deadline=self.deadline,
                on_stage=display.enter,
                query_length=self.query_length,
            )

    def say(self, question: str) -> None:
        """Print the choice and its probability."""
        choice = self.ask(question)
        sys.stdout.write(f"{choice.text} ({choice.probabilities[choice.text]:.1%})\n")
        sys.stdout.flush()

    def ask_json(self, question: str) -> dict[str, Any]:
        """Return the choice as JSON values."""
        choice = self.ask(question)
        return asdict(choice) | {"timings_ms": {stage: round(ms, 3) for stage, ms in choice.timings_ms.items()}}
