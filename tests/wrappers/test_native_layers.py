"""Decoder layers in three native calls: the same bits as part by part, and aside wherever a part is not native."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss_opt import explain, undo, with_fast_linears, with_flash_attention, with_lora, with_mxfp4_experts
from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.kernels.decoder_layer import NativeLayer
from gptoss_opt.model import layers
from tests.helpers import few_rows_native, ids, tiny_model

if native.why_not("cpu", torch.bfloat16):
    pytest.skip("no native library here", allow_module_level=True)
DTYPES = (torch.float32, torch.bfloat16) if native.library().best >= native.BFLOAT16 else (torch.float32,)
LAYERS = 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows native layers were given, of tables in which up to 8 are native."""
    found: list[int] = []
    monkeypatch.setattr(kernel_table, "measured", few_rows_native)
    real = NativeLayer.before

    def counted(self: NativeLayer, x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        found.append(len(x))
        return real(self, x, *args)

    monkeypatch.setattr(NativeLayer, "before", counted)
    return found


def wrapped(dtype: torch.dtype = torch.float32, wrap: Callable[[Any], Any] = lambda model: model) -> Any:
    return with_fast_linears(wrap(with_flash_attention(with_mxfp4_experts(tiny_model(dtype))))).eval()


@torch.no_grad()
def decoded(model: Any, rows: int = 1, steps: int = 12, **options: Any) -> Tensor:
    """The logits of tokens that are given one by one after a few, past the sliding window."""
    tokens = ids()[:rows, :5].repeat(1, 4) if rows <= len(ids()) else ids()[:1, :5].repeat(rows, 4)
    cache = options.pop("cache", None) or DynamicCache(config=model.config)
    found = [model(tokens[:, :5], past_key_values=cache, **options).logits[:, -1]]
    found += [model(tokens[:, i : i + 1], past_key_values=cache, **options).logits[:, -1] for i in range(5, 5 + steps)]
    return torch.stack(found)


def part_by_part(model: Any, **options: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_native", lambda *args, **kwargs: None)
        return decoded(model, **options)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_part_by_part(calls: list[int], dtype: torch.dtype, rows: int) -> None:
    model = wrapped(dtype)
    expected = part_by_part(model, rows=rows)
    assert not calls
    assert torch.equal(decoded(model, rows=rows), expected)
    assert calls == [rows] * (12 * LAYERS)
    # Negative control: it is the native layer that computes.
    with pytest.MonkeyPatch.context() as patch:
        real = NativeLayer.after
        patch.setattr(NativeLayer, "after", lambda *args: real(*args) * 1.01)
        assert not torch.equal(decoded(model, rows=rows), expected)
    undo(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_without_a_cache(calls: list[int]) -> None:
    model, token = wrapped(), ids()[:2, :1]
    with torch.no_grad():
        found = model(token, use_cache=False).logits
        assert calls == [2] * LAYERS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "_native", lambda *args, **kwargs: None)
            assert torch.equal(model(token, use_cache=False).logits, found)


def test_generate(calls: list[int]) -> None:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model().generate(ids()[:1, :8], **options)
    assert torch.equal(wrapped().generate(ids()[:1, :8], **options), expected)
    assert len(calls) == 19 * LAYERS


def hooked(path: str) -> Callable[[Any], object]:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *args: None)


def patched(model: Any) -> None:
    experts = model.model.layers[0].mlp
    experts.forward = type(experts).forward.__get__(experts)


def parametrised(model: Any) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for layer in model.model.layers:
        nn.utils.parametrize.register_parametrization(layer.self_attn.q_proj, "weight", Same())


def trained(model: Any) -> None:
    model.model.layers[0].mlp.router.train()


def replaced(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features).eval()


def swapped(model: Any) -> None:
    first, second = model.model.layers[:2]
    first.mlp, second.mlp = second.mlp, first.mlp


def subclassed(model: Any) -> None:
    class Twice(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    model.model.layers[0].self_attn.q_proj.__class__ = Twice


def acting(model: Any) -> None:
    class Twice(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * out.as_subclass(Tensor) if func is nn.functional.linear else out

    projection = model.model.layers[0].self_attn.q_proj
    projection._parameters["weight"] = projection.weight.data.as_subclass(Twice)


def scaled(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = torch.tensor(0.5)


def norm_of_ones(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.data[None])


def buffered(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    del norm.variance_epsilon
    norm.register_buffer("variance_epsilon", torch.tensor(1e-2))


def a_function(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    projection = attention.q_proj
    del attention.q_proj
    object.__setattr__(attention, "q_proj", lambda x: projection(x) * 2)


ASIDE: dict[str, Callable[[Any], object]] = {
    "a hook on a projection": hooked("model.layers.0.self_attn.q_proj"),
    "a hook on the router": hooked("model.layers.0.mlp.router"),
    "a hook before the experts": lambda model: model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda *args: None
    ),
    "a forward of the user's": patched,
    "a router in training": trained,
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "parametrised weights": parametrised,
    "another projection": replaced,
    "a projection of another class": subclassed,
    "a weight that acts": acting,
    "a function for a projection": a_function,
    "a scale that is a tensor": scaled,
    "a norm of two dims": norm_of_ones,
    "an epsilon that is a buffer": buffered,
}


@pytest.mark.parametrize("change", ASIDE)
@pytest.mark.parametrize("after_a_step", [False, True])
def test_it_stands_aside(calls: list[int], change: str, after_a_step: bool) -> None:
    """Also where it had stepped before."""
    model = wrapped()
    if after_a_step:
        decoded(model, steps=1)
        calls.clear()
    ASIDE[change](model)
    expected = part_by_part(model)
    assert torch.equal(decoded(model), expected)
    aside = LAYERS if change in ("eager attention", "parametrised weights") else 1
    assert len(calls) == 12 * (LAYERS - aside)


def test_it_stands_aside_for_what_is_not_one_plain_token_of_each_sequence(calls: list[int]) -> None:
    model, tokens = wrapped(), ids()[:2, :1]
    assert model(tokens).logits.requires_grad
    padded = torch.tensor([[0, 1], [1, 1]])
    with torch.no_grad():
        model(ids()[:2, :2], attention_mask=padded)
        model.train()(tokens)
        model.eval()(tokens.repeat(5, 1))
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens)
        static = StaticCache(config=model.config, max_cache_len=16)
        decoded(model, rows=1, steps=2, cache=static)
    assert not calls


def transposed(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T


def given_a_bias(model: Any) -> None:
    projection = model.model.layers[0].self_attn.q_proj
    projection.bias = nn.Parameter(torch.randn(len(projection.weight)))


def without_a_bias(model: Any) -> None:
    model.model.layers[0].mlp.router.bias = None


@pytest.mark.parametrize(
    "change", [transposed, given_a_bias, without_a_bias, swapped], ids=lambda change: change.__name__
)
def test_it_notices_what_changed_since_the_last_step(calls: list[int], change: Callable[[Any], None]) -> None:
    square = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False}
    model = with_fast_linears(with_flash_attention(with_mxfp4_experts(tiny_model(**square)))).eval()
    before = decoded(model)
    assert len(calls) == 12 * LAYERS
    change(model)
    found = decoded(model)
    assert torch.equal(found, part_by_part(model))
    assert not torch.equal(found, before)


def test_it_keeps_no_weights(calls: list[int]) -> None:
    model = wrapped()
    decoded(model, steps=1)
    old = weakref.ref(model.model.layers[0].self_attn.q_proj.weight)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert old() is None


@pytest.mark.parametrize("odd", ["dtype", "shape", "negated"])
def test_what_a_cache_gives_is_looked_at(calls: list[int], odd: str) -> None:
    class Odd(DynamicCache):
        pass

    model, token = wrapped(), ids()[:1, :1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids()[:1, :5], past_key_values=cache)
        real = cache.layers[0].update

        def update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = real(*args, **kwargs)
            if odd == "dtype":
                return keys.double(), values.double()
            return (keys, values[:, :, 1:]) if odd == "shape" else (keys, torch._neg_view(values))

        cache.layers[0].update = update
        with pytest.raises(ValueError, match=r"(keys|values) is"):
            model(token, past_key_values=cache)
        assert calls
        calls.clear()
        model(token, past_key_values=Odd(config=model.config))
    assert not calls


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(calls: list[int], window: int) -> None:
    model = wrapped()
    model.model.layers[0].self_attn.sliding_window = window
    with pytest.raises(ValueError, match="window"):
        decoded(model, steps=1)


def test_another_function_under_our_name(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, key = wrapped(), layers.OUR_ATTENTION
    real = ALL_ATTENTION_FUNCTIONS[key]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, key, lambda *args, **kwargs: real(*args, **kwargs))
    decoded(model)
    assert not calls


PATCHED = """
import os, sys, torch
from transformers.models.gpt_oss import modeling_gpt_oss as theirs

# What takes long is imported once. Each class is patched in a process that then meets gptoss_opt for the first time.
assert "gptoss_opt" not in sys.modules
for name in sys.argv[1:]:
    if (process := os.fork()) == 0:
        break
    os.waitpid(process, 0)
else:
    sys.exit()

cls = getattr(theirs, name)
real = cls.forward

def forward(self, *args, **kwargs):
    forward.calls += 1
    return real(self, *args, **kwargs)

forward.calls = 0
cls.forward = forward
from gptoss_opt import with_fast_linears, with_flash_attention, with_mxfp4_experts
from gptoss_opt.kernels import kernel_table
from tests.helpers import few_rows_native, ids, tiny_model

kernel_table.measured = few_rows_native
model = with_fast_linears(with_flash_attention(with_mxfp4_experts(tiny_model()))).eval()
with torch.no_grad():
    model(ids()[:1, :1])
print(name, "called" if forward.calls else "not called", flush=True)
"""


def test_a_forward_that_was_patched_before_the_package_came() -> None:
    """It is the user's, whichever of the classes it is of."""
    names = ("GptOssDecoderLayer", "GptOssMLP", "GptOssExperts", "GptOssAttention", "GptOssRMSNorm")
    command = [sys.executable, "-c", PATCHED, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines() == [f"{name} called" for name in names], done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_router_logits_are_recorded(calls: list[int]) -> None:
    model, token = wrapped(), ids()[:1, :1]
    with torch.no_grad():
        expected = tiny_model()(token, output_router_logits=True, output_hidden_states=True)
        found = model(token, output_router_logits=True, output_hidden_states=True)
    assert len(found.router_logits) == len(expected.router_logits) == LAYERS
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0.5, atol=0.5)


@pytest.mark.parametrize("targets", ["q_proj", "down_proj"])
@pytest.mark.parametrize("last", [False, True])
def test_adapters_count(calls: list[int], targets: str, last: bool) -> None:
    adapt = with_lora(rank=2, targets=[targets])
    model = wrapped(wrap=adapt) if not last else None
    if model is None:
        model = wrapped()
        decoded(model, steps=1)
        calls.clear()
        model = adapt(model).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(decoded(model), part_by_part(model))
    assert not calls


def test_it_follows_changed_weights_and_settings(calls: list[int]) -> None:
    model = wrapped()
    before = decoded(model)
    layer = model.model.layers[1]

    def assigned() -> None:
        layer.self_attn.k_proj.weight.data = torch.randn_like(layer.self_attn.k_proj.weight)

    def replaced() -> None:
        layer.mlp.router.weight = nn.Parameter(torch.randn_like(layer.mlp.router.weight))

    def limited() -> None:
        layer.mlp.experts.limit = 0.01

    def in_place() -> None:
        with torch.no_grad():
            layer.self_attn.sinks.add_(2)

    for change in (assigned, replaced, limited, in_place):
        change()
        calls.clear()
        found = decoded(model)
        assert len(calls) == 12 * LAYERS
        assert torch.equal(found, part_by_part(model)), change.__name__
        assert not torch.equal(found, before), change.__name__
        before = found


def test_another_meaning_of_the_rotation(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    decoded(model, steps=1)
    calls.clear()
    monkeypatch.setattr(modeling_gpt_oss, "apply_rotary_pos_emb", lambda q, k, *args: (q, k))
    decoded(model, steps=1)
    assert not calls


def test_copies_have_their_own(calls: list[int]) -> None:
    model = wrapped()
    before = decoded(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.model.layers[0].mlp.router.weight.mul_(-1)
        assert not torch.equal(decoded(other), before)
        assert torch.equal(decoded(other), part_by_part(other))
    calls.clear()
    assert torch.equal(decoded(model), before)
    assert len(calls) == 12 * LAYERS


def test_explain_says_so(calls: list[int]) -> None:
    changed = [line for row in explain(wrapped()).rows for line in row.changed]
    assert any(line.startswith("layers (3): three native calls") for line in changed)


def test_a_cast_model_is_found_anew(calls: list[int]) -> None:
    model = wrapped()
    decoded(model, steps=1)
    calls.clear()
    model.to(torch.bfloat16)
    assert torch.equal(decoded(model), part_by_part(model))
    assert len(calls) == (12 * LAYERS if torch.bfloat16 in DTYPES else 0)
