"""Training over two processes: DDP and FSDP2 give the gradients of one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssmcore.torch import MambaConfig, MambaLMHeadModel

PROCESSES = 2
CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=32, ssm_cfg={"d_state": 4})


def make() -> tuple[MambaLMHeadModel, Tensor]:
    torch.manual_seed(0)
    return MambaLMHeadModel(CONFIG), torch.randint(0, 32, (2 * PROCESSES, 20))


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def train(rank: int, port: int, method: str, file: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        model: Any
        model, ids = make()
        if method == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (PROCESSES,))
            for layer in model.backbone.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        reduced = gradients(model, ids[2 * rank : 2 * rank + 2])
        whole = {
            name: grad.full_tensor() if method == "fsdp" else grad for name, grad in reduced.items()
        }
        if rank == 0:
            torch.save(whole, file)
        # While this waits, Gloo's threads can drop what they hold of Python. Destroying the group
        # before they have would wait for them with the interpreter's lock, which they wait for.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(method: str, tmp_path: Path) -> None:
    file = tmp_path / "gradients.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, args=(port, method, file), nprocs=PROCESSES)
    expected = gradients(*make())
    actual = torch.load(file, weights_only=True)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-6)
