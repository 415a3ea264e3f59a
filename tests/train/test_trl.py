"""TRL's SFTTrainer and DPOTrainer on a model with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptoss_opt import adapters_off, stack_of, undo, with_flash_attention, with_lora, with_mxfp4_experts
from gptoss_opt.wrappers.lora import TARGETS
from tests.finetune.chats import MARKED, assistant, tokenizer, user
from tests.helpers import relative
from tests.train.twins import adapted, assert_only_adapters_changed, in_peft, plain, values, without_adapters

datasets = pytest.importorskip("datasets", reason="TRL needs Python 3.11")
trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")

# peft and TRL ask transformers by names that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def words(*lengths: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return ["".join("abcdefghij"[n] for n in torch.randint(10, (length,), generator=generator)) for length in lengths]


def rows(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict(columns)


TEXTS = words(5, 9, 14, 7, 12, 6, 11, 8)
STARTS, ENDS = [one[:3] for one in TEXTS], [one[3:] for one in TEXTS]
TEXT = rows(text=TEXTS)
COMPLETIONS = rows(prompt=STARTS, completion=ENDS)
CHATS = rows(messages=[[user(start), assistant(end)] for start, end in zip(STARTS, ENDS, strict=True)])
PAIRS = rows(prompt=STARTS, chosen=ENDS, rejected=words(*[6] * 8, seed=1))

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "per_device_train_batch_size": 8,
    "max_steps": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 80,
    "router_aux_loss_coef": 0.0,
}


def sft(model: Any, folder: Path, data: Any = TEXT, template: str | None = None, **options: Any) -> Any:
    arguments = trl.SFTConfig(output_dir=str(folder), **{**SETTINGS, **options})
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer(template))


def dpo(model: Any, folder: Path, reference: Any = None, **options: Any) -> Any:
    arguments = trl.DPOConfig(output_dir=str(folder), **{**SETTINGS, **options})
    given = {"train_dataset": PAIRS, "processing_class": tokenizer(None)}
    return trl.DPOTrainer(model=model, ref_model=reference, args=arguments, **given)


def curve(one: Any, key: str = "loss") -> list[float]:
    return [float(row[key]) for row in one.state.log_history if key in row]


def learned(one: Any) -> list[float]:
    one.train()
    return curve(one)


def close(found: list[float], expected: list[float]) -> bool:
    assert len(found) == len(expected) == SETTINGS["max_steps"]
    return all(abs(a / b - 1) < 1e-6 for a, b in zip(found, expected, strict=True))


# SFT


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (TEXT, {}),
        (TEXT, {"gradient_checkpointing": False, "router_aux_loss_coef": 0.5}),
        (COMPLETIONS, {}),
        (CHATS, {"template": MARKED, "assistant_only_loss": True}),
    ],
    ids=["text", "text and the router's loss", "completions", "assistant"],
)
def test_sft_learns_as_with_peft(tmp_path: Path, data: Any, options: dict[str, Any]) -> None:
    model = adapted()
    twin = in_peft(model, tmp_path / "adapter")
    before = values(model)
    found, expected = (learned(sft(one, tmp_path, data, **options)) for one in (model, twin))
    assert close(found, expected)
    assert found[-1] < 0.8 * found[0]
    assert_only_adapters_changed(model, before)
    # Negative control: adapters that count a little more.
    assert not close(learned(sft(adapted(alpha=16.1), tmp_path, data, **options)), expected)


def test_sft_learns_completions_alone(tmp_path: Path) -> None:
    one = sft(adapted(), tmp_path, COMPLETIONS)
    (batch,) = one.get_train_dataloader()
    assert ((batch["labels"] == -100).sum(-1) == 3 + (batch["attention_mask"] == 0).sum(-1)).all()
    model = adapted()
    for step in (batch, {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}):
        with torch.no_grad():
            loss = model(**step).loss.item()
        completions = step is batch
        assert curve_of_one_step(tmp_path, completion_only_loss=completions) == pytest.approx(loss, rel=1e-6)


def curve_of_one_step(folder: Path, **options: Any) -> float:
    (loss,) = learned(sft(adapted(), folder, COMPLETIONS, max_steps=1, **options))
    return loss


STACKS: dict[str, Callable[[Any], Any]] = {
    "dense": with_flash_attention,
    "packed": lambda model: with_mxfp4_experts(with_flash_attention(model)),
}


@pytest.mark.parametrize("stack", STACKS)
def test_packed_documents_are_learnt_as_padded_ones(tmp_path: Path, stack: str) -> None:
    def run(model: Any, packed: bool) -> list[float]:
        one = sft(model, tmp_path, packing=packed, per_device_train_batch_size=1 if packed else 8)
        (batch,) = one.get_train_dataloader()
        assert len(batch["input_ids"]) == (1 if packed else 8)
        return learned(one)

    model = STACKS[stack](adapted())
    before = values(model)
    expected = run(STACKS[stack](adapted()), packed=False)
    assert close(run(model, packed=True), expected)
    assert expected[-1] < 0.8 * expected[0]
    assert_only_adapters_changed(model, before)
    # Negative control: transformers' own attention sees one document from the next.
    assert close(run(adapted(), packed=False), expected)
    assert not close(run(adapted(), packed=True), expected)


def test_sft_resumes_to_the_same_curve_and_bits(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole, resumed = (sft(adapted(), tmp_path / name, **saving) for name in ("whole", "resumed"))
    expected = learned(whole)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert curve(resumed) == expected
    found, wanted = values(resumed.model), values(whole.model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_on_the_head_are_refused(tmp_path: Path) -> None:
    said = "TRL computes the loss with the weight of lm_head, past its adapter, .* Leave lm_head out"
    for one in (sft(adapted(targets=("q_proj", "lm_head")), tmp_path), dpo_with_own_base(tmp_path, "lm_head")):
        with pytest.raises(ValueError, match=said):
            one.train()


def dpo_with_own_base(folder: Path, *targets: str) -> Any:
    return dpo(adapted(targets=targets), folder, plain())


# DPO


def fresh() -> Any:
    """A model with adapters that do nothing yet."""
    return with_lora(plain(), rank=4, targets=(*TARGETS, "router"), dtype=torch.float64)


@pytest.mark.parametrize("stack", ["plain", *STACKS])
def test_dpo_learns_as_with_peft(tmp_path: Path, stack: str) -> None:
    wrap = STACKS.get(stack, lambda model: model)
    expected = learned(dpo(in_peft(fresh(), tmp_path / "adapter"), tmp_path))
    assert expected[0] == pytest.approx(0.6931472, rel=1e-6)
    assert expected[-1] < 0.5 * expected[0]
    precomputed, sharing = wrap(fresh()), wrap(fresh())
    reference = without_adapters(sharing)
    theirs, ours = dict(reference.named_parameters()), dict(sharing.named_parameters())
    assert theirs.keys() == {name for name in ours if "lora_" not in name}
    assert all(theirs[name] is ours[name] for name in theirs)
    before = values(sharing)
    assert close(learned(dpo(precomputed, tmp_path, precompute_ref_log_probs=True)), expected)
    assert close(learned(dpo(sharing, tmp_path, reference)), expected)
    for model in (precomputed, sharing):
        assert_only_adapters_changed(model, before)


def test_the_reference_is_what_the_model_was_or_the_base(tmp_path: Path) -> None:
    # Of adapters that were trained before, what is precomputed is the model with them, as with peft.
    expected = learned(dpo(in_peft(adapted(), tmp_path / "adapter"), tmp_path))
    assert close(learned(dpo(adapted(), tmp_path, precompute_ref_log_probs=True)), expected)
    # A model that shares the parameters is the base.
    base = learned(dpo(adapted(), tmp_path, plain()))
    model = adapted()
    assert close(learned(dpo(model, tmp_path, without_adapters(model))), base)
    assert not close(base, expected)


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Those of the completions, by row."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:, None]
    return (logits.log_softmax(-1).gather(-1, tokens)[..., 0] * batch["completion_mask"][:, 1:]).sum(-1)


def dpo_loss(model: Any, batch: dict[str, Tensor], beta: float = 0.1) -> Tensor:
    """Rafailov et al. 2023, equation 7, with the model itself as its reference."""
    chosen, rejected = log_probabilities(model, batch).chunk(2)
    with adapters_off(model), torch.no_grad():
        reference_chosen, reference_rejected = log_probabilities(model, batch).chunk(2)
    return -functional.logsigmoid(beta * (chosen - reference_chosen - rejected + reference_rejected)).mean()


@pytest.mark.parametrize("stack", ["plain", *STACKS])
def test_a_loss_of_ones_own_with_adapters_off_is_that_of_trl(tmp_path: Path, stack: str) -> None:
    wrap = STACKS.get(stack, lambda model: model)
    one = dpo(adapted(), tmp_path, plain())
    (batch,) = one.get_train_dataloader()
    one.compute_loss(one.model, batch).backward()
    expected = {name: value.grad for name, value in one.model.named_parameters() if "lora_" in name}
    model = wrap(adapted()).train()
    loss = dpo_loss(model, batch)
    loss.backward()
    # TRL takes the softmax of these logits in float32.
    torch.testing.assert_close(loss.float(), one.compute_loss(one.model, batch), rtol=1e-6, atol=0)
    assert max(relative(model.get_parameter(name).grad, gradient) for name, gradient in expected.items()) < 1e-5
    # The reference is the base, and bit for bit on the same computation.
    with adapters_off(model):
        reference = log_probabilities(model, batch)
    base = wrap(fresh())
    assert torch.equal(reference, log_probabilities(undo(base, with_lora), batch))
    torch.testing.assert_close(reference, log_probabilities(plain(), batch), rtol=1e-9, atol=0)
    assert len(stack_of(model)) == len(stack_of(base)) + 1
    # Negative control: with its adapters on, the model is elsewhere.
    assert (log_probabilities(model, batch) - reference).abs().min() > 1e-2
