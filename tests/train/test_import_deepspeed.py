"""What a launch script's ``--deepspeed_config`` says goes into the config, or is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_import_megatron import GPT, LLAMA

from fastllm_train.__main__ import main
from fastllm_train.config import Config, build_config
from fastllm_train.errors import UserError
from fastllm_train.migrate.deepspeed_json import apply_deepspeed_config, read_deepspeed_config
from fastllm_train.migrate.megatron_config import Migration, migrate
from fastllm_train.migrate.shell_script import training_command

FLAT = LLAMA.replace("PP=2", "PP=1")  # 16 processes: TP 2, DP 8


def applied(content: dict[str, Any], script: str = FLAT) -> tuple[Config, list[str]]:
    found = migrate(training_command(script), vocab=32000)
    assert found.notes == []
    apply_deepspeed_config(found, content)
    return build_config(found.table), found.notes


def test_the_here_document_of_the_script_is_read() -> None:
    command = training_command(LLAMA)
    content = read_deepspeed_config(command, Path())
    assert content == {"train_batch_size": 512, "x": "pretrain.py --num-layers 1"}
    quoted = LLAMA.replace("<<EOT >", "<<'EOT' >").replace(": $GLOBAL_BATCH_SIZE", ': "$GLOBAL"')
    content = read_deepspeed_config(training_command(quoted), Path())
    assert isinstance(content, dict)
    assert content["train_batch_size"] == "$GLOBAL"
    appended = LLAMA.replace("cat <<EOT > $DS_CONFIG", "cat > ${DS_CONFIG} <<- EOT")
    assert read_deepspeed_config(training_command(appended), Path()) == command_content(LLAMA)


def command_content(script: str) -> object:
    return read_deepspeed_config(training_command(script), Path())


def test_zero_and_offload() -> None:
    config, notes = applied({"zero_optimization": {"stage": 3, "overlap_comm": True}})
    assert config.parallel.zero_stage == 3
    assert notes == ["deepspeed_config: zero_optimization.stage 3 instead of the script's 0"]
    cpu, nvme = {"device": "cpu", "pin_memory": True}, {"device": "nvme", "nvme_path": "/fast"}
    for sections, offload, path in (
        ({"offload_optimizer": cpu}, "optimizer", ""),
        ({"cpu_offload": True}, "optimizer", ""),
        ({"offload_optimizer": {"device": "none"}}, "none", ""),
        ({"offload_optimizer": cpu, "offload_param": cpu}, "optimizer+params", ""),
        ({"offload_optimizer": nvme}, "optimizer", "/fast"),
    ):
        config, _ = applied({"zero_optimization": {"stage": 3, **sections}})
        assert (config.parallel.offload, config.parallel.nvme_path) == (offload, path)


def test_precision_and_clipping() -> None:
    config, notes = applied(
        {
            "bf16": {"enabled": True},
            "gradient_clipping": 0.5,
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    )
    assert (config.precision.dtype, config.precision.accumulate) == ("bf16", "fp32")
    assert config.optim.clip == 0.5
    assert notes == ["deepspeed_config: gradient_clipping 0.5 instead of the script's 1.0"]
    fp16 = {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 4}
    config, notes = applied({"fp16": {**fp16, "loss_scale": 0, "min_loss_scale": 2}})
    assert config.precision.dtype == "fp16"
    scale = config.precision
    assert (scale.loss_scale, scale.loss_scale_window) == (4096, 500)
    assert (scale.loss_scale_hysteresis, scale.min_loss_scale) == (4, 2)
    assert notes == ["deepspeed_config: fp16.enabled fp16 instead of the script's bf16"]
    _, notes = applied({"fp16": {"enabled": True, "loss_scale": 128}})
    assert "deepspeed_config: fp16.loss_scale: the scale is dynamic here" in notes
    config, notes = applied({"fp16": {"enabled": False, "initial_scale_power": 12}})
    assert (config.precision.dtype, notes) == ("bf16", [])


def test_batches_are_the_scripts_and_must_agree() -> None:
    same = {
        "train_batch_size": 512,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 16,
        "steps_per_print": 1,
        "zero_optimization": {"stage": "auto"},
    }
    assert applied(same)[1] == []
    config, notes = applied({**same, "train_batch_size": 256, "gradient_accumulation_steps": 8})
    assert config.batch.global_size == 512
    assert notes == [
        "deepspeed_config: train_batch_size 256 is not the script's 512, which is used",
        "deepspeed_config: gradient_accumulation_steps 8 is not the script's 16, which is used",
    ]


def test_what_has_no_counterpart_is_listed() -> None:
    _, notes = applied(
        {
            "optimizer": {"type": "OneBitAdam"},
            "curriculum_learning": {"enabled": True},
            "activation_checkpointing": {"cpu_checkpointing": True},
        }
    )
    assert notes == [
        "deepspeed_config: optimizer OneBitAdam: the script's options are used",
        "deepspeed_config: cpu_checkpointing: has no counterpart",
        "deepspeed_config: curriculum_learning: has no counterpart",
    ]


def test_a_file_beside_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = FLAT[: FLAT.index("cat <<EOT")] + FLAT[FLAT.index("EOT\nds_args") + 4 :]
    source, file = tmp_path / "pretrain.sh", tmp_path / "ds.json"
    source.write_text(script)
    command = ["import-megatron", str(source), "--vocab", "32000"]
    assert main(command) == 0
    assert "note: --deepspeed_config ds.json: no such file here" in capsys.readouterr().err
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "zero_stage = 2" in shown.out
    assert (
        "note: deepspeed_config: zero_optimization.stage 2 instead of the script's 0" in shown.err
    )
    assert "deepspeed_config" not in shown.err.partition("without an effect here")[2]
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"zero_optimization": 3}', "zero_optimization is 3, not an object"),
        ('{"gradient_clipping": "much"}', 'gradient_clipping is "much", not a number'),
        ("[" * 100_000, "is not JSON"),
        (" " * (1 << 20) + "{}", "is larger than"),
    ):
        file.write_text(text)
        assert main(command) == 2
        error = capsys.readouterr()
        assert message in error.err
        assert error.out == ""


def test_a_command_without_the_option() -> None:
    command = training_command(GPT.replace("--deepspeed_config", "--other"))
    assert read_deepspeed_config(command, Path()) is None
    with pytest.raises(UserError, match="not a number"):
        apply_deepspeed_config(Migration(), {"train_batch_size": True})
