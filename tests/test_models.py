from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OVERRIDES, CheckpointFactory, build_model, settings_with
from kvconvert.convert import ARCHITECTURES
from kvconvert.convert.architectures.table import LATENT_ARCHITECTURES
from kvconvert.convert.errors import CheckpointError, UnsupportedError
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.models import freeze_except, load_models, require_separation, share_equal_parameters

TRAINED = {
    name: entry
    for name, entry in {**ARCHITECTURES, **LATENT_ARCHITECTURES}.items()
    if entry.separates_documents and not entry.cross_attention
}
LATENT = {
    "head_dim": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}


def build(model_type: str) -> Any:
    return build_model(model_type, **(LATENT if model_type == "deepseek_v3" else OVERRIDES.get(model_type, {})))


@pytest.mark.parametrize("model_type", TRAINED)
def test_classes_that_are_trained_pass_the_probe(model_type: str) -> None:
    model = build(model_type)
    require_separation(model, name="x", bf16=False)
    if TRAINED[model_type].autocasts:
        require_separation(model, name="x", bf16=True)
    assert not model.training


def test_the_probe_restores_the_mode() -> None:
    model = build("llama").train()
    require_separation(model, name="x", bf16=False)
    assert model.training


class Deaf(torch.nn.Module):
    """A llama that is told other positions than it was given: to it everything is one document."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self._model = model.config, model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        return self._model(input_ids=input_ids, **options)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_class_that_mixes_documents_is_refused(bf16: bool) -> None:
    with pytest.raises(UnsupportedError, match="name: documents that share a sequence see each other in Deaf, so that"):
        require_separation(Deaf(build("llama")), name="name", bf16=bf16)
    with pytest.raises(UnsupportedError, match="see each other in OPTForCausalLM"):
        require_separation(build_model("opt", word_embed_proj_dim=64, ffn_dim=64), name="x", bf16=bf16)


def test_a_broken_model_is_not_taken_for_one_that_mixes_documents() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"^x: logits are not finite .*model\.norm\.weight"):
        require_separation(model, name="x", bf16=False)


def pair(dtype: torch.dtype) -> tuple[Any, Any]:
    """A float32 student with two K/V heads, and the teacher of which it has all else, in `dtype`."""
    teacher, student = build_model().to(dtype), build_model(num_key_value_heads=2)
    theirs = teacher.state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.shape == theirs[name].shape:
                parameter.copy_(theirs[name])
    freeze_except(student, frozenset(name for name, _ in student.named_parameters() if "self_attn" in name))
    return student, teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parameters_are_the_teachers(dtype: torch.dtype) -> None:
    student, teacher = pair(dtype)
    frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    num_bytes = 4 * sum(parameter.numel() for parameter in frozen.values())
    assert share_equal_parameters(student, teacher) == num_bytes
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.data_ptr() not in {p.data_ptr() for p in teacher.parameters()}
        else:
            assert parameter.data_ptr() == theirs[name].data_ptr()


def test_what_is_not_exactly_equal_is_not_shared() -> None:
    """A student stored in float32 beside a teacher in bfloat16: sharing would round its frozen weights."""
    student, teacher = pair(torch.bfloat16)
    norm = student.model.norm.weight
    with torch.no_grad():
        norm.mul_(1 + 2**-12)
    assert torch.equal(norm.bfloat16(), teacher.model.norm.weight)
    before = norm.clone()
    share_equal_parameters(student, teacher)
    assert torch.equal(student.model.norm.weight, before)
    embeddings = (model.model.embed_tokens.weight.data_ptr() for model in (student, teacher))
    assert len(set(embeddings)) == 1


def test_only_named_parameters_have_gradients() -> None:
    student, _ = pair(torch.float32)
    found = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert found == {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(2) for kind in ("q", "k", "v", "o")
    }


@pytest.mark.parametrize(
    ("stored", "precision", "expected"),
    [
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float16, "fp32", torch.float32),
        (torch.float16, "fp64", torch.float64),
        (torch.float16, "bf16", torch.bfloat16),
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.float32, "bf16", torch.float32),  # which autocast computes in bf16, as it does the student's weights
    ],
)
def test_the_teacher_has_the_precision_of_the_run(
    stored: torch.dtype,
    precision: str,
    expected: torch.dtype,
    make_job: Callable[..., UptrainJob],
    make_checkpoint: CheckpointFactory,
) -> None:
    teacher = make_checkpoint(name="teacher", dtype=stored, with_tokenizer=True)
    job = make_job(teacher=teacher, settings=settings_with(precision=precision))
    (stage,) = job.settings.stages
    student, loaded = load_models(job, stage, job.checkpoint.directory, teacher, torch.device("cpu"))
    trained = torch.float64 if precision == "fp64" else torch.float32
    assert {parameter.dtype for parameter in student.parameters()} == {trained}
    assert loaded is not None
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
