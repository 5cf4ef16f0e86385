"""The one hierarchy of errors. Every message says what was wrong, with the value, and what to do."""


class SrcrError(Exception):
    """A run failed for a reason srcr can name. The command line exits with 1."""

    exit_code = 1


class InputError(SrcrError):
    """What the user gave cannot be used: option, file, model, plan. The command line exits with 2."""

    exit_code = 2


class NotAvailableYetError(InputError):
    """The option or command belongs to the design but has not been built yet."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not available yet in this version of srcr.")


class NumericalError(SrcrError):
    """Weights, activations or Hessians are not finite, or cannot be factorised."""


class VerificationError(SrcrError):
    """What was written does not read back as what was computed."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line; its type's name if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
