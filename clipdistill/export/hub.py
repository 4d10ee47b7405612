"""Push an export to a model repo of the Hugging Face Hub: one atomic commit, retried until it succeeds.

Weights go to the Hub's large file storage first, and become visible with the commit that refers to them. A retry does
not upload again what has arrived, and recognises a commit that went through.

The token comes from the environment (``HF_TOKEN``) or from the file that ``hf auth login`` writes.
"""

import logging
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from clipdistill.errors import InputError, RunError
from clipdistill.io.retries import Retries, may_pass, status_of

log = logging.getLogger(__name__)

RETRIES = Retries(attempts=6, first_wait=1.0, seconds=600.0)
"""Retries of the whole push; the Hub's client also retries single uploads."""

_OWN_SUFFIXES = (".onnx", ".safetensors")
_ALLOWED = "a token with write access, in HF_TOKEN or from `hf auth login`"


class PushError(RunError):
    """The Hub could not be reached, or rejected the push."""


def check_token(repo_id: str) -> None:
    """Check the token before any work is done; passes if the Hub cannot be reached.

    Raises:
        InputError: no token, one that the Hub does not know, or HF_HUB_OFFLINE is set.
    """
    if not get_token():
        raise InputError(f"--push-to-hub {repo_id}: no token; allowed: {_ALLOWED}")
    try:
        HfApi().whoami()
    except OfflineModeIsEnabled as error:
        raise InputError(f"--push-to-hub {repo_id}: HF_HUB_OFFLINE is set; allowed: HF_HUB_OFFLINE unset") from error
    except Exception as error:
        if status_of(error) == 401:
            raise InputError(
                f"--push-to-hub {repo_id}: the Hub does not know the token; allowed: {_ALLOWED}"
            ) from error
        log.info("the token could not be checked: %s", type(error).__name__)


def push(folder: Path, repo_id: str, *, private: bool = False, retries: Retries = RETRIES) -> str:
    """Push an export in one commit; the repo is created if it does not exist.

    The commit also removes weights and ONNX files of an earlier export that this one does not have.

    Args:
        folder: the export.
        repo_id: OWNER/NAME.
        private: create the repo as private; an existing one must be private.
        retries: number and duration of retries.

    Returns:
        The commit's address.

    Raises:
        InputError: the token is missing, unknown or lacks write access, the Hub rejects the card, or the repo is not
            private.
        PushError: any other failure, after the last retry.
    """
    try:
        return retries.run(
            lambda: _commit(folder, repo_id, private=private),
            lambda error, what: log.warning("push to %s: %s: %s", repo_id, _describe(error), what),
        )
    except InputError:
        raise
    except Exception as error:
        if str(error).startswith("Invalid metadata"):
            raise InputError(f"--push-to-hub {repo_id}: the Hub refuses the card: {_describe(error)}") from error
        status = status_of(error)
        if status in (401, 403):
            refused = "does not know the token" if status == 401 else "does not let this token write there"
            raise InputError(f"--push-to-hub {repo_id}: the Hub {refused}; allowed: {_ALLOWED}") from error
        attempts = f" after {retries.attempts} attempts" if may_pass(error) else ""
        raise PushError(
            f"--push-to-hub {repo_id}: not pushed{attempts}: {_describe(error)}; the export in {folder} is complete, "
            f"`hf upload {repo_id} {folder}` uploads it"
        ) from error


def _commit(folder: Path, repo_id: str, *, private: bool) -> str:
    """One attempt; returns the commit's URL. Each needs new operations, as these cache what the Hub already has."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise InputError(f"--private: {repo_id} exists and is public; allowed: a new repo, or a private one")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [name for name in api.list_repo_files(repo_id) if name not in files and Path(name).suffix in _OWN_SUFFIXES]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]
    try:
        return api.create_commit(repo_id, operations, commit_message="Export with clipdistill").commit_url
    except JSONDecodeError:  # a proxy's page in place of the Hub's answer to the card validation
        raise ConnectionError("the answer is not the Hub's") from None


def _describe(error: BaseException) -> str:
    """One-line description of an error, with the server's own message if there is one."""
    if isinstance(error, HfHubHTTPError):
        status = f"HTTP {error.response.status_code}"
        return f"{status}: {' '.join(error.server_message.split())}" if error.server_message else status
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
