"""The exceptions that command lines print without a traceback."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""


class AlreadyReported(UserError):
    """The same in one of several processes, where another one prints the message: this one ends silently."""


# What a user gets wrong on a command line: printed without a traceback. Any other exception is our bug.
USER_ERRORS = (
    UserError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
