"""Messages with the fields of ROS 2's, for tests without ROS."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass
class Time:
    sec: int = 3
    nanosec: int = 500


@dataclass
class Header:
    stamp: Time = field(default_factory=Time)
    frame_id: str = "front"


@dataclass
class ImageMessage:
    height: int
    width: int
    encoding: str
    step: int
    data: array[int] | bytes
    is_bigendian: int = 0
    header: Header = field(default_factory=Header)


@dataclass
class CompressedImageMessage:
    format: str
    data: array[int] | bytes
    header: Header = field(default_factory=Header)
