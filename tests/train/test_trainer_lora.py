"""transformers' Trainer with the arguments of its documentation, on a model with adapters."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from gptoss_opt import CheckpointError, load_adapter, undo, with_flash_attention, with_mxfp4_experts
from gptoss_opt.model import trainer as teaching
from gptoss_opt.model.on_import import OnImport
from tests.helpers import ids, relative, tiny_model
from tests.train.twins import adapted, assert_only_adapters_changed, in_peft, plain, values

# peft asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NEW = Version(version("transformers")) >= Version("5.23")
CHECKPOINTING = "activation_checkpointing" if NEW else "gradient_checkpointing"
"""What transformers calls it."""


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = [{"input_ids": row, "labels": row} for row in ids(batch=8, length=12)]
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])


def curve(one: Trainer, key: str = "loss") -> list[float]:
    return [row[key] for row in one.state.log_history if key in row]


def learned(model: Any, folder: Path, **options: Any) -> list[float]:
    one = trainer(model, folder, **options)
    one.train()
    return curve(one)


SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {CHECKPOINTING: True},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    ],
    ids=["as it is", "accumulation", "checkpoints", "reentrant checkpoints"],
)
def test_it_learns_as_with_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(with_flash_attention(plain()))
    twin = in_peft(model, tmp_path / "adapter")
    before = values(model)
    found, expected = learned(model, tmp_path, **options), learned(twin, tmp_path, **options)
    assert len(expected) == 6
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_only_adapters_changed(model, before)
    # Negative control: adapters that count twice learn otherwise.
    other = learned(adapted(alpha=32), tmp_path, **options)
    assert max(abs(a / b - 1) for a, b in zip(other, expected, strict=True)) > 1e-2


def test_under_autocast_it_learns_as_exactly_as_with_peft(tmp_path: Path) -> None:
    model = adapted(with_flash_attention(plain(torch.float32)))
    twin = in_peft(model, tmp_path / "adapter", plain(torch.float32))
    exact = learned(adapted(), tmp_path)
    found, expected = learned(model, tmp_path, bf16=True), learned(twin, tmp_path, bf16=True)

    def error(losses: list[float]) -> float:
        return max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True))

    assert found[-1] < 0.9 * found[0]
    assert 0 < error(found) < 2 * error(expected)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").dtype == torch.float32
    # Negative control: adapters that count five times as much learn otherwise.
    assert error(learned(adapted(alpha=80), tmp_path)) > 2 * error(expected)


def test_it_evaluates_as_with_peft(tmp_path: Path) -> None:
    model = adapted()
    twin = in_peft(model, tmp_path / "adapter")
    found, expected = (trainer(one, tmp_path, eval_strategy="steps", eval_steps=3) for one in (model, twin))
    for one in (found, expected):
        one.train()
    losses = curve(expected, "eval_loss")
    assert len(losses) == 2
    torch.testing.assert_close(curve(found, "eval_loss"), losses, rtol=1e-6, atol=0)
    # In evaluation mode too, what is loaded counts.
    undo(model, discard=True)
    assert abs(found.evaluate()["eval_loss"] / losses[-1] - 1) > 1e-2


# Checkpoints


def test_a_checkpoint_is_an_adapter_that_peft_reads(tmp_path: Path) -> None:
    model = adapted()
    learned(model, tmp_path, **SAVING)
    files = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"}
    assert not any(name.startswith("model") or name == "config.json" for name in files)
    twin = PeftModel.from_pretrained(plain(), tmp_path / "checkpoint-6").eval()
    assert relative(twin(ids()).logits, model.eval()(ids()).logits) < 1e-6


COPIES: dict[str, Callable[[Any], Any]] = {
    "a new model": lambda model: model,
    "a copy": copy.deepcopy,
    "unpickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_it_resumes_to_the_same_curve_and_bits(tmp_path: Path, how: str) -> None:
    whole = trainer(adapted(), tmp_path, **SAVING)
    whole.train()
    fresh = COPIES[how](adapted())
    parameters = dict(fresh.named_parameters())
    resumed = trainer(fresh, tmp_path / "again", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(resumed) == curve(whole)
    assert all(parameters[name] is parameter for name, parameter in fresh.named_parameters())
    found, expected = values(fresh), values(whole.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_on_packed_experts_it_resumes_too(tmp_path: Path) -> None:
    def packed() -> Any:
        return with_mxfp4_experts(with_flash_attention(adapted(tiny_model())))

    whole = trainer(packed(), tmp_path, **SAVING)
    before = values(whole.model)
    whole.train()
    assert_only_adapters_changed(whole.model, before)
    resumed = trainer(packed(), tmp_path / "again", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(resumed) == curve(whole)
    found, expected = values(resumed.model), values(whole.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Negative control: a training that does not resume is elsewhere in its second half.
    assert learned(packed(), tmp_path / "more", seed=1)[3:] != curve(whole)[3:]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    # The largest loss counts as the best, which is that of the first checkpoint.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    one = trainer(adapted(), tmp_path, eval_strategy="steps", eval_steps=3, **best, **SAVING)
    one.train()
    losses = curve(one, "eval_loss")
    assert losses[1] < 0.99 * losses[0]
    assert one.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert one.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-9)
    there = load_adapter(adapted(), tmp_path / "checkpoint-3")
    assert all(torch.equal(found, values(one.model)[name]) for name, found in values(there).items())


def test_resuming_from_what_holds_no_such_adapter_is_an_error(tmp_path: Path) -> None:
    learned(plain(), tmp_path / "full", **SAVING)
    with pytest.raises(CheckpointError, match="there is no adapter_config.json. Give the folder of a peft adapter"):
        trainer(adapted(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-3"))
    learned(adapted(), tmp_path / "adapter", **SAVING)
    with pytest.raises(ValueError, match="has one of rank 2, scaled by 8, .* and one of rank 4, scaled by 4, in the"):
        trainer(adapted(rank=2), tmp_path).train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-3"))
    (tmp_path / "adapter" / "checkpoint-3" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no adapter_model.safetensors"):
        trainer(adapted(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-3"))


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_other_models_resume_as_ever(tmp_path: Path, kind: str) -> None:
    def make() -> Any:
        return plain() if kind == "plain" else in_peft(adapted(), tmp_path / "adapter")

    expected = learned(make(), tmp_path, **SAVING)
    resumed = trainer(make(), tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(resumed) == expected


A_TRAINER = """
class Trainer:
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None): ...
    def _load_best_model(self): ...
"""


@pytest.mark.parametrize("first", ["its import", "ours"])
def test_the_trainer_is_taught_whenever_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    name = f"a_trainer_after_{first.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(A_TRAINER)
    monkeypatch.syspath_prepend(tmp_path)
    others = [one for one in sys.meta_path if not isinstance(one, OnImport)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(teaching, "TRAINER", name)
    if first == "ours":
        teaching.teach_trainer(load_adapter)
        assert name not in sys.modules
    taught = importlib.import_module(name).Trainer
    if first != "ours":
        assert not hasattr(taught._load_best_model, "__wrapped__")
        teaching.teach_trainer(load_adapter)
    assert taught._load_best_model.__wrapped__ is not None
    assert taught._load_from_checkpoint.__wrapped__ is not None


IN_A_NEW_PROCESS = """
import sys, pickle
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
assert "transformers.trainer" not in sys.modules
from pathlib import Path
from tests.train.test_trainer_lora import SAVING, curve, trainer
one = trainer(model, Path(sys.argv[2], "again"), **SAVING)
one.train(resume_from_checkpoint=str(Path(sys.argv[2], "checkpoint-3")))
print(curve(one)[3:])
"""


def test_a_process_that_unpickles_a_model_resumes(tmp_path: Path) -> None:
    whole = learned(adapted(), tmp_path, **SAVING)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(adapted()))
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "model.pickle"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(whole[3:])
