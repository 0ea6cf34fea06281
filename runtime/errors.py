"""The errors a user can cause. Everything else that escapes is a defect of fusion-edge."""

from __future__ import annotations


class FusionError(Exception):
    """Something the user gave or the machine lacks; the message names it, what was expected and the remedy.

    Command-line tools print it as one line and exit with :attr:`exit_code`.
    """

    exit_code = 1

    def __str__(self) -> str:
        """The message; bytes of a path that are no UTF-8 are escaped, so that it can be printed anywhere."""
        return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class UsageError(FusionError):
    """A wrong command line or argument value (exit code 2)."""

    exit_code = 2


class DeviceError(FusionError):
    """A device that this machine cannot start, or not with what is installed; another one might run the bundle."""
