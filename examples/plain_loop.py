"""A training loop of one's own: autocast, scaled losses, accumulated gradients, a moving average, torch.compile.

python examples/plain_loop.py --tiny
python examples/plain_loop.py --dtype bfloat16 --accumulate 2 --compile
"""

from __future__ import annotations

import argparse

import torch
from digits import Digits, accuracy, cross_entropy, data
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import racecar
from racecar.schedules import LamSchedule, cosine, warmup


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    train_set, test = data(args.tiny)
    model = Digits().to(device, memory_format=torch.channels_last)
    # `mean`, so that neither the batch's size nor the number of accumulated steps changes what λ means
    net = racecar.wrap(model.features, lam=args.lam, reduction="mean", memory=args.memory)
    print(net.plan)

    run = torch.compile(model, fullgraph=True, backend=args.compile) if args.compile else model
    loader = DataLoader(train_set, args.batch, shuffle=True, drop_last=True)
    steps = args.epochs * (len(loader) // args.accumulate)
    schedule = LamSchedule(net, warmup(max(1, steps // 10), then=cosine(max(1, steps - steps // 10), end=0.1)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

    step = 0
    for epoch in range(args.epochs):
        model.train()
        for i, (x, y) in enumerate(loader):
            schedule.set(step)
            with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                out = run(x.to(device, memory_format=torch.channels_last))
            loss = cross_entropy(out.float(), y.to(device)) + net.reverse_loss
            scaler.scale(loss / args.accumulate).backward()
            if (i + 1) % args.accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                average.update_parameters(model)
                step += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, of which reverse {net.reverse_loss.item():.3f}")

    net.unwrap()  # the plain model again
    print(f"test accuracy {accuracy(model.cpu(), test):.3f}, of the average {accuracy(average.cpu(), test):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images, one epoch: done in seconds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lam", type=float, default=1.0, help="λ; the reverse loss is a mean over elements here")
    parser.add_argument("--memory", choices=["store", "recompute"], default="store")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step of the optimiser")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--compile", nargs="?", const="inductor", help="backend of torch.compile")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.tiny:
        args.epochs = 1
    train(args)


if __name__ == "__main__":
    main()
