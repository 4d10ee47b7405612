"""The exceptions that one line tells, each with the exit code that the command line makes of it."""


class InputError(ValueError):
    """Bad input from the user: a config field, a file, a shard, a class list.

    The message is one line that names the field or file, the value, and what is allowed. The command line prints it
    without a traceback and exits with code 2.
    """

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on through no fault of its input: a full disk, a process that is gone.

    The message is one line. The command line prints it without a traceback and exits with code 1.
    """

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run; the message is one line.

    The command line prints it and exits with code 75, EX_TEMPFAIL of sysexits.h: ``--resume auto`` goes on.
    """

    exit_code = 75


class AlreadyToldError(Exception):
    """The run has ended for a reason that another of its processes tells: the command line prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process tells why the run has ended, with exit code {exit_code}")
        self.exit_code = exit_code
