"""How a suite says what is wrong."""


def require(holds: bool, fault: str) -> None:
    """Nothing where it ``holds``; unlike the statement ``assert`` it is never left out.

    Raises:
        AssertionError: the ``fault``.
    """
    if not holds:
        raise AssertionError(fault)
