"""CLIP's modified ResNet."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.towers.transformer import Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConfig:
    """Configuration of CLIP's modified ResNet.

    It has three stem convolutions, anti-aliased strides and attention pooling.
    """

    image_size: int
    width: int
    layers: tuple[int, int, int, int]
    heads: int


class Bottleneck(nn.Module):
    """Residual bottleneck whose stride is an average pool before the last convolution."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * 4
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)  # the branch starts at 0, as in OpenAI's initialization
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential()
        if isinstance(self.shortcut, nn.Sequential):
            self.shortcut.append(nn.AvgPool2d(stride) if stride > 1 else nn.Identity())
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.pool(out)))
        return F.relu(out + self.shortcut(x))


class ModifiedResNet(nn.Module):
    """CLIP's modified ResNet. It pools by attention, whose query is the mean of all positions."""

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width, half = config.width, config.width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        stages = []
        inputs = width
        for index, depth in enumerate(config.layers):
            planes, stride = width * 2**index, 1 if index == 0 else 2
            blocks = [Bottleneck(inputs, planes, stride)]
            inputs = planes * 4
            blocks += [Bottleneck(inputs, planes, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        positions = (config.image_size // 32) ** 2
        self.position_embedding = nn.Parameter(torch.randn(positions + 1, inputs) * inputs**-0.5)
        self.attention = Attention(inputs, config.heads, embed_dim)
        for linear in (self.attention.query, self.attention.key, self.attention.value):
            nn.init.normal_(linear.weight, std=inputs**-0.5)
        nn.init.normal_(self.attention.output.weight, std=inputs**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of convolutions."""
        return self.conv1.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images `[batch, 3, size, size]` to `[batch, dim]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in self.stages:
            x = stage(x)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position_embedding
        pooled: Tensor = self.attention(x[:, :1], x)
        return pooled[:, 0]


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every batch norm in `module` into the convolution before it, in place.

    `module` has to be in eval mode. Folding saves one multiplication per channel, and INT8 then
    quantizes convolution and batch norm as one layer.
    """
    for part in module.modules():
        names = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
        if isinstance(part, nn.Sequential):
            names = [("1", "2")]
        for conv, norm in names:
            first, second = part._modules.get(conv), part._modules.get(norm)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                part._modules[conv] = fuse_conv_bn_eval(first, second)
                part._modules[norm] = nn.Identity()
