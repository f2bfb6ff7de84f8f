"""Two ranks that the doctor starts."""

import pytest
import torch

from sslcells.checks.two_ranks import two_ranks


@pytest.mark.slow
def test_they_meet_and_gather():
    check = two_ranks()
    assert check.passed is True, check
    if torch.cuda.device_count() < 2:
        assert check.name == "two ranks, gloo"
    assert "gathered in order" in check.found


def test_those_that_do_not_start_in_time_are_ended():
    check = two_ranks(seconds=0.2)
    assert check.passed is None
    assert "still importing torch" in check.found
    assert "load" in check.remedy


@pytest.mark.slow
def test_those_that_fail_say_why():
    check = two_ranks(extra={"MASTER_PORT": "no port"})
    assert check.passed is False
    assert "MASTER_PORT='no port' in the environment is not a number" in check.found
