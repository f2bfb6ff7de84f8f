"""What a command tells its user without a traceback."""

from typing import ClassVar


class UserError(Exception):
    """A command cannot go on; the message says why and what to do, and is all there is to show."""

    status: int = 1
    """of the process"""
    one_ranks: ClassVar[bool] = False
    """whether a rank may meet it alone"""
    at_once: ClassVar[bool] = False
    """whether the process must end without waiting for anything"""


class ConfigError(UserError):
    """A mistake of the user's in the configuration or the data it names; the message is all there is to show."""

    status = 2


class TrainingError(UserError):
    """Training cannot go on; the message says why, and from where it can be taken up."""
