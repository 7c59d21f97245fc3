"""FID's InceptionV3 in torch, module by module as pytorch-fid has it: what ours is compared with."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    def __init__(self, inside, outside, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def mean(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, inside, pool):
        super().__init__()
        self.branch1x1 = Conv(inside, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inside, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inside, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3, self.branch_pool = Conv(96, 96, 3, padding=1), Conv(inside, pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(mean(x))], 1)


class B(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.branch3x3 = Conv(inside, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inside, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, inside, c):
        super().__init__()
        wide, high = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1, self.branch_pool = Conv(inside, 192, 1), Conv(inside, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(inside, c, 1), Conv(c, c, **wide)
        self.branch7x7_3 = Conv(c, 192, **high)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(inside, c, 1), Conv(c, c, **high)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, **wide), Conv(c, c, **high)
        self.branch7x7dbl_5 = Conv(c, 192, **wide)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(mean(x))], 1)


class D(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(inside, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inside, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, inside, largest):
        super().__init__()
        self.largest = largest
        wide, high = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1, self.branch_pool = Conv(inside, 320, 1), Conv(inside, 192, 1)
        self.branch3x3_1 = Conv(inside, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **wide), Conv(384, 384, **high)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inside, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **wide), Conv(384, 384, **high)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else mean(x)
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        split += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """uint8 [b h w 3] to features [b 2048]; FID's at size 299."""

    def __init__(self, size=299):
        super().__init__()
        self.size = size
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3, padding=1), Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768), E(1280, False), E(2048, True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pictures):
        x = pictures.permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


def randomised(module, seed=0):
    """Weights that keep activations alive through fifty layers, and statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            if name.endswith(("conv.weight", "fc.weight")):
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("bn.weight", "running_var")):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif name.endswith(("bn.bias", "running_mean")):
                tensor.copy_(0.1 * noise)
    return module.eval()
