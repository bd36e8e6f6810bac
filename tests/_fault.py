"""What a fault is, for the lists of them."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement, which must match exactly one place of a file."""

    name: str
    file: str
    """In the package, without the suffix."""
    before: str
    after: str
    tests: tuple[str, ...] = ()
    """Files, or file::test, in the order in which they are run."""
