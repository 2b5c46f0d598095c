"""The error a user can cause and mend: one line, shown without a traceback, exit code 2."""


class UserError(ValueError):
    """Says in one line what was given, what was expected and what to do."""
