"""The errors a user can cause. Everything else that escapes is a defect of fusion-edge."""

from __future__ import annotations


class FusionError(Exception):
    """Something the user gave or the machine lacks; the message names it, what was expected and the remedy.

    Command-line tools print it as one line and exit with :attr:`exit_code`.
    """

    exit_code = 1


class UsageError(FusionError):
    """A wrong command line or argument value (exit code 2)."""

    exit_code = 2


class DeviceError(FusionError):
    """A device that this machine cannot start, or not with what is installed; another one might run the bundle."""
