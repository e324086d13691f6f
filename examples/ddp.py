"""Data-parallel training; gradients are those of one process on the joined batch.

torchrun --nproc-per-node 2 examples/ddp.py --tiny
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py --device cuda
"""

from __future__ import annotations

import argparse
import os

import torch
from digits import Digits, accuracy, cross_entropy, data
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import racecar


def train(args: argparse.Namespace) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # every process begins with the same weights
    train_set, test = data(args.tiny)
    model = Digits().to(device)
    net = racecar.wrap(model.features, lam=args.lam)  # before DDP; `l2` sums over the batch of all processes
    parallel = DistributedDataParallel(model, device_ids=[local] if device.type == "cuda" else None)
    sampler: DistributedSampler = DistributedSampler(train_set, drop_last=True)
    loader = DataLoader(train_set, args.batch, sampler=sampler, drop_last=True)
    optimizer = torch.optim.Adam(parallel.parameters(), 1e-3)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        parallel.train()
        for x, y in loader:
            loss = cross_entropy(parallel(x.to(device)), y.to(device)) + net.reverse_loss  # net's, not parallel's
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if distributed.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    net.unwrap()
    if distributed.get_rank() == 0:
        print(f"{distributed.get_world_size()} processes, test accuracy {accuracy(model.cpu(), test):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images, one epoch: done in seconds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="of every process")
    parser.add_argument("--lam", type=float, default=1e-4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.tiny:
        args.epochs, args.batch = 1, 16
    if "RANK" not in os.environ:
        parser.error("start this by torchrun: torchrun --nproc-per-node 2 examples/ddp.py --tiny")
    distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        train(args)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
