"""The one exception that command lines print without a traceback."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""
