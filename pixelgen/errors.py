"""The exceptions that command lines print without a traceback."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""


class ToldError(UserError):
    """The same, in a process of a run of which another one tells it: ends this one quietly."""


# What a user gets wrong on a command line: printed without a traceback. Any other exception is our bug.
USER_ERRORS = (
    UserError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
