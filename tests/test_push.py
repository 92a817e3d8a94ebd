"""kvconvert push, against a stand-in of the hub on the loopback."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import PROSE, CheckpointFactory, Command, Outcome
from hub_stand_in import TOKEN, Repository, StandIn, stand_in
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint.hub import without_secrets
from kvconvert.convert.checkpoint.manifest import renew_entries
from kvconvert.convert.errors import CheckpointError, InputError
from kvconvert.pipeline import FailedGatesError, push, pushing, run

NAME = "org/model-gqa2"

# huggingface_hub calls its own HTTP library so where it sends a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A hub of one's own, whose address and token the hub's library uses."""
    with stand_in() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has the hub's LFS
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "stored-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def result(make_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    source = make_checkpoint(with_tokenizer=True)
    return convert(source, Gqa(2), tmp_path / "model-gqa2", max_shard_bytes=60_000).output


@pytest.fixture
def command(invoke: Command, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which `invoke` sets
    return invoke


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def name_source(result: Path, source: str) -> None:
    """Let the manifest name a source of the hub."""
    path = result / "kvconvert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))


def test_all_files_arrive_in_one_commit(hub: StandIn, result: Path) -> None:
    done = push(result, NAME)
    pushed = hub.repositories[NAME]
    assert len(list(result.glob("*.safetensors"))) > 2
    assert {name: data for name, data in pushed.files.items() if name != ".gitattributes"} == content(result)
    assert (pushed.num_commits, done.commit) == (1, pushed.sha)
    assert done.url == f"{hub.endpoint}/{NAME}/commit/{pushed.sha}"
    assert (pushed.private, done.private) == (True, True)
    assert done.visibility == "whether its source, the directory model, is public is not known"


def test_what_is_there_is_not_sent_again(hub: StandIn, result: Path) -> None:
    push(result, NAME)
    hub.asked.clear()
    done = push(result, NAME)
    assert all(file.was_there for file in done.files)
    assert (done.num_bytes_to_send, done.commit) == (0, hub.repositories[NAME].sha)
    assert hub.count("PUT", "") == hub.count("POST", "") == 0
    assert hub.repositories[NAME].num_commits == 1


def test_a_push_that_was_cut_short_shows_nothing_and_goes_on(
    hub: StandIn, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "_BATCH_FILES", 1)
    num_large = len(list(result.glob("*.safetensors"))) + 1  # and tokenizer.json

    @contextmanager
    def interrupts(what: str, total: int) -> Iterator[Callable[[int], object]]:
        def advance(count: int) -> None:
            if len(hub.stored) == 2:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt) as caught:
        push(result, NAME, progress=interrupts)
    assert caught.value.__notes__ == ["nothing was committed; what was sent so far is not sent again"]
    assert list(hub.repositories[NAME].files) == [".gitattributes"]
    assert (len(hub.stored), hub.repositories[NAME].num_commits) == (2, 0)
    push(result, NAME)
    assert hub.count("PUT", "/store/") == num_large  # each once, in both calls together
    assert {name: hub.repositories[NAME].files[name] for name in content(result)} == content(result)
    assert hub.repositories[NAME].num_commits == 1


def test_a_signal_says_what_is_left(
    command: Command, hub: StandIn, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", ended)
    outcome = command("push", result, NAME)
    assert outcome.returncode == 128 + signal.SIGTERM
    assert "error: ended by SIGTERM; nothing was committed; what was sent so far is not sent again" in outcome.stderr


def test_a_pull_request_leaves_main_as_it_is(command: Command, hub: StandIn, result: Path) -> None:
    """The model there is not kvconvert's: its weights go in the pull request, so that nobody loads them."""
    before = {"config.json": b"{}", "model.safetensors": b"of the original", "notes.md": b"mine"}
    hub.repositories[NAME] = Repository(private=True, files=dict(before))
    printed = command("push", result, NAME, "--create-pr", "--json").printed
    assert hub.repositories[NAME].files == before
    (proposed,) = hub.repositories[NAME].pull_requests
    assert proposed == content(result) | {"notes.md": b"mine"}
    assert printed["removed"] == ["model.safetensors"]
    assert printed["url"] == f"{hub.endpoint}/{NAME}/discussions/1"


def test_the_model_of_another_is_not_replaced(hub: StandIn, result: Path) -> None:
    hub.repositories[NAME] = Repository(private=True, files={"config.json": b"{}", "model.safetensors": b"theirs"})
    with pytest.raises(InputError, match=f"{NAME} holds a model that kvconvert did not write, and that would be repl"):
        push(result, NAME)
    assert hub.repositories[NAME].num_commits == 0
    push(result, NAME, force=True)
    assert {name: hub.repositories[NAME].files[name] for name in content(result)} == content(result)
    assert "model.safetensors" not in hub.repositories[NAME].files


def test_weights_of_an_earlier_push_are_removed_in_the_same_commit(hub: StandIn, result: Path, tmp_path: Path) -> None:
    push(result, NAME)
    again = convert(tmp_path / "model", Gqa(1), tmp_path / "one-file").output
    assert push(again, NAME).removed == tuple(
        sorted(name for name in content(result) if name.endswith((".safetensors", ".index.json")))
    )
    files = hub.repositories[NAME].files
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == content(again)
    assert hub.repositories[NAME].num_commits == 2


@pytest.mark.parametrize("change", ["a byte of the weights", "a file more", "no manifest"])
def test_what_fails_verify_is_not_sent(change: str, command: Command, hub: StandIn, result: Path) -> None:
    if change == "a byte of the weights":
        path = min(result.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        wanted = f"{result} is not as kvconvert wrote it, so nothing was sent: {path.name} has other bytes than were"
    elif change == "a file more":
        (result / "notes.txt").touch()
        wanted = f"{result} is not as kvconvert wrote it, so nothing was sent: notes.txt is not in the manifest"
    else:
        (result / "kvconvert.json").unlink()
        wanted = f"{result}: there is no kvconvert.json"
    outcome = command("push", result, NAME, "--quiet")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"error: {wanted}")
    assert hub.repositories == {}
    assert hub.count("P", "") == 0  # neither POST nor PUT


def test_a_file_that_changes_while_it_is_sent(hub: StandIn, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After verify has passed: what would be committed is not what was verified."""
    monkeypatch.setattr(pushing, "_check_verified", lambda directory, **options: None)
    path = min(result.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=f"{path.name} was changed while it was sent"):
        push(result, NAME)
    assert hub.repositories[NAME].num_commits == 0


def test_a_gitignore_there_leaves_nothing_out(hub: StandIn, result: Path) -> None:
    hub.repositories[NAME] = Repository(private=True, files={".gitignore": b"*"})
    push(result, NAME)
    assert content(result).keys() <= hub.repositories[NAME].files.keys()


def test_a_commit_with_other_bytes_is_no_success(hub: StandIn, result: Path) -> None:
    hub.corrupts = "config.json"
    with pytest.raises(InputError, match=r"org/model-gqa2: http.*/commit/0+1 lacks config.json, or has other bytes"):
        push(result, NAME)


@pytest.mark.parametrize(
    ("source", "private", "visibility"),
    [
        (Repository(private=True), True, "its source org/original is private"),
        (Repository(gated=True), True, "its source org/original is given only to people who were granted access"),
        (Repository(), False, "its source org/original is public"),
        (
            None,
            True,
            "whether its source org/original is public is not known (the hub has no model of this name, or it",
        ),
    ],
)
def test_private_if_the_source_is(
    source: Repository | None, private: bool, visibility: str, hub: StandIn, result: Path
) -> None:
    name_source(result, "org/original")
    if source is not None:
        hub.repositories["org/original"] = source
    done = push(result, NAME, run=False)
    assert (hub.repositories[NAME].private, done.private) == (private, private)
    assert done.visibility.startswith(visibility)


def test_who_says_public_or_private_is_obeyed_or_refused(command: Command, hub: StandIn, result: Path) -> None:
    assert command("push", result, NAME, "--public", "--no-run").returncode == 0
    assert hub.repositories[NAME].private is False
    refused = command("push", result, NAME, "--private", "--no-run", "--quiet")
    assert (refused.returncode, refused.stderr.splitlines()) == (
        2,
        [
            f"error: {NAME} is public on the hub, and private was asked for",
            "hint: change that in its settings there",
        ],
    )
    refused = command("push", result, NAME, "--no-run", "--quiet")  # the source is a directory
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {NAME} is public on the hub, and whether its source, the directory model")
    assert refused.stderr.rstrip().endswith("(--private)")


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(command: Command, hub: StandIn, result: Path) -> None:
    outcome = command("push", result, NAME, "--dry-run")
    assert outcome.returncode == 0
    assert outcome.stdout.startswith(f"{result} would go to {NAME}\n  private, a new repository: whether its source")
    (line,) = [line for line in outcome.stdout.splitlines() if " config.json " in line]
    assert line.endswith(f"  {(result / 'config.json').stat().st_size} bytes")
    total = sum(path.stat().st_size for path in result.iterdir())
    assert f"  {total / 1000:.3g} kB would be sent" in outcome.stdout
    assert hub.repositories == {}
    assert hub.count("P", "") == 0


REFUSALS: list[tuple[tuple[str, str], tuple[int, str], str, str]] = [
    (("GET", "/api/whoami-v2"), (401, "Invalid"), "the hub does not accept the token (HTTP 401", "make a token with"),
    (("POST", "/api/repos/create"), (403, "no right"), "the hub does not let this token write there (HTTP 403", "make"),
    (("POST", "/preupload/"), (404, "gone"), "the hub has no such place, or does not show it to this token", "check"),
    (("PUT", "/store/"), (403, "expired"), "the hub does not let this token write there (HTTP 403", "make a token"),
    (("POST", "/commit/"), (412, "changed"), "it was changed by somebody else at the same time (HTTP 412", "run it"),
    (("POST", "/commit/"), (500, "broken"), "the hub answered with an error (HTTP 500", "later, run it again: what"),
]


@pytest.mark.parametrize(("place", "answer", "clause", "hint"), REFUSALS)
def test_refusals_are_one_line_and_say_what_to_do(
    place: tuple[str, str],
    answer: tuple[int, str],
    clause: str,
    hint: str,
    command: Command,
    hub: StandIn,
    result: Path,
) -> None:
    hub.refusals[place] = answer
    outcome = command("push", result, NAME, "--quiet", "--no-run")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    error, advice = outcome.stderr.splitlines()
    assert error.startswith(f"error: {NAME}: {clause}")
    assert advice.startswith(f"hint: {hint}")
    assert all(repository.num_commits == 0 for repository in hub.repositories.values())


def test_a_card_that_the_hub_refuses_is_told_before_anything_is_sent(hub: StandIn, result: Path) -> None:
    hub.refusals["POST", "/api/validate-yaml"] = (400, '"license" must be one of a list')
    wanted = f'the hub does not take the metadata of {result}/README.md ("license" must be one of a list)'
    with pytest.raises(InputError, match=re.escape(wanted)):
        push(result, NAME, run=False)
    assert hub.repositories == {}


def test_a_token_that_may_only_read_is_told_at_once(hub: StandIn, result: Path) -> None:
    hub.role = "read"
    with pytest.raises(InputError, match="the token for the hub may only read"):
        push(result, NAME)
    assert hub.asked == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("status", [403, 429])
def test_a_hub_that_does_not_say_whose_token_it_is_is_written_to(status: int, hub: StandIn, result: Path) -> None:
    hub.refusals["GET", "/api/whoami-v2"] = (status, "not now")
    assert push(result, NAME, run=False).commit is not None


def test_a_hub_that_falls_silent_while_files_are_sent(
    hub: StandIn, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "UPLOAD_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *arguments, **options: setattr(hub, "silent", True)
    )
    with pytest.raises(InputError, match=rf"{NAME}: the hub cannot be reached \(no answer within 0\.2 s\)"):
        push(result, NAME, run=False)


def test_no_token(command: Command, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    outcome = command("push", result, NAME)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[0] == "error: no token for the hub"
    assert "set HF_TOKEN to it or log in with `hf auth login`" in outcome.stderr


def test_the_token_of_the_hubs_own_store_is_taken(
    hub: StandIn, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "stored-token").write_text(f"{TOKEN}\n")
    assert push(result, NAME, run=False).commit is not None


def test_a_hub_that_does_not_answer(
    command: Command, hub: StandIn, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.silent = True
    monkeypatch.setattr(pushing, "ANSWER_SECONDS", 0.2)
    outcome = command("push", result, NAME)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[0] == f"error: {NAME}: the hub cannot be reached (no answer within 0.2 s)"


def test_a_hub_that_is_not_there(command: Command, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    outcome = command("push", result, NAME)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[0].startswith(f"error: {NAME}: the hub cannot be reached (")


@pytest.mark.parametrize("name", ["model", "org/", "org/a/b", "org/a b", "../x"])
def test_a_name_that_is_none(name: str, hub: StandIn, result: Path) -> None:
    with pytest.raises(InputError, match="is no name of a repository on the hub"):
        push(result, name)
    assert hub.asked == []


@pytest.mark.parametrize(
    "place", [("GET", "/api/whoami-v2"), ("POST", "/preupload/"), ("PUT", "/store/"), ("POST", "/commit/")]
)
def test_the_token_is_nowhere(place: tuple[str, str], command: Command, hub: StandIn, result: Path) -> None:
    """The hub repeats it in its message, and a traceback shows what libraries make of that."""
    hub.refusals[place] = (
        400,
        f"bad request with Authorization: Bearer {TOKEN} at http://x/?X-Amz-Signature=SignedPlace&b=1",
    )
    outcome = command("--debug", "push", result, NAME, "--no-run")
    assert outcome.returncode == 2
    assert "Traceback" in outcome.stderr
    for text in (outcome.stdout, outcome.stderr):
        assert TOKEN not in text
        assert "SignedPlace" not in text
    assert "Bearer ***" in outcome.stderr  # the control: without the change it would be there


def test_a_token_with_a_character_that_no_header_takes(
    command: Command, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which an HTTP library prints whole."""
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01")
    outcome = command("--debug", "push", result, NAME)
    assert outcome.returncode == 2
    assert "error: the token for the hub holds characters that no token has" in outcome.stderr
    assert TOKEN not in outcome.stderr


def test_secrets_are_taken_out_and_nothing_else() -> None:
    text = "hf_raise_for_status(response), hf_hub_download, bearer of news"
    assert without_secrets(text) == "hf_raise_for_status(response), hf_hub_download, Bearer *** news"
    assert without_secrets("hf_abcdefghijklmnopqrstuvwx,") == "hf_***,"
    assert without_secrets("?X-Amz-Credential=a/b&X-Amz-Date=1") == "?X-Amz-Credential=***&X-Amz-Date=1"


def test_a_recipe_beside_the_weights_goes_along(hub: StandIn, result: Path) -> None:
    """Once the manifest lists it."""
    (result / "recipe.yaml").write_text("model: org/original\n")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is not in the manifest"):
        push(result, NAME, run=False)
    path = result / "kvconvert.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record["files"].append({"name": "recipe.yaml", "algorithm": "sha256", "digest": "", "size": 0})
    path.write_text(json.dumps(record))
    renew_entries(result, ["recipe.yaml"])
    push(result, NAME, run=False)
    assert hub.repositories[NAME].files["recipe.yaml"] == b"model: org/original\n"


def test_a_run_publishes_its_result_once_all_gates_are_passed(
    hub: StandIn, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    make_checkpoint(name="original", with_tokenizer=True)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    content_of = {
        "model": "original",
        "convert": {"target": "gqa", "groups": 2},
        "evaluate": {"data": "held_out.jsonl", "window": 16},
        "report": {"pictures": False},
        "push": {"repo": NAME},
    }
    recipe.write_text(json.dumps(content_of | {"gates": {"max_kl": 0}}))
    with pytest.raises(FailedGatesError):
        run(recipe, output=tmp_path / "out")
    assert NAME not in hub.repositories
    stopped = run(recipe, overrides=["gates.max_kl=100"], output=tmp_path / "out", last="report")
    assert NAME not in hub.repositories
    done = run(recipe, overrides=["gates.max_kl=100"], output=tmp_path / "out")
    pushed = hub.repositories[NAME]
    assert {name: data for name, data in pushed.files.items() if name != ".gitattributes"} == content(stopped.model)
    assert "recipe.yaml" in pushed.files
    assert done.stages["push"].summary["commit"] == pushed.sha
    status = json.loads((tmp_path / "out" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
