"""with_flash_attention inside a model: padding, caches, packing, masks, checkpointing, compilation, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GptOssForCausalLM, StaticCache

from gptoss_opt import BackendError, CompatibilityError, explain, stack_of, undo, with_flash_attention
from gptoss_opt.kernels import native
from gptoss_opt.model import packing
from tests.helpers import WINDOW, gradients, ids, loss_and_gradients, relative, tiny_config, tiny_model

LENGTH = 4 * WINDOW + 3
ON_CPU = "torch" if native.why_not("cpu", torch.float32) else "native"
BACKENDS = ["torch", "reference"] if ON_CPU == "torch" else ["native", "torch", "reference"]


def pair(dtype: torch.dtype = torch.float32, backend: str = "torch") -> tuple[GptOssForCausalLM, GptOssForCausalLM]:
    """The same model in eager attention and wrapped."""
    return tiny_model(dtype), with_flash_attention(tiny_model(dtype), backend=backend)


def padded(side: str) -> torch.Tensor:
    """A mask [3, LENGTH] with up to more padding than the window is wide."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, amount in enumerate((0, 3, 2 * WINDOW + 1)):
        where = slice(None, amount) if side == "left" else slice(LENGTH - amount, None)
        mask[row, where] = 0
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, LENGTH, 300])
def test_lengths_around_the_window(length: int, backend: str) -> None:
    eager, fast = pair(backend=backend)
    assert relative(fast(ids(2, length)).logits, eager(ids(2, length)).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_eager_is(dtype: torch.dtype) -> None:
    # Every expert takes part: a choice of experts that flips on a rounding says nothing about attention.
    eager = tiny_model(dtype, num_experts_per_tok=4)
    fast = with_flash_attention(tiny_model(dtype, num_experts_per_tok=4))
    exact = tiny_model(num_experts_per_tok=4)
    exact.load_state_dict({name: value.float() for name, value in eager.state_dict().items()})
    truth = exact(ids()).logits
    assert relative(fast(ids()).logits, truth) < 2 * relative(eager(ids()).logits, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, backend: str) -> None:
    eager, fast = pair(backend=backend)
    mask = padded(side)
    inputs = {"input_ids": ids(3, LENGTH), "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    valid = mask.bool()
    expected = eager(**inputs).logits
    assert relative(fast(**inputs).logits, expected) < 1e-5
    # What padding predicts counts too, unless the labels say otherwise.
    for labels in (ids(3, LENGTH), ids(3, LENGTH).masked_fill(mask == 0, -100)):
        loss, wanted = loss_and_gradients(eager, labels=labels, **inputs)
        fast_loss, found = loss_and_gradients(fast, labels=labels, **inputs)
        torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=0)
        for name in wanted:
            assert relative(found[name], wanted[name]) < 1e-4, name
    if side == "left":
        # Negative control: without the mask the result is another.
        without = fast(ids(3, LENGTH), position_ids=torch.arange(LENGTH)[None]).logits
        assert relative(without[2][valid[2]], expected[2][valid[2]]) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_with_holes(backend: str) -> None:
    eager, fast = pair(backend=backend)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 5:9] = 0
    mask[1, [0, 1, 20, 22]] = 0
    for positions in (None, (mask.cumsum(-1) - 1).clamp(min=0)):
        inputs = {"input_ids": ids(2, LENGTH), "attention_mask": mask, "position_ids": positions}
        assert relative(fast(**inputs).logits, eager(**inputs).logits) < 1e-5
        loss, wanted = loss_and_gradients(eager, **inputs)
        fast_loss, found = loss_and_gradients(fast, **inputs)
        torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=0)
        assert max(relative(found[name], wanted[name]) for name in wanted) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_behind_virtual_tokens(backend: str) -> None:
    """As in prefix tuning: a cache that no token stands for, then padding, then tokens."""
    eager, fast = pair(backend=backend)
    mask = torch.ones(2, 4 + 9, dtype=torch.long)
    mask[0, 4:8] = 0

    def run(model: GptOssForCausalLM, mask: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids(2, 4, seed=7), past_key_values=cache)
        return model(ids(2, 9), attention_mask=mask, past_key_values=cache, labels=ids(2, 9)).loss

    expected = run(eager, mask)
    torch.testing.assert_close(run(fast, mask), expected, rtol=1e-5, atol=0)
    # Negative control: padding that sees nothing at all predicts something else.
    assert abs(run(eager, torch.ones_like(mask)) - expected) > 1e-3


def test_right_padded_generate() -> None:
    eager, fast = pair()
    mask = padded("right")
    inputs = {"input_ids": ids(3, LENGTH), "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(**inputs), eager.generate(**inputs))


def test_padded_rows_equal_the_row_alone() -> None:
    _, fast = pair()
    mask = padded("left")
    together = fast(ids(3, LENGTH), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for row in range(3):
        tokens = ids(3, LENGTH)[row, mask[row].bool()]
        assert relative(together[row, -len(tokens) :], fast(tokens[None]).logits[0]) < 1e-5


def caches(model: GptOssForCausalLM, kind: str):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=2 * LENGTH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [5, 1, 1, WINDOW, 2], [3, LENGTH - 3], [LENGTH - 1, 1]])
@torch.no_grad()
def test_chunks_against_a_cache(kind: str, chunks: list[int], backend: str) -> None:
    _, fast = pair(backend=backend)
    tokens = ids(2, sum(chunks))
    expected = tiny_model()(tokens).logits
    cache = caches(fast, kind)
    pieces = [fast(piece, past_key_values=cache).logits for piece in tokens.split(chunks, dim=1)]
    assert relative(torch.cat(pieces, 1), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_padded_chunks_against_a_cache(kind: str) -> None:
    eager, fast = pair()
    mask = padded("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    results = []
    for model in (eager, fast):
        cache, pieces, seen = caches(model, kind), [], 0
        for size in (20, 1, 1, LENGTH - 22):
            now = slice(seen, seen + size)
            seen += size
            pieces.append(
                model(
                    ids(3, LENGTH)[:, now],
                    attention_mask=mask[:, :seen],
                    position_ids=positions[:, now],
                    past_key_values=cache,
                ).logits
            )
        results.append(torch.cat(pieces, 1)[mask.bool()])
    assert relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str, backend: str) -> None:
    eager, fast = pair(backend=backend)
    options = {"max_new_tokens": 3 * WINDOW, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    mask = padded("left")
    inputs = {"input_ids": ids(3, LENGTH).masked_fill(mask == 0, 0), "attention_mask": mask}
    expected = eager.generate(**inputs, **options)
    assert torch.equal(fast.generate(**inputs, **options), expected)
    beams = {"input_ids": ids(1, 11), "max_new_tokens": 9, "num_beams": 3, "do_sample": False}
    assert torch.equal(fast.generate(**beams), eager.generate(**beams))


PACKED = (7, 1, WINDOW + 4, 2 * WINDOW)


def packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in PACKED])[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both", "position_ids and an all-ones mask"])
def test_packed_sequences_equal_separate_runs(how: str, backend: str) -> None:
    _, model = pair(backend=backend)
    tokens = ids(1, sum(PACKED))
    cu_seq_lens = torch.tensor([0, *torch.tensor(PACKED).cumsum(0)], dtype=torch.int32)
    extra: dict = {"position_ids": packed_positions()}
    if how in ("cu_seq_lens", "both"):
        lengths = {"max_length_q": max(PACKED), "max_length_k": max(PACKED)}
        extra |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens.clone(), **lengths}
    if how.endswith("mask"):
        extra["attention_mask"] = torch.ones_like(tokens)
    weights = torch.randn(1, sum(PACKED), model.config.vocab_size)
    together = model(tokens, **extra).logits
    (together * weights).sum().backward()
    found = gradients(model)
    pieces = [model(piece).logits for piece in tokens.split(PACKED, dim=1)]
    (torch.cat(pieces, 1) * weights).sum().backward()
    assert relative(together, torch.cat(pieces, 1)) < 1e-5
    for name, wanted in gradients(model).items():
        assert relative(found[name], wanted) < 1e-4, name
    # Negative control: one long sequence is something else.
    assert relative(model(tokens).logits, together) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_numbers_the_sequences_of_packed_rows(backend: str) -> None:
    _, fast = pair(backend=backend)
    tokens = ids(2, 12)
    mask = torch.tensor([[1] * 5 + [2] * 7, [0, 0, 4, 4, 4, 0, 7, 7, 4, 4, 0, 0]])
    together = fast(tokens, attention_mask=mask).logits
    for row, part in ((0, slice(5)), (0, slice(5, 12)), (1, slice(2, 5)), (1, slice(6, 8)), (1, slice(8, 10))):
        alone = fast(tokens[row, part][None]).logits[0]
        assert relative(together[row, part], alone) < 1e-5
    # Negative control: of ones, the second sees the first.
    alone = fast(tokens[:1, 5:]).logits[0]
    assert relative(fast(tokens, attention_mask=(mask > 0).long()).logits[0, 5:], alone) > 1e-3
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert relative(compiled(tokens, attention_mask=mask, use_cache=False).logits, together) < 1e-5


def test_masks_that_say_what_cannot_be_done_are_refused() -> None:
    _, fast = pair()
    tokens = ids(1, 6)
    numbered = torch.tensor([[1, 1, 1, 2, 2, 2]])
    with pytest.raises(ValueError, match="numbers the sequences of packed rows, up to 2, and these cannot continue"):
        fast.generate(tokens, attention_mask=numbered, max_new_tokens=2)
    for wrong in (numbered - 2, numbered / 2, torch.full((1, 6), -torch.inf)):
        with pytest.raises(ValueError, match=r"It is 0 for padding and 1 for tokens, or"):
            fast(tokens, attention_mask=wrong)
    ones = torch.ones(6, 6, dtype=torch.long).tril()[None, None]
    with pytest.raises(ValueError, match=r"not torch.int64. Of zeros and ones give mask.bool\(\)"):
        fast(tokens, attention_mask=ones)
    assert relative(fast(tokens, attention_mask=ones.bool()).logits, fast(tokens).logits) < 1e-5


def test_positions_that_restart_beside_a_mask_are_said(caplog: pytest.LogCaptureFixture) -> None:
    _, fast = pair()
    packing._say_once.cache_clear()
    grow, restart = torch.arange(6)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    fast(ids(1, 6), position_ids=restart)
    fast(ids(1, 6), position_ids=grow, attention_mask=torch.ones(1, 6))
    assert not caplog.records
    for _ in range(2):
        fast(ids(1, 6), position_ids=restart, attention_mask=torch.ones(1, 6))
    assert [record.message[:45] for record in caplog.records] == ["position_ids restart beside an attention_mask"]


def test_cu_seq_lens_alone_rule_over_positions() -> None:
    _, model = pair()
    tokens = ids(1, 12)
    cu_seq_lens = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    both = model(tokens, position_ids=positions, cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens).logits
    assert relative(both, model(tokens, position_ids=positions).logits) < 1e-6


def test_packed_rows_with_padding_behind() -> None:
    _, model = pair()
    tokens, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[:, 11:] = 0
    positions = torch.tensor([[*range(5), *range(6), 0, 0, 0], [*range(3), *range(8), 0, 0, 0]])
    together = model(tokens, attention_mask=mask, position_ids=positions).logits
    for row, cut in enumerate((5, 3)):
        for begin, end in ((0, cut), (cut, 11)):
            alone = model(tokens[row : row + 1, begin:end]).logits[0]
            assert relative(together[row, begin:end], alone) < 1e-5


def test_packed_sequences_with_padding_between() -> None:
    _, model = pair()
    tokens, mask = ids(1, 27), torch.ones(1, 27, dtype=torch.long)
    mask[0, [7, 17, 26]] = 0
    positions = torch.cat([torch.arange(8), torch.arange(10), torch.arange(9)])[None]
    together = model(tokens, attention_mask=mask, position_ids=positions).logits
    for begin, end in ((0, 7), (8, 17), (18, 26)):
        assert relative(together[:, begin:end], model(tokens[:, begin:end]).logits) < 1e-5


def test_cu_seq_lens_that_cannot_work_are_refused() -> None:
    _, model = pair()
    cu_seq_lens = torch.tensor([0, 5, 12], dtype=torch.int32)
    for wrong, message in (
        ({"cu_seq_lens_k": cu_seq_lens}, "cu_seq_lens_k was given without cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([5, 12])}, "must grow from 0 to at most the 12 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 30])}, "must grow from 0 to at most the 12 tokens"),
        ({"cu_seq_lens_q": [0, 12]}, "an integer tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids(1, 12), **wrong)
    cache = model(ids(1, 12), cu_seq_lens_q=cu_seq_lens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(ids(1, 12), cu_seq_lens_q=cu_seq_lens, past_key_values=cache)
    with pytest.raises(ValueError, match="but the batch has 2 rows"):
        model(ids(2, 12), cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens)
    with pytest.raises(ValueError, match="cu_seq_lens_k differs from cu_seq_lens_q"):
        model(ids(1, 12), cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=torch.tensor([0, 6, 12], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_changed_in_place_are_read_again(backend: str) -> None:
    _, model = pair(backend=backend)
    tokens, positions = ids(1, 12), torch.arange(12)[None].clone()
    plain = model(tokens, position_ids=positions).logits
    positions[:, 5:] -= 5
    packed = model(tokens, position_ids=positions).logits
    assert relative(packed[:, 5:], model(tokens[:, 5:]).logits) < 1e-5
    assert relative(packed, plain) > 1e-3
    # A write that leaves no trace on the tensor.
    positions.numpy()[:] = range(12)
    assert relative(model(tokens, position_ids=positions).logits, plain) < 1e-6


def test_every_config_of_the_model_is_set() -> None:
    model = tiny_model()
    expected = model(ids()).logits
    original = model.config
    model.config = copy.deepcopy(original)
    with_flash_attention(model)
    assert model.model.layers[0].self_attn.config._attn_implementation == f"gptoss_opt:{ON_CPU}"
    assert original._attn_implementation == "eager"
    assert relative(model(ids()).logits, expected) < 1e-5
    undo(model)
    assert model.model.config is original
    # A part that is wrapped by itself is not wrapped a second time with the whole.
    with_flash_attention(model.model, backend="reference")
    with pytest.raises(CompatibilityError, match=r"\.model inside this model is wrapped already. undo\(model.model\)"):
        with_flash_attention(model)


def test_what_the_user_sets_on_the_config_survives_undo() -> None:
    for change, name, value in (
        (lambda model: model.set_attn_implementation("flex_attention"), "_attn_implementation", "flex_attention"),
        (lambda model: model.set_experts_implementation("eager"), "_experts_implementation", "eager"),
    ):
        model = with_flash_attention(tiny_model())
        change(model)
        assert getattr(undo(model).config, name) == value


def test_autocast_leaves_float64_alone() -> None:
    model = with_flash_attention(tiny_model(torch.float64))
    model.set_experts_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        model(ids())


def test_a_mask_of_another_length_is_refused() -> None:
    _, model = pair()
    with pytest.raises(ValueError, match="attention_mask tells of 7 tokens, but there are 9 keys"):
        model(ids(2, 9), attention_mask=torch.tensor([[0, *[1] * 6]] * 2), use_cache=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "additive", "per layer type"])
def test_own_mask(kind: str, backend: str) -> None:
    eager, fast = pair(backend=backend)
    tokens = ids(2, LENGTH)
    allowed = torch.rand(2, 1, LENGTH, LENGTH).tril() > 0.2
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    full = torch.zeros_like(additive).masked_fill(~torch.ones_like(allowed).tril(), torch.finfo(torch.float32).min)
    # transformers' eager attention only takes an additive mask.
    reference = {"full_attention": additive, "sliding_attention": full} if kind == "per layer type" else additive
    given = {"bool": allowed, "additive": additive, "per layer type": reference}[kind]
    expected = eager(tokens, attention_mask=reference).logits
    assert relative(fast(tokens, attention_mask=given).logits, expected) < 1e-5
    assert relative(fast(tokens).logits, expected) > 1e-3


def test_masks_of_another_shape_are_refused() -> None:
    _, fast = pair()
    with pytest.raises(ValueError, match=r"attention_mask \[batch, len\], or one of your own"):
        fast(ids(2, 9), attention_mask=torch.ones(2, 9, 9))
    with pytest.raises(ValueError, match="an attention mask for 9 queries and 9 keys"):
        fast(ids(2, 9), attention_mask=torch.zeros(2, 1, 9, 7))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, packed: bool) -> None:
    eager, fast = pair()
    extra = {"position_ids": packed_positions()} if packed else {}
    tokens = ids(1, sum(PACKED))
    _, expected = loss_and_gradients(fast if packed else eager, tokens, **extra)
    # The newer name, where there is one: the older one warns there.
    enable = getattr(fast, "activation_checkpointing_enable", fast.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    fast.train()
    fast.enable_input_require_grads()
    _, actual = loss_and_gradients(fast, tokens, **extra)
    for name in expected:
        assert relative(actual[name], expected[name]) < 1e-4, name


def test_autocast() -> None:
    eager, fast = pair()
    results = []
    for model in (eager, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids(), labels=ids()).loss
        loss.backward()
        results.append((loss.item(), gradients(model)["model.layers.1.self_attn.sinks"]))
    exact = loss_and_gradients(tiny_model(), ids())[1]["model.layers.1.self_attn.sinks"]
    assert abs(results[1][0] - results[0][0]) < 0.05
    assert relative(results[1][1], exact) < 2 * relative(results[0][1], exact) + 0.01


# torch's own, while tracing older versions of transformers.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_forward_and_backward_are_one_graph() -> None:
    eager, fast = pair()
    for model in (eager, fast):
        # The grouped experts of transformers break the graph when gradients are on.
        model.set_experts_implementation("batched_mm")
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    mask = padded("left")
    inputs = {"input_ids": ids(3, LENGTH), "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert relative(compiled(ids(2, LENGTH), use_cache=False).logits, eager(ids(2, LENGTH)).logits) < 1e-5
    valid = mask.bool()
    assert relative(compiled(**inputs, use_cache=False).logits[valid], eager(**inputs).logits[valid]) < 1e-5
    # Packing is found from the positions while tracing too.
    packed = {"input_ids": ids(1, sum(PACKED)), "position_ids": packed_positions(), "use_cache": False}
    loss, expected = loss_and_gradients(fast, labels=packed["input_ids"], **packed)
    compiled_loss, actual = loss_and_gradients(compiled, labels=packed["input_ids"], **packed)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in actual.items():
        assert relative(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-4, name


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache() -> None:
    eager, fast = pair()
    compiled = torch.compile(fast, backend="aot_eager")
    results = []
    for model in (eager, compiled):
        cache = StaticCache(config=fast.config, max_cache_len=30)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids(2, 14).split([11, 1, 1, 1], dim=1)]
        results.append(torch.cat(pieces, 1))
    assert relative(results[1], results[0]) < 1e-5


def test_output_attentions_is_refused() -> None:
    _, fast = pair()
    sentence = r"output_attentions=True: no flash kernel computes the attention weights.*undo\(model"
    for call in (
        lambda: fast(ids(), output_attentions=True),
        lambda: fast.model(ids(), output_attentions=True),
        lambda: fast.generate(ids(), output_attentions=True, return_dict_in_generate=True, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    undo(fast)
    assert len(fast(ids(), output_attentions=True).attentions) == 3


def test_hidden_states_and_router_logits_still_come_out() -> None:
    eager, fast = pair()
    options = {"output_hidden_states": True, "output_router_logits": True}
    a, b = eager(ids(), **options), fast(ids(), **options)
    assert len(b.hidden_states) == 4
    for x, y in zip((*a.hidden_states, *a.router_logits), (*b.hidden_states, *b.router_logits), strict=True):
        assert relative(y, x) < 1e-5


def test_what_the_model_asks_for_is_refused_before_anything_is_touched() -> None:
    model = GptOssForCausalLM(tiny_config(attention_dropout=0.1))
    with pytest.raises(CompatibilityError, match=r"with_flash_attention\(\): attention_dropout is 0.1, and no flash"):
        with_flash_attention(model)
    assert not stack_of(model)
    assert model.config._attn_implementation == "eager"
    # Dropout that comes later is refused when it would act, and only then.
    _, fast = pair()
    for layer in fast.model.layers:
        layer.self_attn.attention_dropout = 0.1
    fast(ids())
    with pytest.raises(ValueError, match="has no dropout, but attention_dropout is 0.1"):
        fast.train()(ids())


def test_backends() -> None:
    with pytest.raises(
        BackendError, match="with_flash_attention: there is no backend 'sdpa'. Use one of 'auto', 'fa4'"
    ):
        with_flash_attention(backend="sdpa")
    model = tiny_model()
    with pytest.raises(
        CompatibilityError, match="backend 'fa2' cannot serve here: needs CUDA, and the model is on cpu"
    ):
        with_flash_attention(model, backend="fa2")
    assert model.config._attn_implementation == "eager"
    (row,) = explain(with_flash_attention(model)).rows
    assert row.backend == ON_CPU
    assert dict(row.rejected)["reference"] == "only used when named"
    assert set(dict(row.rejected)) == {"fa4", "fa3", "fa2", "native", "torch", "reference"} - {ON_CPU}


def test_a_sharper_option_is_another_wrapper() -> None:
    model = with_flash_attention(tiny_model())
    with pytest.raises(CompatibilityError, match="the same wrapper twice with different options"):
        with_flash_attention(model, backend="reference")
    assert model.config._attn_implementation == f"gptoss_opt:{ON_CPU}"
    model.set_attn_implementation("eager")
    assert "changed by you since" in str(explain(model))
    assert with_flash_attention(model).config._attn_implementation == f"gptoss_opt:{ON_CPU}"


def by_the_decoder_forward(model, x, positions):
    return model.model.forward(x, position_ids=positions).last_hidden_state


def by_a_later_hook(model, x, positions):
    def repack(module, args, kwargs):
        return args, {**kwargs, "position_ids": positions}

    handle = model.model.register_forward_pre_hook(repack, with_kwargs=True)
    hidden = model.model(x).last_hidden_state
    handle.remove()
    return hidden


def by_layers_alone(model, x, positions):
    hidden = model.model.embed_tokens(x)
    embeddings = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings)
    return model.model.norm(hidden)


@pytest.mark.parametrize("way", [by_the_decoder_forward, by_a_later_hook, by_layers_alone])
def test_packed_sequences_are_seen_by_layers_however_they_come(way) -> None:
    model, x = tiny_model(), ids(batch=1, length=12)
    positions = torch.tensor([[*range(5), *range(7)]])
    alone = torch.cat([model.model(part).last_hidden_state for part in (x[:, :5], x[:, 5:])], 1)
    with_flash_attention(model)
    assert relative(way(model, x, positions), alone) < 1e-5
    assert relative(way(model, x, torch.arange(12)[None]), alone) > 1e-2


def test_a_mask_of_the_new_tokens_alone_is_padded() -> None:
    model = with_flash_attention(tiny_model())
    cache = model(ids(batch=1, length=6), use_cache=True).past_key_values
    out = model(
        ids(batch=1, length=3),
        past_key_values=cache,
        attention_mask=torch.ones(1, 3),
        position_ids=torch.tensor([[6, 6, 7]]),
    )
    assert out.logits.isfinite().all()
