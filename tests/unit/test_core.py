"""The core on toy modules: resolve, apply, undo, the journal, call forms and errors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gptoss_opt import CompatibilityError, IrreversibleError, Stack, Wrapper, compose, explain, stack_of, undo
from gptoss_opt.core import WRAPPERS, BackendError, Choice, Phase, Report, choose


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.settings = "plain"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def double(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return (args[0] * 2,), kwargs


@dataclass(frozen=True, kw_only=True, repr=False)
class Doubled(Wrapper):
    """Doubles the input of `inner`, and notes it in `settings`."""

    mark: str = "doubled"
    name: ClassVar[str] = "with_toy_doubled"
    phase: ClassVar[Phase] = Phase.COMPUTE
    claims: ClassVar[tuple[str, ...]] = ("the input of inner",)
    provides: ClassVar[tuple[str, ...]] = ("doubled inputs",)

    def attach(self, model, journal):
        journal.add_pre_hook(model, "inner", double)
        journal.set(model, "", "settings", model.settings + "+" + self.mark)
        return Report(("inner: doubles its input",), Choice("best", (("other", "slower"),)))


@dataclass(frozen=True, kw_only=True, repr=False)
class Named(Wrapper):
    """Sets an attribute that was not there."""

    size: int = 1
    name: ClassVar[str] = "with_toy_named"
    phase: ClassVar[Phase] = Phase.LAYOUT

    def check(self, model):
        if self.size > 9:
            yield f"size {self.size} is above 9. Use 1 to 9."

    def attach(self, model, journal):
        journal.set(model, "inner", "label", f"named {self.size} {model.settings}")
        return Report(("inner.label",))


@dataclass(frozen=True, kw_only=True, repr=False)
class Picky(Wrapper):
    name: ClassVar[str] = "with_toy_picky"
    phase: ClassVar[Phase] = Phase.ADAPT
    refuses: ClassVar[dict[str, str]] = {"doubled inputs": "it cannot count that far. Drop one of the two."}

    def attach(self, model, journal):
        return Report(())


@dataclass(frozen=True, kw_only=True, repr=False)
class Greedy(Wrapper):
    name: ClassVar[str] = "with_toy_greedy"
    phase: ClassVar[Phase] = Phase.COMPUTE
    claims: ClassVar[tuple[str, ...]] = ("the input of inner",)

    def attach(self, model, journal):
        return Report(())


@dataclass(frozen=True, kw_only=True, repr=False)
class Failing(Wrapper):
    name: ClassVar[str] = "with_toy_failing"
    phase: ClassVar[Phase] = Phase.OBSERVE

    def attach(self, model, journal):
        journal.set(model, "", "settings", "half done")
        raise RuntimeError("no luck")


@dataclass(frozen=True, kw_only=True, repr=False)
class Final(Wrapper):
    name: ClassVar[str] = "with_toy_final"
    phase: ClassVar[Phase] = Phase.COMPUTE
    reversible: ClassVar[bool] = False

    def attach(self, model, journal):
        return Report(())


@pytest.fixture(autouse=True, scope="module")
def _forget_the_toys():
    yield
    for name in [name for name in WRAPPERS if "_toy_" in name]:
        del WRAPPERS[name]


def snapshot(model: nn.Module) -> dict:
    inner = {k: v for k, v in model.inner.__dict__.items() if not k.startswith("_")}
    return {"settings": model.settings, "inner": inner, "hooks": list(model.inner._forward_pre_hooks.values())}


def test_order_of_calls_never_matters() -> None:
    one, two, three = Toy(), Toy(), Toy()
    Doubled()(Named()(one))
    Named()(Doubled()(two))
    compose(Doubled(), Named())(three)
    assert stack_of(one) == stack_of(two) == stack_of(three) == compose(Named(), Doubled())
    assert [wrapper.name for wrapper in stack_of(two)] == ["with_toy_named", "with_toy_doubled"]
    # The second wrapper went below the first: what it saw is the model before the first.
    assert one.inner.label == two.inner.label == three.inner.label == "named 1 plain"
    assert one.settings == two.settings == "plain+doubled"


def test_applying_returns_the_same_object_and_changes_it() -> None:
    model = Toy()
    x = torch.randn(1, 2)
    before = model(x)
    assert Doubled()(model) is model
    assert not torch.equal(model(x), before)
    assert undo(model) is model
    assert torch.equal(model(x), before)


def test_undo_is_exact() -> None:
    model = Toy()
    before = snapshot(model)
    compose(Named(), Doubled())(model)
    assert snapshot(model) != before
    undo(model)
    assert snapshot(model) == before
    assert not stack_of(model)
    assert "_gptoss_opt_record" not in model.__dict__


def test_undo_one_of_several() -> None:
    model = compose(Named(size=2), Doubled())(Toy())
    undo(model, "with_toy_named")
    assert stack_of(model) == compose(Doubled())
    assert not hasattr(model.inner, "label")
    assert model.settings == "plain+doubled"
    undo(model, Doubled())
    assert model.settings == "plain"
    with pytest.raises(ValueError, match="with_toy_doubled is not on this model. It has no wrappers"):
        undo(model, Doubled())
    with pytest.raises(TypeError, match="undo takes wrappers or their names, not 3"):
        undo(model, 3)
    compose(Named(), Doubled())(model)
    undo(model, compose(Doubled()))
    assert stack_of(model) == compose(Named())


def test_what_the_user_changed_since_stays() -> None:
    model = Doubled()(Toy())
    model.settings = "my own"
    assert "changed by you since" in str(explain(model))
    assert undo(model).settings == "my own"
    # Wrapping again after such a change puts it back in force.
    Doubled()(model)
    model.settings = "mine again"
    assert Doubled()(model).settings == "mine again+doubled"
    assert len(model.inner._forward_pre_hooks) == 1


def test_the_same_wrapper_twice() -> None:
    model = Doubled()(Doubled()(Toy()))
    assert len(stack_of(model)) == 1
    assert model.settings == "plain+doubled"
    with pytest.raises(
        CompatibilityError, match=r"with_toy_doubled\(\) and with_toy_doubled\(mark='x'\): the same wrapper"
    ):
        Doubled(mark="x")(model)
    assert model.settings == "plain+doubled"


def test_all_problems_at_once_and_nothing_touched() -> None:
    model = Toy()
    before = snapshot(model)
    with pytest.raises(CompatibilityError) as error:
        compose_unchecked = (Doubled(), Greedy(), Picky(), Named(size=12))
        Stack(compose_unchecked)(model)
    text = str(error.value)
    assert text.startswith("cannot apply this stack:\n  - ")
    assert "with_toy_doubled() and with_toy_greedy() both claim the input of inner" in text
    assert "with_toy_picky() refuses doubled inputs, set by with_toy_doubled(): it cannot count that far" in text
    assert "with_toy_named(size=12): size 12 is above 9. Use 1 to 9." in text
    assert len(error.value.problems) == 3
    assert snapshot(model) == before
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems


def test_conflicts_are_found_without_a_model() -> None:
    with pytest.raises(CompatibilityError, match="both claim"):
        compose(Doubled(), Greedy())


def test_a_failure_half_way_puts_everything_back() -> None:
    model = Toy()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no luck"):
        compose(Doubled(), Failing())(model)
    assert snapshot(model) == before
    assert not stack_of(model)
    Named()(model)
    with_one = snapshot(model)
    with pytest.raises(RuntimeError, match="no luck"):
        Failing()(model)
    assert snapshot(model) == with_one
    assert stack_of(model) == compose(Named())


def test_what_cannot_be_undone_says_so_and_stays() -> None:
    model = Final()(Toy())
    with pytest.raises(IrreversibleError, match=r"with_toy_final\(\) cannot be taken off"):
        undo(model)
    assert stack_of(model) == compose(Final())
    # For one that goes before it, it is put on again.
    assert stack_of(Named()(model)) == compose(Named(), Final())
    with pytest.raises(IrreversibleError, match=r"with_toy_final\(\) cannot be taken off"):
        undo(model)
    assert stack_of(undo(model, Named())) == compose(Final())


def test_deepcopy_and_pickle_keep_the_stack_and_its_undo() -> None:
    model = compose(Named(), Doubled())(Toy())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stack_of(twin) == stack_of(model)
        undo(twin)
        assert twin.settings == "plain"
        assert not twin.inner._forward_pre_hooks
        assert model.settings == "plain+doubled"


def test_json_round_trip() -> None:
    stack = compose(Doubled(mark="x"), Named())
    assert Stack.from_json(stack.to_json()) == stack
    assert hash(Stack.from_json(stack.to_json())) == hash(stack)
    for text, message in (
        ('[{"wrapper": "with_nothing", "options": {}}]', "there is no wrapper 'with_nothing'. Known are"),
        (
            '[{"wrapper": "with_toy_named", "options": {"colour": 1}}]',
            "with_toy_named has no option 'colour'. It has size.",
        ),
        ('{"wrapper": 1}', "not a stack"),
        ('[{"wrapper": [], "options": {}}]', "not a stack"),
    ):
        with pytest.raises(ValueError, match=message):
            Stack.from_json(text)


def test_call_forms() -> None:
    @Doubled()
    @Named(size=3)
    def build(width: int) -> Toy:
        """Builds."""
        return Toy()

    assert build.__name__ == "build"
    assert build.__doc__ == "Builds."
    assert stack_of(build(2)) == compose(Named(size=3), Doubled())
    assert stack_of(compose(Doubled())(lambda: Toy())()) == compose(Doubled())
    assert compose(compose(Doubled()), Named()) == compose(Named(), Doubled())
    assert repr(compose(Named(size=3), Doubled())) == "compose(with_toy_named(size=3), with_toy_doubled())"


def test_wrong_targets() -> None:
    with pytest.raises(TypeError, match=r"with_toy_named\(\) was given the class Toy, not a model. Build one first"):
        Named()(Toy)
    with pytest.raises(TypeError, match="given a str, not a model"):
        Named()("openai/gpt-oss-20b")
    with pytest.raises(TypeError, match="Join wrappers with compose"):
        Named()(Doubled())
    with pytest.raises(TypeError, match=r"decorates build\(\), which returned a tuple, not a model"):

        @Named()
        def build():
            return Toy(), "tokenizer"

        build()
    with pytest.raises(TypeError, match=r"compose takes wrappers, not <function.*Write with_x\(\)."):

        def with_x(): ...

        compose(with_x)


def test_options_may_be_tuples() -> None:
    stack = compose(Named(size=(1, 2)))
    assert Stack.from_json(stack.to_json()) == stack


def test_a_stack_in_a_notebook() -> None:
    page = compose(Doubled(), Named(size=(1, 2)))._repr_html_()
    for word in ("with_toy_doubled()", "with_toy_named(size=(1, 2))", Named.phase.name, Doubled.phase.name):
        assert word in page
    assert page.index("with_toy_named") < page.index("with_toy_doubled")
    assert Stack()._repr_html_() == "<p>no wrappers</p>"


def test_attach_must_report() -> None:
    @dataclass(frozen=True, kw_only=True, repr=False)
    class Silent(Wrapper):
        name: ClassVar[str] = "with_toy_silent"
        phase: ClassVar[Phase] = Phase.COMPUTE

        def attach(self, model, journal):
            journal.set(model, "", "settings", "changed")

    model = Toy()
    with pytest.raises(TypeError, match=r"with_toy_silent\(\): attach returned a NoneType, not a Report"):
        Silent()(model)
    assert model.settings == "plain"


def test_a_host_that_fails_leaves_nothing() -> None:
    class Stubborn:
        def why_not(self, model):
            return None

        def own_config(self, model, journal):
            journal.set(model, "", "settings", "half")
            raise RuntimeError("no")

        def release(self, model, journal): ...

        def tell_new(self, parameters, model, journal): ...

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Hosted(Greedy):
        name: ClassVar[str] = "with_toy_hosted"
        host: ClassVar[object] = Stubborn()

    model = Toy()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            Hosted()(model)
        assert model.settings == "plain"
        assert not stack_of(model)


def test_what_a_later_wrapper_sets_over_an_earlier_change_leaves_that_standing() -> None:
    @dataclass(frozen=True, kw_only=True, repr=False)
    class Over(Named):
        name: ClassVar[str] = "with_toy_over"
        phase: ClassVar[Phase] = Phase.OBSERVE

        def attach(self, model, journal):
            journal.set(model, "", "settings", model.settings + "+over")
            return Report(("settings",))

    model = Over()(Doubled()(Toy()))
    assert model.settings == "plain+doubled+over"
    assert "changed by you since" not in str(explain(model))
    hooks = list(model.inner._forward_pre_hooks)
    Doubled()(model)
    assert list(model.inner._forward_pre_hooks) == hooks, "what stood was attached anew"
    # What the user sets over both is told of the last.
    model.settings = "mine"
    assert ["changed by you since" in " ".join(row.changed) for row in explain(model).rows] == [False, True]
    assert undo(model).settings == "mine"


def test_hosts_are_released_in_the_reverse_order() -> None:
    class First:
        label = "first"

        def why_not(self, model):
            return None

        def own_config(self, model, journal):
            journal.set(model, "", "settings", f"{model.settings}, {self.label}")

        def release(self, model, journal):
            journal.undo(model)

        def tell_new(self, parameters, model, journal): ...

    class Second(First):
        label = "second"

    @dataclass(frozen=True, kw_only=True, repr=False)
    class OnFirst(Picky):
        name: ClassVar[str] = "with_toy_on_first"
        host: ClassVar[object] = First()

    @dataclass(frozen=True, kw_only=True, repr=False)
    class OnSecond(Picky):
        name: ClassVar[str] = "with_toy_on_second"
        host: ClassVar[object] = Second()

    model = compose(OnFirst(), OnSecond())(Toy())
    assert model.settings == "plain, first, second"
    assert undo(model).settings == "plain"


def test_modules_around_a_wrapped_model_are_looked_into() -> None:
    model = Doubled()(Toy())
    around = nn.Sequential(model)
    compiled = torch.compile(model, backend="eager")
    assert stack_of(around) == stack_of(compiled) == stack_of(model)
    assert str(explain(around)) == str(explain(model))
    # What is on a model already can be asked for again, compiled or not.
    assert Doubled()(model) is model
    model.compile(backend="eager")
    assert Doubled()(model) is model
    with pytest.raises(CompatibilityError, match=r"\.0 inside this model is wrapped already"):
        Named()(around)
    undo(around)
    assert not stack_of(model)
    for wrong in (None, "model"):
        with pytest.raises(TypeError, match="expected a model"):
            explain(wrong)


def test_hooks_do_not_collide_after_unpickling() -> None:
    data = pickle.dumps(Doubled()(Toy()))
    # A fresh process counts hooks from zero.
    before, RemovableHandle.next_id = RemovableHandle.next_id, 0
    try:
        model = pickle.loads(data)
        model.inner.register_forward_pre_hook(double, with_kwargs=True)
        assert len(model.inner._forward_pre_hooks) == 2
        undo(model)
        assert len(model.inner._forward_pre_hooks) == 1
    finally:
        RemovableHandle.next_id = max(before, RemovableHandle.next_id)


def test_compiled_models_are_refused() -> None:
    in_place = Toy()
    in_place.compile(backend="eager")
    for compiled in (torch.compile(Toy(), backend="eager"), in_place):
        with pytest.raises(CompatibilityError, match="already"):
            Named()(compiled)


def test_explain() -> None:
    model = Toy()
    assert str(explain(model)) == "Toy: no wrappers"
    compose(Doubled(), Named())(model)
    explanation = explain(model)
    assert [row.wrapper for row in explanation.rows] == ["with_toy_named()", "with_toy_doubled()"]
    assert explanation.rows[1].backend == "best"
    text, page = str(explanation), explanation._repr_html_()
    for word in ("with_toy_doubled()", "doubles its input", "best", "other: slower"):
        assert word in text
        assert word in page
    assert "<table>" in page


@dataclass(frozen=True)
class Option:
    name: str
    reason: str | None = None
    only_named: bool = False

    def why_not(self, request: object) -> str | None:
        return self.reason


def test_choosing_a_backend() -> None:
    broken, good, late, plain = (
        Option("broken", "no driver"),
        Option("good"),
        Option("late"),
        Option("plain", None, True),
    )
    choice = choose((broken, good, late, plain), None, "auto", "attention")
    assert choice.backend == "good"
    assert dict(choice.rejected) == {
        "broken": "no driver",
        "late": "'good' comes first",
        "plain": "only used when named",
    }
    assert choose((broken, good, plain), None, "plain", "attention").backend == "plain"
    with pytest.raises(BackendError, match="^backend 'broken' cannot serve here: no driver"):
        choose((broken, good), None, "broken", "attention")
    with pytest.raises(BackendError, match="there is no backend 'fast'. Use one of 'auto', 'broken', 'good'"):
        choose((broken, good), None, "fast", "attention")
    with pytest.raises(BackendError, match="no backend can serve here"):
        choose((broken, plain), None, "auto", "attention")
