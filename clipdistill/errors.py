"""Exceptions whose message is one line, each with its exit code."""


class InputError(ValueError):
    """Bad input from the user: a config field, a file, a shard, a class list.

    The message is one line that names the field or file, the value, and what is allowed. The command line prints it
    without a traceback and exits with code 2.
    """

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot continue although its input is right: a full disk, a dead process.

    The message is one line. The command line prints it without a traceback and exits with code 1.
    """

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal.

    The command line prints the message, one line, and exits with code 75 (EX_TEMPFAIL of sysexits.h): ``--resume auto``
    continues.
    """

    exit_code = 75


class ReportedElsewhereError(Exception):
    """The run has ended for a reason that another rank reports: the command line prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank reports why the run has ended, with exit code {exit_code}")
        self.exit_code = exit_code
