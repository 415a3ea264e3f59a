"""`with_lora` against the float64 reference in which W + s B A is made: logits and all gradients, in any stack."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GptOssForSequenceClassification, GptOssModel

from gptoss_opt import (
    Stack,
    adapters_off,
    compose,
    explain,
    load,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.kernels import low_rank as kernel
from gptoss_opt.kernels.native import low_rank as native
from gptoss_opt.model import adapters as model_adapters
from tests.helpers import GOLDEN, assert_as_exact, ids, relative
from tests.materialised import A, B, Materialised, adapters, begun, gentle
from tests.wrappers.test_contract import left_padded

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "lm_head", "gate_up_proj", "down_proj")
RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "targets": EVERY}
DENSE_AND_PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def adapted(model: Any = None, *, packed: bool = False, **options: Any) -> Any:
    """A model whose adapters all count."""
    model = with_lora(gentle() if model is None else model, **{**OPTIONS, **options})
    return begun(with_mxfp4_experts(model) if packed else model)


def gradients(model: Any, input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Of all that is trained, by name; then cleared."""
    model(input_ids, labels=kwargs.pop("labels", input_ids), **kwargs).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    found = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert exact[name].any(), name
        assert relative(gradient, exact[name]) < tolerance, name


# Numbers.


@DENSE_AND_PACKED
@pytest.mark.parametrize("targets", [*((name,) for name in EVERY), EVERY], ids=lambda some: some[0][: 9 * len(some)])
def test_float32(targets: tuple[str, ...], packed: bool) -> None:
    model = adapted(targets=targets, packed=packed)
    reference = Materialised(model, SCALE)
    logits = model(ids()).logits
    assert relative(logits, reference.logits(ids())) < 1e-5
    assert_equal(gradients(model, ids()), reference.gradients(ids()))
    # Negative controls: the adapters count, and so does their scale.
    assert relative(gentle()(ids()).logits, logits) > 1e-2
    assert relative(Materialised(model, 1.2 * SCALE).logits(ids()), logits) > 1e-3


@DENSE_AND_PACKED
def test_bfloat16_is_as_exact_as_weights_with_the_changes_in(packed: bool) -> None:
    # All experts compute: which are chosen hangs on roundings.
    kind = {"dtype": torch.bfloat16, "num_experts_per_tok": 4, "num_hidden_layers": 2}
    model = adapted(gentle(**kind), packed=packed)
    reference = Materialised(model, SCALE, gentle(**kind))
    exact, ours = reference.gradients(ids()), gradients(model, ids())
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    plain = gentle(**kind)
    plain.set_experts_implementation("eager")
    weights = {name: weight.to(torch.bfloat16) for name, weight in reference.weights().items()}
    loss = functional_call(plain, weights, (ids(),), {"labels": ids()}).loss
    base = torch.autograd.grad(loss, list(reference.factors.values()))
    rounded = [gradient.to(torch.bfloat16) for gradient in base]
    assert_as_exact(ours, [ours[name].to(torch.bfloat16) for name in exact], rounded, list(exact.values()))


@DENSE_AND_PACKED
def test_bfloat16_points_where_float64_does(packed: bool) -> None:
    # With weights as small as those that training begins with, and in one layer, rounding leaves directions alone.
    kind = {"dtype": torch.bfloat16, "num_experts_per_tok": 4, "num_hidden_layers": 1, "initializer_range": 0.02}
    model = begun(with_lora(gentle(**kind), **OPTIONS), size=0.02)
    if packed:
        with_mxfp4_experts(model)
    input_ids = ids(8, 60)
    exact, ours = Materialised(model, SCALE, gentle(**kind)).gradients(input_ids), gradients(model, input_ids)
    for name, gradient in exact.items():
        cosine = torch.nn.functional.cosine_similarity(ours[name].double().flatten(), gradient.flatten(), dim=0)
        assert cosine >= 0.9999, name
    wrong = Materialised(model, SCALE, gentle(**kind, seed=1)).gradients(input_ids)
    assert any(torch.dot(wrong[name].flatten(), exact[name].flatten()) < 0 for name in exact)


def test_float64_and_autocast() -> None:
    model = adapted(gentle(torch.float64), dtype=torch.float64)
    reference = Materialised(model, SCALE, gentle(torch.float64))
    assert_equal(gradients(model, ids()), reference.gradients(ids()), 1e-10)
    model = adapted(gentle(num_experts_per_tok=4))
    plain = gradients(model, ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, ids())
    assert 1e-4 < max(relative(found[name], plain[name]) for name in plain) < 0.5
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@DENSE_AND_PACKED
def test_every_order_of_a_stack_gives_the_same_bits(packed: bool) -> None:
    wraps = [lambda model: with_lora(model, **OPTIONS), with_flash_attention, with_fast_experts]
    wraps += [with_mxfp4_experts] if packed else []
    first = None
    for order in itertools.permutations(wraps):
        model = gentle()
        for wrap in order:
            wrap(model)
        begun(model)
        found = stack_of(model), gradients(model, ids())
        first = first or found
        assert found[0] == first[0]
        assert all(torch.equal(found[1][name], gradient) for name, gradient in first[1].items())
    assert_equal(first[1], Materialised(model, SCALE).gradients(ids()))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_named_backends(backend: str) -> None:
    model = adapted(with_fast_experts(with_flash_attention(gentle(), backend="reference"), backend=backend))
    assert_equal(gradients(model, ids()), Materialised(model, SCALE).gradients(ids()))


@DENSE_AND_PACKED
def test_left_padding_and_packed_sequences(packed: bool) -> None:
    batch = left_padded()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = adapted(packed=packed)
    assert_equal(gradients(with_flash_attention(model), **batch), Materialised(model, SCALE).gradients(**batch))
    # Two documents in one row are two rows.
    apart, together = ids(2, 12), ids(2, 12).reshape(1, 24)
    positions = torch.arange(12).repeat(2)[None]
    labels = apart.clone()
    labels[:, 0] = -100
    exact = Materialised(model, SCALE).gradients(apart, labels=labels)
    found = gradients(model, together, labels=labels.reshape(1, 24), position_ids=positions)
    assert_equal(found, exact)


@DENSE_AND_PACKED
def test_the_gradients_of_the_oracle_still_hold(packed: bool) -> None:
    """What else is trained gets, beside adapters that add nothing, the gradients of the oracle."""
    exact = load_file(GOLDEN / "expected.safetensors")
    names = [name.removeprefix("grad.") for name in exact if name.startswith("grad.")]
    own = [name for name in names if not packed or not name.endswith(("gate_up_proj", "down_proj"))]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).float().eval()
    model = with_lora(with_mxfp4_experts(model) if packed else model, targets=EVERY, train=own)
    input_ids = exact["input_ids"][None]
    assert relative(model(input_ids).logits[0], exact["logits"]) < 1e-5
    found = gradients(model, input_ids)
    assert len(own) > 5
    for name in own:
        assert relative(found[name], exact[f"grad.{name}"]) < 1e-4, name
    # And gradients of the adapters are those of the weights beside them: with W' = W + s B A, dB = s dW A^T.
    for name in (name for name in names if name.endswith(("_proj.weight", "router.weight", "_proj"))):
        of_experts = not name.endswith(".weight")
        before = f"{name}_" if of_experts else name.removesuffix("weight")
        of_weight = exact[f"grad.{name}"].double()
        of_weight = of_weight.mT if of_experts else of_weight
        expected = 16 / 8 * of_weight @ model.get_parameter(before + A).detach().double().mT
        assert relative(found[before + B], expected) < 1e-4, name


# Mistakes that these tests would notice.


def without_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel.LowRank, "factors", lambda self, dtype: (self.a.to(dtype), self.b.to(dtype)), raising=True
    )


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "dropped", lambda x, probability: x.detach())


def one_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.sums_over_rows
    monkeypatch.setattr(native, "sums_over_rows", lambda *args: real(*args) * 0.99)


def experts_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_opt.model.experts.change_of", lambda *_: None)


def router_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_adapters, "adapted_router", lambda _, module, inner, x: inner(x))


MISTAKES = (without_scale, cut_off, one_gradient_lost, experts_left_out, router_left_out)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_noticed(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    model = adapted()
    exact = Materialised(model, SCALE).gradients(ids())
    model(ids(), labels=ids()).loss.backward()
    wrong = [name for name, p in adapters(model).items() if p.grad is None or relative(p.grad, exact[name]) > 1e-3]
    assert wrong


# What is trained, and what is not.


def step(model: Any, batches: list[Tensor], **options: Any) -> None:
    """One step on each batch, of all that takes gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(batch, labels=batch, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@DENSE_AND_PACKED
def test_the_base_is_frozen_bit_for_bit(packed: bool) -> None:
    model = adapted(packed=packed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)  # of all, as a Trainer gives them
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapters(model))


@pytest.mark.parametrize("name", ["sinks", "norm", "router", "bias", "embed_tokens", "q_proj.weight", "lm_head"])
def test_what_train_names_is_trained_too(name: str) -> None:
    model = adapted(gentle(num_hidden_layers=2), targets=("q_proj", "down_proj"), train=name)
    exact = Materialised(model, SCALE, gentle(num_hidden_layers=2), trained=name).gradients(ids())
    assert_equal(gradients(model, ids()), exact)
    assert len(exact) > len(adapters(model))
    undo(model, discard=True)
    assert all(p.requires_grad for p in model.parameters())


def test_several_names_are_trained() -> None:
    model = with_lora(gentle(), targets="q_proj", train=["sinks", "model.norm"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    assert [name.rpartition(".")[2] for name in trained] == ["sinks", "sinks", "sinks", "weight"]
    assert "sinks, model.norm" in str(explain(model))


def test_packed_weights_are_not_trained_whichever_comes_first() -> None:
    for name in ("gate_up_proj", "experts", "gate_up_proj_blocks"):
        with pytest.raises(ValueError, match=r"train='.*' names .*experts.gate_up_proj, which is stored as 'mxfp4'"):
            with_lora(with_mxfp4_experts(gentle()), targets="q_proj", train=name)
    model = with_lora(gentle(), train="experts")
    with pytest.raises(ValueError, match="train='experts' names"):
        with_mxfp4_experts(model)
    assert stack_of(model) == compose(with_lora(train="experts"))
    assert model.model.layers[0].mlp.experts.down_proj.requires_grad
    model = with_lora(with_mxfp4_experts(gentle()), train="down_proj_bias")
    assert model.model.layers[0].mlp.experts.down_proj_bias.requires_grad


def test_gradients_of_small_batches_add_up() -> None:
    model = adapted(packed=True)
    batch = ids(4, 10)
    exact = gradients(model, batch)
    for part in batch.chunk(2):
        (model(part, labels=part).loss / 2).backward()
    found = {name: p.grad for name, p in adapters(model).items()}
    assert_equal(found, exact)


@DENSE_AND_PACKED
def test_training_goes_as_with_the_changes_in(packed: bool) -> None:
    model = adapted(packed=packed)
    reference = Materialised(model, SCALE)
    ours = torch.optim.SGD(adapters(model).values(), lr=0.05)
    theirs = torch.optim.SGD(reference.factors.values(), lr=0.05)
    losses = []
    for seed in range(4):
        batch = ids(seed=seed % 2)
        loss = model(batch, labels=batch).loss
        loss.backward()
        exact = reference(batch, labels=batch).loss
        exact.backward()
        torch.testing.assert_close(loss, exact, rtol=1e-4, atol=0)
        losses.append(loss.item())
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert losses[2] < losses[0]


# Dropout.


def test_dropout_is_of_training_alone() -> None:
    model, plain = adapted(dropout=0.5), adapted()
    assert torch.equal(model(ids()).logits, plain(ids()).logits)
    model.train()
    torch.manual_seed(1)
    first = model(ids()).logits
    assert relative(first, plain(ids()).logits) > 1e-2
    assert not torch.equal(model(ids()).logits, first)
    torch.manual_seed(1)
    assert torch.equal(model(ids()).logits, first)
    with adapters_off(model):
        assert relative(model(ids()).logits, gentle()(ids()).logits) < 1e-5
    assert torch.equal(model.eval()(ids()).logits, plain(ids()).logits)


def test_dropout_keeps_the_mean() -> None:
    # Of the head, in which the logits are linear.
    model = adapted(targets="lm_head", dropout=0.3).train()
    with torch.no_grad():
        mean = torch.stack([model(ids()).logits for _ in range(400)]).mean(0)
    change = model.eval()(ids()).logits - gentle()(ids()).logits
    assert relative(mean - gentle()(ids()).logits, change) < 0.1


@DENSE_AND_PACKED
def test_gradients_with_dropout_are_those_of_finite_differences(packed: bool) -> None:
    # All experts compute, so that nothing jumps where other ones are chosen.
    plain = gentle(torch.float64, num_experts_per_tok=4, num_hidden_layers=2)
    model = with_lora(plain, **OPTIONS, dropout=0.3, dtype=torch.float64)
    model = begun(with_mxfp4_experts(model) if packed else model).train()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return torch.nn.functional.cross_entropy(model(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())

    loss().backward()
    for number, (name, parameter) in enumerate(adapters(model).items()):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
        step = 3e-4  # transformers' norms are in float32
        with torch.no_grad():
            parameter.add_(step * direction)
            ahead = loss()
            parameter.sub_(2 * step * direction)
            behind = loss()
            parameter.add_(step * direction)
        slope = float((ahead - behind) / (2 * step))
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_leave_out_the_same_again(use_reentrant: bool) -> None:
    model = adapted(packed=True, dropout=0.4).train()

    def found() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return gradients(model, ids(), use_cache=False)

    exact = found()
    with warnings.catch_warnings():  # newer versions of transformers have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_equal(found(), exact)


# Options.


def test_layers_patterns_and_rslora() -> None:
    model = with_lora(gentle(), targets=["q_proj", "lm_head"], layers=[0, 2])
    assert {name.removesuffix(f".{A}").removesuffix(f".{B}") for name in adapters(model)} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "lm_head",
    }
    one = with_lora(gentle(), targets=r"model\.layers\.1\..*(q_proj|gate_up_proj)")
    assert {name.rpartition(".")[0] for name in adapters(one)} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.experts",
    }
    assert with_lora(layers=1).layers == (1,)
    model = adapted(rslora=True)
    assert_equal(gradients(model, ids()), Materialised(model, ALPHA / RANK**0.5).gradients(ids()))
    assert model.model.layers[0].mlp.experts.gate_up_proj_lora_A.shape == (4, RANK, 64)


# Of peft, which asks transformers in words that it is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_first_values_are_those_of_peft_and_the_same_in_every_order() -> None:
    kind = {"hidden_size": 128, "num_hidden_layers": 1}
    model = with_lora(gentle(**kind), rank=16, targets=("q_proj", "o_proj", "gate_up_proj"))
    theirs = get_peft_model(gentle(**kind), LoraConfig(r=16, target_modules=["q_proj", "o_proj"]))
    inner = theirs.base_model.model
    for name in ("q_proj", "o_proj"):
        ours = getattr(model.model.layers[0].self_attn, name)
        peft = getattr(inner.model.layers[0].self_attn, name)
        a, b = ours.lora_A, peft.lora_A["default"].weight
        assert a.shape == b.shape
        bound = a.shape[1] ** -0.5
        for values in (a.detach(), b.detach()):
            assert bound * 0.98 < values.abs().max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert abs(float(values.mean())) < 0.1 * bound
        assert not ours.lora_B.any()
        assert not peft.lora_B["default"].weight.any()
    a = model.model.layers[0].mlp.experts.gate_up_proj_lora_A
    assert 0.98 * 128**-0.5 < a.abs().max() <= 128**-0.5
    assert not torch.equal(a[0], a[1])
    torch.manual_seed(9)
    other = with_lora(with_flash_attention(gentle(seed=3, **kind)), rank=16, targets=("q_proj", "gate_up_proj"))
    assert torch.equal(other.model.layers[0].mlp.experts.gate_up_proj_lora_A, a)
    assert torch.equal(other.model.layers[0].self_attn.q_proj.lora_A, model.model.layers[0].self_attn.q_proj.lora_A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_another_dtype(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    assert all(p.dtype == dtype for p in adapters(model).values())
    exact = Materialised(model, SCALE).gradients(ids())
    assert_equal(gradients(model, ids()), exact, 1e-5 if dtype == torch.float64 else 5e-2)


# The model stays what it is.


def test_generates_with_left_padding() -> None:
    options = {"max_new_tokens": 12, "do_sample": False}
    model = adapted(packed=True)
    merged = gentle()
    with torch.no_grad():
        for name, weight in Materialised(model, SCALE).weights().items():
            merged.get_parameter(name).copy_(weight)
    expected = merged.generate(**left_padded(), **options)
    assert torch.equal(with_flash_attention(model).generate(**left_padded(), **options), expected)
    assert not torch.equal(gentle().generate(**left_padded(), **options), expected)


def test_loading_with_it_is_wrapping() -> None:
    options = {"targets": EVERY, "rank": 2}
    one = begun(load(GOLDEN, with_lora(**options), with_mxfp4_experts(), dtype=torch.float32))
    two = begun(with_lora(load(GOLDEN, with_mxfp4_experts(), dtype=torch.float32), **options))
    three = begun(with_mxfp4_experts(with_lora(load(GOLDEN, dtype=torch.float32), **options)))
    assert stack_of(one) == stack_of(two) == stack_of(three)
    states = [model.state_dict() for model in (one, two, three)]
    assert list(states[0]) == list(states[1]) == list(states[2])
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())
    assert torch.equal(one(ids()).logits, two(ids()).logits)
    assert relative(three(ids()).logits, one(ids()).logits) < 1e-5
    assert {name for name, p in one.named_parameters() if p.requires_grad} == set(adapters(one))


@pytest.mark.parametrize("kind", [GptOssModel, GptOssForSequenceClassification])
def test_other_heads(kind: Any) -> None:
    changes: dict[str, Any] = {"num_labels": 3} if kind is GptOssForSequenceClassification else {}
    changes["num_hidden_layers"] = 2
    model = begun(with_lora(gentle(kind=kind, **changes), rank=RANK, alpha=ALPHA))
    before = gentle(kind=kind, **changes)(ids())[0]
    reference = Materialised(model, SCALE, gentle(kind=kind, **changes))
    out = model(ids())[0]
    assert relative(out, reference(ids())[0]) < 1e-5
    assert relative(out, before) > 1e-3
    d_out = torch.randn_like(out)
    (out * d_out).sum().backward()
    exact = torch.autograd.grad((reference(ids())[0] * d_out).sum(), list(reference.factors.values()))
    for (name, p), gradient in zip(adapters(model).items(), exact, strict=True):
        assert relative(p.grad, gradient) < 1e-5, name
    with adapters_off(model):
        assert relative(model(ids())[0], before) < 1e-5
    if kind is not GptOssModel:
        head = with_lora(gentle(kind=kind, **changes), targets=("score",))
        assert set(adapters(head)) == {"score.lora_A", "score.lora_B"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_adapters_of_their_own(clone: Any) -> None:
    model = with_flash_attention(adapted(packed=True, dropout=0.1))
    logits, exact = model(ids()).logits, gradients(model, ids())
    twin = clone(model)
    assert torch.equal(twin(ids()).logits, logits)
    assert stack_of(twin) == stack_of(model)
    assert all(torch.equal(gradients(twin, ids())[name], gradient) for name, gradient in exact.items())
    step(twin, [ids()])
    assert torch.equal(model(ids()).logits, logits)
    with adapters_off(twin):
        assert torch.equal(model(ids()).logits, logits)
        assert relative(twin(ids()).logits, gentle()(ids()).logits) < 1e-5
    assert relative(twin(ids()).logits, logits) > 1e-3
    undo(twin, discard=True)
    assert not adapters(twin)
    assert adapters(model)


def test_state_dict_and_json() -> None:
    model = adapted(packed=True)
    fresh = with_mxfp4_experts(with_lora(gentle(seed=4), **OPTIONS))
    assert relative(fresh(ids()).logits, model(ids()).logits) > 0.1
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)
    lora = with_lora(rank=3, alpha=1.5, dropout=0.1, targets=r".*q_proj", layers=(0, 1), rslora=True, train=["norm"])
    stack = compose(lora, with_flash_attention())
    assert Stack.from_json(stack.to_json()) == stack
    patterns = {"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"0.*q_proj": 3}, "r": 2}
    stack = compose(with_lora(config={**patterns, "alpha_pattern": {"q_proj": 2.5}}))
    assert Stack.from_json(stack.to_json()) == stack
    assert hash(stack) == hash(Stack.from_json(stack.to_json()))
    model = Stack.from_json(stack.to_json())(gentle())
    assert [len(model.model.layers[n].self_attn.q_proj.lora_A) for n in range(3)] == [3, 2, 2]


def test_adapters_survive_whatever_comes_and_goes() -> None:
    model = with_lora(gentle(), **OPTIONS)
    step(model, [ids(seed=3), ids(seed=4)])
    expected, before = model(ids()).logits, dict(adapters(model))
    for order in itertools.permutations([with_flash_attention, with_fast_experts, with_mxfp4_experts]):
        for wrap in order:
            assert relative(wrap(model)(ids()).logits, expected) < 1e-5
        for wrap in order:
            undo(model, wrap)
            assert relative(model(ids()).logits, expected) < 1e-5
        assert all(p is before[name] and p.requires_grad for name, p in adapters(model).items())
        assert not any(p.requires_grad for name, p in model.named_parameters() if name not in before)


def test_an_optimizer_goes_on_when_other_wrappers_come() -> None:
    one, other = (with_lora(gentle(), **OPTIONS) for _ in range(2))
    losses = []
    for model in (one, other):
        optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
        for seed in range(4):
            if model is other and seed == 2:
                with_mxfp4_experts(with_flash_attention(model))
            model(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(model(ids(), labels=ids()).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def held(model: nn.Module) -> set[str]:
    return {name for module in model.modules() for name in module.__dict__ if "adapters" in name}


def test_nothing_of_it_is_left_behind() -> None:
    model = gentle()
    attributes = [sorted(module.__dict__) for module in model.modules()]
    with_lora(model, **OPTIONS)
    assert held(model)
    with adapters_off(model):
        undo(model)
    assert not held(model)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
