"""MXFP4 is what the OCP specification says, over every code under every scale, and packing is exact where it can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels import memory, native
from gptoss_opt.kernels.mxfp4 import BLOCK, FP4_VALUES, pack, pack_columns, sqnr, unpack
from gptoss_opt.kernels.mxfp4 import format as plain

WIDE = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True, params=["native", "plain torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything with the native library, and without it."""
    if request.param == "plain torch":
        monkeypatch.setattr(native, "_loaded", lambda: "is left out here")
    assert (native.why_not("cpu", torch.float32) is None) == (request.param == "native")
    return request.param


def value(code: int) -> float:
    """A four-bit float by its bits: sign, two of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else math.ldexp(1 + mantissa / 2, exponent - 1)
    return -size if sign else size


def bits(x: Tensor) -> list[int]:
    """The bits of a float tensor: unlike values they tell zeros apart."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(ints).flatten().tolist()


def every_code() -> tuple[Tensor, Tensor]:
    """A row of all 256 bytes, under each of the 256 scales: blocks [256, 16, 16] and scales [256, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(256, -1, -1)
    return blocks, torch.arange(256).to(torch.uint8)[:, None].expand(-1, 16)


def nearest(magnitude: float) -> int:
    """The code of the closest four-bit float, a tie going to the even code; by trying all."""
    return min(range(8), key=lambda code: (abs(value(code) - min(magnitude, 6.0)), code & 1))


def scale_byte(largest: float) -> int:
    """floor(log2(largest)) - 2, as a byte."""
    return min(max(math.floor(math.log2(largest)) - 2 + 127, 0), 254) if largest else 0


def test_the_table_is_the_format() -> None:
    assert tuple(map(value, range(16))) == FP4_VALUES
    assert math.copysign(1, FP4_VALUES[8]) == -1


@pytest.mark.parametrize("dtype", WIDE)
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    found = unpack(*every_code(), dtype)
    assert found.shape == (256, 512)
    assert found.dtype == dtype
    for scale in range(255):
        exact = [math.ldexp(value(code), scale - 127) for byte in range(256) for code in (byte & 15, byte >> 4)]
        assert bits(found[scale]) == bits(torch.tensor(exact, dtype=torch.float64).to(dtype)), scale
    assert found[255].isnan().all()
    assert not found[:255].isnan().any()
    # Only what the dtype cannot hold at all is infinite.
    assert found[:253].isfinite().all()
    # Negative control: the first value of a byte is in its low bits.
    swapped = unpack((every_code()[0] >> 4) | (every_code()[0] << 4), every_code()[1], dtype)
    assert not torch.equal(swapped[127], found[127])


def test_float16_gets_the_rounded_values() -> None:
    blocks, scales = every_code()
    for scale in (100, 127, 140):
        exact = unpack(blocks[scale], scales[scale])
        assert torch.equal(unpack(blocks[scale], scales[scale], torch.float16), exact.half())


@pytest.mark.parametrize("dtype", WIDE)
def test_packing_what_was_unpacked_is_exact(dtype: torch.dtype) -> None:
    dense = unpack(*every_code(), dtype)
    # Whole rows that the dtype holds: the largest scales overflow all but float64.
    last = 255 if dtype == torch.float64 else 253
    dense = dense[:last]
    again = unpack(*pack(dense), dtype)
    assert bits(again) == bits(dense)


@pytest.mark.parametrize("dtype", WIDE)
def test_each_code_alone_in_its_block(dtype: torch.dtype) -> None:
    # Of a block with one value only the scale is not the one it was made with.
    blocks = torch.zeros(255, 16, 16, dtype=torch.uint8)
    blocks[:, range(16), 0] = torch.arange(16, dtype=torch.uint8)
    dense = unpack(blocks, torch.arange(255).to(torch.uint8)[:, None].expand(-1, 16), dtype)
    dense = dense[dense.isfinite().all(-1)].unflatten(-1, (-1, BLOCK))
    assert len(dense) >= 253
    found = pack(dense)
    assert bits(unpack(*found, dtype)) == bits(dense)
    # A zero says nothing of its scale: it is the smallest.
    assert (found[1][:, [0, 8]] == 0).all()


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16])
def test_packing_twice_is_packing_once(dtype: torch.dtype) -> None:
    dense = (torch.randn(40, 320) * torch.randn(40, 1).mul(4).exp2()).to(dtype)
    once = pack(dense)
    assert all(map(torch.equal, pack(unpack(*once)), once))
    assert not torch.equal(unpack(*once), dense.float())


def test_rounding_is_to_nearest_and_ties_to_even() -> None:
    # Every eighth of a unit up to past the largest float, so all midpoints and both sides of each.
    steps = [n / 8 for n in range(65)]
    for exponent in (-130, -20, 0, 1, 60, 125):
        for sign in (1, -1):
            for first in range(0, len(steps), 31):
                part = steps[first : first + 31]
                # The last value pins the scale; 7.99... saturates rather than raise it.
                row = torch.tensor([sign * step for step in part] + [7.96875] * (BLOCK - len(part)))
                row = torch.ldexp(row.double(), torch.tensor(exponent))
                if first == 62:
                    # Eight and more take the next scale.
                    assert pack(row)[1].item() == min(max(exponent + 1 + 127, 0), 254)
                    continue
                blocks, scales = pack(row)
                unit = scales.item() - 127
                assert unit == max(exponent, -127)
                got = torch.stack((blocks & 15, blocks >> 4), -1).flatten().tolist()
                wanted = [nearest(math.ldexp(abs(v), -unit)) | (8 if math.copysign(1, v) < 0 else 0) for v in row]
                assert got == wanted


def test_midpoints_by_hand() -> None:
    row = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.5, -0.25, -0.75, -2.5, -3.5, -5.0, *[4.0] * 19])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -1.0, -2.0, -4.0, -4.0]
    assert unpack(*pack(row))[:13].tolist() == expected
    # A hair past a midpoint goes up, a hair before it down; also where the hair is float32's.
    for hair, wanted in ((1e-7, [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), (-1e-7, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])):
        near = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * (1 + 2 * hair)
        assert unpack(*pack(torch.cat((near, torch.full((25,), 4.0)))))[:7].tolist() == wanted


@pytest.mark.parametrize("dtype", WIDE)
def test_random_rows_against_trying_all(dtype: torch.dtype) -> None:
    dense = (torch.randn(30, BLOCK) * torch.randn(30, 1).mul(8).exp2()).to(dtype)
    blocks, scales = pack(dense)
    for row, block, scale in zip(dense.double().tolist(), blocks, scales.flatten().tolist(), strict=True):
        assert scale == scale_byte(max(map(abs, row)))
        codes = torch.stack((block & 15, block >> 4), -1).flatten().tolist()
        wanted = [nearest(math.ldexp(abs(v), 127 - scale)) | 8 * (v < 0) for v in row]
        assert codes == wanted


def test_scales() -> None:
    # Powers of two and what is just below them, from the smallest subnormal to the largest float.
    for largest in (2.0**-149, 2.0**-126, 0.5, 1.0, 1.0 - 2**-24, 2.0 - 2**-23, 4.0, 7.9, 2.0**127, 3.4028234e38):
        row = torch.zeros(BLOCK)
        row[5] = -largest
        assert pack(row)[1].item() == scale_byte(float(row[5].abs())), largest
    # What only float64 holds: too large is clamped to the largest value, too small is zero.
    for largest, wanted in ((2.0**500, 6 * 2.0**127), (2.0**-500, 0.0)):
        row = torch.full((BLOCK,), largest, dtype=torch.float64)
        assert unpack(*pack(row), torch.float64).tolist() == [wanted] * BLOCK


def test_zeros_and_subnormals() -> None:
    blocks, scales = pack(torch.zeros(2, 64))
    assert not blocks.any()
    assert not scales.any()
    assert (pack(-torch.zeros(BLOCK))[0] == 0x88).all()
    assert unpack(*pack(-torch.zeros(BLOCK))).signbit().all()
    # Below the smallest scale values are rounded to its steps of 2 ** -128.
    row = torch.zeros(BLOCK)
    row[:4] = torch.tensor([2.0**-128, 2.0**-129, 3 * 2.0**-129, 2.0**-149])
    assert unpack(*pack(row))[:4].tolist() == [2.0**-128, 0.0, 2.0**-127, 0.0]


def test_packing_and_slicing_commute() -> None:
    dense = torch.randn(4, 10, 160)
    blocks, scales = pack(dense)
    for name, cut in {
        "experts": (slice(1, 3),),
        "rows": (slice(None), slice(3, 8)),
        "blocks": (slice(None), slice(None), slice(32, 128)),
        "all": (slice(2, 4), slice(0, 9, 2), slice(64, 160)),
    }.items():
        inner = slice(cut[2].start // 32, cut[2].stop // 32) if len(cut) == 3 else slice(None)
        packed = (*cut[:2], *[slice(None)] * (2 - len(cut[:2])), inner)
        found = pack(dense[cut])
        assert torch.equal(found[0], blocks[packed]), name
        assert torch.equal(found[1], scales[packed]), name
    # Negative control: half a block has a scale of its own.
    assert not torch.equal(pack(dense[..., 16:48])[1], scales[..., :1])


def test_layout_of_the_input_does_not_matter() -> None:
    dense = torch.randn(3, 64, 7)
    expected = pack(dense.mT.contiguous())
    assert all(map(torch.equal, pack(dense.mT), expected))
    wide = torch.randn(3, 7, 128)[..., ::2]
    assert all(map(torch.equal, pack(wide), pack(wide.contiguous())))
    assert pack(dense.mT.requires_grad_())[0].shape == (3, 7, 2, 16)
    empty = pack(torch.zeros(0, 5, 64))
    assert (empty[0].shape, empty[1].shape) == ((0, 5, 2, 16), (0, 5, 2))
    assert unpack(*empty).shape == (0, 5, 64)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (torch.zeros(32, dtype=torch.int8), "floating point values, not torch.int8"),
        (torch.zeros(3, 33), r"a multiple of 32 values, not \[3, 33\]"),
        (torch.tensor(1.0), r"a multiple of 32 values, not \[\]"),
        (torch.tensor([math.inf, *[0.0] * 31]), "an infinity or a NaN"),
        (torch.tensor([-math.inf, *[0.0] * 31]), "an infinity or a NaN"),
        (torch.tensor([*[0.0] * 95, math.nan]).bfloat16(), "an infinity or a NaN"),
    ],
)
def test_what_cannot_be_packed_is_refused(dense: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(dense)


@pytest.mark.parametrize(("blocks", "scales"), [((2, 3, 16), (2, 2)), ((2, 3, 15), (2, 3)), ((2, 3, 16), (2, 3, 1))])
def test_shapes_that_do_not_belong_together(blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        unpack(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))


@pytest.mark.parametrize("which", range(len(native.INSTRUCTION_SETS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_and_plain_give_the_same_bits(
    dtype: torch.dtype, which: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how != "native" or which > native.library().best:
        pytest.skip(f"needs {native.INSTRUCTION_SETS[which]}")
    library = native.library()._replace(best=which)
    monkeypatch.setattr(native, "library", lambda: library)
    # Any finite bits there are, and values around the midpoints.
    codes = torch.randint(-(2**15), 2**15, (64, 32 * BLOCK), dtype=torch.int16)
    halves = torch.stack((codes, codes.roll(1)), -1)
    dense = codes.view(torch.bfloat16) if dtype == torch.bfloat16 else halves.view(torch.float32)[..., 0]
    dense = dense.where(dense.isfinite(), torch.zeros((), dtype=dtype))
    near = (torch.arange(64 * BLOCK) % 256 / 32 - 4).view(-1, BLOCK) * torch.randint(-40, 40, (64, 1)).float().exp2()
    for x in (dense, near.to(dtype), -near.to(dtype), near.to(dtype).nextafter(torch.zeros((), dtype=dtype))):
        found, expected = pack(x), plain.pack(x)
        assert all(map(torch.equal, found, expected))
        assert bits(unpack(*found, dtype)) == bits(plain.unpack(*expected, dtype))
    # Negative control: packing is not the identity on these.
    assert not torch.equal(unpack(*pack(dense), dtype), dense)


def test_any_number_of_threads(how: str) -> None:
    dense = torch.randn(300, 2048)
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            packed = pack(dense)
            results.append((*packed, unpack(*packed)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_sqnr() -> None:
    dense = torch.randn(8, 64)
    assert sqnr(dense, dense) == math.inf
    assert sqnr(torch.zeros(4), torch.zeros(4)) == math.inf
    assert sqnr(dense, 0 * dense) == pytest.approx(0)
    assert sqnr(dense, 0.9 * dense) == pytest.approx(20, abs=1e-4)
    assert sqnr(dense.bfloat16(), dense.bfloat16().double() * 0.99) == pytest.approx(40, abs=1e-6)


def test_gaussian_weights_keep_their_signal() -> None:
    dense = torch.randn(200, 640) * 0.02
    blocks, scales = pack(dense)
    assert 18 < sqnr(dense, unpack(blocks, scales)) < 19.5
    # Negative controls: a scale that is one too small or too large, and codes rounded towards zero.
    for wrong in (scales - 1, scales + 1):
        assert sqnr(dense, unpack(blocks, wrong)) < 7
    truncated = pack(dense.abs() * 0.85)
    assert sqnr(dense.abs(), unpack(*truncated)) < 17


def test_memory_for_large_weights() -> None:
    for shape, dtype in (((3, 5), torch.float32), ((memory.LARGE + 1,), torch.uint8), ((0, 4), torch.bfloat16)):
        tensor = memory.empty(shape, dtype)
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert (tensor.zero_() == 0).all()
    assert memory.empty((2,), torch.float32, "meta").device.type == "meta"


DENSE = {
    "normal": lambda shape: torch.randn(shape),
    "next to nothing": lambda shape: torch.randn(shape) * 1e-38,
    "huge": lambda shape: torch.randn(shape) * 1e37,
    "zeros of both signs": lambda shape: torch.randn(shape) * 0,
    "of all sizes": lambda shape: torch.randn(shape) * torch.exp2(torch.randint(-120, 100, shape).float()),
    "midpoints": lambda shape: torch.randint(-28, 29, shape) / 4,
}


def sets_of(dtype: torch.dtype) -> list[int | None]:
    return [*range(native.library().best + 1)] if native.why_not("cpu", dtype) is None else [None]


@pytest.mark.parametrize("shape", [(32, 1), (64, 7), (96, 16), (64, 130), (320, 64)], ids=str)
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_columns_are_packed_as_rows_are(dtype: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    dense = DENSE[kind](shape).to(dtype)
    expected = plain.pack(dense.T)
    exact = dense.T.double()
    signal, noise = exact.square().sum(), (exact - unpack(*expected, torch.float64)).square().sum()
    for which in sets_of(dtype):
        blocks, scales = (torch.full_like(one, 7) for one in map(Tensor.contiguous, expected))
        found = pack_columns(dense, blocks, scales, instruction_set=which)
        assert torch.equal(blocks, expected[0])
        assert torch.equal(scales, expected[1])
        if kind in ("normal", "midpoints"):
            torch.testing.assert_close(torch.tensor(found).double(), torch.stack([signal, noise]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_columns_that_cannot_be_packed(dtype: torch.dtype, bad: float) -> None:
    for place in ((0, 0), (63, 69), (40, 65)):
        dense = torch.randn(64, 70).to(dtype)
        dense[place] = bad
        blocks, scales = torch.empty(70, 2, 16, dtype=torch.uint8), torch.empty(70, 2, dtype=torch.uint8)
        with pytest.raises(ValueError, match="an infinity or a NaN"):
            pack_columns(dense, blocks, scales)


def test_columns_that_lie_apart() -> None:
    dense = torch.randn(40, 64).T[:, ::2]
    expected = plain.pack(dense.T)
    blocks, scales = map(torch.empty_like, map(Tensor.contiguous, expected))
    pack_columns(dense, blocks, scales)
    assert torch.equal(blocks, expected[0])
    with pytest.raises(ValueError, match="blocks"):
        pack_columns(dense, blocks[:3], scales)
