"""A result on the hub: verified here, sent file by file, and there in one commit or not at all."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.checkpoint.hub import (
    ANSWER_SECONDS,
    UPLOAD_ANSWER_SECONDS,
    hub_refusal,
    patient_hub,
    push_refusal,
    quiet_hub,
    without_secrets,
    write_token,
)
from ..convert.checkpoint.layout import WEIGHT_SUFFIXES
from ..convert.checkpoint.manifest import (
    PROVENANCE_NAME,
    RUN_FILES_NAME,
    FileDigest,
    digest_file,
    files_of_the_run,
    listed_files,
    read_provenance,
)
from ..convert.checkpoint.output import CARD_NAME
from ..convert.checkpoint.tensors import CONFIG_NAME
from ..convert.conversion import Progress, no_progress
from ..convert.errors import CheckpointError, InputError, KvConvertError
from ..convert.printable import printable
from ..measure import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelInfo

__all__ = ["Push", "PushedFile", "push"]

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BATCH_BYTES = 2**28  # what is sent between two words of progress, unless one file is larger
_BATCH_FILES = 100
_WEIGHT_FILES = (*WEIGHT_SUFFIXES, ".index.json")
_ELSEWHERE = "choose another name, propose the files as a pull request, or let them be replaced"
_NOT_FINISHED = "nothing was committed; what was sent so far is not sent again"


@dataclass(frozen=True)
class PushedFile:
    """A file by its name in the repository, its size in bytes, and whether the hub had it already, byte for byte."""

    name: str
    size: int
    was_there: bool


@dataclass(frozen=True)
class Push:
    """What a push did, or with a dry run would do.

    `visibility` says why the repository is private or public. `removed` are weights of an earlier push that the new
    manifest does not have. `commit` is the commit that holds the files, and `url` where to look at it: a pull request
    where one was opened. Both are None after a dry run.
    """

    directory: str
    repository: str
    private: bool
    visibility: str
    is_new: bool
    files: tuple[PushedFile, ...]
    removed: tuple[str, ...]
    commit: str | None = None
    url: str | None = None

    @property
    def num_bytes_to_send(self) -> int:
        """The size of the files that the hub does not have."""
        return sum(file.size for file in self.files if not file.was_there)


def push(
    directory: str | Path,
    repository: str,
    *,
    create_pr: bool = False,
    private: bool | None = None,
    force: bool = False,
    dry_run: bool = False,
    run: bool = True,
    progress: Progress = no_progress,
    remark: Callable[[str], object] = lambda text: None,
) -> Push:
    """Send a directory that kvconvert wrote to the repository `org/name` of the hub, which is made if there is none.

    The directory has to pass `measure.verify` first, which `run` is an argument of; then all of its files go: weights,
    card, recipe, manifest. They become visible in one commit, or in one pull request with `create_pr`, when all of them
    are there and have the digests of the manifest, so that no push that was cut short looks finished; a second call
    sends what is missing. Weights of an earlier push that the manifest does not have are removed in the same commit.

    Without `private` a new repository is private where the source of the conversion is private or gated on the hub, or
    where that cannot be known; an existing one keeps its visibility, and is refused where that is public and the
    source is not known to be. A repository whose model kvconvert did not write is refused, unless `create_pr` proposes
    the change or `force` replaces it. The token is that of the environment (HF_TOKEN) or of `hf auth login`. With
    `dry_run` all is checked and nothing is sent. `remark` is called with what a person should know.

    Raises InputError, of it CheckpointError for a directory that is not as kvconvert wrote it, and says what the hub
    refused and why.
    """
    from huggingface_hub import HfApi

    place = Path(directory)
    # 1. what can be known without the hub
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no name of a repository on the hub", hint="give it as org/name")
    files = _files(place)
    api = HfApi(token=write_token())
    with quiet_hub(), _quiet_bars():
        # 2. what is there, and whether it may be changed
        with _refusals(repository, ANSWER_SECONDS):
            _check_may_write(api)
            before = _model_info(api, repository)
        is_private, visibility = _visibility(api, read_provenance(place), private, before, repository)
        if before is not None and not (create_pr or force):
            _check_is_ours(before, repository)
        # 3. the directory, which takes minutes
        _check_verified(place, run=run, remark=remark)
        planned = _planned(place, repository, files, before, is_private, visibility)
        if dry_run:
            return planned
        missing = {file.name for file in planned.files if not file.was_there}
        if before is not None and not missing and not planned.removed:
            return _finished(planned, before.sha, f"{api.endpoint}/{repository}")
        # 4. the files, which nobody sees before the commit
        _check_card(place, repository)
        with _refusals(repository, UPLOAD_ANSWER_SECONDS):
            if before is None:
                api.create_repo(repository, private=is_private)
                before = api.model_info(repository, files_metadata=True, timeout=UPLOAD_ANSWER_SECONDS)
        with _refusals(repository, UPLOAD_ANSWER_SECONDS), _not_finished():
            commit = _send(api, planned, [file for file in files if file.name in missing], before, create_pr, progress)
        # 5. whether the hub holds what was sent
        with _refusals(f"{repository}, where {commit.commit_url} was made", UPLOAD_ANSWER_SECONDS):
            after = api.model_info(
                repository,
                revision=commit.pr_revision or commit.oid,
                files_metadata=True,
                timeout=UPLOAD_ANSWER_SECONDS,
            )
        absent = [file.name for file in files if not _is_there(place, file, _by_name(after))]
        if absent:
            raise InputError(
                f"{repository}: {commit.commit_url} lacks {absent[0]}, or has other bytes of it", hint="push it again"
            )
        return _finished(planned, commit.oid, commit.pr_url or commit.commit_url)


def _files(directory: Path) -> list[FileDigest]:
    """All files of a result: those of its manifest, and the manifest, whose own digests are of what is there now."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    record = read_provenance(directory)
    listed, of_run = listed_files(record), files_of_the_run(directory, record)
    if listed is None or of_run is None:
        what = f"{PROVENANCE_NAME} does not list its files" if record else f"there is no {PROVENANCE_NAME}"
        raise CheckpointError(
            f"{directory}: {what}", hint="only what kvconvert wrote is pushed; `hf upload` sends any directory"
        )
    own = [PROVENANCE_NAME, *([RUN_FILES_NAME] if of_run else [])]
    return [*listed, *of_run, *(digest_file(directory, name) for name in own)]


def _check_may_write(api: HfApi) -> None:
    """Raise InputError for a token that can only read, before hours of work."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        role = ((api.whoami().get("auth") or {}).get("accessToken") or {}).get("role")
    except HfHubHTTPError as error:
        if error.response.status_code not in (403, 429):
            raise
        return  # the token may not ask, or the hub was asked too often, of which it takes little: writing will tell
    if role == "read":
        raise InputError(
            "the token for the hub may only read",
            hint="make one with write permission at https://huggingface.co/settings/tokens",
        )


def _model_info(api: HfApi, repository: str) -> ModelInfo | None:
    """What the hub says of a repository, None where it has none or does not show it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:  # with a timeout of its own, without which it waits for ever, whatever the session's is
        return api.model_info(repository, files_metadata=True, timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError:
        return None


def _visibility(
    api: HfApi, record: Mapping[str, Any], asked: bool | None, before: ModelInfo | None, repository: str
) -> tuple[bool, str]:
    """Whether the repository is or becomes private, and why. Raises InputError where it is public and should not be."""
    wanted, reason = (asked, "as asked") if asked is not None else _visibility_of_source(api, record)
    if before is None:
        return wanted, reason
    is_private = bool(before.private)
    if is_private == wanted:
        return is_private, reason
    if asked is None and is_private:
        return True, f"{repository} is private already"
    there, other = ("private", "public") if is_private else ("public", "private")
    if asked is not None:
        raise InputError(
            f"{repository} is {there} on the hub, and {other} was asked for", hint="change that in its settings there"
        )
    raise InputError(
        f"{repository} is public on the hub, and {reason}",
        hint="make it private in its settings there, or say that everybody may have the result",
        settings=("private",),
    )


def _visibility_of_source(api: HfApi, record: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a new repository becomes private, because of the source that the manifest names."""
    source = printable(str(record.get("source", "")))
    if "/" not in source and "source_revision" not in record:
        return True, f"whether its source, the directory {source}, is public is not known"
    try:
        info = api.model_info(source, timeout=ANSWER_SECONDS)
    except Exception as error:
        return (
            True,
            f"whether its source {source} is public is not known ({without_secrets(hub_refusal(error, 'model')[0])})",
        )
    if info.private:
        return True, f"its source {source} is private"
    if info.gated:
        return True, f"its source {source} is given only to people who were granted access"
    return False, f"its source {source} is public"


def _check_is_ours(before: ModelInfo, repository: str) -> None:
    """Raise InputError for a repository with a model that kvconvert did not write."""
    names = _by_name(before)
    is_model = CONFIG_NAME in names or any(name.endswith(WEIGHT_SUFFIXES) for name in names)
    if is_model and PROVENANCE_NAME not in names:
        raise InputError(
            f"{repository} holds a model that kvconvert did not write, and that would be replaced",
            hint=_ELSEWHERE,
            settings=("create_pr", "force"),
        )


def _check_verified(directory: Path, *, run: bool, remark: Callable[[str], object]) -> None:
    found = verify(directory, run=run, see=lambda name: remark(f"checking {name}"))
    if not found.ok:
        more = f", and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise CheckpointError(
            f"{directory} is not as kvconvert wrote it, so nothing was sent: {found.problems[0]}{more}",
            hint="convert or uptrain it again; a card is best changed on the hub, after the push",
        )


def _check_card(directory: Path, repository: str) -> None:
    """Raise InputError for a card whose metadata the hub would refuse in the commit, after hours of sending."""
    from huggingface_hub import ModelCard

    path = directory / CARD_NAME
    if not path.exists():
        return
    with _refusals(repository, UPLOAD_ANSWER_SECONDS):
        try:
            ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).validate("model")
        except ValueError as error:
            raise InputError(
                f"{repository}: the hub does not take the metadata of {path} ({_said_of_card(str(error))})",
                hint="where it is of the source's card, mend it there and convert again",
            ) from error


def _said_of_card(answer: str) -> str:
    """The messages in the hub's answer about a card, which is JSON."""
    try:
        return "; ".join(str(error["message"]) for error in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.split())


def _planned(
    directory: Path,
    repository: str,
    files: Sequence[FileDigest],
    before: ModelInfo | None,
    is_private: bool,
    visibility: str,
) -> Push:
    there = {} if before is None else _by_name(before)
    names = {file.name for file in files}
    return Push(
        directory=str(directory),
        repository=repository,
        private=is_private,
        visibility=visibility,
        is_new=before is None,
        files=tuple(PushedFile(file.name, file.size, _is_there(directory, file, there)) for file in files),
        removed=tuple(sorted(name for name in there.keys() - names if name.endswith(_WEIGHT_FILES))),
    )


def _by_name(info: ModelInfo) -> dict[str, Any]:
    return {sibling.rfilename: sibling for sibling in info.siblings or ()}


def _is_there(directory: Path, file: FileDigest, there: Mapping[str, Any]) -> bool:
    """Whether the hub has the very bytes of a file, in its large storage or in git, which count differently."""
    sibling = there.get(file.name)
    if sibling is None:
        return False
    if sibling.lfs is not None:
        return bool(sibling.lfs.sha256 == file.digest)
    return sibling.size == file.size and bool(sibling.blob_id == _git_digest(directory / file.name))


def _git_digest(path: Path) -> str:
    content = path.read_bytes()  # of a file that is small enough for git
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _send(
    api: HfApi,
    planned: Push,
    files: Sequence[FileDigest],
    before: ModelInfo,
    create_pr: bool,
    progress: Progress,
) -> CommitInfo:
    """Send files, and make the commit that shows them: not where anybody has changed the repository since `before`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(file.name, Path(planned.directory) / file.name) for file in files]
    with progress("sending", sum(file.size for file in files)) as advance:
        for batch in _batches(additions):
            # a .gitignore there would leave files out silently
            api.preupload_lfs_files(
                planned.repository, batch, create_pr=create_pr, gitignore_content="", free_memory=False
            )
            advance(sum(addition.upload_info.size for addition in batch))
    for file, addition in zip(files, additions, strict=True):
        if addition.upload_info.sha256.hex() != file.digest:
            raise CheckpointError(f"{planned.directory}: {file.name} was changed while it was sent", hint="push again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a card's metadata
        return api.create_commit(
            planned.repository,
            [*additions, *(CommitOperationDelete(name) for name in planned.removed)],
            commit_message=f"Upload {Path(planned.directory).resolve().name} with kvconvert",
            create_pr=create_pr,
            parent_commit=before.sha,
        )


def _batches(additions: Sequence[Any]) -> Iterator[list[Any]]:
    """Small files together, a large one alone."""
    batch: list[Any] = []
    for addition in sorted(additions, key=lambda addition: addition.upload_info.size):
        num_bytes = sum(each.upload_info.size for each in (*batch, addition))
        if batch and (num_bytes > _BATCH_BYTES or len(batch) == _BATCH_FILES):
            yield batch
            batch = []
        batch.append(addition)
    if batch:
        yield batch


def _finished(planned: Push, commit: str | None, url: str) -> Push:
    return Push(**{**vars(planned), "commit": commit, "url": url})


@contextmanager
def _refusals(repository: str, seconds: float) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line: why it could not ask for a repository, make it or write to it.

    seconds: how long each answer is waited for.
    """
    try:
        with patient_hub(seconds):
            yield
    except KvConvertError:
        raise
    except Exception as error:
        clause, hint = push_refusal(error, seconds)
        raise InputError(f"{repository}: {without_secrets(clause)}", hint=hint) from error


@contextmanager
def _not_finished() -> Iterator[None]:
    """Say of a run that is ended by a signal what it left on the hub."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        error.add_note(_NOT_FINISHED)
        raise


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keep huggingface_hub's own bars off the terminal inside the block."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
