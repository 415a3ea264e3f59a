"""with_chunked_loss inside a model: losses, gradients, logits, training loops, other libraries, refusals."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import GptOssForCausalLM, Trainer, TrainingArguments

from benchmarks.harness import peak_memory
from gptoss_opt import CompatibilityError, compose, explain, undo, with_chunked_loss, with_lora
from gptoss_opt.model import loss as glue
from tests.helpers import (
    assert_as_exact,
    gradients,
    group_of_one,
    ids,
    local,
    loss_and_gradients,
    relative,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CHUNKED = with_chunked_loss(chunk_tokens=7)

Run = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""What is done to a model: its loss and all gradients."""


def ignoring() -> Tensor:
    """Labels of which a third does not count."""
    labels = ids().clone()
    labels[:, ::3] = -100
    return labels


def padding() -> Tensor:
    mask = torch.ones_like(ids())
    mask[0, :9] = 0
    return mask


def with_arguments(**kwargs: Any) -> Run:
    return lambda model: loss_and_gradients(model, ids(), **kwargs)


plain = with_arguments()


def assert_same(run: Run, prepare: Callable[[Any], Any] = lambda model: model, **changes: Any) -> None:
    """`run` finds the same of a plain model as of a wrapped one, which is wrapped before it is prepared."""
    loss, expected = run(prepare(tiny_model(**changes).train()))
    found_loss, found = run(prepare(CHUNKED(tiny_model(**changes).train())))
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-5, name


ARGUMENTS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "ignored tokens": {"labels": ignoring()},
    "completions alone": {"labels": ids().index_fill(1, torch.arange(15), -100)},
    "another ignored label": {"labels": ids(), "ignore_index": int(ids()[0, 3]), "shift_labels": ids()},
    "num_items_in_batch": {"labels": ignoring(), "num_items_in_batch": 13},
    "num_items_in_batch as a tensor": {"labels": ignoring(), "num_items_in_batch": torch.tensor(13)},
    "num_items_in_batch of each device": {"labels": ignoring(), "num_items_in_batch": torch.tensor([13])},
    "shifted labels": {"labels": ignoring(), "shift_labels": ids(seed=3)},
    "left padding": {"labels": ignoring().masked_fill(padding() == 0, -100), "attention_mask": padding()},
    "the router's loss": {"labels": ignoring(), "output_router_logits": True},
    "the last tokens": {"logits_to_keep": 5, "shift_labels": ids()[:, -5:].contiguous()},
    "no label smoothing": {"label_smoothing": 0.0},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_losses_and_gradients(name: str) -> None:
    assert_same(with_arguments(**ARGUMENTS[name]))


def test_tied_embeddings() -> None:
    assert_same(plain, tie_word_embeddings=True)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 42, 1000, "auto"])
def test_chunks_of_any_size(chunk_tokens: int | str) -> None:
    loss, expected = plain(tiny_model())
    model = with_chunked_loss(tiny_model(), chunk_tokens=chunk_tokens)
    found_loss, found = plain(model)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) < 1e-5
    # Negative control: labels matter.
    assert relative(loss_and_gradients(model, ids(), labels=ids(seed=3))[0], loss) > 1e-3


def test_float64_is_kept_where_transformers_rounds() -> None:
    model = tiny_model(torch.float64)
    model.set_experts_implementation("eager")
    logits = model(ids()).logits
    exact = cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    exact.backward()
    expected = gradients(model)
    loss, found = plain(CHUNKED(model))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-14, atol=0)
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) < 1e-12


def test_bfloat16_is_as_exact_as_transformers() -> None:
    # Gradients of the head and of what it is given; what lies before is the same in both.
    low, names = tiny_model(torch.bfloat16), ("loss", "d_hidden", "d_head")
    low.set_experts_implementation("eager")  # the others know no float64
    hidden = low.model(ids()).last_hidden_state.detach()

    def run(model: Any, dtype: torch.dtype) -> list[Tensor]:
        x, model = hidden.to(dtype).requires_grad_(), model.to(dtype)
        model.model.norm.register_forward_hook(lambda *_: x)
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        return [loss.detach(), x.grad, model.lm_head.weight.grad]

    exact = run(CHUNKED(copy.deepcopy(low)).double(), torch.float64)
    assert_as_exact(names, run(CHUNKED(copy.deepcopy(low)), torch.bfloat16), run(low, torch.bfloat16), exact)


def under_autocast(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_autocast() -> None:
    loss, expected = under_autocast(tiny_model())
    found_loss, found = under_autocast(CHUNKED(tiny_model()))
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == torch.float32
        assert relative(found[name], gradient) < 5e-3, name


def accumulated(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    losses = [model(ids(seed=seed), labels=ids(seed=seed)).loss / 3 for seed in range(3)]
    for loss in losses:
        loss.backward()
    return torch.stack(losses).sum().detach(), gradients(model)


def several_times(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(ids(), labels=ids()).loss
    loss.backward(retain_graph=True)
    (-3 * loss).backward()
    return loss.detach(), gradients(model)


def checkpointed(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = checkpoint(lambda x: model(x, labels=x, use_cache=False).loss, ids(), use_reentrant=False)
    loss.backward()
    return loss.detach(), gradients(model)


def checkpointed_layers(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, recomputed
    return loss_and_gradients(model, ids(), use_cache=False)


def recomputed(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def saved_elsewhere(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autograd.graph.save_on_cpu():
        loss = model(ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), gradients(model)


def hooked(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    handle = model.lm_head.weight.register_hook(lambda gradient: 3 * gradient)
    found = plain(model)
    handle.remove()
    return found


@pytest.mark.parametrize(
    "run",
    [accumulated, several_times, checkpointed, checkpointed_layers, saved_elsewhere, hooked],
    ids=lambda f: f.__name__,
)
def test_ways_to_train(run: Run) -> None:
    assert_same(run)


@pytest.mark.parametrize("frozen", ["the head", "all but the head"])
def test_frozen(frozen: str) -> None:
    def freeze(model: Any) -> Any:
        (model.lm_head if frozen == "the head" else model.model).requires_grad_(False)
        return model

    assert_same(plain, freeze)


def test_all_frozen() -> None:
    model = CHUNKED(tiny_model().requires_grad_(False)).train()
    loss = model(ids(), labels=ids()).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, tiny_model()(ids(), labels=ids()).loss.detach())


def test_a_batch_in_which_no_label_counts() -> None:
    none = torch.full_like(ids(), -100)
    for model in (tiny_model(), CHUNKED(tiny_model())):
        loss, found = loss_and_gradients(model, ids(), labels=none)
        assert loss.isnan()
        assert not found["lm_head.weight"].any()
        loss, found = loss_and_gradients(model, ids(), labels=none, num_items_in_batch=5)
        assert loss == 0
        assert not any(gradient.any() for gradient in found.values())


# Logits


def test_logits_are_returned_where_they_are_asked_for() -> None:
    expected = tiny_model()(ids(), labels=ids())
    model = CHUNKED(tiny_model())
    for training in (True, False):
        for asked in (None, True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    out = model.train(training)(ids(), labels=ids(), return_logits=asked)
                torch.testing.assert_close(out.loss, expected.loss)
                if asked or (asked is None and not training):
                    assert torch.equal(out.logits, expected.logits)
                else:
                    assert out.logits is None
                    assert "logits" not in out
                assert type(out) is type(expected)


def test_tuples() -> None:
    model = CHUNKED(tiny_model())
    loss, logits, *others = model(ids(), labels=ids(), return_dict=False)
    assert torch.equal(logits, model(ids(), return_dict=False)[0])
    found = model.train()(ids(), labels=ids(), return_dict=False)
    assert torch.equal(found[0], loss)
    assert len(found) == 1 + len(others)


def test_without_labels_nothing_changes() -> None:
    model, expected = CHUNKED(tiny_model()).train(), tiny_model().train()
    for kwargs in ({}, {"return_logits": False}, {"logits_to_keep": 3}, {"num_items_in_batch": 5}):
        out = model(ids(), **kwargs)
        kwargs.pop("return_logits", None)
        assert torch.equal(out.logits, expected(ids(), **kwargs).logits)
        assert out.loss is None
    assert torch.equal(model.lm_head(input=torch.ones(1, 64)), expected.lm_head(torch.ones(1, 64)))
    logits = model(ids()).logits
    torch.testing.assert_close(
        model.loss_function(logits, ids(), 128, num_items_in_batch=7),
        expected.loss_function(logits, ids(), 128, num_items_in_batch=7),
    )


def test_logits_that_are_returned_pass_gradients_on() -> None:
    def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        # transformers' forward takes the argument too, and does not look at it.
        out = model(ids(), labels=ignoring(), return_logits=True)
        loss = out.loss + out.logits.square().mean()
        loss.backward()
        return loss.detach(), gradients(model)

    assert_same(run)


def test_whoever_calls_the_head_on_the_way_gets_logits() -> None:
    model, seen = CHUNKED(tiny_model()).train(), []

    def lens(module: Any, args: Any, out: Any) -> None:
        with torch.no_grad():
            seen.append(model.lm_head(model.model.norm(out if isinstance(out, Tensor) else out[0])))

    def again(module: Any, args: Any, out: Any) -> None:
        handle.remove()
        with torch.no_grad():
            seen.append(model(ids(seed=5)).logits)
            seen.append(model(ids(seed=6), labels=ids(seed=6)).loss)

    model.model.layers[2].register_forward_hook(lens)
    handle = model.model.layers[0].register_forward_hook(again)
    loss, found = plain(model)
    expected_loss, expected = plain(tiny_model())
    torch.testing.assert_close(loss, expected_loss)
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) < 1e-5
    # Those of the lens in each of three forwards, and what two of them gave.
    logits = (2, 21, 128)
    assert [tuple(one.shape) for one in seen] == [logits, logits, logits, (), logits]


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = CHUNKED(tiny_model())
    with pytest.raises(IndexError, match="label 128 is outside the vocabulary of 128"):
        model(ids(), labels=torch.full_like(ids(), 128))
    assert glue.ASKED not in {**model.lm_head.__dict__, **model.model.__dict__}
    assert torch.equal(model(ids()).logits, tiny_model()(ids()).logits)


def test_two_models_do_not_meet() -> None:
    one, other = CHUNKED(tiny_model()).train(), CHUNKED(tiny_model(seed=1)).train()
    expected = [tiny_model(seed=seed)(ids(), labels=ids()).loss for seed in (0, 1)]
    found: list[Tensor] = []
    one.model.layers[0].register_forward_hook(lambda *_: found.append(other(ids(), labels=ids()).loss))
    torch.testing.assert_close([one(ids(), labels=ids()).loss, *found], expected)


# Memory

WORDS, ROWS, LENGTH = 40_000, 16, 48


def trained_once(chunk_tokens: int | None) -> Callable[[], object]:
    shapes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    model = GptOssForCausalLM(tiny_config(**shapes, intermediate_size=16)).train()
    if chunk_tokens is not None:
        with_chunked_loss(model, chunk_tokens=chunk_tokens)
    tokens = ids(ROWS, LENGTH)
    model(tokens[:1], labels=tokens[:1]).loss.backward()  # what is allocated once, on first use
    return lambda: model(tokens, labels=tokens).loss.backward()


def test_the_logits_are_never_there() -> None:
    logits = ROWS * LENGTH * WORDS * 4
    assert peak_memory(trained_once, 32) < logits / 2
    # Negative control: transformers holds them more than once.
    assert peak_memory(trained_once, None) > 1.5 * logits


# Other libraries


def test_what_asks_a_forward_for_its_arguments() -> None:
    model = CHUNKED(tiny_model())
    assert inspect.signature(model.forward) == inspect.signature(tiny_model().forward)
    assert inspect.signature(model.lm_head.forward) == inspect.signature(tiny_model().lm_head.forward)


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **options})
    return get_peft_model(model, config)


OF_PEFT: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", OF_PEFT)
def test_what_peft_puts_in_place_of_the_head(name: str) -> None:
    _, expected = plain(adapted(tiny_model(), **OF_PEFT[name]))
    assert any("lm_head" in key for key in expected)
    model = tiny_model()
    before = adapted(model, **OF_PEFT[name])
    CHUNKED(model)
    found = plain(before)[1]
    assert found.keys() == expected.keys()
    assert max(relative(found[key], gradient) for key, gradient in expected.items()) < 1e-5
    after = adapted(model := CHUNKED(tiny_model()), **OF_PEFT[name])
    with pytest.raises(ValueError, match=r"has taken the place of the head .* Apply with_chunked_loss\(model\) once"):
        plain(after)
    CHUNKED(model)
    found = plain(after)[1]
    assert max(relative(found[key], gradient) for key, gradient in expected.items()) < 1e-5


def test_peft_beside_the_head() -> None:
    assert_same(plain, lambda model: adapted(model, target_modules=["q_proj"]))


def test_adapters_of_our_own_on_the_head() -> None:
    lora = with_lora(rank=2, targets=("q_proj", "lm_head"))

    def trained(*stack: Any) -> dict[str, Tensor]:
        model = compose(*stack)(tiny_model())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
        return plain(model)[1]

    expected, found = trained(lora), trained(CHUNKED, lora)
    assert {"lm_head.lora_A", "lm_head.lora_B"} < found.keys() == expected.keys()
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) < 1e-5


def sharded(model: Any, *also: str) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, *(model.get_submodule(path) for path in also)):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


DATA_PARALLEL: dict[str, Callable[[Any], Any]] = {
    "DDP": DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP2 with the head apart": lambda model: sharded(model, "lm_head"),
}


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_data_parallel(name: str) -> None:
    with group_of_one():
        assert_same(accumulated, DATA_PARALLEL[name])


def test_offloaded_weights() -> None:
    model = cpu_offload(CHUNKED(tiny_model()), execution_device="cpu")
    with torch.no_grad():
        out = model(ids(), labels=ids(), return_logits=False)
    torch.testing.assert_close(out.loss, tiny_model()(ids(), labels=ids()).loss.detach())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_but_for_the_loss() -> None:
    torch._dynamo.reset()
    sizes: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        sizes.append(len(graph.graph.nodes))
        return graph

    model = CHUNKED(tiny_model()).train()
    loss, expected = plain(model)
    found_loss, found = plain(torch.compile(model, backend=counting))
    torch.testing.assert_close(found_loss, loss)
    assert max(relative(found[f"_orig_mod.{name}"], gradient) for name, gradient in expected.items()) < 1e-5
    decoder = sizes[-1]
    sizes.clear()
    torch._dynamo.reset()
    whole = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        assert relative(whole(ids()).logits, model(ids()).logits) < 1e-6
    assert decoder > 0.8 * sizes[0], "the decoder is one graph"
    with pytest.raises(Exception, match="with_chunked_loss computes gradients in the forward, which torch.compile"):
        whole(ids(), labels=ids())


# transformers' Trainer


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    metrics = options.pop("compute_metrics", None)
    tokens = ids(batch=16, length=12)
    labels = tokens.clone()
    labels[::2, :5] = -100  # so that batches count different numbers of tokens
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=data,
        eval_dataset=data[:3],
        compute_metrics=metrics,
    )


def accuracy(found: Any) -> dict[str, float]:
    """How many labels are predicted, and how large the logits are."""
    right = found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]
    return {"right": float(right.mean()), "size": float((found.predictions**2).mean())}


def trained(model: Any, folder: Path, **options: Any) -> tuple[list[float], dict[str, float]]:
    """The losses of training, and what evaluation finds then."""
    ours = trainer(model, folder, **options)
    ours.train()
    losses = [row["loss"] for row in ours.state.log_history if "loss" in row]
    found = ours.evaluate()
    return losses, {
        key: value for key, value in found.items() if key.removeprefix("eval_") in ("loss", "right", "size")
    }


TRAINERS: dict[str, dict[str, Any]] = {
    "losses alone": {},
    "metrics": {"compute_metrics": accuracy},
    "label smoothing": {"label_smoothing_factor": 0.1, "compute_metrics": accuracy},
    "without accumulation": {"gradient_accumulation_steps": 1},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer(name: str, tmp_path: Path) -> None:
    expected_losses, expected = trained(tiny_model(), tmp_path, **TRAINERS[name])
    losses, found = trained(CHUNKED(tiny_model()), tmp_path, **TRAINERS[name])
    assert len(losses) == 4
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    assert found.keys() == expected.keys()
    assert ("eval_right" in found) == ("compute_metrics" in TRAINERS[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_trainer_in_bfloat16(tmp_path: Path) -> None:
    losses, found = trained(CHUNKED(tiny_model()), tmp_path, bf16=True, compute_metrics=accuracy)
    expected_losses, expected = trained(tiny_model(), tmp_path, bf16=True, compute_metrics=accuracy)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-2, atol=0)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_an_evaluation_may_ask_for_no_logits(tmp_path: Path) -> None:
    class Lean(Trainer):
        """Says so in every call."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    ours = trainer(CHUNKED(tiny_model()), tmp_path)
    ours.__class__ = Lean
    expected = trainer(tiny_model(), tmp_path).evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# Refusals


@pytest.mark.parametrize("chunk_tokens", [0, -3, 1.5, True, "many", None])
def test_chunks_that_are_none(chunk_tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk_tokens is .* Give a number of tokens, from 1 up, or 'auto'"):
        with_chunked_loss(chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 0.1), ("weight", torch.ones(128)), ("reduction", "none"), ("reduce", True)]
)
def test_other_losses(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: with_chunked_loss computes the plain cross entropy"):
        CHUNKED(tiny_model())(ids(), labels=ids(), **{name: value})


def test_labels_of_other_rows() -> None:
    with pytest.raises(ValueError, match="there are 42 labels for 6 rows of logits. Give one for each; with logits_to"):
        CHUNKED(tiny_model())(ids(), labels=ids(), logits_to_keep=3)


def no_loss(*args: Any, **kwargs: Any) -> int:
    return 0


def test_a_loss_of_ones_own() -> None:
    model = tiny_model()
    model.loss_function = no_loss
    with pytest.raises(CompatibilityError, match=r"model.loss_function is one of your own, which needs the logits"):
        CHUNKED(model)
    del model._loss_function
    CHUNKED(model).loss_function = no_loss
    with pytest.raises(ValueError, match="model.loss_function was set after with_chunked_loss, and needs the logits"):
        model(ids(), labels=ids())
    assert "changed by you since" in str(explain(model))
    undo(model)
    assert model(ids(), labels=ids()).loss == 0


def test_whoever_looks_at_the_logits() -> None:
    model = CHUNKED(tiny_model())
    handle = model.lm_head.register_forward_hook(no_hook)
    with pytest.raises(
        ValueError, match=r"the head has a forward hook, <function no_hook .*there are no logits for it"
    ):
        model(ids(), labels=ids())
    assert model(ids()).logits is not None
    handle.remove()
    assert model(ids(), labels=ids()).loss is not None


def no_hook(*args: Any) -> None:
    """See nothing."""


def test_a_weight_that_is_not_the_heads_own() -> None:
    class Elsewhere(nn.Module):
        """A head that reads a weight which it does not hold."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.held = [weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.held[0].T

    model = tiny_model()
    model.lm_head = Elsewhere(model.model.embed_tokens.weight)
    with pytest.raises(ValueError, match=r"the head computes with a tensor \[128, 64\] that takes gradients and is no"):
        CHUNKED(model)(ids(), labels=ids())
    with torch.no_grad():
        assert model(ids(), labels=ids()).loss > 0


def test_gradients_are_plain_tensors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found = plain(CHUNKED(tiny_model()))
    assert all(type(local(gradient)) is Tensor for gradient in found.values())
