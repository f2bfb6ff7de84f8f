"""What `sslcells doctor` looks at: this machine, the ranks, the gradients, the speed."""

from typing import NamedTuple


class Check(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool | None
    """None: it works, but should be looked at"""
    found: str
    remedy: str = ""
    """what to do if it has not passed"""
