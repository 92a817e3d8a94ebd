"""Why the hub did not give what was asked for, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import first_line

__all__ = ["ANSWER_SECONDS", "hub_refusal", "is_final_refusal", "is_unreachable", "quiet_hub"]

ANSWER_SECONDS = 10.0  # without an answer, after which the hub counts as out of reach

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
        silent = any(_is_timeout(cause) for cause in causes)
        why = f"no answer within {ANSWER_SECONDS:g} s" if silent else first_line(causes[-1])
        return (
            f"the hub cannot be reached ({why})",
            "check the network and its proxy, or bring it into the cache of this machine",
        )
    return f"the hub did not give it ({first_line(error)})", None


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
