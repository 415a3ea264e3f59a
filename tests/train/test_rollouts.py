"""TRL's trainers sample by the batcher on the model that they train: same curves, same log-probabilities, no copy."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from gptoss_opt import (
    Rollouts,
    adapters_off,
    with_chunked_loss,
    with_flash_attention,
    with_mxfp4_experts,
)
from tests.finetune.chats import TEMPLATE, user
from tests.helpers import group_of_one, ids, relative, tiny_model
from tests.train.twins import adapted, assert_only_adapters_changed, plain, values, without_adapters

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")

from tests.train.rollouts import GROUP, NEW, PROMPTS, STEPS, curves, grpo, online_dpo, with_same_numbers  # noqa: E402

pytestmark = [
    # peft and TRL ask transformers by names that it deprecates.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]


def stacked(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Adapters on packed experts, flash attention and chunked loss."""
    return with_chunked_loss(with_mxfp4_experts(with_flash_attention(adapted(plain(dtype, **changes)))))


def gentle() -> Any:
    """A float32 model whose weights are still five times as large as those of a released one's beginning.

    The usual tiny one, ten times as large, is a rough one: both the loss and the batcher are 8e-6 off in float32.
    """
    return stacked(torch.float32, initializer_range=0.1)


def same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> bool:
    assert found.keys() == expected.keys()
    assert all(len(found[name]) == len(expected[name]) == STEPS for name in expected)
    return all(found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9) for name in expected)


# Draws depend on torch's random numbers and on the logits. With the same numbers, and in float64, the tokens are the
# same: no logit is as near to a tie as rounding. So whole curves can be compared, and not only their means.


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, list[float]]]:
    """Plain transformers with the same adapters, after training; and its curves."""
    twin = with_same_numbers(adapted())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = curves(grpo(twin, tmp_path_factory.mktemp("twin")), "grpo")
    assert expected["reward"][-1] > expected["reward"][0]
    return twin, expected


@pytest.mark.parametrize("how", ["rollout_func", "rollout_func, pages kept", "generating"])
def test_grpo_learns_as_with_transformers_generate(tmp_path: Path, how: str, of_transformers: Any) -> None:
    twin, expected = of_transformers
    model, rollouts = stacked(), Rollouts(keep_pages=how.endswith("kept"))
    before = values(model)
    if how == "generating":
        with rollouts.generating(model):
            found = curves(grpo(model, tmp_path), "grpo")
        assert "generate" not in vars(model)
    else:
        found = curves(grpo(model, tmp_path, rollouts=rollouts), "grpo")
    assert same(found, expected)
    assert_only_adapters_changed(model, before)
    adapters = {name: value for name, value in values(twin).items() if "lora_" in name}
    assert max(relative(model.get_parameter(name), value) for name, value in adapters.items()) < 1e-6
    # All completions of a group share the pages of their prompt.
    assert rollouts.stats is not None
    assert rollouts.stats.prefix_tokens >= 16 * 2 * (GROUP - 1)


def test_other_random_numbers_give_another_curve(tmp_path: Path, of_transformers: Any) -> None:
    found = curves(grpo(stacked(), tmp_path, rollouts=Rollouts(), seed=1), "grpo")
    assert not same(found, of_transformers[1])


def test_online_dpo_learns_as_with_transformers_generate(tmp_path: Path) -> None:
    twin = with_same_numbers(adapted())
    expected = curves(online_dpo(twin, without_adapters(twin), tmp_path), "online dpo")
    model, rollouts = stacked(), Rollouts()
    before = values(model)
    trainer = online_dpo(model, without_adapters(model), tmp_path)
    with rollouts.generating(model):
        assert same(curves(trainer, "online dpo"), expected)
    assert_only_adapters_changed(model, before)
    assert rollouts.stats is not None
    assert rollouts.stats.finished == 4
    # Negative control: other random numbers.
    model = stacked()
    trainer = online_dpo(model, without_adapters(model), tmp_path, seed=1)
    with rollouts.generating(model):
        assert not same(curves(trainer, "online dpo"), expected)


class Watched(trl.GRPOTrainer):
    """Notes in each step how far the log-probabilities of the rollout are from those that the loss finds."""

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        assert all(module.training for module in model.modules())
        both = ((inputs[f"prompt_{name}"], inputs[f"completion_{name}"]) for name in ("ids", "mask"))
        given = [torch.cat(pair, dim=1) for pair in both]
        with torch.no_grad():
            found = self._get_per_token_logps_and_entropies(model, *given, inputs["completion_ids"].shape[1])[0]
            with adapters_off(model):
                base = self._get_per_token_logps_and_entropies(model, *given, inputs["completion_ids"].shape[1])[0]
        mask, rolled = inputs["completion_mask"], inputs["sampling_per_token_logps"]
        drift, off = (((one - rolled) * mask).abs().max().item() for one in (found, base))
        self.drifts = [*getattr(self, "drifts", []), drift]
        self.off = [*getattr(self, "off", []), off]
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_loss(tmp_path: Path, temperature: float) -> None:
    trainer = grpo(gentle(), tmp_path, Watched, Rollouts(), temperature=temperature)
    trainer.train()
    assert len(trainer.drifts) == STEPS
    # In every step, as the rollout takes the adapters that the last step left.
    assert max(trainer.drifts) < 1e-5
    # Negative control: other adapters give others.
    assert min(trainer.off) > 1e-2


def test_old_adapters_would_drift(tmp_path: Path) -> None:
    """Two steps on each rollout: in the second, the adapters are not those of the rollout any more."""
    trainer = grpo(gentle(), tmp_path, Watched, Rollouts(), num_iterations=2)
    trainer.train()
    first, second = trainer.drifts[::2], trainer.drifts[1::2]
    assert max(first) < 1e-5
    assert min(second) > 1e-3


def pages() -> int:
    """How many tensors there are that hold pages of 11 tokens."""
    gc.collect()
    shapes = [one.shape for one in gc.get_objects() if type(one) is Tensor and one.dim() == 4]
    return sum(shape[1:] == (2, 11, 16) for shape in shapes)


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_rollout_leaves(tmp_path: Path, keep: bool) -> None:
    model, rollouts = stacked(torch.float32), Rollouts(keep_pages=keep, page_size=11)
    trainer = grpo(model, tmp_path, rollouts=rollouts)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model(ids(), labels=ids()).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    addresses = [p.data_ptr() for p in model.parameters()]
    prompts = [one for one in PROMPTS[:2] for _ in range(GROUP)]
    out = rollouts(prompts, trainer)
    assert [module.training for module in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(torch.equal(model.get_parameter(name).grad, one) for name, one in gradients.items())
    assert out.keys() == {"prompt_ids", "completion_ids", "logprobs"}
    assert [*map(len, out["logprobs"])] == [*map(len, out["completion_ids"])]
    assert len(out["prompt_ids"]) == len(prompts)
    # Two layers slide and share pages with one that does not: keys and values of two. Of eight sequences of up to 33
    # tokens, three pages each in the full layer, and two behind the window in the others; and the page of nobody.
    assert pages() == (4 if keep else 0)
    assert rollouts.kv_bytes == (8 * (3 + 2) * 2 * 2 * (2 * 11 * 16 * 4) if keep else 0)
    # What is kept serves what needs no more room, and else makes way.
    held = rollouts._batcher
    rollouts(prompts[:4], trainer)
    assert rollouts._batcher is held
    rollouts([prompts[0] * 2], trainer)
    assert rollouts._batcher is not held or not keep
    rollouts.close()
    assert (pages(), rollouts.kv_bytes) == (0, 0)


def test_a_bfloat16_model_trains_under_autocast(tmp_path: Path) -> None:
    """As TRL trains by default. What differs is rounding, and far less than other adapters do."""
    model = with_mxfp4_experts(with_flash_attention(adapted(plain(torch.bfloat16, initializer_range=0.02))))
    trainer = grpo(model, tmp_path, Watched, Rollouts(), bf16=True)
    trainer.train()
    assert max(trainer.drifts) < 0.05 < 10 * max(trainer.drifts) < max(trainer.off)


def test_conversations_are_tokenized_as_the_trainer_does(tmp_path: Path) -> None:
    chats = [[user(one)] for one in PROMPTS]
    trainer = grpo(stacked(), tmp_path, rollouts=Rollouts(), prompts=chats, template=TEMPLATE)
    found = trainer.rollout_func(chats, trainer)["prompt_ids"]
    assert found == trainer._tokenize_prompts(chats)[0]
    assert found != trainer.processing_class(text=PROMPTS)["input_ids"]
    trainer.train()


def test_greedy_tokens_are_those_of_generate() -> None:
    model = stacked()
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :5], mask[2, :17] = 0, 0
    rows = ids(3).masked_fill(mask == 0, 0)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    # Rows end at different places.
    ends = model.generate(rows, **options)[0, -4].item()
    expected = model.generate(rows, **options, eos_token_id=ends)
    rollouts = Rollouts()
    with rollouts.generating(model):
        assert torch.equal(model.generate(rows, **options, eos_token_id=ends), expected)
        assert torch.equal(model.generate(input_ids=rows, **options, eos_token_id=ends), expected)
        several = model.generate(rows, num_return_sequences=2, max_new_tokens=NEW, temperature=1.0)
        assert several.shape == (6, 21 + NEW)
        assert torch.equal(several[::2, :21], rows)
        with pytest.raises(ValueError, match="no field 'logits_processor'"):
            model.generate(rows, logits_processor=[])
        with pytest.raises(ValueError, match=r"generate takes input_ids \[B, T\]"):
            model.generate([[1, 2]])
        # After an error it goes on.
        assert torch.equal(model.generate(rows, **options, eos_token_id=ends), expected)
    assert torch.equal(model.generate(rows, **options, eos_token_id=ends), expected)


def refused(model: Any, match: str, **trainer: Any) -> None:
    given = {
        "model": model,
        "accelerator": SimpleNamespace(unwrap_model=lambda one: one, mixed_precision="no"),
        **trainer,
    }
    given |= {"processing_class": lambda text: {"input_ids": [[1, 2, 3]]}, "generation_config": None, "temperature": 1}
    with pytest.raises(ValueError, match=match):
        Rollouts()(["abc"], SimpleNamespace(**given))


def test_what_is_refused() -> None:
    model = stacked(torch.float32)
    refused(model, "with use_vllm=True vLLM completes the prompts", use_vllm=True)
    refused(model, r"past rollout_func. Leave rollout_func out, and train inside `with rollouts\.gen", tools=[print])
    bf16 = SimpleNamespace(mixed_precision="bf16")
    refused(model, r"under bf16=True a float32 model .* Load the model with dtype=torch.bfloat16", accelerator=bf16)
    refused(tiny_model(), r"reads no pages.* Apply with_flash_attention\(model\) before it is trained")
    with group_of_one():
        refused(fully_shard(with_flash_attention(tiny_model())), "FSDP holds a part of each parameter.* Use DDP")
