"""The node's parameters, and what is valid. Needs no ROS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_edge import UsageError
from fusion_edge_ros.questions import Question, object_of_json

Value = bool | int | float | str | list[str]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the node."""

    name: str
    default: Value
    description: str
    largest: int | float | None = None
    """Limit of a number; None for a parameter that is no number."""
    smallest: int = 0


PARAMETERS = (
    Parameter("bundle", "", "Folder of the bundle, or a hub id org/name."),
    Parameter("device", "auto", "auto, cpu, cuda, tensorrt or tensorrt-rtx."),
    Parameter("threads", 0, "CPU threads; 0 for every processor of the process.", 1024),
    Parameter("lock_memory", False, "Read the weights in, and keep them in memory."),
    Parameter("cached_images", 1, "Pictures whose features stay cached.", 64, 1),
    Parameter("query_length", 0, "Number of latents, one of the bundle's; 0 for its first.", 4096),
    Parameter("max_new_tokens", 512, "Limit of an answer's tokens, for a question without its own.", 65536, 1),
    Parameter("capacity", 8, "Limit of questions that wait; a further one is refused.", 1024, 1),
    Parameter("topics", ["image"], "Topics of frames: CompressedImage if the name ends with /compressed, else Image."),
    Parameter("max_frame_age", 2.0, "Seconds until the newest frame is too old to ask about; 0 for never.", 86400.0),
    Parameter("question", "", "Question about each newest frame; empty for none."),
    Parameter("choices", [], "Answers to choose from, for that question; empty for any answer."),
    Parameter("schema", "", "JSON schema of the answer to that question, as text; empty for a text."),
    Parameter("deadline", 0.0, "Seconds until a question without its own deadline ends; 0 for none.", 86400.0),
    Parameter("action", True, "Whether to serve the action ask, which needs fusion_edge_msgs."),
    Parameter("autostart", False, "Configure and activate at the start."),
)
"""max_frame_age, question, choices, schema and deadline act from the next question on, action and autostart at the
start. The others are read by configure and activate."""


@dataclass(frozen=True)
class Settings:
    """The values of the parameters."""

    bundle: str
    device: str
    threads: int | None
    """None for every processor."""
    lock_memory: bool
    cached_images: int
    query_length: int | None
    """None for the bundle's first."""
    max_new_tokens: int
    capacity: int
    topics: tuple[str, ...]
    max_frame_age: float
    standing: Question | None
    """Question about each newest frame."""
    deadline: float
    action: bool
    autostart: bool


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Return the settings for a value of each of :data:`PARAMETERS`, of its type and in its range.

    Raises:
        UsageError: Values are wrong, or do not fit together.
    """
    topics = tuple(values["topics"])
    if not topics or not all(topics) or len(set(topics)) < len(topics):
        raise UsageError(f"topics is {list(topics)}; expected the names of one or more topics, each once.")
    if values["capacity"] < len(topics):  # the newest frame of each may wait
        raise UsageError(
            f"capacity is {values['capacity']}; expected at least {len(topics)}, one for each of the topics."
        )
    schema = object_of_json("schema", values["schema"]) if values["schema"] else None
    choices = tuple(values["choices"])
    if not values["question"] and (choices or schema is not None):
        raise UsageError("choices and schema are for the parameter question, which is empty; set it, too.")
    standing = None
    if values["question"]:
        standing = Question(values["question"], choices=choices, schema=schema, deadline=values["deadline"])
    return Settings(
        bundle=values["bundle"],
        device=values["device"],
        threads=values["threads"] or None,
        lock_memory=values["lock_memory"],
        cached_images=values["cached_images"],
        query_length=values["query_length"] or None,
        max_new_tokens=values["max_new_tokens"],
        capacity=values["capacity"],
        topics=topics,
        max_frame_age=values["max_frame_age"],
        standing=standing,
        deadline=values["deadline"],
        action=values["action"],
        autostart=values["autostart"],
    )
