"""The Terminator in plain PyTorch, one line a formula: what `torch_step.py` compares with.

Its parameters have the names and layout of `terminator_jax.convert`. Convolutions and
standardizations are PyTorch's own; maps are `(batch, channels, rows, columns)`.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from terminator_jax.layers.sfne import concat_order
from terminator_jax.models import TerminatorConfig

EPSILON = 1e-5
GROUPS = 12
# Where the L2 penalty counts a tensor whole, and where, of weights, a millionth of it.
WHOLE = ("channel_mixer", "bottleneck_layer", "fast_multi_branch.bias")
SLIGHT = ("slow_net_g.", "slow_net_gs_hi.", "slow_net_l", "Fast_Kernel_rgu")


def pointwise(inputs: int, outputs: int, axes: int = 2) -> nn.Module:
    """A linear map of the channels at every position."""
    return (nn.Conv1d, nn.Conv2d)[axes - 1](inputs, outputs, 1)


def instance_standardize(x: torch.Tensor) -> torch.Tensor:
    """IS: over space."""
    return F.instance_norm(x, eps=EPSILON)


def batch_standardize(x: torch.Tensor) -> torch.Tensor:
    """BS: over batch and space."""
    return F.batch_norm(x, None, None, training=True, eps=EPSILON)


def group_standardize(x: torch.Tensor) -> torch.Tensor:
    """G-IBS: BS and IS by turns."""
    pairs = x.unflatten(1, (GROUPS // 2, 2, -1))
    whole, each = (pairs[:, :, n].flatten(1, 2) for n in range(2))
    both = batch_standardize(whole), instance_standardize(each)
    return torch.stack([y.unflatten(1, (GROUPS // 2, -1)) for y in both], 2).flatten(1, 3)


class Filter(nn.Module):
    """`sin(A c + a)`, its phases in float32 as broadcast products: they are large."""

    def __init__(self, axes: int, hidden: int):
        super().__init__()
        self.linear = pointwise(axes, hidden, axes)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        shape = (1, -1) + (1,) * (grid.ndim - 2)
        terms = (grid[:, n : n + 1] * weight[:, n].view(shape) for n in range(grid.shape[1]))
        return torch.sin(sum(terms) + bias.view(shape))


class Kernel(nn.Module):
    """MAGNet: a kernel from the coordinates of its positions, with `context` from a map too."""

    def __init__(self, size, features: int, hidden: int, layers: int, context: bool = False):
        super().__init__()
        axes = len(size)
        self.filters = nn.ModuleList(Filter(axes, hidden) for _ in range(layers + 1))
        self.linears = nn.ModuleList(pointwise(hidden, hidden, axes) for _ in range(layers))
        self.output_linear = pointwise(hidden, features, axes)
        position = nn.Parameter(torch.zeros(1, 1, *size))
        if context:
            self.bias_pk = position
            self.fast_reduce = pointwise(features, hidden)
            self.fast_fc1 = pointwise(hidden, hidden)
            self.fast_linears_x = nn.ModuleList(pointwise(hidden, hidden) for _ in range(layers))
        else:
            self.bias_p = position
        lines = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None]
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """`(1, features, *size)`."""
        position = self.bias_p if x is None else self.bias_pk
        grid = self.grid.to(position.dtype)
        if x is not None:
            pooled = F.adaptive_avg_pool2d(x.to(grid.dtype), grid.shape[2:])
            reduced = self.fast_reduce(pooled).mean(0, keepdim=True)
            t = F.gelu(self.fast_fc1(reduced))
        h = self.filters[0](grid)
        for i, linear in enumerate(self.linears):
            h = self.filters[i + 1](grid) * linear(h) + position
            if x is not None:
                norm = h.flatten(2).norm(dim=2).clamp(min=1e-12)[:, :, None, None]
                h = (h.detach() + 0.1 * h / norm) * self.fast_linears_x[i](t)
        return self.output_linear(h)


class SlowNet(nn.Module):
    """A kernel that is float32 whatever the rest of the network computes in."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.Kernel = Kernel(*args, **kwargs)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(self.Kernel.grid.device.type, enabled=False):
            return self.Kernel(x)


class RGU(nn.Module):
    """The recursive gated unit."""

    def __init__(self, size, channels: int):
        super().__init__()
        for name in "kvqy":
            setattr(self, f"fast_linear_{name}", pointwise(channels, channels))
        self.bias_p = nn.Parameter(torch.zeros(1, 1, *size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = self.fast_linear_k(x)
        q = F.gelu(instance_standardize(key * self.fast_linear_q(self.fast_linear_v(x))))
        return self.fast_linear_y(q + self.bias_p)


class ChannelInteraction(nn.Module):
    """The hyper-channel interaction."""

    def __init__(self, channels: int, config: TerminatorConfig):
        super().__init__()
        self.slow_net_gc = SlowNet((channels,), 1, config.channel_hidden, config.channel_layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, kernel = x.mean((2, 3), keepdim=True), self.slow_net_gc().view(1, -1, 1, 1)
        return x * torch.sigmoid(mean * kernel * mean)


class HyperInteraction(nn.Module):
    """The hyper interaction of (y, x)."""

    def __init__(self, channels: int, config: TerminatorConfig):
        super().__init__()
        layers = config.interaction_layers
        self.slow_net_gc_hi = SlowNet((channels,), 1, config.interaction_channel_hidden, layers)
        self.slow_net_gs_hi = SlowNet(config.size, 1, config.interaction_spatial_hidden, layers)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        by_channel, by_position = y.mean((2, 3), keepdim=True), y.mean(1, keepdim=True)
        kernel = self.slow_net_gc_hi().view(1, -1, 1, 1)
        spatial = by_position * self.slow_net_gs_hi() * by_position
        return x * torch.sigmoid(spatial * (by_channel * kernel * by_channel))


class LocalMixer(nn.Module):
    """What mixes the channels of a local branch."""

    def __init__(self, channels: int):
        super().__init__()
        self.channel_mixer = pointwise(channels, channels)

    def forward(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        kernel = kernel.transpose(0, 1).to(x.dtype)
        y = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return F.gelu(batch_standardize(self.channel_mixer(y)))


class MultiBranch(nn.Module):
    """A block up to its bottleneck."""

    def __init__(self, config: TerminatorConfig, block: int):
        super().__init__()
        size, channels = config.size, config.block_channels[block]
        self.channels, self.branches = channels, config.branches
        self.order = concat_order(len(config.branches), len(config.skips[block]))
        layers = config.global_layers[block]
        self.slow_net_g = SlowNet(size, channels, config.global_hidden, layers)
        for n, branch in enumerate(config.branches, start=1):
            own, hidden = (branch.size,) * 2, config.local_hidden
            net = SlowNet(own, channels, hidden, config.local_layers, context=True)
            setattr(self, f"slow_net_l{n}", net)
            setattr(self, f"local_interact_conv_{n}", LocalMixer(channels))
            setattr(self, f"bias{n}", nn.Parameter(torch.zeros(1)))
        self.channel_mixer_mlp = pointwise(channels, channels)
        outputs = channels * config.factors[block]
        self.bottleneck_layer = pointwise(len(self.order) * channels, outputs)
        self.Fast_Kernel_rgu, self.Fast_Kernel_rgu_2 = RGU(size, channels), RGU(size, channels)
        self.channel_mixer_hci = ChannelInteraction(channels, config)
        self.hyper_interact = HyperInteraction(channels, config)

    def forward(self, x, skips) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's map and its hyper-kernel."""
        kernel = self.slow_net_g()
        hyper = (x * kernel).to(x.dtype)
        f = instance_standardize(self.Fast_Kernel_rgu_2(hyper) + self.Fast_Kernel_rgu(x))
        u = instance_standardize(self.channel_mixer_mlp(x))
        h = instance_standardize(self.channel_mixer_hci(x))
        o, o_u, o_h = (hyper @ z for z in (f, u, h))
        maps = dict(x=x, f=f, u=u, h=h, o=o, o_u=o_u, o_h=o_h, s=torch.sigmoid(o) * o)
        maps["i"] = self.hyper_interact(o, x)
        for n, branch in enumerate(self.branches, start=1):
            local = getattr(self, f"slow_net_l{n}")(maps[branch.kernel_from])
            mixed = getattr(self, f"local_interact_conv_{n}")(maps[branch.applied_to], local)
            maps[f"l{n}"] = mixed + getattr(self, f"bias{n}")
        for n, skip in enumerate(skips, start=1):
            maps[f"skip{n}"] = skip.repeat(1, self.channels // skip.shape[1], 1, 1)
        joined = torch.cat([maps[name].to(x.dtype) for name in self.order], 1)
        return self.bottleneck_layer(joined), kernel


class Block(nn.Module):
    """A slow-fast block."""

    def __init__(self, config: TerminatorConfig, block: int):
        super().__init__()
        self.fast_multi_branch = MultiBranch(config, block)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = config.dropout[block]

    def forward(self, x, skips):
        y, kernel = self.fast_multi_branch(x, skips)
        y = F.gelu(group_standardize(y)) + self.bias
        return F.dropout2d(y, self.dropout, self.training), kernel


class TorchTerminator(nn.Module):
    """Pictures `(batch, channels, rows, columns)` to logits and the blocks' hyper-kernels."""

    def __init__(self, config: TerminatorConfig):
        super().__init__()
        self.skips, self.factors = config.skips, config.factors
        self.blocks = nn.ModuleList(Block(config, n) for n in range(len(config.factors)))
        self.out_layer = nn.Linear(config.block_channels[-1], config.num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features, kernels = [], []
        for block, earlier in zip(self.blocks, self.skips, strict=True):
            x, kernel = block(x, [features[n] for n in earlier])
            features.append(x)
            kernels.append(kernel)
        return self.out_layer(x.mean((2, 3))), kernels

    def loss(self, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Label smoothing, the slow neural loss and the L2 penalty."""
        logits, kernels = self(pictures)
        loss = F.cross_entropy(logits.to(kernels[0].dtype), labels, label_smoothing=0.09)
        for i, j in itertools.combinations(range(len(kernels)), 2):
            tiled = kernels[i].repeat(1, math.prod(self.factors[i:j]), 1, 1)
            loss = loss + F.mse_loss(tiled, kernels[j])
        return loss + 5e-5 * self.norms()

    def norms(self) -> torch.Tensor:
        """The sum of the norms that the penalty counts."""
        named = list(self.named_parameters())
        whole = torch._foreach_norm([p for name, p in named if _counts_whole(name)])
        slight = torch._foreach_norm([p for name, p in named if _counts_slightly(name)])
        return torch.stack(whole).sum() + 1e-6 * torch.stack(slight).sum()


def _counts_whole(name: str) -> bool:
    return any(part in name for part in WHOLE) and "hci" not in name


def _counts_slightly(name: str) -> bool:
    return any(part in name for part in SLIGHT) and name.endswith("weight")


class Kar3:
    """The optimizer, over all parameters at once."""

    def __init__(self, params, rate: float):
        self.params, self.rate = list(params), rate
        self.fast, self.slow = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        """Changes the parameters by their gradients."""
        grads = [p.grad for p in self.params]
        for values in (grads, self.fast, self.slow):
            torch._foreach_add_(self.params, torch._foreach_sign(values), alpha=-self.rate)
        for average, beta in ((self.fast, 0.5), (self.slow, 0.95)):
            torch._foreach_lerp_(average, grads, 1 - beta)
