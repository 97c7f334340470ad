"""The Hugging Face hub: is a repository there, fetch one file of it, and say in one line what went wrong.

One short request with a time limit decides whether the hub can be reached, before any download is tried: the libraries'
own retries wait 23 s for each missing file of a machine without network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..base.errors import UserError
from ..base.files import read_json

PROBE_SECONDS = 10


def offline_only(repo: str, revision: str | None, kind: str, remedy: str) -> bool:
    """Whether only cached copies of the repository can be used: True when the hub is switched off or not reachable.

    Args:
        repo: "owner/name" on the hub.
        revision: branch, tag or commit; None is the default branch.
        kind: "model" or "dataset".
        remedy: what the user can do instead; ends the messages.

    Raises:
        UserError: the hub answers that the repository or the revision does not exist or is not open to this user.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return True
    found = _probe(repo, revision, kind, constants.ENDPOINT)
    if isinstance(found, Exception):
        raise UserError(explain(found, f"{kind} {repo!r}", revision, remedy)) from None
    return not found


@cache
def _probe(repo: str, revision: str | None, kind: str, endpoint: str) -> bool | Exception:
    """True: there; False: the hub cannot be reached; an exception: what the hub refused. Asked once per process."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi(endpoint=endpoint).repo_info(repo, revision=revision, repo_type=kind, timeout=PROBE_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        return error
    except (httpx.HTTPError, OSError):
        return False
    return True


def cached_model(repo: str, revision: str | None, remedy: str) -> Path:
    """The folder in the hub's cache that holds what was downloaded of a model's repository.

    Raises:
        UserError: not even its config.json is there.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    file = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(file, str):
        raise UserError(explain(errors.LocalEntryNotFoundError(repo), f"model {repo!r}", revision, remedy))
    return Path(file).parent


@cache
def holds(repo: str, revision: str | None, name: str) -> bool:
    """Whether a model's repository that can be reached has a file of this name. Asked once per process."""
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        return bool(hf_hub_download(repo, name, revision=revision))
    except (httpx.HTTPError, OSError):  # not there, or out of reach by now
        return False


def commit(folder: Path) -> str | None:
    """The commit whose files a folder of the hub's cache holds (…/models--OWNER--NAME/snapshots/COMMIT)."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def fetch(repo: str, filename: str, revision: str | None, remedy: str) -> tuple[Path, str]:
    """One file of a data set on the hub, downloaded once into the hub's cache: its path and the commit it came from.

    Raises:
        UserError: hub not reachable and file not cached, no such repository, revision or file, or access refused.
    """
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        local = offline_only(repo, revision, "dataset", remedy)
        path = hf_hub_download(repo, filename, repo_type="dataset", revision=revision, local_files_only=local)
    except (httpx.HTTPError, OSError) as error:
        raise UserError(explain(error, f"data set {repo!r} ({filename})", revision, remedy)) from None
    # The cache's layout is …/snapshots/COMMIT/FILENAME.
    return Path(path), Path(path).parents[filename.count("/")].name


def lies_here(repo: str, filename: str, revision: str | None) -> bool:
    """Whether a file of a data set on the hub is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, filename, revision=revision, repo_type="dataset"), str)


def checkpoint_folder(repo: str, revision: str | None, precedence: Sequence[str], remedy: str) -> Path:
    """The folder in the hub's cache with the weight files of a model, downloaded once.

    Args:
        repo, revision: the repository.
        precedence: names of single files and of indexes (….json); the first that is there counts.
        remedy: ends the messages.

    Raises:
        UserError: hub not reachable and files not cached, no such repository or revision, no weights, access refused.
    """
    import httpx
    from huggingface_hub import errors, hf_hub_download

    local = offline_only(repo, revision, "model", remedy)

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local))
        except errors.EntryNotFoundError:  # also one that is not in the cache
            return None

    try:
        get("generation_config.json")
        for name in precedence:
            if (listing := get(name)) is not None:
                files = set()
                if name.endswith(".json"):
                    files = set(read_json(listing)["weight_map"].values())
                if missing := [file for file in sorted(files) if get(file) is None]:
                    raise UserError(f"model {repo!r} lacks {missing[0]}, which {name} names; {remedy}")
                return listing.parent
    except (httpx.HTTPError, OSError) as error:
        raise UserError(explain(error, f"model {repo!r}", revision, remedy)) from None
    raise UserError(f"model {repo!r} has no weights in safetensors or .bin files that can be reached; {remedy}")


def explain(error: BaseException, what: str, revision: str | None, remedy: str) -> str:
    """One line: why the hub did not give `what`, and what to do.

    Libraries wrap the hub's errors in their own, so the chain of causes is searched for the telling one.
    """
    import httpx
    from huggingface_hub import constants, errors

    chain = _causes(error)

    def some(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if some(errors.GatedRepoError):
        return (
            f"{what} is gated and no token with access was given: accept its licence on {constants.ENDPOINT}, "
            f"then set HF_TOKEN or run `hf auth login`"
        )
    if some(errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r} on {constants.ENDPOINT}; give a branch, a tag or a commit of it"
    if some(errors.RepositoryNotFoundError, errors.HFValidationError):
        return (
            f"{what} is not on {constants.ENDPOINT}, or is private: check the spelling (owner/name), set HF_TOKEN if "
            f"it is private, or {remedy}"
        )
    if some(errors.LocalEntryNotFoundError, httpx.TransportError, errors.OfflineModeIsEnabled):
        if constants.is_offline_mode():
            return f"{what} is not in the cache and HF_HUB_OFFLINE switches the hub off: unset it, or {remedy}"
        return f"{what} is not in the cache and the hub at {constants.ENDPOINT} cannot be reached: connect, or {remedy}"
    if some(errors.RemoteEntryNotFoundError):
        return f"{what}: the repository has no such file on {constants.ENDPOINT}; check the name, or {remedy}"
    return f"{what} cannot be loaded ({first_line(chain[-1])}); {remedy}"


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message without colours, at most 300 characters, or the error's type."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")
