"""Retries of requests to remote stores: which errors are transient, the waits between attempts, and their limit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import tenacity

T = TypeVar("T")

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING = (OSError, aiohttp.ClientError)
_PASSING_NAMES = frozenset({"HTTPClientError", "TransportError"})
"""Base classes of botocore's and httpx's errors without a response; by name, as either may not be installed."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_LASTING_NAMES = frozenset({"OfflineModeIsEnabled"})


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Limits of one request to a remote store and its retries. A request that succeeds resets the count.

    The wait before attempt n + 1 is random, at most `first_wait` x 2^(n - 1) seconds, or the server's Retry-After
    if longer, and never longer than `longest_wait`. Only transient errors are retried: no connection or a broken
    one, no response in time, or HTTP status 408, 425, 429, 500, 502, 503 or 504.
    """

    attempts: int = 12
    """Total number of attempts; 1: no retries."""
    seconds: float = 180.0
    """No attempt starts later than this after the start of the first."""
    first_wait: float = 0.2
    """Seconds."""
    longest_wait: float = 30.0
    """Seconds."""
    connect_timeout: float = 10.0
    """Seconds in which a connection must be established."""
    read_timeout: float = 30.0
    """Seconds without a byte after which a response counts as lost."""

    def run(self, request: Callable[[], T], report: Callable[[Exception, str], None]) -> T:
        """The result of `request`, retried after transient errors.

        Args:
            request: One attempt.
            report: Called before each retry with the root cause, and a text about the next attempt.

        Raises:
            Exception: The last attempt's error.
        """

        def before_sleep(state: tenacity.RetryCallState) -> None:
            wait = f"attempt {state.attempt_number + 1} of {self.attempts} in {state.upcoming_sleep:.1f} s"
            report(list(_causes(_error(state)))[-1], wait)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(self.seconds),
            wait=self._wait,
            before_sleep=before_sleep,
            reraise=True,
        )
        return retrying(request)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        wait = tenacity.wait_random_exponential(multiplier=self.first_wait, max=self.longest_wait)(state)
        for error in _causes(_error(state)):
            asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
            if asked.isdecimal():
                return max(wait, min(float(asked), self.longest_wait))
        return wait


DEFAULT_RETRIES = Retries()


def may_pass(error: BaseException) -> bool:
    """Whether an error of a request is transient."""
    errors = list(_causes(error))
    if (status := status_of(error)) is not None:
        return status in _PASSING_STATUS
    if isinstance(error, FileNotFoundError) and len(errors) > 1:  # fsspec raises it for any error over HTTP
        errors = errors[1:]
    names = {base.__name__ for each in errors for base in type(each).__mro__}
    if any(isinstance(each, _LASTING) for each in errors) or names & _LASTING_NAMES:
        return False
    return any(isinstance(each, _PASSING) for each in errors) or bool(names & _PASSING_NAMES)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of aiohttp, botocore or httpx; None if no response arrived."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None) or getattr(each, "status", None)
        if isinstance(status, int) and status >= 400:
            return status
    return None


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """An error, and the chain of its causes."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__


def _error(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return error
