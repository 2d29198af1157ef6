"""Networks as people have them, small, with random weights: of timm, transformers and torchvision, and hand-written.

Every one says which share of its parameters has Kronecker factors at least, so that a rule that silently stops
matching is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import Kronecker
from tests.handwritten import HANDWRITTEN

WIDTH, N_TOKENS = 16, 40


@dataclass(frozen=True)
class Architecture:
    """How to make a model and its inputs.

    Attributes:
        model: Makes the model, in double precision.
        inputs: Makes those of some data.
        kronecker: Share of its parameters with Kronecker factors, at least.
        single: Whether a part of it computes in single precision, whatever its parameters have.
        n_outputs: C.
        structure: Of the fit.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    kronecker: float = 0.0
    single: bool = False
    n_outputs: int = 3
    structure: Kronecker | None = None


def images(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(n: int) -> Tensor:
    return torch.randint(2, N_TOKENS, (n, 7))


# -- timm ------------------------------------------------------------------------------------------


def of_timm(name: str) -> Architecture:
    def model() -> nn.Module:
        timm = pytest.importorskip("timm")
        try:
            return timm.create_model(name, num_classes=3, img_size=64).double()
        except TypeError:  # any size
            return timm.create_model(name, num_classes=3).double()

    if name == "test_nfnet":  # standardised weights, whose dense blocks would be large
        return Architecture(model, images(3, 64, 64), structure=Kronecker(diagonal=("*",)))
    return Architecture(model, images(3, 64, 64), 0.95, name == "test_efficientnet_evos")


try:
    import timm as _timm

    OF_TIMM = _timm.list_models("test_*")
except ImportError:
    OF_TIMM = ["test_vit"]  # its test says that timm is missing


# -- transformers ----------------------------------------------------------------------------------


class Logits(nn.Module):
    """What is called ``logits``, or a linear layer on the mean of the last hidden states."""

    def __init__(self, model: nn.Module, pooled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(WIDTH, 3) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        return outputs.logits if self.head is None else self.head(outputs.last_hidden_state.mean(1))


TEXT = {
    "vocab_size": N_TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 3, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
IMAGE = {
    "image_size": 16, "patch_size": 4, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 3,
}  # fmt: skip
AUDIO = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3,
    "conv_dim": [8, 8], "conv_stride": [3, 2], "conv_kernel": [4, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
}  # fmt: skip
GQA = {"num_key_value_heads": 1, "head_dim": 8}
T5 = {
    "vocab_size": N_TOKENS, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
STAGES = {"num_labels": 3, "depths": [1, 1], "hidden_sizes": [8, 16]}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4,
    "num_labels": 3,
}  # fmt: skip


def of_transformers(
    kind: str, inputs: Callable[[int], Tensor], kronecker: float, *settings: dict[str, Any], config: str | None = None,
    **more: Any,
) -> Architecture:  # fmt: skip
    """A class by its name; small tables of positions have exact blocks, whence the shares."""

    def model() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        of_config = getattr(transformers, config or f"{kind.partition('For')[0].removesuffix('Model')}Config")
        values = {key: value for one in (*settings, more) for key, value in one.items()}
        network = getattr(transformers, kind)(of_config(**values))
        return Logits(network, kind.endswith("Model")).double()

    return Architecture(model, inputs, kronecker, kind.startswith(IN_SINGLE))


#: Their normalisations, softmaxes or scans are in single precision.
IN_SINGLE = ("Deberta", "Llama", "Qwen", "Gemma", "T5", "Mamba")
OF_TEXT = "ForSequenceClassification"
OF_IMAGES = "ForImageClassification"
BUCKETS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8,
           "type_vocab_size": 0}  # fmt: skip
SMALL = images(3, 16, 16)
LARGER = images(3, 32, 32)

OF_TRANSFORMERS = {
    "bert": of_transformers("Bert" + OF_TEXT, tokens, 0.89, TEXT),
    "roberta": of_transformers("Roberta" + OF_TEXT, tokens, 0.95, TEXT),
    "distilbert": of_transformers(
        "DistilBert" + OF_TEXT, tokens, 0.89, vocab_size=N_TOKENS, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24,
        num_labels=3, max_position_embeddings=24,
    ),
    "deberta": of_transformers("Deberta" + OF_TEXT, tokens, 0.7, TEXT, BUCKETS),
    "deberta-v2": of_transformers(
        "DebertaV2" + OF_TEXT, tokens, 0.65, TEXT, BUCKETS, position_buckets=4, share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    "albert": of_transformers("Albert" + OF_TEXT, tokens, 0.9, TEXT, embedding_size=8),
    "electra": of_transformers("Electra" + OF_TEXT, tokens, 0.93, TEXT, embedding_size=8),
    "mpnet": of_transformers("MPNet" + OF_TEXT, tokens, 0.95, TEXT),
    "mobilebert": of_transformers(
        "MobileBert" + OF_TEXT, tokens, 0.92, TEXT, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16
    ),
    "modernbert": of_transformers(
        "ModernBert" + OF_TEXT, tokens, 0.98, TEXT, global_attn_every_n_layers=2, local_attention=4, cls_token_id=1,
        sep_token_id=1,
    ),
    "convbert": of_transformers(
        "ConvBert" + OF_TEXT, tokens, 0.89, TEXT, embedding_size=16, num_groups=1, conv_kernel_size=3
    ),
    "fnet": of_transformers("FNet" + OF_TEXT, tokens, 0.84, TEXT),
    "gpt2": of_transformers(
        "GPT2" + OF_TEXT, tokens, 0.92, vocab_size=N_TOKENS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=24,
        num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    ),
    "gpt2-eager": of_transformers(
        "GPT2" + OF_TEXT, tokens, 0.89, vocab_size=N_TOKENS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=24,
        num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1, attn_implementation="eager", use_cache=False,
    ),
    "gpt-neox": of_transformers("GPTNeoX" + OF_TEXT, tokens, 0.96, TEXT),
    "bloom": of_transformers("Bloom" + OF_TEXT, tokens, 0.97, TEXT, n_head=2, n_layer=2),
    "opt": of_transformers("OPT" + OF_TEXT, tokens, 0.96, TEXT, ffn_dim=24, word_embed_proj_dim=WIDTH),
    "llama": of_transformers("Llama" + OF_TEXT, tokens, 0.98, TEXT, GQA),
    "qwen2": of_transformers("Qwen2" + OF_TEXT, tokens, 0.98, TEXT, GQA),
    "qwen3": of_transformers("Qwen3" + OF_TEXT, tokens, 0.97, TEXT, GQA),
    "gemma2": of_transformers("Gemma2" + OF_TEXT, tokens, 0.96, TEXT, GQA),
    "t5-encoder": of_transformers("T5EncoderModel", tokens, 0.97, T5, config="T5Config"),
    "bart": of_transformers(
        "Bart" + OF_TEXT, lambda n: torch.cat([tokens(n), torch.ones(n, 1, dtype=torch.long)], 1), 0.9,
        vocab_size=N_TOKENS, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, num_labels=3,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ),
    "mamba": of_transformers(
        "MambaModel", tokens, 0.9, vocab_size=N_TOKENS, hidden_size=WIDTH, state_size=4, num_hidden_layers=1,
        conv_kernel=3,
    ),
    "vit": of_transformers("ViT" + OF_IMAGES, SMALL, 0.91, IMAGE),
    "deit": of_transformers("DeiT" + OF_IMAGES, SMALL, 0.9, IMAGE),
    "dinov2": of_transformers("Dinov2" + OF_IMAGES, SMALL, 0.92, IMAGE),
    "beit": of_transformers(
        "Beit" + OF_IMAGES, SMALL, 0.91, IMAGE, use_relative_position_bias=True, layer_scale_init_value=0.1
    ),
    "swin": of_transformers("Swin" + OF_IMAGES, SMALL, 0.93, SWIN),
    "convnext-v2": of_transformers("ConvNextV2" + OF_IMAGES, SMALL, 0.94, STAGES, num_stages=2),
    "segformer": of_transformers(
        "Segformer" + OF_IMAGES, SMALL, 0.95, STAGES, num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    ),
    "resnet": of_transformers("ResNet" + OF_IMAGES, SMALL, 0.97, STAGES, embedding_size=8, layer_type="basic"),
    "mobilenet-v1": of_transformers(
        "MobileNetV1" + OF_IMAGES, LARGER, 0.9, image_size=32, depth_multiplier=0.05, min_depth=4, num_labels=3
    ),
    "mobilevit": of_transformers(
        "MobileViT" + OF_IMAGES, LARGER, 0.93, image_size=32, hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2, num_labels=3,
    ),
    "levit": of_transformers(
        "Levit" + OF_IMAGES, images(3, 64, 64), 0.9, image_size=64, hidden_sizes=[16, 16, 16],
        num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=3,
    ),
    "focalnet": of_transformers(
        "FocalNet" + OF_IMAGES, SMALL, 0.96, STAGES, image_size=16, embed_dim=8, focal_levels=[1, 1],
        focal_windows=[3, 3],
    ),
    "hiera": of_transformers(
        "Hiera" + OF_IMAGES, LARGER, 0.85, image_size=[32, 32], patch_size=[7, 7], patch_stride=[4, 4], embed_dim=8,
        depths=[1, 1], num_heads=[1, 2], mlp_ratio=2.0, num_query_pool=1, query_stride=[2, 2],
        masked_unit_size=[4, 4], num_labels=3,
    ),
    "videomae": of_transformers(
        "VideoMAEForVideoClassification", images(4, 3, 16, 16), 0.97, IMAGE, num_frames=4, tubelet_size=2
    ),
    "timesformer": of_transformers(
        "TimesformerForVideoClassification", images(2, 3, 16, 16), 0.85, IMAGE, num_frames=2
    ),
    "wav2vec2": of_transformers("Wav2Vec2" + OF_TEXT, images(60), 0.85, AUDIO),
    "whisper": of_transformers(
        "WhisperForAudioClassification", images(8, 20), 0.96, d_model=WIDTH, encoder_layers=2,
        encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, num_labels=3,
        classifier_proj_size=8,
    ),
}  # fmt: skip


# -- torchvision -----------------------------------------------------------------------------------


def of_torchvision(make: Callable[[Any], nn.Module], inputs: Callable[[int], Tensor], share: float) -> Architecture:
    return Architecture(lambda: make(pytest.importorskip("torchvision").models).double(), inputs, share)


def _mvit(models: Any) -> nn.Module:
    """With relative positions."""
    block = models.video.mvit.MSBlockConfig
    setting = [block(1, 8, 8, [3, 3, 3], [1, 2, 2], [1, 1, 1], [3, 3, 3]),
               block(2, 8, 16, [3, 3, 3], [1, 1, 1], [1, 2, 2], [3, 3, 3])]  # fmt: skip
    return models.video.MViT(
        (16, 16), 4, setting, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=3,
    )  # fmt: skip


def _convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=3)


class Pixel(nn.Module):
    """What a segmentation network says of one pixel, ``[N, C]``."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, images: Tensor) -> Tensor:
        return self.of(images)["out"][:, :, 3, 5]


def _features(models: Any, **names: str) -> nn.Module:
    """A small body, with the features that a segmentation network asks for."""
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()),
    )
    return models._utils.IntermediateLayerGetter(body, {place: name for name, place in names.items()})


def _lraspp(models: Any) -> nn.Module:
    return Pixel(models.segmentation.LRASPP(_features(models, low="0", high="1"), 8, 16, 3, inter_channels=8))


def _fcn(models: Any) -> nn.Module:
    head = models.segmentation.fcn.FCNHead
    return Pixel(models.segmentation.FCN(_features(models, out="1", aux="0"), head(16, 3), head(8, 3)))


OF_TORCHVISION = {
    "segmentation-lraspp": of_torchvision(_lraspp, SMALL, 0.9),
    "segmentation-fcn": of_torchvision(_fcn, SMALL, 0.9),
    "vit": of_torchvision(lambda models: models.VisionTransformer(16, 4, 2, 2, 16, 24, num_classes=3), SMALL, 0.9),
    "swin": of_torchvision(
        lambda models: models.SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=3), SMALL, 0.93
    ),
    "maxvit": of_torchvision(
        lambda models: models.MaxVit((32, 32), 8, 4, [8, 8], [1, 1], 4, 0.1, num_classes=3), LARGER, 0.88
    ),
    "densenet": of_torchvision(lambda models: models.DenseNet(4, (2, 2), 8, num_classes=3), LARGER, 0.93),
    "convnext": of_torchvision(_convnext, LARGER, 0.95),
    "video-swin": of_torchvision(
        lambda models: models.video.SwinTransformer3d([2, 4, 4], 8, [1, 1], [1, 2], [2, 4, 4], num_classes=3),
        images(3, 4, 16, 16), 0.89,
    ),
    "video-mvit": of_torchvision(_mvit, images(3, 4, 16, 16), 0.8),
}  # fmt: skip


# -- torch_geometric -------------------------------------------------------------------------------


class Graphs(nn.Module):
    """A classifier of graphs, all of one shape, that are one large graph without edges between them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 3)
        ring = torch.arange(6)
        self.register_buffer("edges", torch.stack([torch.cat([ring, ring]), torch.cat([ring.roll(1), ring.roll(2)])]))

    def forward(self, x: Tensor) -> Tensor:
        edges = (self.edges[:, None] + 6 * torch.arange(len(x))[:, None]).flatten(1)
        h = x.flatten(0, 1)
        for layer in self.layers:
            h = layer(h, edges).tanh()
        return self.head(h.reshape(len(x), 6, 8).mean(1))


def of_geometric(make: Callable[[Any], list[nn.Module]], share: float) -> Architecture:
    return Architecture(lambda: Graphs(make(pytest.importorskip("torch_geometric.nn"))).double(), images(6, 8), share)


OF_GEOMETRIC = {
    "gcn": of_geometric(lambda g: [g.GCNConv(8, 8), g.SAGEConv(8, 8)], 0.9),
    "gat": of_geometric(lambda g: [g.GATConv(8, 4, heads=2), g.GATv2Conv(8, 8)], 0.8),
    "gin": of_geometric(lambda g: [g.GINConv(nn.Linear(8, 8), train_eps=True), g.TransformerConv(8, 8)], 0.9),
}  # fmt: skip


#: Where factors are meant to be.
SHARES = (
    dict.fromkeys(["hypernetwork", "conditional-convolution", "film", "squeeze-and-excite", "u-net", "bilinear",
                   "products-of-several", "graph-convolution", "checkpoint", "unrolled",
                   "buffer-of-the-forward-pass"], 1.0)
    | dict.fromkeys(["relative-positions", "relative-positions-and-mask", "relative-positions-of-every-datum",
                     "slopes-of-distances", "latent-queries", "decoder-of-queries", "graph-attention"], 0.9)
    | dict.fromkeys(["soft-experts", "ensemble", "queries-in-a-kernel", "state-space", "prelu"], 0.8)
)  # fmt: skip

#: With functions that have no rule; those of all others have one.
WITHOUT_RULES = {
    "trainable-frequencies", "class-token-by-assignment", "own-function", "deformable-convolution", "prototypes",
    "quantised-codes", "long-convolution", "fourier-layer", "hard-experts", "ensemble-by-vmap",
    "scale-used-once-more",
    "gradient-in-the-forward-pass", "token-in-rows-of-other-data", "transformers-timesformer",
    "transformers-beit",  # its table is looked up at places that are kept from one call to the next
}  # fmt: skip

ARCHITECTURES = (
    {f"timm-{name}": of_timm(name) for name in OF_TIMM}
    | {f"transformers-{name}": case for name, case in OF_TRANSFORMERS.items()}
    | {f"torchvision-{name}": case for name, case in OF_TORCHVISION.items()}
    | {f"torch_geometric-{name}": case for name, case in OF_GEOMETRIC.items()}
    | {name: Architecture(one.make, one.inputs, SHARES.get(name, 0.0)) for name, one in HANDWRITTEN.items()}
)
