from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LATENT, OVERRIDES, VOCAB_SIZE, CheckpointFactory, build_model, settings_with
from kvconvert.convert import Gqa, execute
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.architectures.table import ARCHITECTURES, find_architecture
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.tensors import Checkpoint
from kvconvert.convert.errors import InputError, UnsupportedError
from kvconvert.uptrain import models as models_of_uptrain
from kvconvert.uptrain import run
from kvconvert.uptrain.data.sources import SourceSize
from kvconvert.uptrain.estimate.budget import Batch, Budget
from kvconvert.uptrain.estimate.cost import RunCost, passes_over, require_consent, run_cost
from kvconvert.uptrain.estimate.disk import disk_bytes, packed_tokens
from kvconvert.uptrain.estimate.flops import flops_per_token
from kvconvert.uptrain.estimate.gpu import H100_PEAK_FLOPS, detect_gpu, gpu_hours, peak_flops, require_known_gpu
from kvconvert.uptrain.estimate.memory import memory_bytes, weight_bytes
from kvconvert.uptrain.estimate.shape import Models, RunShape, Sharding
from kvconvert.uptrain.estimate.size import ModelSize, measure_size
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.models import load_for_training
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Objective, Recipe, Stage, Trained, stages, trained_names
from kvconvert.uptrain.training import trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH, LENGTH = 2, 32
NUM_TOKENS = BATCH * LENGTH
TOKENS = torch.randint(3, VOCAB_SIZE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, dict[str, Any]] = {**OVERRIDES, "deepseek_v3": LATENT, "gptj": {"rotary_dim": 4}}
DECODERS = sorted(name for name, entry in ARCHITECTURES.items() if entry.cross_attention is None)
UNGROUPED = ["deepseek_v3", "gpt2", "gpt_neox", "gptj", "opt", "bloom"]
# of which attention is computed how often: DiffLlama's twice, once for each half of the values
TIMES_ATTENDED = {"diffllama": 2}

PREDICTION, REGRESSION, ALL = Objective.prediction, Objective.attention_regression, Trained.all
STAGES = stages(
    Recipe.distill,
    steps=1908,
    learning_rate=1e-4,
    layerwise_fraction=0.0,
    layerwise_learning_rate=1e-4,
    trained=ALL,
)

Open = Callable[..., tuple[Any, Checkpoint]]


@pytest.fixture
def open_model(tmp_path: Path) -> Open:
    """A tiny model whose attention and experts are plain matrix products, which torch counts, and its checkpoint."""

    def build(model_type: str, **overrides: object) -> tuple[Any, Checkpoint]:
        model = build_model(model_type, **{**SETTINGS.get(model_type, {}), **overrides})
        model.save_pretrained(tmp_path / "model")
        model.set_attn_implementation("eager")
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model, open_checkpoint(tmp_path / "model")

    return build


def count_flops(run: Callable[[], object]) -> tuple[float, float]:
    """Per token: FLOPs of matrices, and of products of activations with each other."""
    # the one that is made of counted products; from torch 2.14 on, the fused one of CPUs takes what it did not take
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    scores = sum(flops for operation, flops in counts.items() if "bmm" in str(operation))
    return (sum(counts.values()) - scores) / NUM_TOKENS, scores / NUM_TOKENS


def linear_only(size: ModelSize) -> ModelSize:
    """The same model as if its heads had no width."""
    return replace(size, qk_head_dim=0, v_head_dim=0)


def scores_only(size: ModelSize) -> ModelSize:
    """The same model as if it had no matrices."""
    nothing = dict.fromkeys((name for name in vars(size) if "matmul" in name or "head_parameters" in name), 0)
    return replace(size, **nothing)  # type: ignore[arg-type]


def llama_2_7b() -> ModelSize:
    """By hand: 32 layers of 4 · 4096² and 3 · 4096 · 11008, embeddings and head of 32000 · 4096."""
    attention, mlp, head = 4 * 4096**2, 3 * 4096 * 11008, 32000 * 4096
    return ModelSize(
        num_parameters=6_738_415_616,
        num_bytes=2 * 6_738_415_616,
        num_matmul_parameters=32 * (attention + mlp) + head,
        num_head_parameters=head,
        num_attention_parameters=32 * attention,
        num_attention_matmul_parameters=32 * attention,
        num_key_value_parameters=16 * attention,
        num_key_value_matmul_parameters=16 * attention,
        linear_features=32 * (4 * 8192 + 3 * 15104),
        hidden_size=4096,
        vocab_size=32000,
        num_attention_heads=32,
        qk_head_dim=128,
        v_head_dim=128,
        windows=(None,) * 32,
    )


@pytest.mark.parametrize("model_type", [*DECODERS, *UNGROUPED])
def test_forward_is_what_torch_counts(model_type: str, open_model: Open) -> None:
    """Exactly; torch counts scores that a causal mask hides, which are the other half."""
    model, checkpoint = open_model(model_type)
    linear, scores = count_flops(lambda: model(input_ids=TOKENS, use_cache=False))
    size = measure_size(checkpoint)
    assert 2 * size.num_matmul_parameters == linear
    assert 2 * size.score_flops(LENGTH) * TIMES_ATTENDED.get(model_type, 1) == scores
    assert size.forward_flops(LENGTH) == linear + size.score_flops(LENGTH)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_bigcode", "mixtral", "deepseek_v3", "gpt_neox", "opt"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(model_type: str, tied: bool, open_model: Open) -> None:
    model, checkpoint = open_model(model_type, tie_word_embeddings=tied)
    size = measure_size(checkpoint)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.num_bytes == 4 * size.num_parameters
    assert size.num_head_parameters == model.get_output_embeddings().weight.numel()
    assert size.vocab_size == VOCAB_SIZE


def test_a_tied_head_that_was_saved_counts_once(open_model: Open) -> None:
    _, checkpoint = open_model("llama", tie_word_embeddings=False)
    untied = measure_size(checkpoint)
    tied = measure_size(replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": True}))
    assert untied.num_parameters - tied.num_parameters == untied.num_head_parameters == tied.num_head_parameters
    assert untied.num_matmul_parameters == tied.num_matmul_parameters


def test_experts_count_as_often_as_a_token_meets_them(open_model: Open) -> None:
    _, one = open_model("mixtral", num_experts_per_tok=1)
    _, all_four = open_model("mixtral", num_experts_per_tok=4)
    experts = 2 * 4 * 3 * 64 * 48  # layers, experts, matrices
    assert measure_size(all_four).num_matmul_parameters - measure_size(one).num_matmul_parameters == experts * 3 // 4
    assert measure_size(all_four).num_parameters == measure_size(one).num_parameters


def test_an_encoder_decoder() -> None:
    checkpoint = Checkpoint("model", None, {"model_type": "grouped_t5"}, {}, 0)
    with pytest.raises(UnsupportedError, match="model: only decoders are uptrained, not grouped_t5"):
        measure_size(checkpoint)


def test_an_unknown_architecture() -> None:
    with pytest.raises(UnsupportedError, match="model_type 'mamba' is not supported"):
        measure_size(Checkpoint("model", None, {"model_type": "mamba"}, {}, 0))


@pytest.mark.parametrize(("window", "length"), [(None, 64), (16, 64), (63, 64), (64, 64), (100, 64), (1, 64)])
def test_scores_within_a_window(window: int | None, length: int) -> None:
    """Summed over the tokens; half a pair per token of the window's edge is left out on either side of the diagonal."""
    size = replace(llama_2_7b(), windows=(window, None))
    within = sum(min(token, window or length) for token in range(1, length + 1)) / length
    everywhere = sum(range(1, length + 1)) / length
    edges = (min(window or length, length) + length) / (2 * length)
    assert size.score_flops(length) == pytest.approx(2 * 32 * 256 * (within + everywhere - edges), rel=1e-12)


def test_windows_are_read_from_the_config(open_model: Open) -> None:
    _, checkpoint = open_model("mistral", sliding_window=8)
    assert measure_size(checkpoint).windows == (8, 8)


def train(model: Any) -> None:
    model(input_ids=TOKENS, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "deepseek_v3", "phi3"])
def test_training_is_three_forwards(model_type: str, open_model: Open) -> None:
    model, checkpoint = open_model(model_type)
    linear, scores = count_flops(lambda: train(model))
    size = measure_size(checkpoint)
    assert flops_per_token(linear_only(size), None, PREDICTION, ALL, LENGTH) == linear
    assert 2 * flops_per_token(scores_only(size), None, PREDICTION, ALL, LENGTH) == scores


@pytest.mark.parametrize("trained", [Trained.attention, Trained.kv])
def test_training_attention_alone(trained: Trained, open_model: Open) -> None:
    """Exactly, but for the gradients that nobody asks of the first layer's projections, whose inputs are frozen."""
    model, checkpoint = open_model("llama", attention_bias=False, mlp_bias=False)
    names = trained_tensors(checkpoint, trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    linear, scores = count_flops(lambda: train(model))
    size = measure_size(checkpoint)
    first = model.model.layers[0].self_attn
    not_asked = 2 * sum(module.weight.numel() for module in (first.q_proj, first.k_proj, first.v_proj))
    assert flops_per_token(linear_only(size), None, PREDICTION, trained, LENGTH) - not_asked == linear
    # with frozen queries, eager attention does not make the first layer's gradient of queries: one product of 12
    products = {Trained.attention: 12, Trained.kv: 11}[trained]
    assert 2 * flops_per_token(scores_only(size), None, PREDICTION, trained, LENGTH) * products / 12 == scores
    assert linear < flops_per_token(linear_only(size), None, PREDICTION, ALL, LENGTH) - not_asked


def test_a_teacher_adds_its_forward(open_model: Open) -> None:
    _, checkpoint = open_model("llama")
    size, teacher = measure_size(checkpoint), llama_2_7b()
    alone = flops_per_token(size, None, PREDICTION, ALL, LENGTH)
    assert flops_per_token(size, teacher, PREDICTION, ALL, LENGTH) == alone + teacher.forward_flops(LENGTH)
    assert flops_per_token(size, size, PREDICTION, ALL, LENGTH) == alone * 4 / 3


def test_the_layerwise_stage(open_model: Open) -> None:
    """The teacher up to its head, and of each layer the student's attention, whose inputs are given.

    What is counted beyond is the gradient of those inputs.
    """
    model, checkpoint = open_model("llama")
    positions = torch.arange(LENGTH)[None]

    def stage() -> None:
        with torch.no_grad():
            states = model.model(input_ids=TOKENS, use_cache=False).last_hidden_state
        rotary = model.model.rotary_emb(states, positions)
        for layer in model.model.layers:
            layer.self_attn(states, position_embeddings=rotary, attention_mask=None)[0].sum().backward()

    linear, scores = count_flops(stage)
    size = measure_size(checkpoint)
    inputs = 2 * sum(
        module.weight.numel()
        for layer in model.model.layers
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    assert flops_per_token(linear_only(size), linear_only(size), REGRESSION, ALL, LENGTH) - inputs == linear
    assert 2 * flops_per_token(scores_only(size), scores_only(size), REGRESSION, ALL, LENGTH) == scores


def trained_tensors(checkpoint: Checkpoint, trained: Trained) -> frozenset[str]:
    return trained_names(checkpoint.tensors, find_architecture(checkpoint), trained)


def test_attention_regression_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="attention is fitted to a teacher's"):
        flops_per_token(llama_2_7b(), None, REGRESSION, Trained.attention, LENGTH)


def test_what_is_trained(open_model: Open) -> None:
    _, llama = open_model("llama", attention_bias=False)
    projections = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"}
    assert trained_tensors(llama, ALL) == set(llama.tensors)
    assert trained_tensors(llama, Trained.attention) == projections
    assert trained_tensors(llama, Trained.kv) == {name for name in projections if name[-13] in "kv"}
    _, phi3 = open_model("phi3")
    assert trained_tensors(phi3, Trained.kv) == {f"model.layers.{layer}.self_attn.qkv_proj.weight" for layer in (0, 1)}
    _, latent = open_model("deepseek_v3")
    modules = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
    assert trained_tensors(latent, Trained.kv) == {
        f"model.layers.{layer}.self_attn.{module}.weight" for layer in (0, 1) for module in modules
    }
    _, olmo2 = open_model("olmo2")
    modules = ("k_proj", "v_proj", "k_norm")
    assert trained_tensors(olmo2, Trained.kv) == {
        f"model.layers.{layer}.self_attn.{module}.weight" for layer in (0, 1) for module in modules
    }


@pytest.mark.parametrize("model_type", DECODERS)
def test_keys_and_values_are_found_in_every_class(model_type: str, open_model: Open) -> None:
    """The parameters that these names choose are the model's, and as many as the size says."""
    model, checkpoint = open_model(model_type)
    size = measure_size(checkpoint)
    parameters = dict(model.named_parameters())
    counts = {
        part: sum(parameters[name].numel() for name in trained_tensors(checkpoint, part))
        for part in (Trained.attention, Trained.kv)
    }
    assert counts == {part: size.num_trained(part) for part in counts}
    assert 0 < counts[Trained.kv] < counts[Trained.attention] < size.num_parameters


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("H100", 989),
        ("h100-sxm", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
    ],
)
def test_peaks(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H20",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
        "Tesla T4",
        "NVIDIA GB200",
    ],
)
def test_peaks_that_are_not_known(name: str) -> None:
    assert peak_flops(name) is None


def test_the_first_gpu_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H100 80GB HBM3", "NVIDIA L4"][index])
    assert detect_gpu() == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_gpu() is None


def test_hours_by_hand() -> None:
    """6N + 6·L·H·d·S with N = 6.607e9 at S = 4096, 5 % of Llama 2's tokens, 40 % of 989 TFLOPS: 3010 hours."""
    size = llama_2_7b()
    per_token = flops_per_token(size, None, PREDICTION, ALL, 4096)
    assert per_token == 6 * 6_607_077_376 + 6 * 32 * 32 * 128 * 4096
    assert round(gpu_hours(1e11 * per_token, H100_PEAK_FLOPS)) == 3010
    assert gpu_hours(3600 * 1e12, 1e12, mfu=0.5) == 2


def stage_of(trained: Trained = ALL, objective: Objective = PREDICTION, first_step: int = 0) -> Stage:
    return Stage("main", objective, trained, 1908, first_step, 1e-4)


def shape_of(
    student: ModelSize,
    teacher: ModelSize | None = None,
    *,
    stages: tuple[Stage, ...] = (stage_of(),),
    shares: bool = False,
    bf16: bool = True,
    weights: LossWeights = LossWeights(),  # noqa: B008
    micro_batch: int = 1,
    sequence_length: int = 4096,
    num_processes: int = 1,
    **fields: Any,
) -> RunShape:
    batch = Batch(micro_batch * num_processes, sequence_length, num_processes, micro_batch)
    models = Models(student, teacher, shares, bf16)
    return RunShape(models, stages, weights, **{"batch": batch, **fields})


def memory(
    student: ModelSize | None = None, *, trained: Trained = ALL, objective: Objective = PREDICTION, **fields: Any
) -> int:
    stage = stage_of(trained, objective)
    return memory_bytes(shape_of(student or llama_2_7b(), stages=(stage,), **fields), stage)


@pytest.mark.parametrize(
    ("sharding", "kept"),
    [("none", 4 + 12 + 2), ("zero2", 4 + 12 / 8 + 2), ("zero3", (4 + 12) / 8 + 2), ("fsdp", (4 + 12 + 2) / 8)],
)
def test_states_of_weights(sharding: Sharding, kept: float) -> None:
    """Float32 weights, gradients and moments, 4 + 4 + 8 bytes per parameter, and 2 of the teacher's."""
    size = llama_2_7b()
    found = memory(teacher=size, sharding=sharding, num_processes=8)
    stateless = memory(teacher=replace(size, num_bytes=0), sharding="fsdp", num_processes=10**12)
    assert found - stateless == pytest.approx(kept * size.num_parameters, abs=2)


def test_frozen_weights_have_neither_gradient_nor_moments() -> None:
    size = llama_2_7b()
    saved = memory() - memory(trained=Trained.attention)
    assert saved == 12 * (size.num_parameters - size.num_attention_parameters)


def test_frozen_weights_that_are_the_teachers() -> None:
    """Against weights of its own it saves 4 bytes, and the copy that autocast makes of float32."""
    size = llama_2_7b()
    frozen = size.num_parameters - size.num_attention_parameters
    apart, shared = (memory(teacher=size, trained=Trained.attention, shares=shares) for shares in (False, True))
    assert apart - shared == (4 + 2) * frozen
    larger = replace(size, hidden_size=8192)  # in which no weight is equal
    apart, shared = (memory(teacher=larger, trained=Trained.attention, shares=shares) for shares in (False, True))
    assert apart - shared == (4 - 2 + 2) * frozen


def test_weights_of_a_light_run_in_float32() -> None:
    """All that is loaded is float32, and what is frozen counts once, as the teacher's."""
    size = llama_2_7b()
    found = weight_bytes(Models(size, size, shares=True, bf16=False), Trained.attention)
    assert found == 4 * (size.num_parameters + size.num_attention_parameters)


@pytest.mark.parametrize("frozen_in_half", [False, True])
def test_autocast_keeps_copies_of_frozen_float32_weights_too(frozen_in_half: bool, open_model: Open) -> None:
    """Gradients pass through the feed-forward and the head down to the attention below."""
    model, _ = open_model("llama")
    shapes = {"mlp": {(64, 48), (48, 64)}, "head": {(64, VOCAB_SIZE), (VOCAB_SIZE, 64)}}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
        if frozen_in_half and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies: dict[int, torch.Size] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            copies[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.train()(input_ids=TOKENS, use_cache=False)
    found = {part: sum(tuple(shape) in wanted for shape in copies.values()) for part, wanted in shapes.items()}
    assert found == ({"mlp": 0, "head": 0} if frozen_in_half else {"mlp": 2 * 3, "head": 1})


HELD: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"trained": Trained.attention},
    "cross-entropy": {"trained": Trained.kv, "weights": LossWeights(kl=0.0, cross_entropy=1.0)},
    "layerwise": {"recipe": Recipe.layerwise},
    "light": {"recipe": Recipe.light},
    "light-kv": {"recipe": Recipe.light, "trained": Trained.kv},
    "light-fp32": {"recipe": Recipe.light, "precision": "fp32"},
    "light-cross-entropy": {"recipe": Recipe.light, "weights": LossWeights(kl=0.0, cross_entropy=1.0)},
}


@pytest.mark.parametrize("name", HELD)
def test_weights_and_checkpoints_are_those_of_a_run(
    name: str,
    make_job: Callable[..., UptrainJob],
    make_checkpoint: CheckpointFactory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of a bfloat16 original and its pooled copy: every byte that the models' parameters take, shared ones once."""
    original = make_checkpoint(name="original", dtype=torch.bfloat16, with_tokenizer=True)
    with open_checkpoint(original) as checkpoint:
        teacher = measure_size(checkpoint)
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, tmp_path / "gqa2")
    models: list[Any] = []
    saved: list[int] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        models.append(load_for_training(*args, **kwargs))
        return models[-1]

    def finish(folder: Path) -> None:
        saved.append(sum((folder / file).stat().st_size for file in ("model.safetensors", "optimizer.pt")))

    monkeypatch.setattr(models_of_uptrain, "load_for_training", load)
    monkeypatch.setattr(trainer, "finish_checkpoint", finish)
    changes: dict[str, Any] = {"steps": 1, "precision": "bf16", "recipe": Recipe.distill, "weights": LossWeights()}
    settings = settings_with(**{**changes, **HELD[name]})
    job = make_job(model=tmp_path / "gqa2", teacher=original if settings.uses_teacher else None, settings=settings)
    run.uptrain(job, Observation())
    held = {parameter.data_ptr(): parameter for model in models for parameter in model.parameters()}
    stage, bf16 = settings.stages[0], settings.precision == "bf16"
    student, used = measure_size(job.checkpoint), teacher if settings.uses_teacher else None
    sizes = Models(student, used, job.shares_frozen, bf16)
    assert len(models) == (1 if used is None else 2)
    assert weight_bytes(sizes, stage.trained) == sum(held[at].numel() * held[at].element_size() for at in held)
    # beside tensors, files hold a kilobyte for each; frozen weights in another dtype would be 100 kB more or less
    assert 0 < saved[0] - disk_bytes(job.shape, 0) / 3 < 30_000


def test_attention_regression_has_no_logits() -> None:
    size = llama_2_7b()
    prediction, regression = (
        memory(teacher=size, trained=Trained.attention, objective=objective) for objective in (PREDICTION, REGRESSION)
    )
    logits = (3 * 2 * 4096 + 4 * 1024) * 32000
    frozen = size.num_parameters - size.num_attention_parameters
    assert prediction - regression == logits + 2 * frozen  # and the copies that autocast makes of the rest


def test_logits_of_a_micro_batch() -> None:
    """The student's and their gradient, the teacher's, 2 bytes each, and 1024 tokens in float32."""
    size = llama_2_7b()
    narrow = replace(size, vocab_size=0)

    def logits(teacher: ModelSize | None, *, micro_batch: int = 2, bf16: bool = True) -> int:
        with_logits, without = (
            memory(model, teacher=teacher, micro_batch=micro_batch, bf16=bf16) for model in (size, narrow)
        )
        return with_logits - without

    assert logits(None) == (2 * 2 * 2 * 4096 + 4 * 1024) * 32000
    assert logits(size) == (3 * 2 * 2 * 4096 + 4 * 1024) * 32000
    assert logits(size, bf16=False) == (3 * 4 * 2 * 4096 + 4 * 1024) * 32000


@pytest.mark.parametrize("model_type", ["llama", "phi", "nemotron", "qwen2"])
@pytest.mark.parametrize("bf16", [True, False])
def test_activations_are_about_what_autograd_saves(model_type: str, bf16: bool, tmp_path: Path) -> None:
    """Per token, up to the head, as the difference of two batches, so that copies of weights drop out.

    An estimate: it is 0.93 to 1.32 of what these classes save. Half of the matrices' inputs and outputs would be less
    than the lower bound.
    """
    wide = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 688, "num_hidden_layers": 4}
    model = build_model(model_type, **wide).train()
    model.save_pretrained(tmp_path / "model")
    size = measure_size(open_checkpoint(tmp_path / "model"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def saved_bytes(num_sequences: int) -> int:
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            model.model(input_ids=TOKENS[:1].repeat(num_sequences, 1), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)

    def estimate(num_sequences: int, linear_features: int) -> int:
        narrow = replace(size, vocab_size=0, linear_features=linear_features)
        return memory(narrow, micro_batch=num_sequences, sequence_length=LENGTH, bf16=bf16)

    saved = saved_bytes(3) - saved_bytes(1)
    features = size.linear_features
    assert 0.85 < (estimate(3, features) - estimate(1, features)) / saved < 1.4
    assert (estimate(3, features // 2) - estimate(1, features // 2)) / saved < 0.85


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    size = replace(llama_2_7b(), vocab_size=0)

    def per_token(checkpointing: bool) -> int:
        one, two = (
            memory(size, sequence_length=length, activation_checkpointing=checkpointing) for length in (4096, 4097)
        )
        return two - one

    assert per_token(True) == per_token(False) // 32 + 32 * 4 * 4096


def test_disk() -> None:
    size = llama_2_7b()
    trained, frozen = size.num_attention_parameters, size.num_parameters - size.num_attention_parameters
    assert disk_bytes(shape_of(size), 10**9) == 2 * 10**9 + 36 * size.num_parameters

    def some(first_step: int = 0, **fields: Any) -> int:
        return disk_bytes(shape_of(size, stages=(stage_of(Trained.attention, first_step=first_step),), **fields), 0)

    assert some() == 36 * trained + 12 * frozen
    assert some(shares=True) == 36 * trained + 6 * frozen
    assert some(shares=True, bf16=False) == 36 * trained + 12 * frozen
    assert some(keeps_best=True) == some() + 2 * 4 * size.num_parameters
    assert some(first_step=1) == 40 * trained + 16 * frozen
    assert some(teacher_copy_bytes=7) == 36 * trained + 12 * frozen + 7
    large = shape_of(replace(size, vocab_size=2**16 + 1))
    assert disk_bytes(large, 10**9) - disk_bytes(large, 0) == 4 * 10**9


def test_packed_text_is_each_sources_share_or_all_of_it() -> None:
    sources = [SourceSize(0.75, 10**6), SourceSize(0.25, 10**12)]
    assert packed_tokens(10**9, sources) == 10**6 + 25 * 10**7
    assert packed_tokens(1000, sources) == 1000
    assert packed_tokens(10**9, [SourceSize(0.75, None), SourceSize(0.25, 5)]) == 75 * 10**7 + 5


def test_passes_are_those_over_the_source_that_is_read_most() -> None:
    assert passes_over(1000, [SourceSize(0.75, 1000), SourceSize(0.25, 50)]) == 5
    assert passes_over(1000, [SourceSize(0.75, None), SourceSize(0.25, 50)]) is None
    assert passes_over(1000, []) is None


def test_a_gpu_that_is_not_known_is_refused() -> None:
    require_known_gpu("NVIDIA H100 80GB HBM3")
    with pytest.raises(InputError, match="--gpu A6000: the peak of this GPU is not known") as caught:
        require_known_gpu("A6000")
    assert caught.value.hint is not None
    names = caught.value.hint.removeprefix("known are ").split(", ")
    assert len(names) == 11
    assert None not in map(peak_flops, names)


UNKNOWN = [SourceSize(1.0, None)]
BUDGET = Budget(steps=1908, tokens_per_step=2**19, pretraining_tokens=None, source="unknown")
SPLIT = Batch(sequences_per_step=128, sequence_length=4096, num_processes=8, micro_batch=4)


def test_a_run() -> None:
    size = llama_2_7b()
    shape = shape_of(size, size, stages=STAGES, batch=SPLIT, sharding="fsdp")
    cost = run_cost(shape, BUDGET, sources=[SourceSize(1.0, 10**9)], gpu_name="NVIDIA A100-SXM4-80GB")
    tokens = 1908 * 2**19
    flops = tokens * flops_per_token(size, size, PREDICTION, ALL, 4096)
    assert cost == RunCost(
        tokens=tokens,
        steps=1908,
        passes=tokens / 10**9,
        flops=flops,
        gpu_name="NVIDIA A100-SXM4-80GB",
        gpu_hours=gpu_hours(flops, 312e12),
        h100_hours=gpu_hours(flops, 989e12),
        memory_bytes=memory(teacher=size, micro_batch=4, num_processes=8, sharding="fsdp"),
        disk_bytes=disk_bytes(shape, 10**9),
    )
    assert cost.warning is None


def test_a_run_with_a_layerwise_stage() -> None:
    size = llama_2_7b()
    first = replace(STAGES[0], objective=REGRESSION, trained=Trained.attention, steps=477)
    plan = (first, replace(STAGES[0], steps=1431, first_step=477))
    shape = shape_of(size, size, stages=plan, batch=SPLIT)
    cost = run_cost(shape, BUDGET, sources=UNKNOWN)
    per_token = [
        flops_per_token(size, size, REGRESSION, Trained.attention, 4096),
        flops_per_token(size, size, PREDICTION, ALL, 4096),
    ]
    assert cost.flops == pytest.approx(BUDGET.tokens * (0.25 * per_token[0] + 0.75 * per_token[1]), rel=1e-12)
    assert (cost.passes, cost.gpu_hours) == (None, None)
    assert cost.disk_bytes == disk_bytes(shape, BUDGET.tokens)
    assert cost.memory_bytes == memory(teacher=size, micro_batch=4)


def test_trials_before_a_run_leave_nothing_on_the_disk() -> None:
    size = llama_2_7b()
    shape = shape_of(size, stages=STAGES, batch=SPLIT)
    alone, tried = (run_cost(shape, BUDGET, sources=UNKNOWN, trials=STAGES * times) for times in (0, 2))
    assert tried.flops == pytest.approx(3 * alone.flops, rel=1e-12)
    assert tried.disk_bytes == alone.disk_bytes


def test_a_teacher_counts_in_the_stages_that_use_it() -> None:
    """Attention is fitted to it, then cross-entropy compares with none."""
    size, teacher = llama_2_7b(), replace(llama_2_7b(), num_parameters=10**12, num_bytes=2 * 10**12)
    cross_entropy = LossWeights(kl=0.0, cross_entropy=1.0)

    def cost_of(plan: tuple[Stage, ...], teacher: ModelSize | None) -> RunCost:
        shape = shape_of(size, teacher, stages=plan, batch=SPLIT, weights=cross_entropy)
        return run_cost(shape, BUDGET, sources=UNKNOWN)

    alone = cost_of(STAGES, None)
    assert cost_of(STAGES, teacher) == alone
    first = replace(STAGES[0], objective=REGRESSION, trained=Trained.attention, steps=477)
    plan = (first, replace(STAGES[0], steps=1431, first_step=477))
    cost = cost_of(plan, teacher)
    per_token = flops_per_token(size, teacher, REGRESSION, Trained.attention, 4096)
    assert cost.flops == pytest.approx(0.25 * BUDGET.tokens * per_token + 0.75 * alone.flops, rel=1e-12)
    regression: dict[str, Any] = {"trained": Trained.attention, "objective": REGRESSION, "micro_batch": 4}
    assert cost.memory_bytes == memory(teacher=teacher, **regression) > alone.memory_bytes


def test_text_that_is_read_often() -> None:
    size = llama_2_7b()
    tokens = BUDGET.tokens

    def warning(num_tokens: int) -> str | None:
        shape = shape_of(size, stages=STAGES, batch=SPLIT)
        return run_cost(shape, BUDGET, sources=[SourceSize(1.0, num_tokens)]).warning

    assert warning(tokens // 4) is None
    assert warning(tokens // 5) == "the run reads the text 5.0 times; beyond 4 it learns it by heart: use more text"


COST = RunCost(
    tokens=5 * 10**11,
    steps=10**6,
    passes=None,
    flops=1.5e21,
    gpu_name=None,
    gpu_hours=None,
    h100_hours=1000.0,
    memory_bytes=0,
    disk_bytes=0,
)


def test_consent_to_a_long_run() -> None:
    require_consent(COST, explicit=True, yes=False)
    long = replace(COST, h100_hours=1000.1)
    require_consent(long, explicit=True, yes=True)
    with pytest.raises(InputError, match=r"this run is 500B tokens, 1\.50e\+21 FLOPs, about 1,000 hours of") as caught:
        require_consent(long, explicit=True, yes=False)
    assert caught.value.hint is not None
    assert "pass --yes if you mean it; published conversions recover with 0.3 to 10B tokens" in caught.value.hint


def test_consent_to_a_run_whose_length_nobody_chose() -> None:
    require_consent(replace(COST, h100_hours=100.0), explicit=False, yes=False)
    with pytest.raises(InputError, match=r"this run by default is 500B tokens, .*, about 101 hours of an H100"):
        require_consent(replace(COST, h100_hours=101.0), explicit=False, yes=False)
    require_consent(replace(COST, h100_hours=101.0), explicit=False, yes=True)


def test_budgets_and_costs_need_no_torch() -> None:
    """They are arithmetic, and torch takes seconds; what a model is, its class says, for which torch is needed."""
    program = (
        "import sys; from kvconvert.uptrain.estimate import budget, cost, pretraining, size; "
        "from kvconvert.convert.checkpoint.opening import open_checkpoint; from kvconvert.configs import DEMO; "
        "open_checkpoint(DEMO / 'model'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"
