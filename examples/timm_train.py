"""A timm training script with three lines more: wrap, add the reverse loss, unwrap.

python examples/timm_train.py --tiny
python examples/timm_train.py --model vgg11_bn --size 224 --data path/to/folders
"""

from __future__ import annotations

import argparse

import torch
from digits import accuracy, cross_entropy
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.models.vgg import VGG
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

import racecar
from racecar.data import load_images


def images(args: argparse.Namespace) -> tuple[TensorDataset, TensorDataset, int]:
    found = load_images(args.data, limit=200 if args.tiny else None)
    parts = [(found.train_x, found.train_y), (found.test_x, found.test_y)]
    train, test = (TensorDataset(interpolate(x, args.size).expand(-1, 3, -1, -1), y) for x, y in parts)
    return train, test, len(found.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few images, a small VGG, one epoch: done in seconds")
    parser.add_argument("--model", default="vgg11_bn", help="a model of timm whose features are an nn.Sequential")
    parser.add_argument("--data", default="digits", help="digits, a folder of class folders, a zip of one, an .npz")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lam", type=float, default=1e-6)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test, classes = images(args)
    if args.tiny:
        args.epochs = 1
        model = VGG([8, "M", 16, "M"], num_classes=classes, mlp_ratio=0.01, norm_layer=torch.nn.BatchNorm2d)
    else:
        model = create_model(args.model, num_classes=classes)
    net = racecar.wrap(model.features, lam=args.lam)  # 1. behind create_model
    print(net.plan)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.01)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
    average = ModelEmaV3(model, decay=0.9)
    smoothed = LabelSmoothingCrossEntropy(0.1)
    for epoch in range(args.epochs):
        model.train()
        meter = AverageMeter()
        for x, y in DataLoader(train, 32, shuffle=True):
            loss = smoothed(model(x), y) + net.reverse_loss  # 2. behind the forward
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            meter.update(loss.item(), len(x))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {meter.avg:.3f}")
    net.unwrap()  # 3. before the model is saved as a module or exported; its state_dict is the plain one all along
    with torch.no_grad():
        x, y = test.tensors
        print(f"test loss {cross_entropy(model.eval()(x), y).item():.3f}, accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
