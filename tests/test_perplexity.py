from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, CheckpointFactory, build_model
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import CheckpointError, DataError
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate
from kvconvert.measure.windows import cut_windows


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(count))


@given(
    count=st.integers(2, 200),
    window=st.integers(3, 40),
    stride=st.integers(1, 40),
    bos=st.booleans(),
    max_windows=st.none() | st.integers(1, 5),
)
def test_every_token_is_scored_once_and_in_its_context(
    count: int, window: int, stride: int, bos: bool, max_windows: int | None
) -> None:
    text_window = window - bos
    text = torch.arange(1000, 1000 + count)  # each token names its place
    options: dict[str, Any] = {"window": window, "stride": stride}
    options |= {"bos_token_id": 7 if bos else None, "max_windows": max_windows}
    if stride > text_window or count < text_window:
        reason = f"stride {stride} does not fit" if stride > text_window else f"the text has {count} tokens, fewer than"
        with pytest.raises(DataError, match=reason):
            cut_windows(text, **options)
        return
    windows = cut_windows(text, **options)
    scored = []
    for row, first in zip(windows.input_ids, windows.scored_from, strict=True):
        assert len(row) == window
        assert not bos or row[0] == 7
        assert first >= 1
        scored += row[first:].tolist()
    assert len(scored) == len(set(scored)) == windows.num_scored_tokens
    if bos or stride < text_window:  # nothing lies between the windows' scored parts
        assert scored == list(range(scored[0], scored[-1] + 1))
        assert scored[0] == (1000 if bos else 1001)


def test_nats_equal_a_loop_in_float64() -> None:
    model = build_model()
    windows = cut_windows(tokens(100), window=16, stride=8)
    nats = []
    with torch.inference_mode():
        for row, first in zip(windows.input_ids, windows.scored_from, strict=True):
            probabilities = model(input_ids=row[None], use_cache=False).logits[0].double().softmax(-1)
            nats.append([-math.log(probabilities[place - 1, row[place]]) for place in range(first, len(row))])
    evaluation = evaluate(model, windows, batch_size=3)
    flat = [value for window in nats for value in window]
    assert evaluation.num_tokens == len(flat)
    assert evaluation.nats_per_token == pytest.approx(sum(flat) / len(flat), abs=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    means = [sum(window) / len(window) for window in nats]
    center = sum(means) / len(means)
    variance = sum((value - center) ** 2 for value in means) / (len(means) - 1)
    assert evaluation.standard_error == pytest.approx(math.sqrt(variance / len(means)), abs=1e-5)


def test_comparison_with_the_original_equals_a_float64_formula() -> None:
    model, original = build_model(seed=1), build_model(seed=2)
    windows = cut_windows(tokens(64), window=16)
    with torch.inference_mode():
        p = original(input_ids=windows.input_ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        q = model(input_ids=windows.input_ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    targets = windows.input_ids[:, 1:, None]
    comparison = evaluate(model, windows, original=original).against
    assert comparison is not None
    assert comparison.kl_nats_per_token == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    assert comparison.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    excess = (p - q).gather(-1, targets).mean().item()
    assert comparison.excess_nats_per_token == pytest.approx(excess, abs=1e-5)
    assert comparison.perplexity_increase == pytest.approx(math.exp(excess) - 1, rel=1e-4)
    assert comparison.original_perplexity == pytest.approx(math.exp(-p.gather(-1, targets).mean().item()), rel=1e-5)


def test_a_model_against_itself_differs_in_nothing() -> None:
    model = build_model()
    comparison = evaluate(model, cut_windows(tokens(64), window=16), original=model).against
    assert comparison is not None
    assert (comparison.excess_nats_per_token, comparison.kl_nats_per_token) == (0, 0)
    assert comparison.top1_agreement == 1


def test_the_batch_size_does_not_matter() -> None:
    model = build_model()
    windows = cut_windows(tokens(100), window=10)
    one, other = (evaluate(model, windows, batch_size=size).nats_per_token for size in (1, 10))
    assert one == pytest.approx(other, abs=1e-6)


def test_the_method_is_stated() -> None:
    assert cut_windows(tokens(20), window=10).method == (
        "documents joined by EOS, non-overlapping windows of 10 tokens, "
        "no BOS, first token of each window not scored, last partial window left out"
    )
    overlapping = cut_windows(tokens(20), window=10, stride=4, bos_token_id=1).method
    assert "overlapping (stride 4) windows of 10 tokens, BOS before each window" in overlapping


def test_what_stands_between_documents_is_stated_as_it_is(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    """A tokenizer.json alone: EOS is the model's, and the method says so where the model names none either."""
    whole, bare, without = (make_checkpoint(name=name, with_tokenizer=True) for name in ("whole", "bare", "without"))
    for model in (bare, without):
        (model / "tokenizer_config.json").unlink()
    config = json.loads((without / "config.json").read_text()) | {"eos_token_id": None}
    (without / "config.json").write_text(json.dumps(config))
    (without / "generation_config.json").unlink()
    found = [load_windows(model, TextSource(str(prose_file)), window=32) for model in (whole, bare, without)]
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    assert found[0].method == found[1].method
    assert found[1].method.startswith("documents joined by EOS, non-overlapping")
    assert found[2].method.startswith("documents joined without EOS, as the tokenizer has none, non-overlapping")
    assert [int((windows.input_ids == 2).sum()) for windows in found] == [39, 39, 0]  # the 40th is cut off


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(DataError, match="the text has 9 tokens, fewer than one window of 10"):
        cut_windows(tokens(9), window=10)


def poisoned(value: float, *, seed: int = 0) -> Any:
    """A model that adds `value` to the logit of the last token."""
    model = build_model(seed=seed)
    model.lm_head.register_forward_hook(
        lambda module, args, output: torch.cat([output[..., :-1], output[..., -1:] + value], -1)
    )
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("culprit", ["the model", "the original"])
def test_logits_that_are_not_finite_are_somebodys(culprit: str, value: float) -> None:
    windows = cut_windows(tokens(40), window=16)
    models = {"the model": build_model(), "the original": build_model(seed=1)} | {culprit: poisoned(value)}
    reason = "its weights are finite, so that the computation left the range of float32 or divided by zero"
    with pytest.raises(CheckpointError, match=f"^{culprit}: logits are not finite in window 1: {reason}$"):
        evaluate(models["the model"], windows, original=models["the original"])


def test_weights_that_are_not_finite_are_named() -> None:
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight[3:5] = math.nan
    expected = r"^M: logits are not finite in window 1: 2 values of its model\.norm\.weight are not finite$"
    with pytest.raises(CheckpointError, match=expected):
        evaluate(model, cut_windows(tokens(40), window=16), names=("M", "O"))


def test_a_token_that_is_ruled_out_counts_where_it_occurs() -> None:
    text = tokens(40)
    absent, present = text.where(text != VOCAB_SIZE - 1, 3), text.clone()
    present[20] = VOCAB_SIZE - 1
    ruled_out = poisoned(-math.inf)
    windows = cut_windows(absent, window=16)
    assert math.isfinite(evaluate(ruled_out, windows).perplexity)
    both = evaluate(ruled_out, windows, original=poisoned(-math.inf, seed=1)).against
    assert both is not None
    assert both.kl_nats_per_token > 0
    for model, original, cut in (
        (ruled_out, None, cut_windows(present, window=16)),
        (ruled_out, build_model(seed=1), windows),
    ):
        with pytest.raises(CheckpointError, match=r"^the model: rules out a token of the text, or one that the orig"):
            evaluate(model, cut, original=original)


@pytest.mark.parametrize("rows", [{"the model": 8}, {"the original": 8}])
def test_vocabularies_that_differ_in_padding_are_compared(rows: dict[str, int]) -> None:
    windows = cut_windows(tokens(40), window=16)
    plain = {"the model": build_model(), "the original": build_model(seed=1)}
    expected = evaluate(plain["the model"], windows, original=plain["the original"]).against
    for name, count in rows.items():
        plain[name].resize_token_embeddings(VOCAB_SIZE + count, mean_resizing=False)
        with torch.no_grad():
            plain[name].lm_head.weight[VOCAB_SIZE:] = 0.01
    found = evaluate(plain["the model"], windows, original=plain["the original"]).against
    assert found is not None
    assert expected is not None
    # of the original the padding is left out; of the model it takes a part of the probability, which is its own loss
    assert (found.kl_nats_per_token == pytest.approx(expected.kl_nats_per_token, rel=1e-5)) == ("the original" in rows)
    assert found.kl_nats_per_token >= expected.kl_nats_per_token * (1 - 1e-5)
