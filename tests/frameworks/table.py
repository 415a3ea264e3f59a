"""The table of docs/frameworks.md as data, and the page that is made of it: python -m tests.frameworks.table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"

STACKS = {
    "adapters": "`with_lora` on packed experts",
    "full": "`with_full_finetuning`",
    "flash": "`with_flash_attention`",
    "sharded": "`shard_tensor_parallel`, `shard_experts`",
    "loss": "`with_chunked_loss`",
    "monitor": "`with_monitor`",
}
"""The columns."""

FRAMEWORKS = {
    "plain": "A loop of your own",
    "trainer": "transformers' `Trainer`",
    "ddp": "accelerate, or DDP itself",
    "autocast": "accelerate in mixed precision",
    "offload": "accelerate's CPU offload",
    "fsdp": "FSDP2, by `fully_shard`",
    "fsdp plugin": "accelerate's FSDP2 plugin",
    "deepspeed": "DeepSpeed ZeRO-3",
    "ray": "Ray Train",
    "lightning": "Lightning",
    "trl": "TRL's `SFTTrainer`",
    "compile": "`torch.compile`",
}
"""The rows."""


@dataclass(frozen=True)
class Checked:
    """A cell that tests hold: each is `path::function` under tests/."""

    tests: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A cell that is an error, a part of what it says, what to do instead, and the tests that raise it."""

    sentence: str
    instead: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Untested:
    """A cell of which no test says anything, and why it should work."""

    why: str


Cell = Checked | Refused | Untested


def by(*tests: str, note: str = "") -> Checked:
    return Checked(tests, note)


TOGETHER = "parameters that are spread over ranks cannot be put together with others, as DistributedDataParallel does"
AS_IT_IS = "Leave the model as it is: it sums its own gradients."
OFFLOADED = "accelerate has offloaded weights of this model, and their gradients would be lost"
ACCELERATE, LIGHTNING, RAY, DEEPSPEED = (
    f"frameworks/test_{one}.py" for one in ("accelerate", "lightning", "ray", "deepspeed")
)


def all_but(stacks: dict[str, Cell], *tests: str) -> dict[str, Cell]:
    """A row in which these tests hold every stack but those given."""
    return {stack: stacks.get(stack, by(*tests)) for stack in STACKS}


TABLE: dict[str, dict[str, Cell]] = {
    "plain": {
        "adapters": by("train/test_plain_loop.py::test_the_curve_is_that_of_plain_pytorch"),
        "full": by("wrappers/test_full_finetuning.py::test_a_short_training_is_that_of_plain_pytorch"),
        "flash": by("frameworks/test_table.py::test_a_plain_loop"),
        "sharded": by("distributed/test_full_finetuning.py::test_five_steps_are_those_of_one_process"),
        "loss": by("frameworks/test_table.py::test_a_plain_loop"),
        "monitor": by("frameworks/test_table.py::test_a_plain_loop"),
    },
    "trainer": {
        "adapters": by(
            "train/test_trainer_lora.py::test_it_learns_as_with_peft",
            "train/test_trainer_lora.py::test_on_packed_experts_it_resumes_too",
        ),
        "full": by("wrappers/test_full_finetuning.py::test_the_trainer_learns_as_without_the_wrapper"),
        "flash": by("train/test_trainer_lora.py::test_it_learns_as_with_peft", note="beside adapters"),
        "sharded": by(
            "distributed/test_trainer.py::test_two_ranks_learn_as_one_process",
            "distributed/test_trainer.py::test_two_replicas_of_two_ranks_learn_as_one_process",
            note="with accelerate 1.12 or newer",
        ),
        "loss": by("wrappers/test_chunked_loss.py::test_the_trainer"),
        "monitor": by("monitoring/test_monitor.py::test_trainers_log_it"),
    },
    "ddp": all_but(
        {
            "sharded": by(
                f"{ACCELERATE}::test_sharded_models_in_its_tensor_parallelism",
                f"{ACCELERATE}::test_refused",
                note="in its tensor parallelism; DDP is refused",
            )
        },
        f"{ACCELERATE}::test_on_two_processes_it_learns_as_one",
    ),
    "autocast": all_but(
        {"sharded": Untested("`torch.autocast` in your own loop is what it adds")},
        f"{ACCELERATE}::test_in_mixed_precision_it_is_as_exact_as_plain_transformers",
    ),
    "offload": {
        "adapters": Refused(OFFLOADED, "Pack the experts, or shard.", (f"{ACCELERATE}::test_offloaded",)),
        "full": Refused(
            OFFLOADED,
            "Load it without; sharding and FSDP2 spread it.",
            (
                f"{ACCELERATE}::test_offloaded",
                "wrappers/test_full_finetuning.py::test_what_cannot_be_trained_is_refused",
            ),
        ),
        "flash": by(f"{ACCELERATE}::test_offloaded_models_compute", note="forwards alone"),
        "sharded": Refused(
            "cannot be made anew or moved, as accelerate's offloading",
            "Shard over more ranks.",
            ("distributed/test_foreign.py::test_a_sharded_model_is_not_offloaded",),
        ),
        "loss": by("wrappers/test_chunked_loss.py::test_offloaded_weights", note="forwards alone"),
        "monitor": by("monitoring/test_monitor.py::test_what_others_put_around_a_model", note="forwards alone"),
    },
    "fsdp": {
        "adapters": by("distributed/test_lora.py::test_fsdp2"),
        "full": by("distributed/test_full_finetuning.py::test_five_steps_are_those_of_one_process"),
        "flash": by(
            "distributed/test_full_finetuning.py::test_five_steps_are_those_of_one_process", note="beside the former"
        ),
        "sharded": by(
            "distributed/test_lora.py::test_fsdp2", note="over another axis of the mesh than the model's own"
        ),
        "loss": by("wrappers/test_chunked_loss.py::test_data_parallel"),
        "monitor": by("distributed/test_monitor.py::test_under_fsdp"),
    },
    "fsdp plugin": all_but(
        {"sharded": Untested("`fully_shard` over another axis is tested, the plugin's meshes are not")},
        f"{ACCELERATE}::test_its_fsdp2_plugin",
    ),
    "deepspeed": all_but(
        {
            "sharded": Refused(
                "Couldn't swap Embedding.weight",
                "Take FSDP2 over another axis.",
                (f"{DEEPSPEED}::test_refused",),
            )
        },
        f"{DEEPSPEED}::test_it_learns_as_one_process",
    ),
    "ray": all_but(
        {"sharded": Refused(TOGETHER, AS_IT_IS, (f"{RAY}::test_refused",))}, f"{RAY}::test_it_learns_as_one_process"
    ),
    "lightning": all_but(
        {"sharded": Refused(TOGETHER, AS_IT_IS, (f"{LIGHTNING}::test_refused",))},
        f"{LIGHTNING}::test_it_learns_as_a_plain_loop",
        f"{LIGHTNING}::test_in_ddp_it_learns_as_one_process",
    ),
    "trl": {
        "adapters": by("train/test_trl.py::test_packed_documents_are_learnt_as_padded_ones"),
        "full": Untested("it is a `Trainer`"),
        "flash": by("train/test_trl.py::test_packed_documents_are_learnt_as_padded_ones", note="beside adapters"),
        "sharded": Untested("it is a `Trainer`"),
        "loss": Untested("TRL computes chunks of its own, past the model's loss"),
        "monitor": by("monitoring/test_monitor.py::test_trl_which_has_a_forward_of_its_own"),
    },
    "compile": {
        "adapters": by("train/test_plain_loop.py::test_a_compiled_step_is_the_step"),
        "full": by("wrappers/test_full_finetuning.py::test_compiles_in_training_mode"),
        "flash": by("wrappers/test_flash_attention.py::test_compiled_forward_and_backward_are_one_graph"),
        "sharded": by("distributed/test_sharded_model.py::test_compiles"),
        "loss": by(
            "wrappers/test_chunked_loss.py::test_compiled_but_for_the_loss",
            note="all but the loss; not with `fullgraph=True`",
        ),
        "monitor": by("monitoring/test_monitor.py::test_what_is_compiled_is_not_measured", note="nothing is measured"),
    },
}


def stacks_of(framework: str) -> list[str]:
    """The stacks that the table calls tested with a framework."""
    return [stack for stack, cell in TABLE[framework].items() if isinstance(cell, Checked)]


def refusals_of(framework: str) -> list[tuple[str, str]]:
    """The stacks that the table calls refused, and what is said."""
    return [(stack, cell.sentence) for stack, cell in TABLE[framework].items() if isinstance(cell, Refused)]


HEAD = """\
# With which frameworks

Wrap the model first, then give it to the framework. Columns are wrappers; other stacks are these together. A cell that
is tested is a short training, on CPUs, whose losses are those of a plain loop of one process. A cell that is refused is
an error, whose sentence stands below. `make test-frameworks` installs DeepSpeed, Ray and Lightning beside the rest and
runs these tests.

"""

NOTES = """\

## How, with each

- **DDP, accelerate, Lightning, Ray.** `DistributedDataParallel(model)`, `accelerator.prepare(model, optimizer)`, a
  `LightningModule` that holds the model, or `ray.train.torch.prepare_model(model)`. Each rank holds the whole model.
- **Sharded models** sum their gradients themselves, and have no DDP around them. accelerate is told so by
  `Accelerator(parallelism_config=ParallelismConfig(tp_size=...))`, which prepares the model alone: the optimizer stays
  as it is. The `Trainer` is told by the model.
- **FSDP2.** `fully_shard` each layer, then the model, and make the optimizer afterwards. Beside `shard_tensor_parallel`
  or `shard_experts` it takes another axis of the same mesh.
- **accelerate's FSDP2 plugin.** `fsdp_version=2`, with `GptOssDecoderLayer` as the class to wrap. accelerate keeps the
  plugin for GPUs; on CPUs, the tests switch it on by hand. `gather_state_dict(model)` gives the whole tensors.
- **DeepSpeed ZeRO-3.** `deepspeed.initialize(model=model, ...)`. Load the model outside of `deepspeed.zero.Init()`.
  Where `TrainingArguments` with a DeepSpeed config exist already, transformers' `from_pretrained` enters it. A model
  that ZeRO-3 holds is refused by every wrapper. DeepSpeed clips gradients to a norm of 1 unless `gradient_clipping`
  says otherwise. What is tested is in float32.
- **CPU offload.** accelerate brings the weights for the forward alone. Such a model computes and is not trained, with
  wrappers or without: offloaded after wrapping, it has no gradients, and nothing says so.
- **Saving.** `model.save_pretrained` and `save_adapter` serve where each rank holds the whole model; of adapters and of
  sharded models, under FSDP2 too. Else there is what the framework gathers: `engine.save_checkpoint`, Lightning's and
  Ray's checkpoints. They go into a model under the same stack.

## What is refused

"""


def cell_text(cell: Cell) -> str:
    """A cell of the page."""
    if isinstance(cell, Untested):
        return "works, untested"
    if isinstance(cell, Refused):
        return "refused"
    file = cell.tests[0].partition("::")[0]
    return f"[tested](../tests/{file})" + (f", {cell.note}" if cell.note else "")


def page() -> str:
    """The whole page."""
    lines = [f"| | {' | '.join(STACKS.values())} |", f"|---{'|---' * len(STACKS)}|"]
    for framework, row in TABLE.items():
        lines.append(f"| {FRAMEWORKS[framework]} | {' | '.join(cell_text(cell) for cell in row.values())} |")
    refusals = ["| with | stack | what is said | instead |", "|---|---|---|---|"]
    untested = ["", "## What is untested", "", "| with | stack | why it should work |", "|---|---|---|"]
    names = ["", "## The tests", "", "| with | stack | tests |", "|---|---|---|"]
    for framework, row in TABLE.items():
        for stack, cell in row.items():
            start = f"| {FRAMEWORKS[framework]} | {STACKS[stack]} |"
            if isinstance(cell, Refused):
                refusals.append(f"{start} {cell.sentence} | {cell.instead} |")
            if isinstance(cell, Untested):
                untested.append(f"{start} {cell.why} |")
            else:
                names.append(f"{start} {', '.join(f'`{test}`' for test in cell.tests)} |")
    return HEAD + "\n".join(lines) + "\n" + NOTES + "\n".join([*refusals, *untested, *names]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
