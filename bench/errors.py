"""The error that ends a command with one clear line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to change.

    ``exit_code`` is the status the command ends with: 2 when what was asked for is wrong (an unknown name or option),
    1 when it could not be done (a failed download, a damaged file).
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
