"""What a wrapper asks wrongly is refused in a sentence that names it, and a failure leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_opt import (
    CompatibilityError,
    Stack,
    compose,
    explain,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.core.journal import SetAttribute
from gptoss_opt.extend import (
    GPT_OSS,
    Attachment,
    Axis,
    Host,
    Layout,
    LayoutError,
    Phase,
    Report,
    Split,
    Storage,
    Stored,
    Wrapper,
)
from gptoss_opt.layout import STORAGES
from tests.helpers import ids, tiny_model
from tests.stacks.low_rank import LowRank, low_rank_parameters

ATTENTION = "model.layers.0.self_attn"
WEIGHT = f"{ATTENTION}.o_proj.weight"  # [64, 64]
EXPERTS = "model.layers.0.mlp.experts.down_proj"
NEW = f"{ATTENTION}.o_proj.delta"
Ask = Callable[[Layout], Layout]


@dataclass(frozen=True, kw_only=True, repr=False)
class Asking(Wrapper):
    """Asks of the layout what a test wants it to."""

    ask: Ask = lambda layout: layout

    name: ClassVar[str] = "with_toy_asking"
    phase: ClassVar[Phase] = Phase.ADAPT
    host: ClassVar[Host] = GPT_OSS

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        return self.ask(layout)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        return Report(("asked",))


def adding(name: str = NEW, shape: tuple[int, ...] = (64,), **options: Any) -> Ask:
    return lambda layout: layout.add(name, shape, **options)


def splitting(*parts: Sequence[int], dim: int = 0, degree: int = 2) -> Ask:
    return lambda layout: layout.over(Axis("tp", degree)).split([WEIGHT], Split(dim, "tp", cast(Any, parts)))


WRONG: dict[str, tuple[Ask, str]] = {
    "unknown parameter": (
        lambda layout: layout.store(["lm_heat.weight"], "mxfp4"),
        "asks for lm_heat.weight, which model.named_parameters() does not have",
    ),
    "unknown storage": (lambda layout: layout.store([WEIGHT], "int7"), "as 'int7'. Known are dense"),
    "storage cannot": (
        lambda layout: (
            layout.store(["model.layers.0.mlp.experts.down_proj"], "mxfp4")
            .over(Axis("tp", 2))
            .split(["model.layers.0.mlp.experts.down_proj"], Split(1, "tp", (range(31), range(31, 64))))
        ),
        "stored as 'mxfp4'",
    ),
    "unknown init": (adding(init="normal"), "init='normal'. Use zeros, ones, kaiming_uniform"),
    "no shape to draw": (adding(shape=(), init="kaiming_uniform"), "cannot fill"),
    "empty": (adding(shape=(4, 0)), "cannot fill"),
    "trainable integers": (adding(dtype=torch.int64), "Use trainable=False"),
    "no such module": (adding("model.layers.9.delta"), "no module model.layers.9"),
    "a module's name": (adding(f"{ATTENTION}.q_proj"), "has a 'q_proj' already"),
    "an attribute's name": (adding(f"{ATTENTION}.scaling"), "has a 'scaling' already"),
    "a method's name": (adding(f"{ATTENTION}.forward"), "has a 'forward' already"),
    "no name": (adding(f"{ATTENTION}.o_proj."), "another name"),
    "a parameter's name": (adding(WEIGHT), "which the model has already"),
    "beside nothing": (adding(beside=f"{ATTENTION}.o_proj.wait"), "no parameter of the model's own"),
    "beside itself": (adding(beside=NEW), "no parameter of the model's own"),
    "beside another module's": (adding(beside="lm_head.weight"), "is in another module"),
    "dims beside nothing": (adding(dims={0: 0}), "beside no parameter"),
    "dims there": (adding(beside=WEIGHT, dims={2: 0}), "of one size"),
    "dims here": (adding(beside=WEIGHT, dims={0: 1}), "of one size"),
    "dims of two sizes": (adding(shape=(65,), beside=WEIGHT, dims={0: 0}), "of one size"),
    "stored new": (lambda layout: adding()(layout).store([NEW], "mxfp4"), "are dense"),
    "a shape that cannot be stored": (lambda layout: layout.store([WEIGHT], "mxfp4"), "MXFP4 takes expert weights"),
    "beside each other": (
        lambda layout: layout.add(NEW, (2,), beside=f"{NEW}2").add(f"{NEW}2", (2,), beside=NEW),
        "no parameter of the model's own",
    ),
    "every second index": (splitting(range(32), range(32, 96, 2)), "Give each index to one rank"),
    "descending indices": (splitting((1, 0, *range(2, 32)), range(32, 64)), "Give each index to one rank"),
    "a packed tensor's name": (
        lambda layout: layout.store([EXPERTS], "mxfp4").add(f"{EXPERTS}_blocks", (2,)),
        f"are both held as {EXPERTS}_blocks",
    ),
    "overlapping parts": (splitting(range(33), range(32, 64)), "Give each index to one rank"),
    "missing indices": (splitting(range(31), range(32, 64)), "Give each index to one rank"),
    "no such dimension": (splitting(range(32), range(32, 64), dim=2), "Give each index to one rank"),
    "too few parts": (splitting(range(64)), "of 2 ranks"),
    "unnamed axis": (
        lambda layout: layout.split([WEIGHT], Split(0, "tp", (range(32), range(32, 64)))),
        "Name the axis first",
    ),
    "unbound axis": (splitting(range(32), range(32, 64)), "no wrapper binds the ranks of axis 'tp'"),
}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_held_is_refused(case: str) -> None:
    ask, sentence = WRONG[case]
    model = tiny_model()
    before = parameters(model)
    with pytest.raises(CompatibilityError) as error:
        Asking(ask=ask)(model)
    assert sentence in str(error.value)
    assert parameters(model) == before
    assert not stack_of(model)


def test_what_can_be_held_is_not_refused() -> None:
    model = Asking(ask=adding(beside=WEIGHT, dims={0: 0}))(tiny_model().bfloat16())
    assert model.get_parameter(NEW).dtype == torch.bfloat16


@dataclass(frozen=True, kw_only=True, repr=False)
class Halves(Wrapper):
    """Stores the experts, as another wrapper does too."""

    name: ClassVar[str] = "with_toy_halves"
    phase: ClassVar[Phase] = Phase.LAYOUT
    host: ClassVar[Host] = GPT_OSS

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        return layout.store([EXPERTS], "half")


def test_two_storages_of_one_parameter_are_refused() -> None:
    with pytest.raises(CompatibilityError, match=r"with_mxfp4_experts\(\) stores .* and with_toy_halves\(\) as 'half'"):
        compose(Halves(), with_mxfp4_experts())(tiny_model())


class Misnamed(Storage):
    """Encodes to a tensor that it does not name."""

    name = "misnamed"
    suffixes = ("_q",)

    def encode(self, dense: Any) -> Stored:
        return Stored({"_r": dense})


def test_a_storage_that_does_not_keep_its_word_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORAGES, "misnamed", Misnamed())
    model = tiny_model()
    before = parameters(model)
    with pytest.raises(LayoutError, match="says that its suffixes are"):
        Asking(ask=lambda layout: layout.store([WEIGHT], "misnamed"))(model)
    assert parameters(model) == before


def test_a_failing_exchange_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LowRank()(tiny_model())
    before = parameters(model)

    def fail(*args: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(sys.modules["gptoss_opt.layout.relayout"], "_sort_new", fail)
    with pytest.raises(MemoryError):
        with_mxfp4_experts(model)
    assert parameters(model) == before
    assert stack_of(model) == compose(LowRank())


FAILING = {"now": False}


@dataclass(frozen=True, kw_only=True, repr=False)
class Flaky(LowRank):
    """Attaches once."""

    name: ClassVar[str] = "with_toy_flaky"
    phase: ClassVar[Phase] = Phase.ADAPT

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        if FAILING["now"]:
            raise RuntimeError("once more is too often")
        journal.add_pre_hook(model, "", keep)
        journal.state = "kept"
        return super().attach(model, journal)


def keep(_: nn.Module, args: Any, kwargs: Any) -> None: ...


def test_a_wrapper_that_cannot_attach_again_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Flaky()(tiny_model())
    with torch.no_grad():
        for parameter in low_rank_parameters(model).values():
            parameter += 0.1
    before, logits, hooks = parameters(model), model(ids()).logits, dict(model._forward_pre_hooks)
    monkeypatch.setitem(FAILING, "now", True)
    with pytest.raises(RuntimeError, match="once more"):
        with_flash_attention(model)
    monkeypatch.undo()
    assert parameters(model) == before
    assert torch.equal(model(ids()).logits, logits)
    assert model._forward_pre_hooks == hooks
    assert stack_of(model) == compose(Flaky())
    assert all("by you since" not in line for row in explain(model).rows for line in row.changed)
    assert not low_rank_parameters(undo(model))


def test_nothing_is_packed_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(num_hidden_layers=1, num_local_experts=4))
    with pytest.raises(CompatibilityError, match="on the meta device"):
        with_mxfp4_experts(model)


def test_an_interrupt_while_wrappers_come_off_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose(LowRank(), with_flash_attention(), with_mxfp4_experts())(tiny_model())
    before, logits = parameters(model), model(ids()).logits
    for number in range(6):
        calls = iter(range(100))

        def interrupted(edit: Any, model: nn.Module, real: Any = SetAttribute.undo) -> None:
            if next(calls) == number:  # noqa: B023
                raise KeyboardInterrupt
            real(edit, model)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SetAttribute, "undo", interrupted)
            undo(model)
        assert parameters(model) == before
        assert stack_of(model) == compose(LowRank(), with_flash_attention(), with_mxfp4_experts())
        assert torch.equal(model(ids()).logits, logits)
    undo(model)
    assert not stack_of(model)


@dataclass(frozen=True, kw_only=True, repr=False)
class OnAny(Wrapper):
    """Goes on any module."""

    name: ClassVar[str] = "with_toy_on_any"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        return Report(("nothing",))


def test_a_config_that_was_made_for_a_failure_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    config = model.config
    OnAny()(model)
    monkeypatch.setitem(FAILING, "now", True)
    with pytest.raises(RuntimeError, match="once more"):
        Flaky()(model)
    assert model.config is config
    assert stack_of(model) == compose(OnAny())


def test_hooks_of_the_user_stay_behind_ours_on_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_flash_attention(tiny_model())
    model.model.register_forward_pre_hook(keep, with_kwargs=True)
    order = list(model.model._forward_pre_hooks)
    monkeypatch.setitem(FAILING, "now", True)
    with pytest.raises(RuntimeError, match="once more"):
        compose(Flaky(), with_mxfp4_experts())(model)
    assert list(model.model._forward_pre_hooks) == order


def test_layouts_of_what_cannot_be_are_refused() -> None:
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(num_hidden_layers=1, num_local_experts=4))
    for wrapper, sentence in (
        (shard_tensor_parallel(degree=3), "do not divide over 3 ranks"),
        (shard_tensor_parallel(degree=16), "key/value heads do not divide"),
        (shard_experts(degree=5), "4 experts do not go on 5 ranks"),
    ):
        with pytest.raises(LayoutError, match=sentence):
            compose(wrapper).layout(model)
    with pytest.raises(LayoutError, match="Linear is not a GPT-OSS model"):
        compose(with_mxfp4_experts()).layout(nn.Linear(2, 2))


def test_a_layout_looks_inside_a_module_around_the_model() -> None:
    model = with_mxfp4_experts(LowRank()(tiny_model()))
    assert stack_of(model).layout(nn.Sequential(model)) == stack_of(model).layout(model)


def test_first_values_depend_on_no_default() -> None:
    plain, other = tiny_model(), tiny_model()
    LowRank()(plain)
    with torch.device("meta"):
        LowRank()(other)
    torch.set_default_dtype(torch.float64)
    third = LowRank()(tiny_model().float())
    torch.set_default_dtype(torch.float32)
    for model in (other, third):
        for name, parameter in low_rank_parameters(plain).items():
            assert torch.equal(model.get_parameter(name), parameter)


def test_names_of_wrappers_are_their_own() -> None:
    with pytest.raises(TypeError, match="'with_flash_attention' is FlashAttention"):
        type("Mine", (type(with_flash_attention()),), {})
    with pytest.raises(TypeError, match="needs a `name` of its own"):
        type("Mine", (Wrapper,), {"name": "with_flash_attention"})
    assert Stack.from_json(compose(with_flash_attention()).to_json()) == compose(with_flash_attention())


def test_layers_that_are_gone_stand_in_nobodys_way() -> None:
    model = compose(with_flash_attention(), LowRank(), with_mxfp4_experts())(tiny_model(num_hidden_layers=3))
    model.model.layers = model.model.layers[:2]
    assert "by you since" in str(explain(model))
    undo(model)
    assert not stack_of(model)
    assert model(ids()).logits.isfinite().all()


def test_new_parameters_are_left_out_of_what_a_part_saves(tmp_path: Any) -> None:
    from safetensors import safe_open

    LowRank()(model := tiny_model())
    model.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "low_" in name]  # noqa: SIM118
