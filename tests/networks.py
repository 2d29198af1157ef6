"""A zoo of tiny networks, one for each thing a model can do to its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def perturb(model: nn.Module) -> nn.Module:
    """Biases, scales and running statistics that are not zero and one, by the global generator."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn_like(buffer))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return model


@dataclass(frozen=True)
class Case:
    """A network and the shape of one datum; ``n_outputs`` is C."""

    build: Callable[[], nn.Module]
    datum: tuple[int, ...]
    n_outputs: int = 2
    integer: int = 0  # inputs are integers below this, if positive

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return perturb(self.build().to(dtype)).eval()

    def inputs(self, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.integer:
            return torch.randint(self.integer, (n, *self.datum), generator=generator)
        return torch.randn(n, *self.datum, generator=generator, dtype=torch.float64).to(dtype)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def cnn() -> nn.Module:
    """Strides, padding, dilation, groups, and one-sided paddings all at once."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh(),
        nn.Conv2d(4, 4, (2, 3), groups=2, padding="same"), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def padded(mode: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2))


def padded_by_name(padding: str) -> nn.Module:
    size = 32 if padding == "same" else 6
    return nn.Sequential(nn.Conv2d(1, 2, (2, 4), padding=padding), nn.Tanh(), nn.Flatten(), nn.Linear(size, 2))


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def many_positions() -> nn.Module:
    """Far more positions than features."""
    return nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh(), nn.Conv1d(1, 2, 1, bias=False), Apply(lambda x: x.mean(-1)))


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 2, dilation=(1, 1, 2), bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


class Residual(nn.Module):
    """In-place activation right after a convolution, in-place addition, as torchvision's ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.stem(x))
        out = self.conv2(self.relu(self.conv1(identity)))
        out += identity
        return self.head(self.relu(out).mean((2, 3)))


class Functional(nn.Module):
    """Layer functions with parameters that belong to no layer module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(2, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.weight, bias=self.bias))
        return F.conv1d(hidden[:, None], self.kernel).square().mean(-1)


class Twice(nn.Module):
    """One module used twice."""

    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1) if convolution else nn.Linear(3, 3)
        self.head = nn.Linear(2 if convolution else 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        return self.head(hidden.mean((2, 3)) if hidden.ndim == 4 else hidden)


class TiedWeights(nn.Module):
    """One weight with two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedTranspose(nn.Module):
    """An autoencoder that decodes with the transposed weight: an exact block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.T)


class Scaled(nn.Module):
    """Lone parameters: a scalar temperature and a scale of every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale, self.temperature = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) * self.scale) / self.temperature


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, one encoder layer; positions and token are lone parameters."""

    def __init__(self, batch_first: bool = True, patches: int = 2) -> None:
        super().__init__()
        self.batch_first, self.patches = batch_first, patches
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, patches + 1, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unflatten(1, (self.patches, 3)))
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        if self.batch_first:
            return self.head(self.encoder(tokens)[:, 0])
        return self.head(self.encoder(tokens.transpose(0, 1))[0])


class SequenceFirst(nn.Module):
    """Sequence-first layers whose outputs are read at one position: only gradients of several data tell the layout."""

    def __init__(self, length: int, position: int) -> None:
        super().__init__()
        self.length, self.position = length, position
        self.layer, self.norm, self.head = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (self.length, 2)).transpose(0, 1).contiguous()  # [T, N, 2]
        return self.head(torch.tanh(self.norm(self.layer(tokens)))[self.position])


class Attention(nn.Module):
    """nn.MultiheadAttention, with keys and values of other widths than the queries if asked for."""

    def __init__(self, batch_first: bool, separate: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        widths = {"kdim": 3, "vdim": 3} if separate else {}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **widths)
        self.embed, self.head, self.separate = nn.Linear(3, 4), nn.Linear(4, 2), separate

    def forward(self, x: Tensor) -> Tensor:
        values = x.unflatten(1, (3, 3))
        queries = self.embed(values)
        if not self.batch_first:
            values, queries = values.transpose(0, 1), queries.transpose(0, 1)
        others = values if self.separate else queries
        attended, _ = self.attention(queries, others, others)
        return self.head(attended.mean(1 if self.batch_first else 0))


class MergedPositions(nn.Module):
    """Data and positions merged in one dimension, as some implementations of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x.reshape(-1, 2)))  # [N * T, 2]
        return self.head(hidden.unflatten(0, (len(x), -1)).sum(1))


class MergedImages(nn.Module):
    """Several images for each datum go through one convolution together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x.flatten(0, 1)[:, None])).mean((2, 3))
        return self.head(hidden.unflatten(0, (len(x), -1)).sum(1))


class Embedded(nn.Module):
    """An embedding of tokens in any shape, averaged; a token may be padding."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, padding_idx), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).reshape(len(x), -1, 3).mean(1))


class EmbeddedTwice(nn.Module):
    """One embedding for two sequences, of which the second comes position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embedding(x[:, :2].int()), self.embedding(x[:, 2:].T)
        return self.head(torch.tanh(first.mean(1) * second.sum(0)))


class TiedEmbedding(nn.Module):
    """A language model: the outputs are inner products with the embedding; positions have one too."""

    def __init__(self, vocabulary: int = 3, length: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions, self.layer = nn.Embedding(vocabulary, 2), nn.Embedding(length, 2), nn.Linear(2, 2)
        self.register_buffer("steps", torch.arange(length))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.tokens(x) + self.positions(self.steps))).mean(1)
        return F.linear(hidden, self.tokens.weight)


class Written(nn.Module):
    """A function of inputs ``[N, 4, 3]`` and parameters, without layers; outputs are sums over tokens."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters_).sum(1)


def with_token(x: Tensor, token: Tensor, positions: Tensor, scale: Tensor) -> Tensor:
    """A class token, positions and a scale, as a vision Transformer has them."""
    tokens = torch.cat([token.expand(len(x), -1, -1), x], 1) + positions[:, :5]
    return tokens.tanh().cumsum(1)[..., :2] * scale


def heads(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Projections to heads and back with weights of three dimensions."""
    return torch.einsum("nthe,hed->ntd", torch.einsum("nti,ihe->nthe", x, first).tanh(), second)


def relative(x: Tensor, table: Tensor, queries: Tensor) -> Tensor:
    """An attention bias that is looked up at constant places, and queries that are learned."""
    index = (torch.arange(4)[:, None] - torch.arange(4)) % len(table)
    mixed = (x @ x.mT + table[index.flatten()].view(4, 4)).softmax(-1) @ x
    return (queries.repeat(len(x), 1, 1) @ mixed.mT).tanh() @ mixed[..., :2]


def standardised(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """A weight that is normalised first, as in a network without normalisation layers."""
    rows = F.batch_norm(weight.reshape(1, 2, -1), None, None, weight=gain.view(-1), training=True)
    return F.linear(x.mT, rows.reshape_as(weight)).tanh()


def attended(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Queries, keys and values from the rows of one weight, of different inputs."""
    inputs = zip((x, x.sin(), x.cos()), weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (F.linear(i, w, b) for i, w, b in inputs)
    return (q @ k.mT).softmax(-1) @ v


def by_entries(x: Tensor, base: Tensor, exponent: Tensor, floor: Tensor) -> Tensor:
    """Functions of entries, in place and out of place, of parameters in any of their places."""
    y = 2 * (x.abs() / base.exp()).pow(exponent.abs())
    y.mul_(exponent).add_(floor)
    return torch.where(x > 0, y, floor.sin())[..., :2] - floor[0]


class Recurrent(nn.Module):
    """A recurrent layer on three times, all of whose outputs are read."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        sequences = x.unflatten(1, (3, 2))
        first = self.layer.batch_first
        outputs, _ = self.layer(sequences if first else sequences.transpose(0, 1))
        return self.head(outputs.square().mean(1 if first else 0))


class Cells(nn.Module):
    """A layer of an LSTM, and one of a GRU upon it, cell by cell; the initial states are trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(2, 3), nn.GRUCell(3, 2), nn.Linear(2, 2)
        self.initial = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, self.initial.expand(len(x), -1)
        for step in x.unflatten(1, (3, 2)).unbind(1):
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
        return self.head(hidden)


class Packed(nn.Module):
    """Sequences of tokens up to the first zero, packed; they are sorted by torch, or by hand with all their tensors."""

    def __init__(self, layer: nn.Module, by_hand: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer, self.by_hand = nn.Embedding(5, 2, padding_idx=0), layer, by_hand
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.hidden, self.head = nn.Linear(width, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x != 0).cumprod(1).sum(1).clamp_min(1)
        order = lengths.argsort(descending=True) if self.by_hand else torch.arange(len(x))
        tokens, lengths = x[order], lengths[order]
        tokens = torch.where(torch.arange(x.shape[1], device=x.device) < lengths[:, None], tokens, 0)
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=self.by_hand
        )
        outputs, _ = self.layer(packed)
        outputs = outputs._replace(data=torch.tanh(self.hidden(outputs.data)))
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return self.head(padded.sum(1))[order.argsort()]


class Bags(nn.Module):
    """Tokens of a datum as one bag."""

    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 3, mode=mode, **options), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


class Upsampling(nn.Module):
    """Transposed convolutions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(x)).flatten(2).square().mean(-1))


class TiedConvolution(nn.Module):
    """An autoencoder whose transposed convolution has the weight of the convolution: an exact block."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(torch.tanh(self.encoder(x)), self.encoder.weight)[:, 0, :2]


class SingleOutput(nn.Module):
    """Returns ``[N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


class NormalisationTwice(nn.Module):
    """One normalisation layer used twice, and one whose shift alone is trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.last = nn.LayerNorm(3)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.tanh(self.norm(self.first(torch.tanh(self.norm(x)))))))


class WithoutInfluence(nn.Module):
    """A layer that is called and whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


def frozen(weight: bool, bias: bool) -> nn.Module:
    """The middle layer's weight or bias, or both, are not trainable."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight.requires_grad_(not weight)
    model[2].bias.requires_grad_(not bias)
    return model


def frozen_positions() -> nn.Module:
    """A convolution of which the bias alone is trainable, and one of which the weight alone is."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    )
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def normalised(layer: Callable[[], nn.Module]) -> nn.Module:
    """A normalisation layer between convolutions."""
    first, activation, second = nn.Conv2d(1, 4, 2, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2)
    return nn.Sequential(first, layer(), activation, second, nn.Flatten(), nn.Linear(8, 2))


def normalised_tokens(layer: Callable[[], nn.Module]) -> nn.Module:
    """A normalisation layer between linear layers on tokens ``[N, T, d]``."""
    split = Apply(lambda x: x.unflatten(1, (2, 3)))
    return nn.Sequential(split, nn.Linear(3, 4), layer(), nn.Tanh(), nn.Linear(4, 2), Apply(lambda x: x.sum(1)))


def linear_with_leading_dimensions() -> nn.Module:
    split = Apply(lambda x: x.reshape(len(x), 2, 2, 2))
    return nn.Sequential(split, nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), Apply(lambda x: x.square().mean((1, 2))))


ZOO: dict[str, Case] = {
    "mlp": Case(mlp, (3,)),
    "mlp-no-bias": Case(lambda: mlp(False), (3,)),
    "cnn": Case(cnn, (2, 6, 5)),
    "conv1d": Case(conv1d, (2, 5)),
    "many-positions": Case(many_positions, (1, 140)),
    "conv3d": Case(conv3d, (1, 3, 2, 4)),
    **{f"padding-{m}": Case(lambda m=m: padded(m), (1, 4, 4)) for m in ("zeros", "reflect", "replicate", "circular")},
    **{f"padding-{name}": Case(lambda name=name: padded_by_name(name), (1, 4, 4)) for name in ("same", "valid")},
    "residual": Case(Residual, (1, 4, 4)),
    "functional": Case(Functional, (3,)),
    "module-twice": Case(Twice, (3,)),
    "convolution-twice": Case(lambda: Twice(True), (2, 3, 3)),
    "tied-weights": Case(TiedWeights, (3,)),
    "tied-transpose": Case(TiedTranspose, (3,), 3),
    "batch-norm": Case(lambda: normalised(lambda: nn.BatchNorm2d(4)), (1, 4, 4)),
    "group-norm": Case(lambda: normalised(lambda: nn.GroupNorm(2, 4)), (1, 4, 4)),
    "instance-norm": Case(lambda: normalised(lambda: nn.InstanceNorm2d(4, affine=True)), (1, 4, 4)),
    "instance-norm-running": Case(
        lambda: normalised(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (1, 4, 4)
    ),
    "layer-norm": Case(lambda: normalised_tokens(lambda: nn.LayerNorm(4)), (6,)),
    "layer-norm-two-dimensions": Case(lambda: normalised_tokens(lambda: nn.LayerNorm((2, 4))), (6,)),
    "rms-norm": Case(lambda: normalised_tokens(lambda: nn.RMSNorm(4)), (6,)),
    "batch-norm-1d": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "normalisation-twice": Case(NormalisationTwice, (3,)),
    "lone-parameters": Case(Scaled, (3,)),
    "leading-dimensions": Case(linear_with_leading_dimensions, (8,)),
    "merged-positions": Case(MergedPositions, (6,)),
    "merged-images": Case(MergedImages, (2, 3, 3)),
    "attention": Case(lambda: Attention(True), (9,)),
    "attention-sequence-first": Case(lambda: Attention(False), (9,)),
    "attention-separate": Case(lambda: Attention(True, separate=True), (9,)),
    "transformer": Case(lambda: VisionTransformer(True), (6,)),
    "transformer-sequence-first": Case(lambda: VisionTransformer(False), (6,)),
    "transformer-sequence-first-3": Case(lambda: VisionTransformer(False, patches=3), (9,)),
    **{f"sequence-first-{t}-{p}": Case(lambda t=t, p=p: SequenceFirst(t, p), (2 * t,))
       for t, p in ((3, 0), (3, 2), (4, 0), (6, 1))},
    "embedding": Case(Embedded, (4,), integer=5),
    "embedding-one-token": Case(Embedded, (), integer=5),
    "embedding-padding": Case(lambda: Embedded(padding_idx=-2), (2, 3), integer=5),
    "embedding-twice": Case(EmbeddedTwice, (5,), integer=5),
    "embedding-tied": Case(TiedEmbedding, (4,), n_outputs=3, integer=3),
    "rnn": Case(lambda: Recurrent(nn.RNN(2, 3), 3), (6,)),
    "lstm-projected": Case(lambda: Recurrent(nn.LSTM(2, 3, proj_size=2, batch_first=True), 2), (6,)),
    "gru-bidirectional": Case(lambda: Recurrent(nn.GRU(2, 2, 2, bidirectional=True), 4), (6,)),
    "recurrent-cells": Case(Cells, (6,)),
    "packed": Case(lambda: Packed(nn.LSTM(2, 2, bidirectional=True)), (4,), integer=5),
    "packed-by-hand": Case(lambda: Packed(nn.GRU(2, 2, bias=False), by_hand=True), (4,), integer=5),
    **{f"bag-{mode}": Case(lambda mode=mode: Bags(mode, padding_idx=0), (4,), integer=5)
       for mode in ("sum", "mean", "max")},
    "transposed-1d": Case(
        lambda: Upsampling(nn.ConvTranspose1d(2, 4, 3, stride=3, padding=3, output_padding=2, groups=2),
                           nn.Tanh(), nn.ConvTranspose1d(4, 2, 2, dilation=2, bias=False)), (2, 3),
    ),
    "transposed-2d": Case(
        lambda: Upsampling(nn.ConvTranspose2d(1, 2, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2))), (1, 3, 2)
    ),
    "transposed-3d": Case(lambda: Upsampling(nn.ConvTranspose3d(1, 2, 2, stride=(1, 2, 1), padding=1)), (1, 2, 2, 3)),
    "transposed-tied": Case(TiedConvolution, (1, 4)),
    "product": Case(lambda: Written(lambda x, w, v: (w @ (x @ v).tanh()), (4, 4), (3, 2)), (4, 3)),
    "product-transposed": Case(lambda: Written(lambda x, w: F.linear(x.tanh(), w.t()), (3, 2)), (4, 3)),
    "product-in-groups": Case(lambda: Written(lambda x, w: torch.einsum("nti,tio->nto", x, w).tanh(), (4, 3, 2)),
                              (4, 3)),
    "product-and-bias": Case(
        lambda: Written(lambda x, w, b: torch.addmm(b, x.reshape(-1, 3), w).view(len(x), 4, 2).tanh(), (3, 2), (2,)),
        (4, 3),
    ),
    "heads": Case(lambda: Written(heads, (3, 2, 2), (2, 2, 2)), (4, 3)),
    "class-token": Case(lambda: Written(with_token, (1, 1, 3), (1, 6, 3), (2,)), (4, 3)),
    "relative-bias": Case(lambda: Written(relative, (5, 1), (1, 2, 3)), (4, 3)),
    "standardised": Case(lambda: Written(standardised, (2, 4), (2, 1)), (4, 3)),
    "rows-of-a-weight": Case(lambda: Written(attended, (6, 3), (6,)), (4, 3)),
    "functions-of-entries": Case(lambda: Written(by_entries, (3,), (3,), (3,)), (4, 3)),
    "similarities": Case(lambda: Written(lambda x, w: F.cosine_similarity(x[:, :, None], w, -1), (2, 3)), (4, 3)),
    "branch": Case(
        lambda: Written(lambda x, w: F.cosine_similarity(x[:, :, None], w, -1) if float(x.sum()) < 1e9 else x, (2, 3)),
        (4, 3),
    ),
    "single-output": Case(SingleOutput, (3,), 1),
    "frozen-weight": Case(lambda: frozen(True, False), (3,)),
    "frozen-bias": Case(lambda: frozen(False, True), (3,)),
    "frozen-layer": Case(lambda: frozen(True, True), (3,)),
    "frozen-in-convolutions": Case(frozen_positions, (1, 4, 4)),
    "without-influence": Case(WithoutInfluence, (3,)),
}  # fmt: skip
