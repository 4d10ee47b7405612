"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """Bad input from the user: a config field, a file, a shard, a class list.

    The message is one line that names the field or file, the value, and what is allowed. The command line prints it
    without a traceback and exits with code 2.
    """
