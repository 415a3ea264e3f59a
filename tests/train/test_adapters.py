"""Adapters in files: what PEFT wrote is read, what is written PEFT reads, and what is damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForSequenceClassification

from gptoss_opt import (
    CheckpointError,
    CompatibilityError,
    compose,
    load,
    load_adapter,
    save_adapter,
    stack_of,
    undo,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from tests.helpers import GOLDEN, ids, relative, tiny_model
from tests.materialised import adapters, begun
from tests.wrappers.test_lora import step

# Of peft, which asks transformers in words that it is about to drop, and names its own patterns for parameters wrongly.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

PEFT = Path(__file__).parent.parent / "golden" / "peft"
FIXTURES = sorted(path.name for path in PEFT.iterdir() if path.is_dir())
AMBIGUOUS = "down_only_swapped"
SQUARE = ("swapped_square", "down_only_in_out", "down_only_swapped")
DENSE_AND_PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_of(name: str, packed: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(dtype) if name in SQUARE else tiny_model(dtype, intermediate_size=96)
    return with_mxfp4_experts(model) if packed else model


def read(name: str, model: Any, folder: Path | None = None) -> Any:
    layout = {"experts_layout": "swapped"} if name == AMBIGUOUS else {}
    return load_adapter(model, folder or PEFT / name, **layout)


# What PEFT wrote.


def test_there_are_fixtures() -> None:
    assert len(FIXTURES) == 7


@DENSE_AND_PACKED
@pytest.mark.parametrize("name", FIXTURES)
def test_what_peft_wrote(name: str, packed: bool) -> None:
    expected = load_file(PEFT / name / "expected.safetensors")
    model = base_of(name, packed)
    assert relative(model(expected["input_ids"]).logits, expected["base_logits"]) < 1e-5
    assert read(name, model) is model
    assert relative(model(expected["input_ids"]).logits, expected["logits"]) < 1e-5
    # Negative control: factors of experts whose rank runs the other way are others.
    with torch.no_grad():
        for key, parameter in adapters(model).items():
            if key.endswith("_proj_lora_A"):
                turned = parameter.flatten(0, 1).unflatten(0, parameter.shape[1::-1]).transpose(0, 1)
                parameter.copy_(turned.clone())
    assert relative(model(expected["input_ids"]).logits, expected["logits"]) > 1e-2


@pytest.mark.parametrize("name", FIXTURES)
def test_round_trip_of_what_peft_wrote(name: str, tmp_path: Path) -> None:
    expected = load_file(PEFT / name / "expected.safetensors")
    model = read(name, with_flash_attention(base_of(name)))
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(base_of(name), tmp_path / "ours")
    assert relative(again(expected["input_ids"]).logits, expected["logits"]) < 1e-5
    assert all(torch.equal(p, adapters(model)[key]) for key, p in adapters(again).items())
    theirs = PeftModel.from_pretrained(base_of(name), tmp_path / "ours").eval()
    assert relative(theirs(expected["input_ids"]).logits, expected["logits"]) < 1e-5


def test_a_layout_that_nothing_tells_is_asked_for() -> None:
    model = base_of(AMBIGUOUS)
    message = r"peft 0.19.0 wrote adapters of experts .* does not tell which. Say it: experts_layout='in_out' if"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, PEFT / AMBIGUOUS)
    assert not stack_of(model)
    expected = load_file(PEFT / AMBIGUOUS / "expected.safetensors")
    wrong = load_adapter(base_of(AMBIGUOUS), PEFT / AMBIGUOUS, experts_layout="in_out")(expected["input_ids"]).logits
    assert relative(wrong, expected["logits"]) > 0.1
    with pytest.raises(ValueError, match="experts_layout is 'out_in'. Use one of in_out, swapped"):
        load_adapter(model, PEFT / AMBIGUOUS, experts_layout="out_in")
    # Where shapes tell, what is said must be true.
    with pytest.raises(CheckpointError, match=r"mlp.experts.* is torch.float32 \[.*\], and should be"):
        load_adapter(base_of("in_out"), PEFT / "in_out", experts_layout="swapped")


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.2", None, "0.19.1.dev0@abc", "0.18.2.dev0"])
def test_what_the_version_of_peft_tells(version: str | None, tmp_path: Path) -> None:
    folder = shutil.copytree(PEFT / "down_only_in_out", tmp_path / "adapter")
    rewrite(folder, peft_version=version)
    if version is None or version.startswith("0.18"):
        expected = load_file(folder / "expected.safetensors")
        assert (
            relative(load_adapter(base_of(SQUARE[1]), folder)(expected["input_ids"]).logits, expected["logits"]) < 1e-5
        )
    else:
        with pytest.raises(CheckpointError, match="does not tell which"):
            load_adapter(base_of(SQUARE[1]), folder)


# What is written.

Options = dict[str, Any]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "lm_head", "gate_up_proj", "down_proj")
WRITTEN: dict[str, Options] = {
    "attention": {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "experts": {"targets": ("gate_up_proj", "down_proj")},
    "the first projection": {"targets": "gate_up_proj"},
    "the second projection": {"targets": "down_proj"},
    "both": {},
    "router": {"targets": "router"},
    "head": {"targets": ("lm_head",)},
    "all": {"targets": ALL},
    "layers": {"layers": (0, 2)},
    "a layer and the head": {"layers": 1, "targets": ("q_proj", "lm_head")},
    "a pattern": {"targets": r".*(layers\.0\..*q_proj|layers\.1\..*down_proj|layers\.2\..*router)"},
    "the first projection here, the second there": {"targets": r".*(0\..*gate_up_proj|1\..*down_proj|2\..*_proj)"},
    "rslora": {"rslora": True},
    "dropout": {"dropout": 0.2},
    "dropout of linear layers": {"dropout": 0.2, "targets": "q_proj"},
    "bfloat16": {"dtype": torch.bfloat16},
    "sinks": {"train": "sinks"},
    "norms": {"train": "norm"},
    "sinks and norms": {"train": ("sinks", "norm"), "targets": ALL},
    "biases": {"train": "bias", "targets": ALL},
    "biases of attention": {"train": ("q_proj.bias", "o_proj.bias"), "targets": ("q_proj",)},
    "the router itself": {"train": "router"},
    "the bias of an adapted router": {"train": "router.bias", "targets": "router"},
    "an adapted weight itself": {"train": "q_proj.weight", "targets": ("q_proj", "k_proj")},
    "embedding and head": {"train": ("embed_tokens", "lm_head")},
    "ranks": {
        "config": {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["experts.down_proj"],
            # Sorted by the alphabet, the others would count.
            "rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 3, "down_proj": 1},
            "alpha_pattern": {"o_proj": 7, r"layers\.0\.self_attn\..*": 3},
        }
    },
}


def moved(options: Options, packed: bool = False) -> Any:
    """A model all of whose trained parameters are elsewhere than they began."""
    if "config" not in options:
        options = {"rank": 3, "alpha": 4, **options}
    model = begun(with_lora(with_mxfp4_experts(tiny_model()) if packed else tiny_model(), **options), size=0.2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@DENSE_AND_PACKED
@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_peft_and_we_read_what_is_written(options: Options, packed: bool, tmp_path: Path) -> None:
    model = moved(options, packed)
    logits = model(ids()).logits
    assert relative(tiny_model()(ids()).logits, logits) > 1e-3
    save_adapter(model, tmp_path)
    ours = load_adapter(tiny_model(), tmp_path)
    assert relative(ours(ids()).logits, logits) < 1e-5
    assert {name for name, p in ours.named_parameters() if p.requires_grad} >= set(adapters(ours))
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.equal(ours.get_parameter(name), parameter), name
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert relative(theirs(ids()).logits, logits) < 1e-5
    # What peft writes of it in turn, but for parameters that it passes through alone, and the order of patterns.
    if not options.get("train") and "config" not in options:
        theirs.save_pretrained(tmp_path / "by peft")
        again = load_adapter(tiny_model(), tmp_path / "by peft", experts_layout="in_out")
        assert relative(again(ids()).logits, logits) < 1e-5


def by_transformers(model: Any, folder: Path) -> Tensor:
    """The logits of a plain model with the adapter that transformers' own `load_adapter` has read."""
    model.load_adapter(str(folder))
    return model.eval()(ids()).logits


@pytest.mark.parametrize("name", ["both", "all", "layers", "ranks", "the router itself"])
def test_transformers_own_load_adapter_reads_it(name: str, tmp_path: Path) -> None:
    model = moved(WRITTEN[name])
    save_adapter(model, tmp_path)
    # transformers 5.17 leaves whole modules out of what peft itself has saved, too.
    exact = load_file(PEFT / "options" / "expected.safetensors")["logits"]
    whole_modules = relative(by_transformers(base_of("options"), PEFT / "options"), exact) < 1e-5
    right = relative(by_transformers(tiny_model(), tmp_path), model(ids()).logits) < 1e-5
    assert right == (whole_modules or "train" not in WRITTEN[name])
    assert relative(tiny_model()(ids()).logits, model(ids()).logits) > 1e-3


def test_what_the_config_says(tmp_path: Path) -> None:
    save_adapter(with_lora(tiny_model(), rank=3, alpha=5, dropout=0.1, targets=("q_proj", "o_proj")), tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (3, 5, 0.1)
    assert said["target_modules"] == ["q_proj", "o_proj"]
    assert said["target_parameters"] is None
    assert said["task_type"] == "CAUSAL_LM"
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"q_proj", "o_proj"}
    loaded = load_adapter(tiny_model(), tmp_path)
    assert stack_of(loaded) == compose(with_lora(rank=3, alpha=5, dropout=0.1, targets=("q_proj", "o_proj")))
    # peft has no dropout for parameters of a module, and would refuse the file.
    save_adapter(with_lora(tiny_model(), dropout=0.1), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.0


def test_values_are_written_as_they_are_held(tmp_path: Path) -> None:
    save_adapter(moved({"dtype": torch.bfloat16, "train": "sinks"}), tmp_path)
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in load_file(tmp_path / WEIGHTS).items()}
    assert dtypes == {"weight": torch.bfloat16, "sinks": torch.float32}
    loaded = load_adapter(tiny_model(), tmp_path)  # whose adapters are in float32, as with_lora makes them
    assert all(p.dtype == torch.float32 for p in adapters(loaded).values())
    assert torch.equal(loaded.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_low_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "num_experts_per_tok": 4, "initializer_range": 0.05}
    model = begun(with_lora(tiny_model(**changes), rank=3))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(**changes), tmp_path).eval()
    assert relative(theirs(ids()).logits, model(ids()).logits) < 3e-2
    assert relative(tiny_model(**changes)(ids()).logits, model(ids()).logits) > 0.1
    again = load_adapter(tiny_model(**changes), tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_other_heads(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"kind": GptOssForSequenceClassification, "num_labels": 3}
    model = begun(with_lora(tiny_model(**kind), rank=2, train="score"))
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model(**kind), tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["score"]
    with pytest.raises(CompatibilityError, match="train='score' is part of no parameter's name"):
        load_adapter(tiny_model(), tmp_path)


def test_training_goes_on_from_a_file_as_peft_would(tmp_path: Path) -> None:
    """One adapter, trained for three steps here and by peft: the same values."""
    save_adapter(moved({}), tmp_path)
    ours = load_adapter(tiny_model(), tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    for seed in range(3):
        for model in (ours, theirs):
            model(input_ids=ids(seed=seed), labels=ids(seed=seed)).loss.backward()
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    assert relative(theirs(input_ids=ids()).logits, ours(ids()).logits) < 1e-4
    before = load_adapter(tiny_model(), tmp_path)(ids()).logits
    assert relative(before, ours(ids()).logits) > 1e-2


def test_reading_into_adapters_that_are_there(tmp_path: Path) -> None:
    model = moved({})
    save_adapter(model, tmp_path)
    other = with_lora(tiny_model(), rank=3, alpha=4)
    before = adapters(other)
    optimizer = torch.optim.AdamW(before.values())
    load_adapter(other, tmp_path)
    assert all(adapters(other)[name] is p for name, p in before.items()), "an optimizer would lose them"
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    assert optimizer.param_groups[0]["params"][0] is next(iter(adapters(other).values()))
    # The same by other names, and with another dropout, is the same.
    named = with_lora(tiny_model(), rank=3, alpha=4, dropout=0.5, targets=r".*\.(q|k|v|o|gate_up|down)_proj")
    assert torch.equal(load_adapter(named, tmp_path)(ids()).logits, model(ids()).logits)
    assert stack_of(named).wrappers[0].dropout == 0.5
    for options, said in (
        ({"rank": 2, "alpha": 4}, "one of rank 2, scaled by 2,.*one of rank 3, scaled by 1.33333"),
        ({"rank": 3, "alpha": 5}, "one of rank 3, scaled by 1.66667"),
        ({"rank": 3, "alpha": 4, "targets": ("q_proj",)}, "has no adapter by .*and one of rank 3"),
        ({"rank": 3, "alpha": 4, "targets": ALL}, "router has one of rank 3, .* and no adapter in the folder"),
    ):
        other = with_lora(tiny_model(), **options)
        values = {name: p.clone() for name, p in other.named_parameters()}
        with pytest.raises(ValueError, match=said):
            load_adapter(other, tmp_path)
        assert all(torch.equal(p, values[name]) for name, p in other.named_parameters())


def test_on_the_loaded_checkpoint(tmp_path: Path) -> None:
    model = with_lora(load(GOLDEN, with_mxfp4_experts(), dtype=torch.float32), rank=2)
    step(model, [ids(seed=3)])
    save_adapter(model, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(GOLDEN)
    again = load_adapter(load(GOLDEN, with_mxfp4_experts(), dtype=torch.float32), tmp_path)
    assert relative(again(ids()).logits, model(ids()).logits) < 1e-6


# What is damaged, or of another model.


def rewrite(folder: Path, **fields: Any) -> None:
    """Change fields of the config; None takes one out."""
    said = json.loads((folder / CONFIG).read_text())
    said.update(fields)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.1.mlp.experts"


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"there is no adapter_config.json. Give the folder of a peft adapter"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "there is no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
    "half a config": (lambda folder: (folder / CONFIG).write_text('{"r": 2'), "adapter_config.json"),
    "a config that is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "adapter_config.json"),
    "truncated": (truncated, "adapter_model.safetensors"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "adapter_model.safetensors"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"junk" * 99), "adapter_model.safetensors"),
    "a tensor less": (
        changed(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")),
        rf"there is no {Q}.lora_B.weight, which by its adapter_config.json should be there",
    ),
    "no experts": (
        changed(lambda tensors: [tensors.pop(key) for key in list(tensors) if "experts" in key]),
        r"there is no .*experts.*lora_[AB].weight, which by its",
    ),
    "a tensor more": (
        changed(lambda tensors: tensors.update({f"{Q}.lora_C.weight": torch.ones(2)})),
        rf"{Q}.lora_C.weight belongs to nothing that its adapter_config.json names",
    ),
    "two tensors more": (
        changed(lambda tensors: tensors.update({"x": torch.ones(2), "y": torch.ones(2)})),
        r"x \(and 1 more\) belongs to nothing",
    ),
    "DoRA": (
        changed(lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(128)})),
        "lora_magnitude_vector belongs to nothing",
    ),
    "a wrong shape": (
        changed(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 63)})),
        rf"{Q}.lora_A.weight.* is torch.float32 \[2, 63\], and should be floating point \[2, 64\]",
    ),
    "another rank of experts": (
        changed(lambda tensors: tensors.update({f"{DOWN}.lora_A.weight": torch.ones(12, 96)})),
        rf"{DOWN}.lora_A.weight.* is torch.float32 \[12, 96\], and should be",
    ),
    "integers": (
        changed(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 64, dtype=torch.int64)})),
        r"is torch.int64 \[2, 64\], and should be floating point",
    ),
    "another rank in the config": (
        lambda folder: rewrite(folder, r=3),
        r"is torch.float32 \[2, 64\], and should be floating point \[3, 64\]|and one of rank 3, scaled by 1.33333",
    ),
    "more targets in the config": (
        lambda folder: rewrite(folder, target_modules=["q_proj", "o_proj", "k_proj"]),
        "there is no .*k_proj.lora_A.weight, which by its|k_proj has no adapter by .* and one of rank 2",
    ),
    "fewer targets in the config": (
        lambda folder: rewrite(folder, target_modules=["q_proj"]),
        r"o_proj.lora_A.weight \(and 5 more\) belongs to nothing|o_proj has one of rank 2.* no adapter in the folder",
    ),
    "another kind of adapter": (lambda folder: rewrite(folder, peft_type="LOHA"), "config is one of LOHA"),
    "a field that is not served": (lambda folder: rewrite(folder, use_dora=True), "config.use_dora is True"),
    "a broken pattern": (lambda folder: rewrite(folder, target_modules="(q"), "is no regular expression"),
    "a layer too many": (
        lambda folder: rewrite(folder, layers_to_transform=[7]),
        r"lora_A.weight \(and 11 more\) belongs to nothing|q_proj has one of rank 2.* and no adapter in the folder",
    ),
}


def mixed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    a, b = (f"{DOWN}.lora_{factor}.weight" for factor in "AB")
    tensors[a], tensors[b] = torch.ones(8, 64), torch.ones(96, 8)
    save_file(tensors, folder / WEIGHTS)


DAMAGE["two layouts in one file"] = (mixed, rf"{DOWN}.lora_[AB].weight.* is torch.float32 .*, and should be")


@pytest.mark.parametrize("present", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_nothing_half_changed(
    damage: Callable[[Path], Any], message: str, present: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(PEFT / "in_out", folder)
    model = base_of("in_out")
    if present:
        load_adapter(model, folder)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    stack = stack_of(model)
    damage(folder)
    with pytest.raises((CheckpointError, CompatibilityError, ValueError), match=message):
        load_adapter(model, folder)
    assert stack_of(model) == stack
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad == before[name][2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"should be floating point \[\d+, \d+\]"),
        ({"intermediate_size": 96, "num_hidden_layers": 2}, r"layers.2.*\(and \d+ more\) belongs to nothing"),
        ({"intermediate_size": 96, "num_hidden_layers": 4}, r"there is no .*layers.3.* which by its"),
        ({"intermediate_size": 96, "num_local_experts": 8}, r"should be floating point \[16, 64\]"),
        ({"intermediate_size": 96, "hidden_size": 128}, r"should be floating point \[2, 128\]"),
    ],
)
def test_the_adapter_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model(**changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, PEFT / "in_out")
    assert not stack_of(model)


def test_values_of_what_is_packed_are_refused(tmp_path: Path) -> None:
    model = with_lora(tiny_model(), targets="q_proj", train="gate_up_proj")
    save_adapter(model, tmp_path)
    packed = with_mxfp4_experts(tiny_model())
    with pytest.raises(CheckpointError, match="it has values of .*gate_up_proj, which this model stores as 'mxfp4'"):
        load_adapter(packed, tmp_path)
    assert len(stack_of(packed)) == 1
    assert torch.equal(load_adapter(tiny_model(), tmp_path)(ids()).logits, model(ids()).logits)


def test_what_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match="there are no adapters on this GptOssForCausalLM"):
        save_adapter(tiny_model(), "nowhere")
    assert not Path("nowhere").exists()


def test_peft_on_a_wrapped_model_is_not_ours(tmp_path: Path) -> None:
    theirs = get_peft_model(with_flash_attention(tiny_model()), LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CompatibilityError, match="is adapted by a Linear already"):
        load_adapter(theirs, tmp_path)
    assert undo(load_adapter(tiny_model(), tmp_path))
