"""The one exception that stands for a user's mistake."""


class MassError(Exception):
    """Something the user can mend: the message names the key, file or line, the value seen and the way out.

    Entry points print it without a traceback and exit with code 2.
    """
