"""Folders to the Hugging Face hub: whether this user may write a repository, and one commit that holds the folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..base.errors import UserError
from .hub import first_line

# What tells a repository that a run has written from others, which are not overwritten.
MARK = "record.json"
# Files that huggingface_hub may spread over several commits.
_ONE_COMMIT = 200
_HARMLESS = {".gitattributes", "README.md"}


def check_form(repo: str) -> None:
    """Raise UserError unless `repo` may be the name of a repository, OWNER/NAME, as far as its letters tell."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) is None:
        raise _no_name(repo)


def check_name(repo: str) -> None:
    """Raise UserError unless the hub would take `repo` for a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    check_form(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise _no_name(repo) from None


def _no_name(repo: str) -> UserError:
    return UserError(f"save.push={repo} is no repository of the hub: give OWNER/NAME, of letters, digits and . _ -")


def address(repo: str) -> str:
    """Where a repository can be looked at."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def check_token(repo: str) -> str:
    """The token that a push would use: what can be said without asking the hub.

    Raises:
        UserError: a wrong name, no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token

    check_name(repo)
    if constants.is_offline_mode():
        raise UserError(
            f"save.push={repo} needs the hub, and HF_HUB_OFFLINE switches it off: unset it, or leave it out"
        )
    token = get_token()
    if not token:
        raise UserError(f"save.push={repo} needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    return token


def check(repo: str) -> None:
    """Whether the model can be pushed, as far as the hub says so beforehand.

    Raises:
        UserError: a wrong name, no token or one that may not write there, the hub is out of reach, or the repository
            holds something else.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    owner = repo.partition("/")[0]
    api = HfApi(endpoint=constants.ENDPOINT, token=check_token(repo))
    try:
        _check_rights(api.whoami(), owner, repo)
        try:
            files = {item.rfilename for item in api.model_info(repo).siblings or []}
        except RepositoryNotFoundError:  # it will be made
            return
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(
                f"save.push={repo}: the hub does not accept the token for that: set HF_TOKEN to one that may write to "
                f"{owner}, or run `hf auth login`"
            ) from None
        raise UserError(
            f"save.push={repo}: the hub refuses ({first_line(error)}): try later, or leave it out"
        ) from None
    except (httpx.HTTPError, OSError):
        raise UserError(
            f"save.push={repo}: the hub at {constants.ENDPOINT} cannot be reached: connect, or leave it out"
        ) from None
    if MARK not in files and files - _HARMLESS:
        raise UserError(
            f"save.push={repo}: that repository holds something else ({min(files - _HARMLESS)}): give another name"
        )


def _check_rights(user: Mapping, owner: str, repo: str) -> None:
    """Refuse what the token says about itself; what it does not say, the hub decides when it is written to."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    may = {user.get("name"): True} | {org.get("name"): org.get("roleInOrg") != "read" for org in user.get("orgs") or []}
    if owner not in may:
        raise UserError(
            f"save.push={repo}: the token is that of {user.get('name')}, who is not in {owner}: give "
            f"{user.get('name')}/{repo.partition('/')[2]}, or a token of {owner}"
        )
    writes = may[owner] and token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        named = [scope for scope in scopes if (scope.get("entity") or {}).get("name") in (owner, repo)]
        writes = writes and any("repo.write" in (scope.get("permissions") or []) for scope in named)
    if not writes:
        raise UserError(f"save.push={repo}: the token may read {owner} and not write there: give one that may")


def push(folder: Path, repo: str, message: str) -> str:
    """Make the repository hold what the folder holds, by one commit (several beyond 200 files). A new one is private.

    Returns:
        The commit's address.

    Raises:
        UserError: the hub did not take it; the folder stays as it is.
    """
    import httpx
    from huggingface_hub import HfApi, constants, get_token

    api = HfApi(endpoint=constants.ENDPOINT, token=get_token())
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        if len(list(folder.iterdir())) > _ONE_COMMIT:  # if a later one fails, the next run shall know its repository
            api.upload_file(repo_id=repo, path_or_fileobj=folder / MARK, path_in_repo=MARK, commit_message=message)
        info = api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns="*", commit_message=message)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:  # errors of the hub are among them
        by_hand = f"hf upload {repo} {shlex.quote(os.fspath(folder))} . --private --delete '*'"
        raise UserError(
            f"the model was saved and not pushed to {repo} ({' '.join(str(error).split())}): the same command goes on "
            f"from there, or push it with `{by_hand}`"
        ) from error
    return str(info.commit_url)
