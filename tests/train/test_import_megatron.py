"""Launch scripts of Megatron-LM and Megatron-DeepSpeed become configs that ``check`` accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastllm_planner.arch import count_params, preset
from fastllm_train.__main__ import main
from fastllm_train.config import build_config
from fastllm_train.errors import UserError
from fastllm_train.migrate.deepspeed_json import migrate_whole
from fastllm_train.migrate.megatron_config import migrate, read_options
from fastllm_train.migrate.shell_script import Command, training_command

# The options of a Megatron-DeepSpeed pre-training of LLaMA-2.
LLAMA = """#!/bin/bash
set -ex
DS_CONFIG=ds.json
TP=2
PP=2
ZERO_STAGE=0
GPUS_PER_NODE=8
NNODES=${WORLD_NODES:-2}
HIDDEN_SIZE=4096   # e.g. llama-13b: 5120
MICRO_BATCH_SIZE=4
GLOBAL_BATCH_SIZE=$((MICRO_BATCH_SIZE * 8 * 16))
cat <<EOT > $DS_CONFIG
{ "train_batch_size": $GLOBAL_BATCH_SIZE, "x": "pretrain.py --num-layers 1" }
EOT
ds_args=""
ds_args=" --deepspeed ${ds_args}"
ds_args=" --deepspeed_config=$DS_CONFIG ${ds_args}"
ds_args=" --zero-stage=$ZERO_STAGE ${ds_args}"
ds_args=" --deepspeed-activation-checkpointing ${ds_args}"
DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank 0 \\
    --master_addr localhost --master_port 6000"
torchrun $DISTRIBUTED_ARGS \\
       src/pretrain.py \\
       --tensor-model-parallel-size $TP \\
       --pipeline-model-parallel-size $PP \\
       --num-layers 32 --hidden-size $HIDDEN_SIZE --ffn-hidden-size 11008 \\
       --num-attention-heads 32 --num-key-value-heads 32 \\
       --micro-batch-size $MICRO_BATCH_SIZE --global-batch-size $GLOBAL_BATCH_SIZE \\
       --seq-length 4096 --max-position-embeddings 4096 --train-iters 250000 \\
       --save runs/llama --load runs/llama \\
       --data-path 0.3 data/a_text_document 0.7 "data/b text_document" --data-impl mmap \\
       --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model data/tokenizer.model \\
       --split 949,50,1 --distributed-backend nccl \\
       --lr 3e-4 --lr-decay-style cosine --min-lr 3e-5 --weight-decay 0.1 --clip-grad 1 \\
       --lr-warmup-iters 2000 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 \\
       --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --bf16 \\
       --no-query-key-layer-scaling --attention-dropout 0 --hidden-dropout 0 \\
       --use-rotary-position-embeddings --untie-embeddings-and-output-weights --swiglu \\
       --normalization rmsnorm --disable-bias-linear \\
       --recompute-granularity full --recompute-method uniform $ds_args
"""

# The options of a Megatron-DeepSpeed pre-training of GPT-3 125M.
GPT = """
SEQ_LEN=2048
GLOBAL_BATCH_SIZE=256
TRAIN_TOKENS=300000000000
TRAIN_SAMPLES=$(( 300000000000 * 2 / SEQ_LEN ))
data_options=" \\
         --vocab-file gpt2-vocab.json \\
         --merge-file gpt2-merges.txt \\
         --data-path ${DATA_PATH} \\
         --data-impl mmap"
OPTIONS=(
    --override-opt_param-scheduler
    # a comment --num-layers 99
    --adam-beta1 0.9 --adam-beta2 0.95
    --tensor-model-parallel-size 1
    --init-method-std 0.014
    --lr-decay-tokens 260000000000
    --lr-warmup-tokens 375000000
    --micro-batch-size 4
    --exit-duration-in-mins 30000000
    --global-batch-size ${GLOBAL_BATCH_SIZE}
    --num-layers 12 --hidden-size 768 --num-attention-heads 12
    --seq-length ${SEQ_LEN} --max-position-embeddings ${SEQ_LEN}
    --train-tokens ${TRAIN_TOKENS} --train-samples ${TRAIN_SAMPLES}
    --lr 6.0e-4 --min-lr 1.0e-6 --lr-decay-style cosine
    --split 949,50,1
    --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000
    --weight-decay 0.1 --clip-grad 1.0
    --hysteresis 2 --num-workers 0 --fp16 --seed 1234
    --no-async-tensor-model-parallel-allreduce --use-flash-attn
    --tensorboard-queue-size 1 --log-timers-to-tensorboard
    --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard
    --log-optimizer-states-to-tensorboard --tensorboard-dir tb
    --checkpoint-activations --deepspeed-activation-checkpointing
    --no-pipeline-parallel --zero-stage 1 --deepspeed --deepspeed_config ds.json
)
OPTIONS+=(--save runs/gpt --load runs/gpt)
deepspeed --num_gpus 8 src/pretrain_gpt.py "${OPTIONS[@]}" ${data_options}
"""


def table_of(text: str, vocab: int | None = None) -> tuple[dict[str, Any], list[str]]:
    found = migrate(training_command(text), vocab=vocab)
    return found.table, found.notes


def test_llama_s_script_becomes_the_preset_s_model_and_the_script_s_layout() -> None:
    table, notes = table_of(LLAMA, vocab=32000)
    assert notes == []
    config = build_config(table)
    assert (config.eval.every, config.eval.samples) == (1000, 10 * 512)
    assert count_params(config.model.resolve()) == count_params(preset("llama-2-7b"))
    parallel = config.parallel
    assert (parallel.tp, parallel.pp, parallel.dp, parallel.zero_stage) == (2, 2, 4, 0)
    assert parallel.recompute == "full"
    assert (config.batch.micro, config.batch.global_size, config.batch.seq_len) == (4, 512, 4096)
    assert config.data.paths == ("0.3", "data/a_text_document", "0.7", "data/b text_document")
    assert (config.optim.lr, config.optim.beta2, config.optim.clip) == (3e-4, 0.95, 1.0)
    assert (config.schedule.steps, config.schedule.warmup_steps) == (250000, 2000)
    assert (config.schedule.kind, config.schedule.min_lr) == ("cosine", 3e-5)
    assert (config.checkpoint.every, config.run.out) == (10000, "runs/llama")
    assert config.precision.dtype == "bf16"


def test_gpt_s_script_and_what_it_cannot_carry_over() -> None:
    table, notes = table_of(GPT)
    config = build_config(table)
    spec = config.model.resolve()
    assert (spec.layers, spec.hidden, spec.vocab, spec.ffn_hidden) == (12, 768, 50304, 3072)
    assert (spec.family, spec.position, spec.tied_embeddings) == ("gpt2", "learned", True)
    assert spec.qkv_bias
    assert spec.init_std == 0.014
    assert config.parallel.dp == 8
    assert config.schedule.steps == round(3e11 / (256 * 2048))  # over before --train-samples
    assert (config.data.workers, config.logging.tensorboard) == (0, True)
    assert config.schedule.warmup_steps == round(375e6 / (256 * 2048))
    text = "\n".join(notes)
    assert (config.precision.dtype, config.precision.loss_scale_hysteresis) == ("fp16", 2)
    for what in ("--exit-duration-in-mins", "--data-path", "dropout", "--merge-file"):
        assert what in text, what
    assert "falls over" in text
    assert "num-layers" not in text


# What the two launch scripts of the toolkit that fastllm replaces give to their training program.
LLAMA_OPTIONS = """
    tensor-model-parallel-size pipeline-model-parallel-size num-layers hidden-size ffn-hidden-size
    num-attention-heads num-key-value-heads micro-batch-size global-batch-size seq-length
    max-position-embeddings train-iters save load data-path data-impl tokenizer-type tokenizer-model
    split distributed-backend lr lr-decay-style min-lr weight-decay clip-grad lr-warmup-iters
    optimizer adam-beta1 adam-beta2 log-interval save-interval eval-interval eval-iters bf16
    no-query-key-layer-scaling attention-dropout hidden-dropout use-rotary-position-embeddings
    untie-embeddings-and-output-weights swiglu normalization disable-bias-linear
    recompute-granularity recompute-method deepspeed-activation-checkpointing zero-stage
    deepspeed_config deepspeed
""".split()
GPT_OPTIONS = """
    vocab-file merge-file override-opt_param-scheduler init-method-std lr-decay-tokens
    lr-warmup-tokens train-tokens train-samples exit-duration-in-mins hysteresis num-workers fp16
    seed no-async-tensor-model-parallel-allreduce use-flash-attn tensorboard-dir
    tensorboard-queue-size log-timers-to-tensorboard log-batch-size-to-tensorboard
    log-validation-ppl-to-tensorboard log-optimizer-states-to-tensorboard checkpoint-activations
    no-pipeline-parallel
""".split()
# Options that say what would be so without them → something else to say.
OTHERWISE = {
    "num-key-value-heads": "8",
    "max-position-embeddings": "8192",
    "load": "elsewhere",
    "clip-grad": "0.5",
    "optimizer": "sgd",
    "zero-stage": "2",
    "recompute-granularity": "selective",
    "deepspeed-activation-checkpointing": None,  # once --checkpoint-activations is gone, too
    "checkpoint-activations": None,
    "train-samples": "1000",
    "data-path": "data/c",
    "tokenizer-type": "GPT2BPETokenizer",  # whose vocabulary is known
}


def without(command: Command, *names: str) -> Command:
    words: list[str] = []
    kept = True
    for word in command.arguments:
        if word.startswith("--"):
            kept = word[2:].partition("=")[0] not in names
        words += [word] * kept
    return replace(command, arguments=tuple(words))


@pytest.mark.parametrize(
    ("script", "name"),
    [*((LLAMA, name) for name in LLAMA_OPTIONS), *((GPT, name) for name in GPT_OPTIONS)],
    ids=[*(f"llama {name}" for name in LLAMA_OPTIONS), *(f"gpt {name}" for name in GPT_OPTIONS)],
)
def test_every_option_is_carried_over_or_listed(script: str, name: str) -> None:
    """Leaving it out, or giving it another value, changes the config or what is said."""
    command = training_command(script)
    assert name in read_options(command.arguments)
    vocab = None if script is GPT or name == "tokenizer-type" else 32000
    if name not in OTHERWISE:
        other = without(command, name)
    elif OTHERWISE[name] is None:
        other = without(command, "deepspeed-activation-checkpointing", "checkpoint-activations")
        other = without(other, "recompute-granularity")
        command = without(command, "recompute-granularity")
    else:
        other = without(command, name)
        other = replace(other, arguments=(*other.arguments, f"--{name}={OTHERWISE[name]}"))

    def outcome(command: Command) -> object:
        try:
            return migrate_whole(command, Path(), vocab=vocab)
        except UserError as error:
            return str(error)

    assert outcome(other) != outcome(command)


def test_a_growing_batch_and_fp16_s_loss_scale_are_carried_over() -> None:
    more = " --rampup-batch-size 32 32 1000000 --lr-decay-style inverse-square-root"
    table, notes = table_of(GPT.rstrip() + more + " --initial-loss-scale 4096\n")
    config = build_config(table)
    assert config.batch.rampup == (32, 32, 1000000)
    assert config.schedule.kind == "inverse-sqrt"
    assert config.precision.loss_scale == 4096
    assert not any("rampup" in note or "loss-scale" in note for note in notes)


@pytest.mark.parametrize(("script", "vocab"), [(LLAMA, "32000"), (GPT, "50257")])
def test_check_accepts_what_is_written(
    script: str, vocab: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "pretrain.sh", tmp_path / "config.toml"
    source.write_text(script)
    if script is GPT:  # the vocabulary follows from the tokenizer, or from the option
        assert main(["import-megatron", str(source)]) == 0
        assert "vocab = 50304" in capsys.readouterr().out
    arguments = ["import-megatron", str(source), "--vocab", vocab, "--out", str(target)]
    assert main(arguments) == 0
    assert f"next: fastllm-train check {target}" in capsys.readouterr().err
    assert main(["check", str(target), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["world_size"] == (16 if script is LLAMA else 8)
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err


def test_experts_and_megatron_lm_s_names() -> None:
    table, notes = table_of(
        "torchrun --nproc-per-node=8 pretrain_gpt.py --num-layers 4 --hidden-size 64 "
        "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --swiglu "
        "--normalization RMSNorm --position-embedding-type rope --rotary-base 1000000 "
        "--disable-bias-linear --untie-embeddings-and-output-weights --seq-length 128 "
        "--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 "
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--use-distributed-optimizer --micro-batch-size 1 --global-batch-size 16 "
        "--train-samples 1600 --lr-warmup-fraction 0.1 --lr 1e-4 --vocab-size 1000 "
        "--attention-dropout 0 --hidden-dropout 0 --bf16 --data-path a --frobnicate 3"
    )
    config = build_config(table)
    spec = config.model.resolve()
    assert spec.moe is not None
    assert (spec.moe.experts, spec.moe.active_experts, spec.moe.aux_loss_coef) == (8, 2, 0.01)
    assert (spec.kv_heads, spec.rope.theta, spec.vocab) == (2, 1e6, 1024)
    assert (config.parallel.ep, config.parallel.dp, config.parallel.zero_stage) == (2, 4, 1)
    assert (config.schedule.steps, config.schedule.warmup_steps) == (100, 10)
    assert config.schedule.kind == "linear"
    assert notes == ["--frobnicate 3: has no counterpart"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo nothing\n", "runs no Python program"),
        ("torchrun a.py --lr 1\n", "--num-layers is missing"),
        (LLAMA, "does not say how many entries data/tokenizer.model has"),
        (LLAMA.replace("--lr 3e-4", "--lr $LR"), r"--lr is given \$LR, which the script"),
        (LLAMA.replace("--lr 3e-4", "--lr fast"), "--lr fast is not a number"),
        (LLAMA.replace("TP=2", "TP=3"), "16 processes do not divide into"),
        (
            GPT.replace("--train-tokens ${TRAIN_TOKENS} --train-samples ${TRAIN_SAMPLES}", ""),
            "--train-samples or --train-tokens",
        ),
    ],
)
def test_scripts_that_do_not_say_enough(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        table_of(text, None if text is LLAMA else 32000)


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"X=$(touch {mark})\nY=`touch {mark}`\npython a.py --lr $X --num-layers $Y\n"
    with pytest.raises(UserError):
        table_of(script)
    assert not mark.exists()
