"""What every wrapper owes its user, run over all of them: a new one cannot be forgotten."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssForCausalLM

import gptoss_opt
from gptoss_opt import CompatibilityError, IrreversibleError, Stack, compose, explain, load_adapter, stack_of, undo
from gptoss_opt.core import WRAPPERS
from gptoss_opt.layout import STORAGES
from gptoss_opt.model.saving import SAVING
from tests.helpers import (
    WINDOW,
    group_of_one,
    ids,
    local,
    loss_and_gradients,
    names_reversed,
    relative,
    tiny_config,
    tiny_model,
)

# What shards a model does so among the ranks of a process group, here of this process alone.
ALL = sorted(name for name in WRAPPERS if hasattr(gptoss_opt, name))
OF_THE_LANGUAGE_HEAD = {"with_chunked_loss"}


@pytest.fixture(autouse=True, scope="module")
def _group():
    with group_of_one():
        yield


@pytest.fixture(params=["as named", "against the alphabet"])
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as named":
        names_reversed(monkeypatch)


@pytest.fixture(params=ALL)
def wrap(request: pytest.FixtureRequest, names: None):
    return getattr(gptoss_opt, request.param)


def fingerprint(model: nn.Module) -> dict:
    """Everything a wrapper may change: parameters, buffers, attributes, hooks, config."""
    tensors = {
        name: (value.dtype, value.requires_grad, bits(value))
        for name, value in model.state_dict(keep_vars=True).items()
    }
    return {
        path: (
            type(module),
            list(module._parameters),
            sorted(name for name in module.__dict__ if not name.startswith("_gptoss")),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            id(getattr(module, "config", None)),
            module.__dict__.get("forward"),
        )
        for path, module in model.named_modules()
    } | {
        "tensors": tensors,
        "config": model.config.to_dict()
        | {"attention": model.config._attn_implementation, "experts": model.config._experts_implementation},
    }


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, or of this rank's part of it."""
    return local(tensor).detach().contiguous().view(torch.uint8).numpy().tobytes()


def take_off(wrap, model: nn.Module) -> bool:
    """Undo a wrapper, and whether it could be: if not, it says so and stays."""
    if WRAPPERS[wrap.__name__].reversible:
        undo(model)
        assert not stack_of(model)
        return True
    there = fingerprint(model)
    with pytest.raises(IrreversibleError, match=rf"{wrap.__name__}\(\) cannot be taken off: it dropped data"):
        undo(model)
    assert fingerprint(model) == there
    return False


def left_padded(batch: int = 3) -> dict:
    """Prompts of which some have more padding on the left than the window is wide."""
    length = 3 * WINDOW
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : row * (WINDOW + 1)] = 0
    return {"input_ids": ids(batch, length).masked_fill(mask == 0, 0), "attention_mask": mask}


def test_there_are_wrappers() -> None:
    assert "with_flash_attention" in ALL
    assert all(WRAPPERS[name].__doc__ and getattr(gptoss_opt, name).__doc__ for name in ALL)


def test_the_object_class_and_keys_stay(wrap, model) -> None:
    keys, kind = list(model.state_dict()), type(model)
    # What a wrapper lays out anew keeps its place, under the names of its storage; what it brings comes after it.
    layout = compose(wrap()).layout(model)
    suffixes = {name: STORAGES[storage].suffixes for name, storage in layout.storages.items()}
    before = fingerprint(model)
    wrapped = wrap(model)
    assert wrapped is model
    assert type(model) is kind
    own = [f"{key}{suffix}" for key in keys for suffix in suffixes.get(key, ("",))]
    assert [key for key in model.state_dict() if key not in layout.new] == own
    assert model.state_dict().keys() == {*own, *layout.new}
    assert fingerprint(model) != before, "the wrapper changed nothing"


def test_undo_is_exact(wrap, model) -> None:
    before = fingerprint(model)
    logits = model(ids()).logits
    if take_off(wrap, wrap(model)):
        assert fingerprint(model) == before
        assert torch.equal(model(ids()).logits, logits)


def test_call_forms_agree(wrap) -> None:
    @wrap
    def build() -> GptOssForCausalLM:
        return tiny_model()

    @wrap()
    def build_too() -> GptOssForCausalLM:
        return tiny_model()

    stacks = [stack_of(model) for model in (wrap(tiny_model()), build(), build_too(), compose(wrap())(tiny_model()))]
    assert all(stack == compose(wrap()) for stack in stacks)
    assert Stack.from_json(stacks[0].to_json()) == stacks[0]


def test_twice_is_once(wrap, model) -> None:
    once = fingerprint(wrap(model))
    assert fingerprint(wrap(model)) == once
    assert len(stack_of(model)) == 1
    take_off(wrap, model)


def test_explain(wrap, model) -> None:
    (row,) = explain(wrap(model)).rows
    assert row.wrapper == repr(wrap())
    assert row.changed
    assert wrap.__name__ in str(explain(model))
    assert wrap.__name__ in explain(model)._repr_html_()


def test_config_is_private(wrap) -> None:
    config = tiny_config()
    one, two = GptOssForCausalLM(config).eval(), GptOssForCausalLM(config).eval()
    two.load_state_dict(one.state_dict())
    wrap(one)
    assert two.config is config
    assert two.config._attn_implementation == "eager"
    assert not stack_of(two)
    assert one.config is not config
    assert one.config is one.model.config is one.model.layers[0].self_attn.config
    assert not take_off(wrap, one) or one.config is config


def test_changes_to_the_config_survive_undo(wrap, model) -> None:
    wrap(model)
    model.config.use_cache = False
    model.config.vocab_size = 140
    take_off(wrap, model)
    assert model.config.use_cache is False
    assert model.config.vocab_size == 140
    assert model.config._attn_implementation == "eager"


def test_resizes_or_says_why_not(wrap, model) -> None:
    wrap(model)
    if WRAPPERS[wrap.__name__].reversible:
        model.resize_token_embeddings(140)
        assert model(torch.tensor([[139]])).logits.shape[-1] == 140
    else:
        with pytest.raises(ValueError, match="resize_token_embeddings: .* Resize the model before it is sharded"):
            model.resize_token_embeddings(140)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch"])
def test_copies_work_and_undo_alone(wrap, model, clone) -> None:
    if clone == "torch":

        def clone(model: nn.Module) -> nn.Module:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

    logits = wrap(model)(ids()).logits
    twin = clone(model)
    assert torch.equal(twin(ids()).logits, logits)
    assert stack_of(twin) == stack_of(model)
    assert twin.config is not model.config
    take_off(wrap, twin)
    assert len(stack_of(model)) == 1
    assert torch.equal(model(ids()).logits, logits)


def test_saves_a_plain_checkpoint(wrap, model, tmp_path) -> None:
    expected = tiny_model()(ids()).logits
    wrap(model).save_pretrained(tmp_path)
    if SAVING in WRAPPERS[wrap.__name__].claims:
        assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert relative(load_adapter(tiny_model(), tmp_path)(ids()).logits, expected) < 1e-5
        return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).float().eval()
    assert plain.config._attn_implementation == "eager"
    assert relative(plain(ids()).logits, expected) < 1e-5
    assert stack_of(plain) == Stack()


def test_same_logits_loss_and_gradients(wrap, model) -> None:
    loss, expected = loss_and_gradients(model, ids())
    logits = model(ids()).logits
    wrap(model)
    assert relative(model(ids()).logits, logits) < 1e-5
    wrapped_loss, actual = loss_and_gradients(model, ids())
    torch.testing.assert_close(wrapped_loss, loss, rtol=1e-5, atol=0)
    layout, there = compose(wrap()).layout(tiny_model()), dict(model.named_parameters())
    frozen = {name for name in expected if name not in there}
    assert all(layout.storages.get(name) for name in frozen)
    if layout.new:  # all else is frozen, and only the factors that are not multiplied with zeros have gradients
        frozen = expected.keys()
        assert {name for name, p in there.items() if p.requires_grad} == actual.keys() == set(layout.new)
        assert all(actual[name].any() != name.endswith("lora_A") for name in layout.new)
    for name in expected.keys() - frozen:
        assert relative(actual[name], expected[name]) < 1e-4, name


def test_generates_the_same_with_left_padding(wrap, model) -> None:
    options = {"max_new_tokens": 3 * WINDOW, "do_sample": False}
    expected = model.generate(**left_padded(), **options)
    assert torch.equal(wrap(model).generate(**left_padded(), **options), expected)
    # Negative control: the padding mask matters.
    unmasked = left_padded() | {"attention_mask": torch.ones_like(left_padded()["attention_mask"])}
    assert not torch.equal(model.generate(**unmasked, **options), expected)


def test_trains(wrap, model) -> None:
    wrap(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# torch's own, while tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
# Tracing takes most of the time of this file, and what it traces of one wrapper knows no names.
@pytest.mark.parametrize("names", ["as named"], indirect=True)
def test_compiles(wrap, model) -> None:
    loss, expected = loss_and_gradients(wrap(model), ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(ids(), labels=ids()).loss
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    found.backward()
    for name, gradient in expected.items():
        assert relative(local(model.get_parameter(name).grad), gradient) < 1e-4, name
    with torch.no_grad():
        assert relative(compiled(ids(seed=2)).logits, model(ids(seed=2)).logits) < 1e-5


def test_wrapped_under_inference_mode_it_can_be_trained(wrap, model) -> None:
    with torch.inference_mode():
        wrap(model)
        model(ids())
    loss_and_gradients(model, ids())
    with torch.inference_mode():
        take_off(wrap, model)
    loss_and_gradients(model, ids())


def test_nothing_is_shared_with_other_models(wrap, model) -> None:
    other = wrap(tiny_model())
    before = other.config.to_dict()
    for value in vars(wrap(model).config).values():
        if isinstance(value, dict):
            value["mine"] = 1
    assert other.config.to_dict() == before
    assert wrap(tiny_model()).config.to_dict() == before


def test_refuses_by_name(wrap, model) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **small))
    with pytest.raises(
        CompatibilityError, match="LlamaForCausalLM is a llama model: only gpt_oss models can be wrapped"
    ):
        wrap(llama)
    with pytest.raises(CompatibilityError, match="Linear is not a GPT-OSS model"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(CompatibilityError, match="Sequential is not a GPT-OSS model but holds one at .0"):
        wrap(nn.Sequential(model))
    with pytest.raises(TypeError, match="the class GptOssForCausalLM, not a model"):
        wrap(GptOssForCausalLM)
    with pytest.raises(CompatibilityError, match="already torch.compiled"):
        wrap(torch.compile(model, backend="eager"))
    assert not stack_of(model)


def test_any_head(wrap) -> None:
    from transformers import GptOssForSequenceClassification, GptOssModel

    for kind in (GptOssModel, GptOssForSequenceClassification):
        model = tiny_model(kind=kind)
        expected = model(ids())[0]
        if wrap.__name__ in OF_THE_LANGUAGE_HEAD:
            with pytest.raises(CompatibilityError, match=f"{kind.__name__} has no language head"):
                wrap(model)
            assert not stack_of(model)
            continue
        assert relative(wrap(model)(ids())[0], expected) < 1e-5
        take_off(wrap, model)
