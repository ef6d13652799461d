"""Networks in PyTorch that timm does not have, for the benchmarks; definitions as in hardjax/models."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class HeBlock(nn.Module):
    def __init__(self, channels: int, features: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=not norm)
        self.bn1, self.bn2 = ((nn.BatchNorm2d if norm else nn.Identity)(features) for _ in range(2))
        self.stride, self.room = stride, features - channels

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, 0, self.room)))


def he_resnet(blocks: int, norm: bool = True) -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=not norm), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU()]
    channels = 16
    for stage in range(3):
        for block in range(blocks):
            layers.append(HeBlock(channels, 16 * 2**stage, 2 if stage and not block else 1, norm))
            channels = 16 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def reduced_alexnet() -> nn.Module:
    layers = []
    for channels, features, kernel, pool in (
        (3, 16, 5, True),
        (16, 48, 3, True),
        (48, 96, 3, False),
        (96, 64, 3, False),
        (64, 64, 3, True),
    ):
        layers += [nn.Conv2d(channels, features, kernel, padding=kernel // 2), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if pool else []
    layers += [nn.Flatten(), nn.Linear(576, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def perceptron(inputs: int = 1024) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(inputs, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))
    )


def plain() -> nn.Module:
    """As in bench_networks.py, like the transformer below."""
    layers: list[nn.Module] = []
    for channels, features, pool in ((3, 32, False), (32, 32, True), (32, 64, False), (64, 64, True)):
        layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Any) -> Any:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        return x + self.down(functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class ViT(nn.Module):
    """Without class token and positions."""

    def __init__(self, width: int = 96, heads: int = 3, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        parts = [part for _ in range(blocks) for part in (Attention(width, heads), Wide(width))]
        self.blocks, self.norm, self.head = nn.Sequential(*parts), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Any) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


NETWORKS = {
    "mlp": perceptron,
    "alexnet_reduced": reduced_alexnet,
    "resnet8": lambda: he_resnet(1),
    "resnet20": lambda: he_resnet(3),
    "resnet32": lambda: he_resnet(5),
}


def create(name: str) -> nn.Module | None:
    """The network of that name here or in timm (if installed), in channels-last memory format, or None."""
    if name in NETWORKS:
        return NETWORKS[name]().to(memory_format=torch.channels_last)
    try:
        import timm
    except ImportError:
        return None
    if name not in timm.list_models():
        return None
    return timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
