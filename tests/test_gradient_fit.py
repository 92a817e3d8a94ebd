"""Gradient steps that fit the attention of a layer to the original's (convert/calibration/fitting.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, Command
from kvconvert import configs
from kvconvert.convert import Calibration, Cla, Gqa, Mla, as_target, convert, open_checkpoint
from kvconvert.convert.calibration import streams
from kvconvert.convert.calibration.fitting import Fit, fit_parameters, orthogonalised, relative_error
from kvconvert.convert.calibration.text import CalibrationText
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.errors import DataError, InputError, UnsupportedError
from kvconvert.convert.methods.prepared import Preparation, Prepared
from kvconvert.measure import EvaluationSettings, evaluate
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

CheckpointFactory = Callable[..., Path]


def regression(noise: float = 0.0) -> tuple[Parameter, Tensor, Callable[[int], Tensor], list[int]]:
    """A start, the W that made the targets, the squared error of a part, and the parts."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(4, 6, generator=generator)
    wanted[:, 5] = 0
    inputs = torch.randn(32, 50, 6, generator=generator)
    outputs = inputs @ wanted.T + noise * torch.randn(32, 50, 4, generator=generator)
    start = Parameter(wanted + 0.3 * torch.randn(4, 6, generator=generator))
    with torch.no_grad():
        start[:, 5] = 0
    return start, wanted, lambda part: (inputs[part] @ start.T - outputs[part]).square().mean(), list(range(32))


def test_steps_lead_to_the_least_of_a_regression() -> None:
    weight, wanted, loss, parts = regression()
    before = (weight - wanted).norm().item()
    start = sum(loss(part).item() for part in parts[::16]) / 2  # of which the first in sixteen is kept aside
    outcome = fit_parameters([weight], loss, parts, Fit(steps=300))
    assert outcome is not None
    assert outcome.steps == 300
    assert outcome.loss_before == pytest.approx(start)
    assert outcome.loss_after == pytest.approx(sum(loss(part).item() for part in parts[::16]) / 2)
    assert outcome.loss_after < 1e-3 * start
    assert (weight - wanted).norm().item() < 0.01 * before
    assert not weight.requires_grad
    assert weight.grad is None


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    results = []
    for seed in (0, 0, 1):
        weight, _, loss, parts = regression(noise=1.0)
        fit_parameters([weight], loss, parts, Fit(steps=40, seed=seed))
        results.append(weight.detach().clone())
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (30, 40), (150, 20)])
def test_orthogonalising_makes_singular_values_alike(shape: tuple[int, int]) -> None:
    """Against the singular vectors themselves; what has more than 64 rows is taken in parts."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -1, min(shape)).double()) @ right
    assert not spread_of(matrix) < 5
    found = orthogonalised(matrix)
    for before, after in zip(matrix.split(64), found.split(64), strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        assert spread_of(after) < 1.8
        assert after.square().mean().sqrt().item() == pytest.approx(1)
        within = left.T @ after @ right.T  # U and V are kept: nothing lies outside, or off the diagonal
        torch.testing.assert_close(left @ within @ right, after)
        torch.testing.assert_close(within, torch.diag(within.diagonal()), atol=1e-6 * shape[1] ** 0.5, rtol=0)


def spread_of(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[-1])


def test_zero_is_orthogonalised_to_zero() -> None:
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    matrix[3], matrix[:, 5] = 0, 0
    found = orthogonalised(matrix)
    assert not found[3].any()
    assert not found[:, 5].any()
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_what_is_zero_stays_zero() -> None:
    weight, _, _, parts = regression()
    with torch.no_grad():
        weight[1, 2] = 0  # by itself, which the step along a momentum that is zero there would change
    inputs = torch.randn(32, 10, 6, generator=torch.Generator().manual_seed(1))

    def loss(part: int) -> Tensor:  # whose least has no zeros
        return (inputs[part] @ weight.T - 1).square().mean()

    fit_parameters([weight], loss, parts, Fit(steps=40))
    assert not weight[:, 5].any()
    assert not weight[1, 2]
    assert weight[:, :5].count_nonzero() == 4 * 5 - 1


def test_a_rate_is_in_proportion_to_the_rms_of_a_tensor() -> None:
    """Loss and gradient of a tensor a thousand times larger differ, its relative change does not."""
    changes = []
    for scale in (1.0, 1000.0):
        weight = Parameter(torch.full((3, 3), scale))
        parts = [(weight, scale)] * 32
        fit_parameters([weight], lambda part: (part[0] / part[1]).square().sum(), parts, Fit(steps=10))
        changes.append(weight.detach() / scale)
    assert changes[0].max() < 0.95
    torch.testing.assert_close(changes[0], changes[1])


def test_a_fit_that_does_not_help_on_text_kept_aside_is_undone() -> None:
    weight, _, loss, parts = regression()
    start = weight.detach().clone()

    def contrary(part: int) -> Tensor:  # what is fitted to leads away from what is kept aside
        return loss(part) if part % 16 == 0 else -loss(part)

    outcome = fit_parameters([weight], contrary, parts, Fit(steps=20))
    assert outcome is not None
    assert outcome.steps == 20
    assert outcome.loss_after == outcome.loss_before
    assert weight.equal(start)


@pytest.mark.parametrize(("rate", "share"), [(0.02, 0.1), (100.0, 0.1)])
def test_a_rate_that_is_too_high_is_lowered(rate: float, share: float) -> None:
    """The second one leads far away: only because it falls, again and again, is something gained in the end."""
    weight, _, loss, parts = regression()
    outcome = fit_parameters([weight], loss, parts, Fit(steps=64, learning_rate=rate))
    assert outcome is not None
    assert outcome.loss_after < share * outcome.loss_before
    assert outcome.loss_after == pytest.approx(sum(loss(part).item() for part in parts[::16]) / 2)


def test_steps_that_make_a_loss_infinite_are_undone() -> None:
    weight, _, loss, parts = regression()
    start = weight.detach().clone()
    outcome = fit_parameters([weight], lambda part: loss(part).exp().square(), parts, Fit(steps=3, learning_rate=1e6))
    assert outcome is not None
    assert outcome.loss_after == outcome.loss_before
    assert weight.equal(start)


@pytest.mark.parametrize(("num_parts", "steps"), [(1, None), (0, None), (32, 0)])
def test_without_text_or_steps_nothing_changes(num_parts: int, steps: int | None) -> None:
    weight, _, loss, parts = regression()
    start = weight.detach().clone()
    assert fit_parameters([weight], loss, parts[:num_parts], Fit(steps=steps)) is None
    assert weight.equal(start)


def test_the_text_is_read_once_unless_a_number_of_steps_is_asked_for() -> None:
    assert Fit().num_steps(31) == 31
    assert Fit(steps=5).num_steps(31) == 5


def test_each_token_counts_alike() -> None:
    wanted = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    found = torch.tensor([[3.0, 4.5], [300.0, 400.0]])
    assert relative_error(found, wanted).item() == pytest.approx(0.25 / 25 / 2)


# of the whole command

# the same sequences again and again, so that what is learned of them holds for those that are kept aside
TOKENS = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0)).repeat(8, 1)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two sequences of 32 tokens."""
    monkeypatch.setattr(streams, "STEP_TOKENS", 64)


METHODS: dict[str, Callable[..., Any]] = {
    "gqa": lambda **options: Gqa(1, merge="svd", **options),
    "cla": lambda **options: Cla(share=2, merge="svd", **options),
    "mla": lambda **options: Mla(24, 4, **options),
    "mla-exact": lambda **options: Mla(24, 4, latent_norm="exact", **options),
}


def prepared_of(source: Path, method: Any, scratch: Path) -> Prepared:
    scratch.mkdir()
    with method.source(open_checkpoint(source)) as view:
        prepared: Prepared = method.resolve(view).prepare(view, Preparation(scratch, CalibrationText(TOKENS, "random")))
    return prepared


def tensors_of(source: Path, method: Any, scratch: Path) -> dict[str, Tensor]:
    """What the method makes of the checkpoint, calibrated on TOKENS."""
    prepared_of(source, method, scratch)
    return {name: tensor for file in scratch.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("kind", METHODS)
def test_all_projections_are_fitted(kind: str, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=4, num_hidden_layers=2, dtype=torch.bfloat16)
    closed = tensors_of(source, METHODS[kind](fit_steps=0), tmp_path / "closed")
    fitted = tensors_of(source, METHODS[kind](fit_steps=40), tmp_path / "fitted")
    again = tensors_of(source, METHODS[kind](fit_steps=40), tmp_path / "again")
    assert {tensor.dtype for tensor in fitted.values()} == {torch.bfloat16}
    assert all(fitted[name].equal(again[name]) for name in fitted)
    changed = {name for name, tensor in closed.items() if not tensor.equal(fitted[name])}
    constant = ("kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight") if kind == "mla-exact" else ()
    kept = {name for name in closed if name.endswith(("o_proj.bias", *constant))}  # the bias is zero
    assert changed == set(closed) - kept
    for name, tensor in closed.items():
        assert not fitted[name][tensor == 0].any()


@pytest.mark.parametrize(
    ("model_type", "overrides", "adds"),
    [
        ("llama", {}, True),
        ("falcon", {"multi_query": False}, True),  # attention and MLP side by side
        ("bloom", {}, True),  # the MLP adds what it is given
        ("phi3", {}, True),
        ("gemma2", {}, False),  # a norm comes between
        ("glm4", {}, False),
        ("granite", {"residual_multiplier": 0.5}, False),  # a factor comes between
        ("granite", {"residual_multiplier": 1.0}, True),
    ],
)
def test_whether_attention_is_added_as_it_is(
    model_type: str, overrides: dict[str, Any], adds: bool, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint(model_type, **overrides)
    with as_target(open_checkpoint(source), 2) as view:
        stream = streams.Stream.of(view, CalibrationText(TOKENS, "random"), streams.CPU)
        with torch.no_grad(), stream.model.layer(0) as module:
            assert stream.model.adds_outputs(module, 0, stream.states()[0]) is adds


@pytest.mark.usefixtures("short_steps")
def test_keys_and_values_are_fitted_to_what_every_layer_that_reads_them_needs(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Its own attention gives nothing of them: a layer alone would leave its keys and values as they are."""
    source = make_checkpoint(num_key_value_heads=4, num_hidden_layers=2)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for kind, changes in (("cla", True), ("gqa", False)):
        closed, fitted = (
            tensors_of(source, METHODS[kind](fit_steps=steps), tmp_path / f"{kind}-{steps}") for steps in (0, 20)
        )
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.0.self_attn.{name}.weight"
            assert closed[key].equal(fitted[key]) is not changes


@pytest.mark.usefixtures("short_steps")
def test_layers_that_share_are_judged_by_the_sum_of_their_errors(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two errors are of the first layer and of the one that reads it, on a part that is kept aside."""
    errors: list[float] = []

    def noted(found: Tensor, wanted: Tensor) -> Tensor:
        error = relative_error(found, wanted)
        errors.append(error.item())
        return error

    monkeypatch.setattr(streams, "relative_error", noted)
    source = make_checkpoint(num_key_value_heads=4, num_hidden_layers=2)
    (report,) = prepared_of(source, Cla(share=2, merge="svd", fit_steps=1), tmp_path / "scratch").reports
    assert [fit.steps for fit in report.fits] == [1, 1]
    assert report.fits[0].loss_before == pytest.approx(errors[0] + errors[1])


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_error_is_that_of_the_states_once_attention_is_added(
    model_type: str, make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, whose inputs are the same, against the classes themselves; gemma2 puts a norm between."""
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(found: Tensor, wanted: Tensor) -> Tensor:
        seen.append((found.detach(), wanted.detach()))
        return relative_error(found, wanted)

    monkeypatch.setattr(streams, "relative_error", noted)
    source = make_checkpoint(model_type, num_key_value_heads=4, num_hidden_layers=1)
    tensors_of(source, Gqa(1, merge="svd", fit_steps=1), tmp_path / "scratch")
    model = load_model(source, dtype=torch.float32, device="cpu")
    layer = model.model.layers[0]
    states: dict[str, Tensor] = {}
    layer.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: states.update(output=output))
    layer.input_layernorm.register_forward_pre_hook(lambda module, inputs: states.update(entering=inputs[0]))
    with torch.no_grad():
        model(input_ids=TOKENS[:2])
    expected = states["output"] + (states["entering"] if model_type == "llama" else 0)
    torch.testing.assert_close(seen[0][1], expected.flatten(0, 1))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Gqa(1, merge="svd", fit_steps=3), {"weights_only": True}),
        (Mla(24, 4, fit_steps=3), {"weights_only": True}),
    ],
)
def test_steps_need_a_text(
    method: Any, options: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(num_key_value_heads=4)
    with pytest.raises(InputError, match="gradient steps are taken on a text"):
        convert(source, method, tmp_path / "out", calibration=Calibration(**options))


def test_steps_that_are_asked_for_need_two_parts_of_a_text(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of one part keeps the closed form; asked for, steps on it are an error, not something left out."""
    monkeypatch.setattr(streams, "STEP_TOKENS", TOKENS.numel())
    source = make_checkpoint(num_key_value_heads=4)
    by_default = tensors_of(source, Gqa(1, merge="svd"), tmp_path / "default")
    closed = tensors_of(source, Gqa(1, merge="svd", fit_steps=0), tmp_path / "closed")
    assert all(by_default[name].equal(closed[name]) for name in closed)
    with pytest.raises(DataError, match=r"3 gradient steps were asked for.* it gives 1 of the parts"):
        tensors_of(source, Gqa(1, merge="svd", fit_steps=3), tmp_path / "asked")


@pytest.mark.parametrize("make", [METHODS["gqa"], METHODS["cla"], METHODS["mla"]])
def test_steps_are_a_part_of_the_refit(make: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="fit_steps = 3, and nothing is to be fitted"):
        make(fit_steps=3, refit=False)
    with pytest.raises(UnsupportedError, match="fit_steps = -1, expected a number from 0 on"):
        make(fit_steps=-1)


@pytest.mark.parametrize(("rate", "kept"), [(0.02, True), (1e9, False)])
def test_the_command_says_of_each_layer_what_the_steps_did(
    rate: float,
    kept: bool,
    make_checkpoint: CheckpointFactory,
    prose_file: Path,
    invoke: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fit.__init__, "__defaults__", (None, rate, 0))
    source = make_checkpoint(num_key_value_heads=4, with_tokenizer=True)
    text = ("--calibration", prose_file, "--calibration-tokens", 4096, "--fit-steps", 9)
    command = ("mha2mqa", "--method", "svd", source, *text)
    outcome = invoke(*command, "-o", tmp_path / "printed")
    result = invoke(*command, "--json", "-o", tmp_path / "json").printed
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("  layer ")]
    assert len(lines) == len(result["layers"]) == 2
    for line, layer in zip(lines, result["layers"], strict=True):
        (fit,) = layer["fits"]
        assert (fit["loss_after"] < fit["loss_before"]) is kept
        error = f"of the values'; error {fit['loss_before']:.3g}"
        rest = f" → {fit['loss_after']:.3g}" if kept else ", which 9 gradient steps did not lower"
        assert line.endswith(error + rest)


@pytest.mark.parametrize(("num_tokens", "said"), [(512, True), (1024, False)])
def test_a_text_that_is_too_short_for_steps_is_told(num_tokens: int, said: bool, tmp_path: Path) -> None:
    text = Calibration(configs.DEMO / "uptrain.jsonl", num_tokens=num_tokens, sequence_length=256)
    remarks: list[str] = []
    convert(configs.DEMO / "model", Gqa(4, merge="svd"), tmp_path / "out", calibration=text, remark=remarks.append)
    assert [line for line in remarks if line.endswith("none was taken")] == (
        ["512 tokens are too few to take and to judge gradient steps: none was taken"] if said else []
    )


def test_the_fit_keeps_more_of_a_trained_model(tmp_path: Path) -> None:
    """The demo's checkpoint with one K/V head, on text that was not fitted to; the manifest has the number of steps."""
    text = Calibration(data=str(configs.DEMO / "uptrain.jsonl"), num_tokens=8192, sequence_length=256)
    held_out, settings = configs.DEMO / "heldout.jsonl", EvaluationSettings(window=256, max_windows=8)
    excess = []
    for steps in (0, 30):
        output = tmp_path / f"{steps}"
        convert(configs.DEMO / "model", Gqa(1, merge="svd", fit_steps=steps), output, calibration=text)
        record = json.loads((output / "kvconvert.json").read_text())
        fit = {key: value for key, value in record["calibration"].items() if key.startswith("fit_")}
        assert fit == {"fit_steps": steps, "fit_step_tokens": 512, "fit_learning_rate": 0.02, "fit_seed": 0}
        compared = evaluate(output, held_out, against=configs.DEMO / "model", settings=settings).against
        assert compared is not None
        excess.append(compared.excess_nats_per_token)
    assert 0 < excess[1] < 0.8 * excess[0]
