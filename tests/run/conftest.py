"""Fixtures for the tests of a run's folder."""

from wandb_standin import mute, no_credentials, server

__all__ = ["mute", "no_credentials", "server"]
