"""push(): a compressed model to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srcr.errors import InputError, SrcrError, in_one_line
from srcr.pipelines.progress import stage
from srcr.records.push import PushRecord
from srcr.records.sharing import shareable
from srcr.serialize import read_json, to_json
from srcr.storage.layout import CARD, EVALUATION, JOURNAL, RECORD, SEARCH

#: Records that earlier versions wrote with the paths of their machine.
_RECORDS = (RECORD, EVALUATION, SEARCH)


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> PushRecord:
    """Upload the compressed model in ``folder`` to the model repository ``repo`` ("name/model") of the hub
    that huggingface_hub is set to, in one commit; absolute paths are left out of its records.

    A repository that is there already is refused, unless ``overwrite``: then files of the same names are
    replaced, and the repository's history keeps the old ones.

    Raises:
        InputError: srcr did not write the folder, or has not finished it; no such name; nobody is logged in,
            or may not write there; the repository exists.
        SrcrError: the hub cannot be reached, or fails.

    >>> push("small", "name/small", private=True).url
    'https://huggingface.co/name/small'
    """
    folder = Path(folder)
    paths = _files(folder)
    _check_name(repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with stage("push", len(paths) + 1, quiet) as bar:
        operations = []
        for name, path in paths.items():
            operations.append(CommitOperationAdd(name, _content(path)))
            bar.note(name, advance=1)
        bar.note(f"upload to {repo}")
        with _hub_errors(repo):
            url = api.create_repo(repo, private=private or None, exist_ok=overwrite)
        with _hub_errors(repo, "; the repository is there, without these files: --overwrite"):
            commit = api.create_commit(
                url.repo_id, operations, commit_message=f"{_title(folder)}, compressed by srcr"
            )
        bar.note("done", advance=1)
    return PushRecord(
        repo=url.repo_id,
        url=str(url),
        commit=commit.oid,
        files=tuple(paths),
        n_bytes=sum(operation.upload_info.size for operation in operations),
    )


def _files(folder: Path) -> dict[str, Path]:
    """What is uploaded: every file of a finished model, by its name in the repository.

    Raises:
        InputError: it is none, is being written, or holds a link.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give one that 'srcr compress' wrote")
    if (folder / JOURNAL).exists():
        raise InputError(f"{folder} is not finished: continue its run with --resume")
    missing = [name for name in (RECORD, CARD) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} has no {missing[0]}: push what 'srcr compress' wrote")
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    shown = {
        name.as_posix(): path
        for name, path in names.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }
    links = [name for name, path in shown.items() if path.is_symlink()]
    if links:
        raise InputError(f"{folder / links[0]} is a link: put the file itself there, or remove it")
    return shown


def _content(path: Path) -> str | bytes:
    """What is uploaded of a file: its path, or a record without the paths of this machine."""
    if path.name in _RECORDS:
        return to_json(shareable(read_json(path))).encode()
    if path.name == CARD:
        return shareable(path.read_text(encoding="utf-8")).encode()
    return str(path)


def _title(folder: Path) -> str:
    """The original's name, as the record has it."""
    record = shareable(read_json(folder / RECORD))
    return str(record.get("base", "a model")) if isinstance(record, dict) else "a model"


def _check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"{repo!r} is no name of a repository, such as name/model: {in_one_line(error)}"
        ) from None


@contextmanager
def _hub_errors(repo: str, left: str = "") -> Iterator[None]:
    """What the hub refuses, as a line with the remedy; ``left``: what is there by then."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    login = "log in with 'hf auth login', or set HF_TOKEN to a token that may write"
    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(f"cannot push to {repo}: nobody is logged in; {login}") from None
    except HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            raise InputError(
                f"the hub refuses to write to {repo} ({status}): {login}{left}"
            ) from None
        if status == 409:
            raise InputError(
                f"{repo} exists on the hub: choose another name, or use --overwrite to replace files of "
                "the same names in a new commit"
            ) from None
        raise SrcrError(f"the hub did not take {repo}: {in_one_line(error)}{left}") from None
    except (HTTPError, OSError) as error:
        raise SrcrError(f"the hub cannot be reached: {in_one_line(error)}{left}") from None


def _status(error: Any) -> int | None:
    """The HTTP status of an answer; None where there was none."""
    return getattr(error.response, "status_code", None)
