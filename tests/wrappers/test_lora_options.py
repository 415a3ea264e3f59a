"""The options of `with_lora`, `peft.LoraConfig` in their place, and what is refused, by name and before anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gptoss_opt import (
    CompatibilityError,
    compose,
    explain,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_full_finetuning,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.extend import LayoutError
from gptoss_opt.model.peft_config import options_of
from tests.helpers import ids, relative, tiny_model
from tests.materialised import A, B, adapters, begun

# Of peft, which asks transformers in words that it is about to drop, and names its own patterns for parameters wrongly.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank of 0": ({"rank": 0}, "rank is 0. Give a whole number of at least 1"),
    "rank of a half": ({"rank": 2.5}, "rank is 2.5. Give a whole number"),
    "rank of True": ({"rank": True}, "rank is True"),
    "alpha of 0": ({"alpha": 0}, "alpha is 0. Give a number above 0"),
    "alpha of nan": ({"alpha": float("nan")}, "alpha is nan"),
    "alpha in words": ({"alpha": "16"}, "alpha is '16'"),
    "dropout of 1": ({"dropout": 1.0}, "dropout is 1.0. Give a probability from 0 up to, and without, 1"),
    "dropout below 0": ({"dropout": -0.1}, "dropout is -0.1"),
    "no targets": ({"targets": ()}, "targets is empty. Give names of weights, such as q_proj"),
    "empty targets": ({"targets": ""}, "targets is empty"),
    "targets of numbers": ({"targets": (1, 2)}, r"targets is \(1, 2\). Give names"),
    "a broken pattern": ({"targets": "(q_proj"}, r"'\(q_proj' is no regular expression: missing \)"),
    "train of numbers": ({"train": (1,)}, r"train is \(1,\). Give names, such as train=\('router',\)"),
    "no layers": ({"layers": ()}, r"layers is \(\). Give numbers of layers"),
    "layers in words": ({"layers": "0"}, r"layers is \('0',\). Give numbers of layers, such as layers=\(0, 1\)"),
    "half a layer": ({"layers": 1.5}, r"layers is \(1.5,\)"),
    "a dtype of integers": ({"dtype": torch.int8}, "dtype is 'int8'. Use one of torch.float32, torch.bfloat16"),
    "no dtype": ({"dtype": None}, "dtype is 'None'"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"with_lora: {message}"):
        with_lora(**options)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown target": (
        {"targets": ("q_proj", "w1")},
        "'w1' is the name of no weight .* Known are down_proj, gate_up",
    ),
    "a pattern of nothing": ({"targets": r".*\.w\d"}, r"'\.\*\\\\.w\\\\d' is the name of no weight"),
    "the embedding": ({"targets": "embed_tokens"}, "'embed_tokens' is the name of no weight"),
    "half a name": ({"targets": "proj"}, "'proj' is the name of no weight"),
    "a layer too many": ({"layers": (0, 3)}, "there is no layer 3. Give some of 0 to 2"),
    "a negative layer": ({"layers": -1}, "there is no layer -1"),
    "nothing in these layers": ({"layers": 0, "targets": "lm_.*"}, r"no weight in the layers \(0,\) is named by"),
    "nothing to train": ({"train": "gates"}, "train='gates' is part of no parameter's name"),
    "a rank for nothing": (
        {"config": {"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}},
        "the pattern 'k_proj' fits no weight that gets an adapter",
    ),
}


@pytest.mark.parametrize(("options", "message"), UNFIT.values(), ids=UNFIT)
def test_what_this_model_does_not_have_is_named(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(CompatibilityError, match=message):
        with_lora(model, **options)
    assert not stack_of(model)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_head_has_no_weight_of_its_own() -> None:
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(CompatibilityError, match="lm_head.weight is tied to another parameter"):
        with_lora(model, targets=("q_proj", "lm_head"))
    with pytest.raises(LayoutError, match="lm_head.weight is tied to another parameter"):
        compose(with_lora(targets="lm_head")).layout(model)
    assert relative(begun(with_lora(model))(ids()).logits, tiny_model(tie_word_embeddings=True)(ids()).logits) > 1e-3


def test_a_head_with_an_adapter_is_not_resized() -> None:
    model = with_lora(tiny_model(), targets="lm_head")
    with pytest.raises(ValueError, match="resize_token_embeddings: the head has an adapter of the size"):
        model.resize_token_embeddings(140)
    undo(model).resize_token_embeddings(140)
    assert with_lora(model, targets="lm_head").lm_head.lora_B.shape == (140, 8)
    other = with_lora(tiny_model())
    other.resize_token_embeddings(140)
    assert other(torch.tensor([[139]])).logits.shape[-1] == 140


def test_what_it_cannot_stand_beside() -> None:
    model = with_lora(tiny_model(), rank=4)
    with pytest.raises(
        CompatibilityError, match=r"the same wrapper twice with different options.*undo\(model, with_lora"
    ) as e:
        with_lora(model, rank=8)
    assert "already" not in str(e.value)
    assert with_lora(model, rank=4) is model
    with pytest.raises(CompatibilityError, match="both claim what is trained"):
        with_full_finetuning(model)
    assert stack_of(model) == compose(with_lora(rank=4))


def test_a_model_adapted_by_peft_is_refused() -> None:
    for config in (
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"]),
    ):
        model = get_peft_model(tiny_model(), config).base_model.model
        with pytest.raises(CompatibilityError, match=r"is adapted by a \w+ already. Merge that adapter first"):
            with_lora(model)
        assert not stack_of(model)
    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))  # transformers' own way
    with pytest.raises(CompatibilityError, match="model.layers.0.self_attn.q_proj is adapted by a Linear already"):
        with_lora(model, targets="gate_up_proj")


class Mxfp4GptOssExperts(nn.Module):
    """Called as the experts that transformers packs for its kernels."""

    def forward(self, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return hidden


def test_experts_of_another_kind() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(CompatibilityError, match="'gate_up_proj' is the name of no weight"):
        with_lora(model)
    before = model(ids()).logits
    with_lora(model, targets=("q_proj", "router"))
    assert relative(model(ids()).logits, before) < 1e-6
    assert relative(begun(model)(ids()).logits, before) > 1e-3


def test_another_computation_of_the_experts_is_an_error_and_no_silence() -> None:
    model = begun(with_lora(tiny_model()))
    expected = model(ids()).logits
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        with pytest.raises(
            ValueError, match=f"the experts implementation '{name}' knows nothing of adapters on experts"
        ):
            model(ids())
    assert torch.equal(with_lora(model)(ids()).logits, expected)
    # Where no expert has an adapter, any will do.
    attention = begun(with_lora(tiny_model(), targets="q_proj"))
    expected = attention(ids()).logits
    attention.set_experts_implementation("eager")
    assert relative(attention(ids()).logits, expected) < 1e-5


def test_explain_says_what_is_adapted() -> None:
    text = " ".join(str(explain(with_lora(tiny_model(), rank=4, targets=("q_proj", "down_proj")))).split())
    assert "adapters of rank 4 beside 6 weights (q_proj," in text
    values = 3 * (4 * (64 + 128) + 4 * 4 * (64 + 64))
    assert f"{values:,} values" in text


# A config of peft.


def config(**changes: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
    return LoraConfig(**{**given, **changes})


SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "dropout": ({"lora_dropout": 0.25}, {"dropout": 0.25}),
    "rslora": ({"use_rslora": True}, {"rslora": True}),
    "layers": ({"layers_to_transform": [0, 2]}, {"layers": (0, 2)}),
    "one layer": ({"layers_to_transform": 1, "layers_pattern": "layers"}, {"layers": (1,)}),
    "a pattern": ({"target_modules": r".*\.0\..*q_proj"}, {"targets": r"(?:.*\.0\..*q_proj)"}),
    "all linear": ({"target_modules": "all-linear"}, {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}),
    "experts": (
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"targets": ("mlp.experts.down_proj",)},
    ),
    "both": (
        {"target_parameters": ["experts.gate_up_proj", "router.weight"]},
        {"targets": ("o_proj", "q_proj", "experts.gate_up_proj", "router.weight")},
    ),
    "more that is trained": ({"modules_to_save": ["router", "norm"]}, {"train": ("router", "norm")}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
        {"rank_pattern": (("q_proj", 2),), "alpha_pattern": ((r"layers\.1\..*", 3),)},
    ),
    "what says nothing": ({"task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main"}, {}),
}


@pytest.mark.parametrize(("changes", "options"), SERVED.values(), ids=SERVED)
def test_fields_of_a_config_that_are_served(changes: dict[str, Any], options: dict[str, Any]) -> None:
    expected = {"rank": 4, "alpha": 6, "dropout": 0.0, "rslora": False, "targets": ("o_proj", "q_proj"), **options}
    expected = {"rank_pattern": (), "alpha_pattern": (), **expected}
    for given in (config(**changes), {**config(**changes).to_dict(), "peft_version": "0.21.2"}):
        made = {"rank_pattern": (), "alpha_pattern": (), **options_of(given)}
        assert made == expected
        wrapper = with_lora(config=given, dtype=torch.bfloat16)
        assert wrapper.dtype == "bfloat16"
        assert wrapper.rank == 4


UNSERVED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layer_replication": {"layer_replication": [(0, 2), (1, 3)]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layers_pattern": {"layers_pattern": "blocks", "layers_to_transform": [0]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_qalora": {"use_qalora": True},
    "loftq_config": {"loftq_config": {"bits": 4}},
}


@pytest.mark.parametrize("field", UNSERVED)
def test_fields_of_a_config_that_are_not_served_are_named(field: str) -> None:
    given = {**config().to_dict(), **UNSERVED[field]}
    with pytest.raises(ValueError, match=f"with_lora: config.{field} is .*, which is not served"):
        with_lora(config=given)


def test_configs_that_are_none() -> None:
    with pytest.raises(ValueError, match="config is one of LOHA. Give a peft.LoraConfig"):
        with_lora(config={"peft_type": "LOHA"})
    with pytest.raises(ValueError, match="config and rank, train say the same. Give one of them"):
        with_lora(config=config(), rank=2, train="router")
    with pytest.raises(ValueError, match="targets is empty"):
        with_lora(config={**config().to_dict(), "target_modules": None})
    with pytest.raises(ValueError, match="alpha is 0"):
        with_lora(config={**config().to_dict(), "lora_alpha": 0})
    with pytest.raises(ValueError, match="rank is 0"):
        with_lora(config={**config().to_dict(), "r": 0})
    bare = with_lora(config={"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert (bare.rank, bare.alpha) == (8, 8), "what peft takes"


CONFIGS: dict[str, dict[str, Any]] = {
    "names": {},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [0, 2]},
    "layers, and a name in full": {
        "layers_to_transform": [0],
        "target_modules": ["q_proj", "lm_head", "model.layers.2.self_attn.k_proj"],
    },
    "layers beside experts": {
        "layers_to_transform": [1],
        "target_modules": ["q_proj", "lm_head"],
        "target_parameters": ["experts.down_proj"],
    },
    "a pattern": {"target_modules": r"model\.layers\.[02]\..*(q|k)_proj"},
    "a pattern beside experts": {"target_modules": r".*\.v_proj", "target_parameters": ["experts.gate_up_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\..*": 3}, "alpha_pattern": {"o_proj": 1}},
    "ranks of parameters": {
        "target_parameters": ["router.weight", "experts.down_proj"],
        "rank_pattern": {"router": 5, "down_proj": 3, r"router\.weight": 2},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_config_adapts_what_peft_adapts(changes: dict[str, Any]) -> None:
    theirs = get_peft_model(tiny_model(), config(**changes))
    model = tiny_model()
    if changes.get("rank_pattern", {}).get("router"):
        with pytest.raises(CompatibilityError, match="the pattern 'router' fits no weight that gets an adapter"):
            with_lora(model, config=config(**changes))
        changes["rank_pattern"].pop("router")  # as for peft, where it fits none either
    with_lora(model, config=config(**changes))
    found = {}
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            # A parameter's wrapper tells which one it is; what it wraps may be a wrapper.
            name = getattr(module, "parameter_name", None)
            own = path.replace(".base_layer", "") + (f".{name}" if name not in (None, "weight") else "")
            found[own] = (module.r["default"], module.scaling["default"])
    (wrapper,) = stack_of(model)
    ours = {place.name: (rank, adapter.scale) for place, (rank, adapter) in wrapper.adapted(model).items()}
    assert ours == found
    for place, (rank, _) in wrapper.adapted(model).items():
        a, b = (model.get_parameter(name) for name in place.factors)
        assert rank in a.shape
        assert (a.shape[-2], b.shape[-1]) == (rank, rank)
    assert {name.rpartition("_")[2] for name in adapters(model)} == {A[-1], B[-1]}


def test_other_wrappers_do_not_care(model: nn.Module) -> None:
    with_fast_experts(with_flash_attention(with_mxfp4_experts(with_lora(model, config=config()))))
    assert len(stack_of(model)) == 4
    assert len(stack_of(undo(model))) == 0
