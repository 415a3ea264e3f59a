"""The command that finetunes: it learns, saves, goes on where it was stopped, and says what it does in code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptoss_opt import cli, load, load_adapter
from gptoss_opt.finetune import loop, report
from gptoss_opt.finetune import options as known
from gptoss_opt.finetune.loop import Interrupt, finetune
from gptoss_opt.finetune.options import FinetuneError, Options, read_config, settle
from gptoss_opt.finetune.run_folder import RunFolder, continued
from tests.finetune.chats import assistant, checkpoint, tokenizer, user


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all three forms, of letters that follow each other as they always do."""
    rows: list[dict[str, Any]] = []
    for number in range(24):
        word = ("abcdef" * 2)[number % 6 :][: 4 + number % 5]
        rows.append(
            ({"text": word * 2}, {"prompt": word, "completion": word}, {"messages": [user(word), assistant(word)]})[
                number % 3
            ]
        )
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, data: Path, output: Path, *more: str) -> int:
    """The command on a small task: rows of 96 tokens, two of them in a step."""
    arguments = ["--model", model, "--data", data, "--output", output, "--context", "96", "--batch-tokens", "192"]
    return cli.main(["finetune", *map(str, arguments), "--dtype", "float32", "--device", "cpu", *more])


def log(output: Path) -> list[dict[str, Any]]:
    """What the log says of each step, but for time and memory."""
    records = RunFolder(output).records()
    return [{key: value for key, value in one.items() if key not in ("seconds", "peak_memory")} for one in records]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in log(output)]


def test_adapters_learn_and_are_saved(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, data, out, "--steps", "12", "--lr", "0.02", "--save-every", "5", "--rank", "4") == 0
    records = log(out)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[0]["loss"] > 4.5
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert [record["learning_rate"] for record in records][:2] == [0.02, 0.02]
    assert 0 < records[-1]["learning_rate"] < 0.001
    assert all(record["labels"] < record["tokens"] <= 192 for record in records)

    # The last two checkpoints, which others can use as they are.
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-000010", "step-000012"]
    assert not list(out.glob("*.part"))
    last = out / "step-000012"
    twin = load_adapter(load(model, dtype=torch.float32), last)
    tokens = AutoTokenizer.from_pretrained(last).apply_chat_template([user("abcd")], add_generation_prompt=True)
    logits, base = (one(torch.tensor([tokens["input_ids"]])).logits for one in (twin, load(model, dtype=torch.float32)))
    assert (logits - base).abs().max() > 1
    assert AutoTokenizer.from_pretrained(last).chat_template == tokenizer().chat_template

    shown = capsys.readouterr()
    assert re.search(r"12/12 .*loss \d\.\d{3}, [\d,]+ tokens/s, peak \d+\.\d\d GB", shown.err)
    assert re.search(r"finetuning +finished\n", shown.out)
    assert re.search(rf"loss +{records[0]['loss']:.4f} at first, {records[-1]['loss']:.4f} at last\n", shown.out)
    assert re.search(rf"tokens +{sum(record['tokens'] for record in records):,}\n", shown.out)
    assert f"saved in     {last}" in shown.out
    assert "█" in shown.out
    # What it says to do next can be done.
    code = shown.out[shown.out.index("from gptoss_opt import") :]
    names: dict[str, Any] = {}
    exec(code, names)
    assert AutoModelForCausalLM.from_pretrained(out / "whole").config.num_hidden_layers == 2


def test_all_parameters_learn(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(model, data, out, "--method", "full", "--lr", "0.003", "--epochs", "3", "--clip", "5") == 0
    assert losses(out)[-1] < losses(out)[0] / 2
    last = max(out.glob("step-*"))
    learnt = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict()
    for name, before in load(model, dtype=torch.float32).state_dict().items():
        assert not torch.equal(learnt[name], before), name
    names: dict[str, Any] = {}
    shown = capsys.readouterr().out
    exec(shown[shown.index("from gptoss_opt import") :], names)
    assert load(out / "whole").config.num_hidden_layers == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    method: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--method", method, "--lr", "0.002", "--steps", "7", "--seed", "3"]
    more += ["--dropout", "0.2"] if method == "lora" else []
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(model, data, whole, *more) == 0
    # Ctrl-C in the third step: the step is taken, and saved.
    take, count = loop.train_step, 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
        return take(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert run(model, data, out, *more) == 130
    assert [record["step"] for record in log(out)] == [1, 2, 3]
    shown = capsys.readouterr()
    assert f"To go on:\npython -m gptoss_opt finetune --resume --output {out}\n" in shown.out
    assert re.search(r"finetuning +stopped\n.*steps +3 of 7\n", shown.out, re.DOTALL)
    # What a run had done after its last checkpoint, before it was killed, is done again.
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')
    (out / "step-000005.part").mkdir()
    torch.manual_seed(99)
    assert cli.main(["finetune", "--resume", "--output", str(out)]) == 0
    assert log(out) == log(whole)
    assert not list(out.glob("*.part"))
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (out / "step-000007" / weights).read_bytes() == (whole / "step-000007" / weights).read_bytes()
    # Another seed gives other losses: of rows in another order.
    other = tmp_path / "other"
    assert run(model, data, other, *more, "--seed", "4") == 0
    assert losses(other) != losses(whole)
    # A run that is finished has nothing left to do.
    assert cli.main(["finetune", "--resume", "--output", str(out)]) == 0
    assert log(out) == log(whole)


def test_a_run_goes_on_with_what_it_began_with(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert cli.main(["finetune", *arguments, "--output", str(out)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "holds no run to go on with. Leave --resume out" in refused("--resume")
    mine = tmp_path / "rows.jsonl"
    shutil.copy(data, mine)
    assert run(model, mine, out, "--steps", "2", "--rank", "2", "--targets", "q_proj", "router") == 0
    before = log(out)
    assert run(model, mine, out, "--steps", "2") == 2
    assert "holds checkpoints of a run. Give --resume" in capsys.readouterr().err
    error = refused("--resume", "--rank", "3", "--steps", "4")
    assert "rank was 2, now 3; steps was 2, now 4" in error
    # What does not change what is learnt may be another.
    assert cli.main(["finetune", "--resume", "--output", str(out), "--save-every", "7", "--rank", "2"]) == 0
    mine.write_text(mine.read_text() + '{"text": "more"}\n')
    assert "data_sha256 was" in refused("--resume")
    assert log(out) == before


WAIT = """
import sys
from gptoss_opt import cli
from gptoss_opt.finetune import run_folder

log = run_folder.RunFolder.log

def wait_for_ctrl_c(self, record):
    log(self, record)
    if record["step"] == 2:
        print("now", flush=True)
        sys.stdin.readline()

run_folder.RunFolder.log = wait_for_ctrl_c
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ctrl_c_saves(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", model, "--data", data, "--output", out, "--steps", "1000", "--context", "96"]
    command = [sys.executable, "-c", WAIT, "finetune", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        shown, said = process.communicate("\n", timeout=60)
    assert process.returncode == 130, said
    assert "stopping after this step, and saving; Ctrl-C again stops at once" in said
    assert "Traceback" not in said
    assert [folder.name for folder in out.glob("step-*")] == ["step-000002"]
    assert f"To go on:\npython -m gptoss_opt finetune --resume --output {out}" in shown


def test_a_second_ctrl_c_stops_at_once(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "train_step", interrupted)
    assert run(model, data, tmp_path / "out") == 130
    assert "stopped. What was saved before is there, and nothing since." in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("step-*"))
    assert signal.getsignal(signal.SIGINT) is before
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_code_that_is_shown_does_the_same(
    method: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--method", method, "--epochs", "2", "--lr", "0.01", "--truncate"]
    if method == "lora":
        config = tmp_path / "adapter_config.json"
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}).save_pretrained(tmp_path)
        more += ["--config", str(config), "--alpha", "8", "--autocast", "--gradient-checkpointing"]
    out = tmp_path / "out"
    assert run(model, data, out, *more, "--show-code") == 0
    assert not out.exists()
    code = capsys.readouterr().out
    assert len(code.splitlines()) < 50
    exec(compile(code, "script", "exec"), {})
    printed = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", capsys.readouterr().out, re.MULTILINE)]
    written = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run(model, data, out, *more) == 0
    assert [round(loss, 4) for loss in losses(out)] == printed
    assert len(printed) > 3
    last = max(out.glob("step-*"))
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (last / weights).read_bytes() == written[weights]
    assert {file.name for file in last.iterdir()} == {*written, "training_state.pt"}


def test_bad_rows_are_named_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": ""}\n' + "no\n" * 30)
    assert run(model, bad, tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error = shown.err.splitlines()
    assert error[0] == f"gptoss_opt finetune: {bad}: 31 rows cannot be trained on:"
    assert error[1:3] == [
        "  line 2: text is empty",
        "  line 3: it is not JSON (Expecting value: line 1 column 1 (char 0))",
    ]
    assert error[-1] == "  and 11 more"
    assert len(error) == 22
    assert not (tmp_path / "out").exists()


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def without_end_token(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))


def with_more_tokens(folder: Path) -> None:
    made = tokenizer()
    made.add_tokens(["abc", *(f"token{number}" for number in range(20))])
    made.add_tokens(["abcde"])
    made.save_pretrained(folder)


def without_weights(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_tokenizer, "has no tokenizer that transformers can read"),
        (without_end_token, "has no end token. Set eos_token"),
        (with_more_tokens, r"gives the token 12\d, and its model has \d+"),
        (without_weights, "model-00002-of-00004.safetensors: missing"),
    ],
)
def test_checkpoints_it_cannot_use(
    damage: Callable[[Path], None],
    sentence: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "abcde"}\n')
    config = json.loads((folder / "config.json").read_text())
    if damage is with_more_tokens:
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 120}))
    assert run(folder, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.match(rf"gptoss_opt finetune: .*{sentence}", error), error
    assert not (tmp_path / "out").exists()
    assert run(folder, data, tmp_path / "out", "--context", "200000", "--batch-tokens", "200000") == 2
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, data, tmp_path / "out", "--lr", "1e30", "--clip", "1e30", "--save-every", "1") == 2
    assert re.search(r"the loss is \S+ and the norm of its gradients nan. Use a lower --lr", capsys.readouterr().err)


def test_running_out_of_memory_is_said(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr("transformers.GptOssForCausalLM.forward", fail)
    assert run(model, data, tmp_path / "out", "--method", "full") == 2
    assert re.search(r"in a row of \d+ tokens \(tried to .*\). Use a shorter --context", capsys.readouterr().err)


def test_outputs_it_cannot_use(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(model, data, tmp_path / "file") == 2
    assert "file is a file. Give --output a folder" in capsys.readouterr().err
    assert run(model, data, tmp_path / "file" / "out") == 2
    assert re.search(r"out cannot be written to \(.*\). Give another --output", capsys.readouterr().err)


def test_several_ranks_are_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(model, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "torchrun has started 2" in error
    for page in re.findall(r"docs/\w+\.md", error):
        assert (Path(__file__).parents[2] / page).exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def write(part: Path) -> None:
        (part / "training_state.pt").write_text("whole")

    def fail(part: Path) -> None:
        write(part)
        raise OSError("no space left")

    with pytest.raises(FinetuneError, match="could not be written .no space left.. There is none before."):
        folder.save(1, fail)
    for step in (2, 4, 1000000):
        folder.save(step, write)
    with pytest.raises(FinetuneError, match="The last one is .*step-1000000"):
        folder.save(1000001, fail)
    assert list(folder.checkpoints()) == [4, 1000000]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000004", "step-1000000"]


def test_options_from_files(tmp_path: Path) -> None:
    table = tmp_path / "run.toml"
    table.write_text(
        'model = "base"\ndata = "rows.jsonl"\nlr = 1\ntargets = "q_proj"\nbatch-tokens = 64\ncontext = 32\n'
    )
    expected = {
        "model": "base",
        "data": "rows.jsonl",
        "lr": 1.0,
        "targets": ("q_proj",),
        "batch_tokens": 64,
        "context": 32,
    }
    if sys.version_info >= (3, 11):
        assert read_config(table) == expected
    same = tmp_path / "run.json"
    same.write_text(json.dumps({**expected, "batch-tokens": expected["batch_tokens"]}))
    assert read_config(same) == expected
    # What the command line says goes before.
    assert settle({**read_config(same), "lr": 2.0}).lr == 2.0


def test_toml_needs_python_3_11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text("steps = 2")
    monkeypatch.setattr(known.sys, "version_info", (3, 10, 14))
    with pytest.raises(FinetuneError, match="Python reads TOML from 3.11 on. Write the same names and values as JSON."):
        read_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "[1]", "holds no object"),
        ("a.json", "{", "is not JSON"),
        (
            "a.json",
            '{"ranks": 2, "r": 1}',
            "there is no option 'ranks', 'r'. Known are model, data, method, output, rank, ",
        ),
        ("a.json", '{"rank": "two"}', "rank: 'two' is not a whole number of at least 1."),
        ("a.json", '{"rank": true}', "rank: True is not a whole number of at least 1."),
        ("a.json", '{"lr": -1}', "lr: -1 is not a number above 0."),
        ("a.json", '{"warmup": 2}', "warmup: 2 is not a number of at least 0, at most 1."),
        ("a.json", '{"method": "qlora"}', "method: 'qlora' is not one of lora, full."),
        ("a.json", '{"truncate": "yes"}', "truncate: 'yes' is not true or false."),
        ("a.json", '{"targets": ["a", 1]}', "targets: 1 is not a text."),
        ("missing.json", None, "cannot be read"),
    ],
)
def test_config_files_it_cannot_use(name: str, content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FinetuneError, match=re.escape(sentence)):
        read_config(tmp_path / name)


def test_config_files_of_peft(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    config = str(tmp_path / "adapter_config.json")
    assert run(model, data, tmp_path / "out", "--config", config) == 2
    assert "config.use_dora is True, which is not served" in capsys.readouterr().err
    LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]).save_pretrained(tmp_path)
    assert run(model, data, tmp_path / "out", "--config", config, "--steps", "1", "--rank", "2") == 0
    saved = json.loads((tmp_path / "out" / "step-000001" / "adapter_config.json").read_text())
    assert (saved["r"], saved["target_modules"], saved["target_parameters"]) == (
        2,
        ["q_proj"],
        ["mlp.experts.down_proj"],
    )
    assert run(model, data, tmp_path / "more", "--config", config, "--steps", "1", "--targets", "k_proj") == 0
    saved = json.loads((tmp_path / "more" / "step-000001" / "adapter_config.json").read_text())
    assert (saved["r"], saved["target_modules"], saved["target_parameters"]) == (4, ["k_proj"], None)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model": ""}, "--model is needed."),
        (
            {"method": "full", "rank": 2, "targets": ("q_proj",)},
            "--rank is for --method lora, and the method is full. --targets",
        ),
        (
            {"method": "full", "adapter": {"peft_type": "LORA"}},
            "the config is that of adapters, and the method is full.",
        ),
        ({"context": 64, "max_length": 65}, "--max-length 65 does not fit into rows of --context 64 tokens."),
        ({"context": 64, "batch_tokens": 63}, "--batch-tokens 63 is less than one row of --context 64 tokens."),
        ({"steps": 2, "epochs": 2}, "--steps and --epochs say the same"),
    ],
)
def test_options_that_do_not_fit_together(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FinetuneError, match=sentence):
        settle({"model": "base", "data": "rows.jsonl", **given})


def test_what_options_are_by_default() -> None:
    lora, full = (settle({"model": "base", "data": "rows.jsonl", "method": method}) for method in ("lora", "full"))
    assert (lora.lr, lora.dtype, lora.max_length, lora.batch_tokens, lora.rows_per_step) == (
        2e-4,
        "bfloat16",
        2048,
        8192,
        4,
    )
    assert (full.lr, full.dtype) == (1e-5, "float32")


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "--rank", "0"]) == 2
    assert "argument --rank: '0' is not a whole number of at least 1" in capsys.readouterr().err
    assert cli.main(["finetune"]) == 2
    assert capsys.readouterr().err == "gptoss_opt finetune: --model is needed. --data is needed.\n"


def test_the_help_tells_every_option_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("config", "resume", "show-code", *known.OPTIONS):
        assert f"--{name.replace('_', '-')} " in shown
    for name in known.OPTIONS:
        default = getattr(Options, name)
        if default not in (None, "", False):
            assert f"(default: {default:g})" if isinstance(default, float) else f"(default: {default})" in shown


def test_losses_as_a_line_and_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.sparkline([2.0]) == "▁"
    assert report.sparkline([3.0, 3.0]) == "▁▁"
    assert report.sparkline([1.0, 2.0, 8.0]) == "▁▂█"
    long = report.sparkline([float(-number) for number in range(601)])
    assert (len(long), long[0], long[-1]) == (55, "█", "▁")
    file = tmp_path / "loss.png"
    # Where matplotlib is not there, a sentence says how to get it.
    with monkeypatch.context() as context:
        context.setattr(report.importlib.util, "find_spec", lambda name: None)
        said = report.draw([3.0, 1.0], file)
    assert said == "loss  █▁  3.000 to 1.000\nFor a picture of it: pip install matplotlib"
    assert not file.exists()
    if report.importlib.util.find_spec("matplotlib"):
        assert report.draw([3.0, 1.0], file) == f"loss  █▁  3.000 to 1.000\nA picture of it: {file}"
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_function_behind_the_command(model: Path, data: Path, tmp_path: Path) -> None:
    given = {"model": str(model), "data": str(data), "output": str(tmp_path / "out"), "context": 96, "steps": 1}
    summary = finetune(settle(given))
    assert summary.finished
    assert summary.checkpoint == tmp_path / "out" / "step-000001"
    assert settle(continued({"output": given["output"]})) == settle(given)
    assert os.listdir(summary.checkpoint)
