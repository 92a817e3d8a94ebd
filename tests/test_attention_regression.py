from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENS, CheckpointFactory, build_model, load
from kvconvert.convert import Cla, Gqa, LayerGrouping, as_cross_layer, as_target, execute, open_checkpoint
from kvconvert.convert.architectures.architecture import Architecture
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.architectures.table import ARCHITECTURES, find_architecture
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.losses.attention_regression import AttentionRegression, require_same_size
from kvconvert.uptrain.models import freeze_except
from kvconvert.uptrain.recipe import attention_names
from test_mla import convert as convert_to_mla
from test_models import TRAINED, build

FEED = {"input_ids": TOKENS[:2], "position_ids": torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1)}
Pair = tuple[Path, Path]


def gqa(make_checkpoint: CheckpointFactory, folder: Path) -> Pair:
    teacher = make_checkpoint(attention_bias=True)
    with open_checkpoint(teacher) as checkpoint:
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, folder / "student")
    return folder / "student", teacher


def phi(make_checkpoint: CheckpointFactory, folder: Path) -> Pair:
    """Another class than its teacher's, with the feed-forward beside the attention."""
    source = make_checkpoint("gpt_neox", name="source")
    for name, heads in (("teacher", 8), ("student", 2)):
        with as_target(open_checkpoint(source), heads) as view:
            plan = Gqa(heads, allow_same=True).plan(view)
            execute(plan, view.checkpoint, folder / name)
    return folder / "student", folder / "teacher"


def cla(make_checkpoint: CheckpointFactory, folder: Path) -> Pair:
    teacher = make_checkpoint(num_hidden_layers=4)
    with as_cross_layer(open_checkpoint(teacher)) as view:
        plan = Cla(LayerGrouping((0, 0, 2, 2))).plan(view)
        execute(plan, view.checkpoint, folder / "student")
    return folder / "student", teacher


def mla(make_checkpoint: CheckpointFactory, folder: Path) -> Pair:
    from kvconvert.convert.methods.mla import Mla

    teacher = make_checkpoint()
    convert_to_mla(teacher, folder / "student", Mla(16, 8))
    return folder / "student", teacher


def opened(directory: Path) -> tuple[Any, Architecture]:
    with open_checkpoint(directory) as checkpoint:
        architecture = find_architecture(checkpoint)
    model = load(directory)
    freeze_except(model, attention_names([name for name, _ in model.named_parameters()], architecture))
    return model, architecture


def projections(model: Any, architecture: Architecture) -> list[Any]:
    place = f"{architecture.attention}.{architecture.o_proj}"
    return [model.get_submodule(place.format(layer=layer)) for layer in range(model.config.num_hidden_layers)]


def reference(student: Any, teacher: Any, of_student: Architecture, of_teacher: Architecture) -> torch.Tensor:
    """In float64, feed-forwards and all, each layer of the student handed the teacher's input. Leaves gradients."""
    student.double(), teacher.double()
    seen: dict[str, list[torch.Tensor]] = {"inputs": [], "targets": [], "outputs": []}

    def keep(place: str) -> Callable[..., None]:
        return lambda module, args, output: seen[place].append(output)

    handles = [projection.register_forward_hook(keep("targets")) for projection in projections(teacher, of_teacher)]
    with torch.no_grad():
        seen["inputs"] = list(teacher(**FEED, use_cache=False, output_hidden_states=True).hidden_states[:-1])
    handles += [projection.register_forward_hook(keep("outputs")) for projection in projections(student, of_student)]
    layers = student.get_submodule(of_student.attention.partition(".{layer}")[0])
    for layer, inputs in zip(layers, seen["inputs"], strict=True):
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, named, inputs=inputs: (
                    (inputs, *args[1:]),
                    {name: value for name, value in named.items() if name != "hidden_states"},
                ),
                with_kwargs=True,
            )
        )
    student(**FEED, use_cache=False)
    for handle in handles:
        handle.remove()
    num_tokens = FEED["input_ids"].numel()
    total = torch.zeros((), dtype=torch.float64)
    for output, target in zip(seen["outputs"], seen["targets"], strict=True):
        total = total + ((output - target) ** 2).sum() / ((target**2).sum() / num_tokens)
    result = total / len(seen["targets"])
    result.backward()
    return result.detach()


@pytest.mark.parametrize("build", [gqa, phi, cla, mla])
def test_loss_and_gradients_equal_a_float64_reference(
    build: Callable[..., Pair], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    places = build(make_checkpoint, tmp_path)
    (student, of_student), (teacher, of_teacher) = map(opened, places)
    loss = AttentionRegression(student, teacher, of_student, of_teacher)
    loss.measure_scales([FEED])
    found = loss(student, FEED, TOKENS[:2])
    found.backward()
    (exact, _), (exact_teacher, _) = map(opened, places)
    expected = reference(exact, exact_teacher, of_student, of_teacher)
    assert expected > 0.1
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(exact.named_parameters())
    trained = attention_names(theirs, of_student)
    for name, parameter in student.named_parameters():
        if name not in trained:
            assert parameter.grad is None, name
            continue
        gradient = theirs[name].grad
        assert gradient is not None, name
        # float32 sums; 1e-4 of the largest of the parameter
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
    queries = [name for name in trained if "q_proj" in name]
    assert all(theirs[name].grad.abs().max() > 0 for name in queries)


def pair(**overrides: Any) -> tuple[Any, Any, AttentionRegression]:
    llama = ARCHITECTURES["llama"]
    student, teacher = build_model(num_key_value_heads=2, seed=1, **overrides), build_model()
    loss = AttentionRegression(student, teacher, llama, llama)
    return student, teacher, loss


def test_hooks_are_inert_outside_of_the_loss() -> None:
    student, teacher, loss = pair()
    untouched = build_model(num_key_value_heads=2, seed=1)
    loss.measure_scales([FEED])
    loss(student, FEED, TOKENS[:2])
    for model, same in ((student, untouched), (teacher, build_model())):
        assert torch.equal(model(**FEED, use_cache=False).logits, same(**FEED, use_cache=False).logits)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    llama = ARCHITECTURES["llama"]
    student, teacher = build_model(), build_model()
    loss = AttentionRegression(student, teacher, llama, llama)
    loss.measure_scales([FEED])
    assert loss(student, FEED, TOKENS[:2]).item() == 0
    with torch.no_grad():  # the feed-forward does not count
        student.model.layers[0].mlp.down_proj.weight.zero_()
    assert loss(student, FEED, TOKENS[:2]).item() == 0
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.zero_()
    # the second of two layers has an error as large as its target, summed over tokens
    assert loss(student, FEED, TOKENS[:2]).item() == pytest.approx(TOKENS[:2].numel() / 2, rel=1e-5)


def test_micro_batches_sum_up() -> None:
    student, _, loss = pair()
    loss.measure_scales([FEED])
    parts = [{name: tensor[row : row + 1] for name, tensor in FEED.items()} for row in range(2)]
    whole = loss(student, FEED, TOKENS[:2]).item()
    assert sum(loss(student, part, TOKENS[:1]).item() for part in parts) == pytest.approx(whole, rel=1e-5)


def test_scales_are_those_of_all_feeds_or_those_given() -> None:
    student, teacher, loss = pair()
    parts = [{name: tensor[row : row + 1] for name, tensor in FEED.items()} for row in range(2)]
    scales = loss.measure_scales(parts)
    assert scales == pytest.approx(loss.measure_scales([FEED]), rel=1e-5)
    error = loss(student, FEED, TOKENS[:2]).item()
    llama = ARCHITECTURES["llama"]
    again = build_model(num_key_value_heads=2, seed=1)
    halved = AttentionRegression(again, teacher, llama, llama, scales=[2 * scale for scale in scales])
    assert halved(again, FEED, TOKENS[:2]).item() == pytest.approx(error / 2, rel=1e-5)


@pytest.mark.parametrize("model_type", TRAINED)
def test_every_class_that_is_trained(model_type: str) -> None:
    """No error but in the first layer, where it is as large as the target; gradients in that layer's attention only."""
    architecture = TRAINED[model_type]
    teacher = build(model_type)
    student = deepcopy(teacher)
    names = [name for name, _ in student.named_parameters()]
    freeze_except(student, attention_names(names, architecture))
    loss = AttentionRegression(student, teacher, architecture, architecture)
    loss.measure_scales([FEED])
    assert loss(student, FEED, TOKENS[:2]).item() < 1e-6
    changed = projections(student, architecture)[0]
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(2)
    found = loss(student, FEED, TOKENS[:2])
    assert found.item() == pytest.approx(TOKENS[:2].numel() / 2, rel=1e-4)
    found.backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-3}
    place = architecture.attention.format(layer=0)
    assert moved
    assert all(name.startswith(f"{place}.") for name in moved)


def test_attention_that_adds_nothing_has_no_scale() -> None:
    """A teacher's layer whose output projection is zero, as depth up-scaling leaves it."""
    llama = ARCHITECTURES["llama"]
    student, teacher = build_model(num_key_value_heads=2), build_model()
    with torch.no_grad():
        for model in (student, teacher):
            model.model.layers[1].self_attn.o_proj.weight.zero_()
    loss = AttentionRegression(student, teacher, llama, llama)
    assert loss.measure_scales([FEED])[1] == 0
    assert 0 < loss(student, FEED, TOKENS[:2]).item() < float("inf")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 3}, "the student has 2 layers of 64, the teacher 3 of 64"),
        ({"hidden_size": 128}, "the student has 2 layers of 64, the teacher 2 of 128"),
    ],
)
def test_a_teacher_of_another_size_is_refused(overrides: dict[str, Any], message: str) -> None:
    teacher = build_model(**overrides).config
    with pytest.raises(UnsupportedError, match=message):
        require_same_size(build_model().config, teacher)
    require_same_size(teacher, teacher)
