"""A folder on the hub, through huggingface_hub: what is there is looked at first, and nothing of others is overwritten unasked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from iqlite.base.hub import offline_without_network
from iqlite.errors import RunError, first_line
from iqlite.export.card import MANIFEST

NOBODYS = {".gitattributes"}  # what the hub itself puts into a new repository


@dataclass(frozen=True)
class There:
    """What a repository holds: its files (None: there is no such repository), its last commit, and whether others can see it."""

    files: frozenset[str] | None
    commit: str | None = None
    private: bool = True


def check_token() -> None:
    """RunError without a token of the hub's, or without the hub."""
    from huggingface_hub import constants, get_token

    if get_token() is None:
        raise RunError("pushing needs a token of the hub that may write: hf auth login, or HF_TOKEN in the environment.")
    offline_without_network()
    if constants.HF_HUB_OFFLINE:
        raise RunError(f"{constants.ENDPOINT} can't be reached, or HF_HUB_OFFLINE is set: nothing was pushed.")


def look(repo: str, *, force: bool) -> There:
    """What is at `repo`; RunError if it holds files that iqlite didn't push, unless `force`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repo):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return There(None)
    files = frozenset(one.rfilename for one in info.siblings or ())
    if files - NOBODYS and MANIFEST not in files and not force:
        raise RunError(
            f"{repo} holds files that iqlite didn't push ({', '.join(sorted(files - NOBODYS)[:4])}): name another repository, or --force."
        )
    return There(files, info.sha, bool(info.private))


def exists(model: str) -> bool:
    """Whether the hub has a model of this name."""
    from huggingface_hub import HfApi

    with _explained(model):
        return HfApi().repo_exists(model)


def push_folder(folder: Path, repo: str, there: There, *, private: bool, message: str) -> str:
    """Uploads a folder as one commit, onto a new repository or onto what `look` found; the commit's URL. RunError if the hub refuses, or somebody pushed meanwhile."""
    from huggingface_hub import HfApi

    with _explained(repo):
        if there.files is None:
            HfApi().create_repo(repo, private=private)
        done = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, parent_commit=there.commit)
    return str(done.commit_url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The hub's refusals, and lines that break, as one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as LineError  # type: ignore[attr-defined] # httpx's or httpx2's, by the hub's version

    try:
        yield
    except HFValidationError as error:
        raise RunError(f"{repo!r} isn't a name that the hub takes ({first_line(error)}): give OWNER/NAME.") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        if status == 412:
            raise RunError(f"{repo} was changed by somebody else meanwhile: push again.") from None
        hint = ": may the token write there?" if status in (401, 403) else "."
        raise RunError(f"the hub refuses {repo} ({status}, {(error.server_message or first_line(error)).splitlines()[0]}){hint}") from None
    except (LineError, OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{repo} couldn't be pushed ({first_line(error)}): push again.") from None
