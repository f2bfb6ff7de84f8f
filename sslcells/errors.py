"""Errors that a command reports to its user without a traceback."""

from typing import ClassVar


class UserError(Exception):
    """A command cannot continue; the message says why and what to do. It is printed without a traceback."""

    status: int = 1
    """exit status of the process"""
    one_ranks: ClassVar[bool] = False
    """True if a single rank can raise it while the others do not"""
    at_once: ClassVar[bool] = False
    """True if the process must exit at once, without waiting for other ranks"""


class ConfigError(UserError):
    """A mistake in the configuration, or in the data that it names."""

    status = 2


class TrainingError(UserError):
    """Training cannot continue; the message says why, and where it can resume."""
