"""What all ranks do together: one acts for all, one speaks for all, all learn of a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist

from fastllm_train.errors import PeerError, UserError


def on_rank_0(action: Callable[[], object]) -> None:
    """Run on rank 0 while the others wait; a failure there is an error on every rank."""
    failed: list[str | None] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, UserError) as error:
            failed = [str(error)]
            failure = error
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        if dist.get_rank() == 0:
            raise UserError(failed[0], hint=getattr(failure, "hint", "")) from failure
        raise PeerError(failed[0])


def say(text: str) -> None:
    """One line of the log: stderr, rank 0 only."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)
