"""The hub: why it did not give or take what it was asked for, in words, how long it is waited for, and its token."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, first_line

__all__ = [
    "ANSWER_SECONDS",
    "UPLOAD_ANSWER_SECONDS",
    "hub_refusal",
    "is_final_refusal",
    "is_unreachable",
    "patient_hub",
    "push_refusal",
    "quiet_hub",
    "without_secrets",
    "write_token",
]

ANSWER_SECONDS = 10.0  # without an answer, after which the hub counts as out of reach
UPLOAD_ANSWER_SECONDS = 120.0  # while files are sent: the hub looks at all of a commit before it answers

_TOKEN_HINT = (
    "make a token with write permission at https://huggingface.co/settings/tokens, and set HF_TOKEN to it or log in "
    "with `hf auth login`"
)
_AGAIN_HINT = "run it again: what was sent is not sent again"
_TOKEN_CHARACTERS = re.compile(r"[!-~]+")  # what a header of HTTP takes; libraries print one that has others
_SECRETS = (
    (re.compile(r"(?i)\bbearer [^\s'\"\\]+"), "Bearer ***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),  # no name in a traceback is as long without another underscore
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s'\"]+"), r"\1***"),  # of places to send to
)
_ACCESS_HINT = "ask for access on its page, and log in with `hf auth login` or set HF_TOKEN"
# huggingface_hub's classes, the more special ones first: what each means, and what to do
_MEANINGS: dict[str, tuple[str, str | None]] = {
    "GatedRepoError": ("the hub gives this {kind} only to people who were granted access", _ACCESS_HINT),
    "RepositoryNotFoundError": (
        "the hub has no {kind} of this name, or it is private",
        "check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN",
    ),
    "RevisionNotFoundError": (
        "the {kind} on the hub has no revision {revision!r}",
        "give a branch, a tag or a commit that it has",
    ),
    "HFValidationError": ("this is no name of a {kind} on the hub ({message})", None),
    "OfflineModeIsEnabled": (
        "it is not in the cache of this machine, and HF_HUB_OFFLINE forbids to ask the hub",
        "unset HF_HUB_OFFLINE, or download it where there is a network and copy the cache",
    ),
}


def hub_refusal(error: BaseException, kind: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return a clause that says why huggingface_hub raised `error`, and a hint or None.

    kind: "model" or "dataset". huggingface_hub raises one class for a server that fails, a network that is down and a
    cache without the files, with the cause behind it, so that the errors behind `error` are looked at too.
    """
    causes = list(_causes(error))
    for cause in causes:
        names = [base.__name__ for base in type(cause).__mro__]
        for name, (clause, hint) in _MEANINGS.items():
            if name in names:
                return clause.format(kind=kind, revision=revision, message=first_line(cause)), hint
    status = next((status for cause in causes if (status := _status(cause)) is not None), None)
    if status is not None:
        return _meaning_of(status, kind, first_line(error))
    if is_unreachable(error):
        return _out_of_reach(
            causes, ANSWER_SECONDS
        ), "check the network and its proxy, or bring it into the cache of this machine"
    return f"the hub did not give it ({first_line(error)})", None


def push_refusal(error: BaseException, seconds: float) -> tuple[str, str | None]:
    """Return a clause that says why huggingface_hub raised `error` where something is written, and a hint or None.

    seconds: how long an answer was waited for.
    """
    causes = list(_causes(error))
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE forbids to ask the hub", "unset HF_HUB_OFFLINE"
    if "HFValidationError" in names:
        return f"this is no name of a repository on the hub ({first_line(error)})", "give it as org/name"
    status = next((status for cause in causes if (status := _status(cause)) is not None), None)
    if status is not None:
        return _meaning_for_writing(status, next(filter(None, map(_message_of_the_hub, causes)), None))
    if is_unreachable(error):
        return _out_of_reach(causes, seconds), f"check the network and its proxy, and {_AGAIN_HINT}"
    lines = dict.fromkeys(first_line(cause).rstrip(".") for cause in (error, causes[-1]))
    return f"the hub did not take it ({': '.join(lines)})", _AGAIN_HINT


def write_token() -> str:
    """Return the token with which the hub is written to: of the environment, or of the hub's own store.

    Raises InputError where there is none, and for one with characters that no token has; it is never shown.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # of an exchange with the hub, which HF_OIDC_RESOURCE asks for
        raise InputError(f"no token for the hub ({first_line(error)})", hint=_TOKEN_HINT) from error
    if not token:
        raise InputError("no token for the hub", hint=_TOKEN_HINT)
    if not _TOKEN_CHARACTERS.fullmatch(token):
        raise InputError("the token for the hub holds characters that no token has", hint=_TOKEN_HINT)
    return token


def without_secrets(text: str) -> str:
    """Return a text with *** in the place of this user's token, of any other, and of signatures of places to send to.

    What the hub or a library says in an error may hold them.
    """
    for token in _known_tokens():
        text = text.replace(token, "***")
    for secret, replacement in _SECRETS:
        text = secret.sub(replacement, text)
    return text


def _known_tokens() -> Iterator[str]:
    """The tokens of the environment and of the hub's own store, which is a file, where the hub's library was used."""
    yield from filter(None, (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        with suppress(OSError, UnicodeError):
            yield from Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").split()


@contextmanager
def patient_hub(seconds: float) -> Iterator[None]:
    """Let huggingface_hub give up inside the block where no byte comes for so long; alone it waits for ever."""
    from huggingface_hub import get_session

    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep what huggingface_hub says of retries off stderr inside the block: callers say what came of them."""
    import logging as levels

    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(levels.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_unreachable(error: BaseException) -> bool:
    """Return whether huggingface_hub raised `error` because no answer of the hub came."""
    return any(_is_network(cause) for cause in _causes(error))


def is_final_refusal(error: BaseException) -> bool:
    """Return whether what huggingface_hub raised says that nothing is to be had now, however it is asked for."""
    causes = list(_causes(error))
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    return bool(names & set(_MEANINGS)) or (
        all(_status(cause) is None for cause in causes) and any(_is_network(cause) for cause in causes)
    )


def _meaning_of(status: int, kind: str, message: str) -> tuple[str, str | None]:
    """What an HTTP status means that has no class of its own, and what to do."""
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status})", _ACCESS_HINT
    if status == 404:
        return f"the {kind} on the hub lacks a file that is needed ({message})", None
    return f"the hub answered with an error (HTTP {status})", "try again later"


def _meaning_for_writing(status: int, message: str | None) -> tuple[str, str | None]:
    """What an HTTP status means where something is written, with what the hub says of it, and what to do."""
    said = f": {message}" if message else ""
    if status == 401:
        return f"the hub does not accept the token (HTTP 401{said})", _TOKEN_HINT
    if status in (402, 403):
        return f"the hub does not let this token write there (HTTP {status}{said})", _TOKEN_HINT
    if status == 404:
        return f"the hub has no such place, or does not show it to this token (HTTP 404{said})", "check the spelling"
    if status in (409, 412):
        return f"it was changed by somebody else at the same time (HTTP {status}{said})", _AGAIN_HINT
    if status < 500 and status not in (408, 429):
        return f"the hub does not take it (HTTP {status}{said})", None
    return f"the hub answered with an error (HTTP {status}{said})", f"later, {_AGAIN_HINT}"


def _message_of_the_hub(error: BaseException) -> str | None:
    """What the hub says of a refusal, where huggingface_hub keeps that."""
    message = getattr(error, "server_message", None)
    return " ".join(message.split()) if isinstance(message, str) and message.strip() else None


def _out_of_reach(causes: list[BaseException], seconds: float) -> str:
    """The clause for a hub that did not answer; `seconds` is how long it was waited for."""
    silent = any(_is_timeout(cause) for cause in causes)
    why = f"no answer within {seconds:g} s" if silent else first_line(causes[-1])
    return f"the hub cannot be reached ({why})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then the one that it was raised from or during, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(error: BaseException) -> int | None:
    """The status of the hub's answer, where there was one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    """Whether no answer came. The HTTP library's classes are known by name: huggingface_hub changes that library."""
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & {"TransportError", "ConnectionError"})


def _is_timeout(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, TimeoutError) or bool(names & {"TimeoutException", "Timeout"})
