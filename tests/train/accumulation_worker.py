"""One rank: a step of SGD over 16 micro-batches in bf16, for several settings. Argument: OUT.json

The update of the fp32 masters is compared with the micro-batches' bf16 gradients added up in fp32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from train_layouts import samples_of, tiny_config

from fastllm_train.config import Config
from fastllm_train.data import MicroBatch, read_step
from fastllm_train.distributed import join, leave, place_from_env
from fastllm_train.engine_choice import build_engine
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.models.kernels import FUSED

SETTINGS = {
    f"{accumulate}, zero {stage}": (accumulate, stage)
    for accumulate in ("model", "fp32")
    for stage in (0, 1, 2, 3)  # 0: the torch engine
}


def config_of(accumulate: str, stage: int) -> Config:
    return tiny_config(
        parallel={"zero_stage": stage, "dp": 2},
        precision={"dtype": "bf16", "accumulate": accumulate},
        batch={"micro": 1, "global": 32},
        optim={"name": "sgd", "lr": 1.0, "clip": 0.0, "weight_decay": 0.0},
        speed={"engine": "auto"},
    )


def expected(config: Config, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    spec = config.model.resolve()
    model = TrainingModel(Decoder(spec, kernels=FUSED))
    initialise(model, spec, config.run.seed)
    model.to(torch.bfloat16)
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    weight = sum(float(b.loss_mask.sum()) for b in batches)
    for b in batches:
        model.zero_grad()
        arrays = (b.tokens, b.position_ids, b.labels, b.loss_mask)
        loss = model(*(torch.from_numpy(a) for a in arrays))
        (loss.objective / weight).backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            sums[name] += param.grad.float()
    return sums


def worst(config: Config, want: dict[str, torch.Tensor], mine: list[MicroBatch]) -> float:
    engine = build_engine(config, config.model.resolve(), "cpu")
    before = {name: weight.clone() for name, weight in engine.master_parameters()}
    engine.train_step(mine, 1.0, stop=False)
    after = dict(engine.master_parameters())
    return max(float((before[n] - after[n] - w).norm() / w.norm()) for n, w in want.items())


def main() -> None:
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    found: dict[str, float] = {}
    want: dict[str, torch.Tensor] = {}
    for name, setting in SETTINGS.items():
        config = config_of(*setting)
        spec = config.model.resolve()
        source = samples_of(config, spec)
        parts = [read_step(source, 0, config.batch, 2, rank, spec.vocab) for rank in (0, 1)]
        want = want or expected(config, parts[0] + parts[1])
        found[name] = worst(config, want, parts[dist.get_rank()])
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
