"""Calibration text that a model writes itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, RunHere, same_weights
from kvconvert.configs import CALIBRATION_TEXT, DEMO
from kvconvert.convert import Calibration, Source, TextSource, conversion, open_checkpoint
from kvconvert.convert.calibration import writing as module
from kvconvert.convert.calibration.statistics import open_statistics
from kvconvert.convert.calibration.streams import Hardware
from kvconvert.convert.calibration.text import read_calibration_text
from kvconvert.convert.calibration.writing import SelfWriting, write_calibration_text
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.errors import DataError, InputError, UnsupportedError
from torch import Tensor

OPENINGS = ["The annual message of the President, who said", "Call me Ishmael.", "def main() -> None:"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
EOS = 0


@pytest.fixture
def openings(tmp_path: Path) -> TextSource:
    path = tmp_path / "openings.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in OPENINGS))
    return TextSource(str(path))


@contextmanager
def demo(directory: Path = DEMO / "model") -> Iterator[Source]:
    with Source.of(open_checkpoint(directory)) as source:
        yield source


def write(openings: TextSource, directory: Path = DEMO / "model", *, tokens: int = 192, **settings: Any) -> Tensor:
    with demo(directory) as source:
        text = write_calibration_text(
            source,
            SelfWriting(openings, **settings),
            num_tokens=tokens,
            sequence_length=48,
            hardware=Hardware(),
        )
    return text.token_ids


def copy_of_demo(tmp_path: Path, **config: Any) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in (DEMO / "model").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return directory


def prompts(directory: Path = DEMO / "model") -> list[list[int]]:
    """What the documents of sequences begin with, in order."""
    tokenizer = load_tokenizer(directory)
    encoded = [tokenizer(text)["input_ids"][:16] for text in OPENINGS]
    if not tokenizer.chat_template:
        return [prompt for ids in encoded for prompt in ([EOS], ids)]
    before, behind = tokenizer("<user>")["input_ids"], tokenizer("<answer>")["input_ids"]
    return [prompt for ids in encoded for prompt in ([EOS], ids, before + ids + behind)]


def test_the_seed_decides_what_is_written(openings: TextSource) -> None:
    first = write(openings, seed=3)
    assert first.shape == (4, 48)
    assert first.dtype == torch.int64
    assert torch.equal(first, write(openings, seed=3))
    other = write(openings, seed=4)
    assert all(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_sequence_does_not_depend_on_those_beside_it(openings: TextSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has random numbers of its own, so that how many are written at once changes nothing but rounding."""
    together = write(openings)
    monkeypatch.setattr(module, "_MAX_ROWS", 1)
    assert torch.equal(together, write(openings))


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_token_is_of_a_prompt_or_sampled(
    openings: TextSource, tmp_path: Path, template: str | None, temperature: float
) -> None:
    """The reference: logits of whole sequences without a cache, and the numbers by torch's own generator."""
    directory = copy_of_demo(tmp_path, **({} if template is None else {"chat_template": template}))
    written = write(openings, directory, tokens=288, seed=5, temperature=temperature)
    assert len(written) == 6
    model = load_model(directory, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        distributions = (model(input_ids=written, use_cache=False).logits.double() / temperature).softmax(-1)
    numbers = torch.rand(6, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    turns, num_sampled = prompts(directory), 0
    for row, ids in enumerate(written.tolist()):
        turn, forced = row, list(turns[row % len(turns)])
        for place, token in enumerate(ids):
            if forced:
                assert token == forced.pop(0), (row, place)
                continue
            cumulated = distributions[row, place - 1].cumsum(-1)
            number = numbers[row, place] * cumulated[-1]
            assert cumulated[token] > number - 1e-5
            assert token == 0 or cumulated[token - 1] <= number + 1e-5
            num_sampled += 1
            if token == EOS:
                turn += 6
                forced = list(turns[turn % len(turns)])
                forced = forced[1:] if forced[0] == EOS else forced
    assert num_sampled > 150


def test_an_ended_document_is_followed_by_the_next_prompt(
    openings: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every token that is sampled ends a document: only prompts are left, and no padding between them."""
    monkeypatch.setattr(module, "_sample", lambda logits, *_: torch.full((len(logits),), EOS))
    turns = prompts()
    for row, ids in enumerate(write(openings).tolist()):
        expected: list[int] = []
        turn = row
        while len(expected) < 48:
            prompt = turns[turn % len(turns)]
            expected += prompt[1:] if prompt[0] == EOS and expected else prompt
            expected.append(EOS)
            turn += 4
        assert ids == expected[:48]


def test_ids_without_a_token_are_never_written() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf")]])
    edge = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert module._sample(logits, edge, 1.0, "a").tolist() == [1]
    assert module._sample(logits, torch.zeros(1, dtype=torch.float64), 1.0, "a").tolist() == [0]


def test_logits_that_are_not_finite_are_said() -> None:
    with pytest.raises(UnsupportedError, match="a: its logits are not finite, so that it cannot write"):
        module._sample(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, dtype=torch.float64), 1.0, "a")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "the chat template does not take a user's message"),
        ("hello", "the chat template leaves out the user's message"),
    ],
)
def test_a_template_that_is_of_no_use_is_said(
    openings: TextSource, tmp_path: Path, template: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write(openings, copy_of_demo(tmp_path, chat_template=template))


def test_a_temperature_that_is_not_positive_is_refused(openings: TextSource) -> None:
    with pytest.raises(DataError, match="temperature 0 is not positive"):
        SelfWriting(openings, temperature=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data": "self", "text_field": "verse"},
            "text_field is about a text that is read, and this one the model writes",
        ),
        ({"data": "self", "split": "test"}, "split is about a text that is read, and this one the model writes"),
        ({"data": "a.txt", "writing_seed": 1}, "a text that is read does not depend on the seed 1"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(**settings)


def test_a_second_run_uses_the_text_again(invoke: Command, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("--calibration", "self", "--calibration-tokens", 160, "--calibration-sequence-length", 32)
    convert = ("mha2gqa", DEMO / "model", "--method", "svd", "--groups", 2)
    run_here(*convert, *text, "--save-statistics", "kept", "-o", "one")
    manifest = json.loads(Path("one/kvconvert.json").read_text())
    described = (
        "written by the model itself: 3 sequences of 32 tokens, temperature 1, seed 0, from BOS, from first tokens of "
        "text.jsonl.gz and through the chat template where there is one; and 2 sequences of text.jsonl.gz"
    )
    assert (manifest["calibration"]["data"], manifest["calibration"]["num_tokens"]) == (described, 160)
    with demo() as source:  # the half that is read is a beginning of the shipped text
        kept = open_statistics(Path("kept"), source).text
        read = read_calibration_text(
            source.checkpoint, TextSource(str(CALIBRATION_TEXT)), num_tokens=64, sequence_length=32
        )
    assert kept is not None
    assert torch.equal(kept.token_ids[3:], read.token_ids)
    run_here(*convert, *text, "--calibration-seed", 1, "-o", "other")
    assert not same_weights(Path("one"), Path("other"))
    monkeypatch.setattr(conversion, "write_calibration_text", None)  # nothing is written again
    outcome = invoke(*convert, "--statistics", "kept", "-o", "two")
    assert outcome.returncode == 0
    assert "the text that is kept with these statistics is run again" in outcome.stderr
    assert same_weights(Path("one"), Path("two"))
    assert json.loads(Path("two/kvconvert.json").read_text())["calibration"]["data"] == described
    run_here(*convert, "--statistics", "kept", "--no-refit", "-o", "three")
    assert not same_weights(Path("one"), Path("three"))
