"""What `make wheel` asks of an installed package: is it whole, and does it stand alone?"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import torch
from transformers import AutoModelForCausalLM

import gptoss_opt
from gptoss_opt import load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.kernels import native
from tests.helpers import GOLDEN, ids

ALONE = """
import sys

OPTIONAL = ("triton", "flash_attn", "flash_attn_interface", "peft", "trl", "kernels", "matplotlib")
for name in OPTIONAL:
    sys.modules[name] = None
import gptoss_opt
for name in gptoss_opt.__all__:
    getattr(gptoss_opt, name)
print(gptoss_opt.doctor().verdict)
"""


def test_the_wheel_is_for_every_python() -> None:
    # A source tree may have metadata of its own, which name no wheel.
    found = [one.read_text("WHEEL") or "" for one in metadata.distributions(name="gptoss-opt")]
    tags = [line for text in found for line in text.splitlines() if line.startswith("Tag: ")]
    assert tags
    assert all(tag.startswith("Tag: py3-none-") for tag in tags)
    assert metadata.version("gptoss-opt") == gptoss_opt.__version__


def test_the_native_library_is_there() -> None:
    assert native.why_not("cpu", torch.bfloat16) is None
    assert native.FILE.name == "_native.so"


def test_it_imports_alone() -> None:
    found = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "packed experts by native" in found.stdout


def test_the_command_runs() -> None:
    found = subprocess.run([sys.executable, "-m", "gptoss_opt", "doctor"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "native" in found.stdout


def test_a_packed_model_generates_what_the_plain_one_does() -> None:
    plain = AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).float().eval()
    packed = load(GOLDEN, with_mxfp4_experts(), with_flash_attention(), dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = plain.generate(ids(1, 12), **options)
    assert torch.equal(packed.generate(ids(1, 12), **options), tokens)
    # Negative control: the tokens come from the weights.
    with torch.no_grad():
        packed.lm_head.weight.neg_()
    assert not torch.equal(packed.generate(ids(1, 12), **options), tokens)
