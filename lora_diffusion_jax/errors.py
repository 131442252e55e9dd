"""The one exception for mistakes a user can make and mend."""


class UserError(ValueError):
    """Bad input from outside: its message says what was found, what was expected and what to do.

    Command-line programs print the message alone, without a stack trace, and exit with status 2.
    """
