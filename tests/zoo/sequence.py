"""Attention, recurrence, embeddings, einsum: channels that are features, heads or hidden units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.case import case, features, image, words


# qkv rows are (part, head, size) by one view, so q, k and v share heads and head size; the 3 parts are literal.
@case("2: qkv.o out.i", "4: qkv.o out.i", inputs=features(5, 8), own_class=False)
class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, 8))


# Projected apart, q and k share one head size and v has its own; heads are shared by all.
@case("2: q.o k.o v.o out.i", "4: q.o k.o", "4: v.o out.i", inputs=features(5, 8), own_class=False)
class SeparateAttention(nn.Module):
    """Attention spelled out, with a causal mask and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-2, -1) / 2).masked_fill(mask, float("-inf")).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(b, n, 8))


# in_proj rows are (part, head, size) again; the view inside merges batch with heads, which must come apart again.
@case(
    "~8: embed.o norm.* attention.in_proj_weight:1 attention.out_proj.o fc.i",
    "2: attention.in_proj_weight:0 attention.in_proj_bias:0 attention.out_proj.weight:1",
    "4: attention.in_proj_weight:0 attention.in_proj_bias:0 attention.out_proj.weight:1",
    inputs=features(5, 3), own_class=False,
)  # fmt: skip
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        return self.fc(x + self.attention(y, y, y, need_weights=False)[0])


# Each of 2 key heads serves 2 query heads: q heads are (key head, repeat).
@case(
    "2: q.o k.o v.o out.i", "2: q.o out.i", "4: q.o k.o v.o out.i",
    inputs=features(5, 8), own_class=False,
)  # fmt: skip
class GroupedQueryByExpand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (t[:, :, None].expand(b, 2, 2, n, 4).reshape(b, 4, n, 4) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(b, n, 16))


# The operator repeats by the ratio of the two head counts, so the ratio may shrink too.
@case("2: q.o k.o v.o out.i", "4: q.o k.o v.o out.i", inputs=features(5, 8), own_class=False)
class GroupedQueryByFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(x.transpose(1, 2).reshape(b, n, 16))


# Learned queries are read one by one by the output, so all three stay; their features are the keys' and the values'.
@case("8: query:2 k.o v.o fc.i", inputs=features(5, 8), own_class=False)
class LearnedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.k, self.v = nn.Parameter(torch.randn(1, 3, 8)), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.expand(x.shape[0], -1, -1)
        return self.fc(F.scaled_dot_product_attention(q, self.k(x), self.v(x)))


# One layer: width 8 shared by the residual, 2 heads of 4, and 6 hidden units.
@case(
    "~8: embed.o layer.self_attn.in_proj_weight:1 layer.self_attn.out_proj.o layer.norm1.* layer.norm2.* "
    "layer.linear1.i layer.linear2.o fc.i",
    "2: layer.self_attn.in_proj_weight:0 layer.self_attn.in_proj_bias:0 layer.self_attn.out_proj.weight:1",
    "4: layer.self_attn.in_proj_weight:0 layer.self_attn.in_proj_bias:0 layer.self_attn.out_proj.weight:1",
    "6: layer.linear1.o layer.linear2.i",
    inputs=features(5, 3), own_class=False,
)  # fmt: skip
class TransformerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(3, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.embed(x)))


@case("~6: embed.weight:1 norm.* up.i down.o", "5: up.o down.i", inputs=words(9, 7))
class RmsNormText(nn.Module):
    """The embedding is the output layer's weight too, so words stay and features are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.RMSNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(F.silu(self.up(self.norm(x)))))


# Rows of the gates' weights are (gate, hidden).
@case(
    "5: rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0 rnn.weight_hh_l0:1 fc.i",
    "4: embed.weight:1 rnn.weight_ih_l0:1",
    inputs=words(9, 7),
)  # fmt: skip
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embed(x))[0])


# The initial state is one tensor of zeros for all layers and directions: all lose the same hidden units.
@case(
    "3: "
    + " ".join(
        f"rnn.{kind}_{layer}:{axis}"
        for layer in ("l0", "l0_reverse", "l1", "l1_reverse")
        for kind, axis in (("weight_ih", 0), ("weight_hh", 0), ("bias_ih", 0), ("bias_hh", 0), ("weight_hh", 1))
    )
    + " rnn.weight_ih_l1:1 rnn.weight_ih_l1_reverse:1 fc.i",
    "4: embed.o rnn.weight_ih_l0:1 rnn.weight_ih_l0_reverse:1",
    inputs=features(7, 3),
)  # fmt: skip
class DeepGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(3, 4), nn.Linear(6, 2)
        self.rnn = nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embed(x))[0])


@case(
    "5: cell.weight_ih:0 cell.weight_hh:0 cell.bias_ih:0 cell.bias_hh:0 cell.weight_hh:1 fc.i",
    "4: embed.o cell.weight_ih:1",
    inputs=features(3, 3),
)  # fmt: skip
class LstmCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.fc = nn.Linear(3, 4), nn.LSTMCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = None
        for step in range(3):
            state = self.cell(x[:, step], state)
        assert state is not None
        return self.fc(state[0])


# "nchw,cd->ndhw": c is contracted, d comes from the weight.
@case("4: a.o mix:0", "5: mix:1 fc.i")
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.fc = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.einsum("nchw,cd->ndhw", self.a(x), self.mix).mean((2, 3)))


# Weight normalisation: g's rows are v's rows; each row's length runs over the inputs.
@case(
    "5: a.bias:0 a.parametrizations.weight.original0:0 a.parametrizations.weight.original1:0 fc.i",
    "~4: first.o a.parametrizations.weight.original1:1",
    inputs=image,
)  # fmt: skip
class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(5, 2)
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(self.first(x)).mean((2, 3)))


# A table looked up by a fixed index (a relative position bias) keeps its rows; its columns are the heads.
@case(
    "2: q.o k.o v.o out.i table:1", "4: q.o k.o v.o out.i",
    inputs=features(4, 8), own_class=False,
)  # fmt: skip
class PositionBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(7, 2))
        self.index: Tensor
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        q, k, v = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return self.out(x.transpose(1, 2).reshape(b, n, 8))


# Transformer-XL's shift: a view that mixes the two axes of places, and no others.
@case("2: q.o k.o v.o out.i", "4: q.o k.o", "4: v.o out.i", inputs=features(4, 8), own_class=False)
class RelativeShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        near = F.pad(q @ k.mT, (1, 0)).view(b, -1, n + 1, n)[:, :, 1:]
        x = (q @ k.mT + near).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


# Windows of 2 x 2: places move between axes and back, channels stay in theirs.
@case("4: a.o mix.i", "5: mix.o fc.i", inputs=image)
class WindowPartition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 2, 3, 1)
        b, h, w, _ = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])
        x = self.mix(torch.tanh(x))
        x = x.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return self.fc(x.mean((1, 2)))


# A mask token is written into a feature map in place.
@case("4: a.o token:0 fc.i", inputs=features(5, 3))
class WrittenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.token, self.fc = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).clone()
        x[:, 0] = self.token
        return self.fc(x)


@case("4: a.o b.i", "5: b.o fc.i", inputs=features(7, 3))
class NoGradInside(nn.Module):
    """Regions without gradients or in another precision mode are part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = self.b(x.float())
        return self.fc(x)


# The features of both sides are contracted with the two inner axes of the weight; what comes out are its rows.
@case("6: a.o both.weight:1", "5: b.o both.weight:2", "4: both.weight:0 both.bias:0 fc.i", inputs=features(3))
class BilinearLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.fc = nn.Linear(3, 6), nn.Linear(3, 5), nn.Bilinear(6, 5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.both(torch.relu(self.a(x)), self.b(x))))


# The words of a bag are looked up by number; their features are summed.
@case("6: table.weight:1 fc.i", inputs=words(7, 5))
class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.EmbeddingBag(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.table(x)))


# What is compared goes from both sides alike; one distance takes its little addition over what is left.
@case("6: a.o b.o", "~5: c.o d.o", inputs=features(3))
class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near = nn.functional.cosine_similarity(self.a(x), self.b(x))
        return near, nn.functional.pairwise_distance(self.c(x), self.d(x), keepdim=True)
