"""The `encodec` package's model in any size: SEANet encoder, residual vector quantizer, SEANet decoder.

Défossez et al. 2022, "High Fidelity Neural Audio Compression" (arXiv:2210.13438), mono and without rescaling. The
package's `n_q` is `codebooks` here, and its `bins` is `codebook_size`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from encodec.model import EncodecModel
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from torch import nn

from multidiff_autoencoder.bounds import MOST_SAMPLE_RATE
from multidiff_autoencoder.codebook import Codebook

_MOST_RATIOS = 16  # each doubles the channels


@dataclass(frozen=True)
class CodecConfig:
    """The size of a codec.

    Attributes:
        sample_rate: sample rate of the sound, Hz.
        ratios: upsampling factors of the decoder, first to last. The encoder uses them in reverse. Their product is the
            hop, the number of samples per frame.
        codebooks: number of residual levels.
        codebook_size: number of codes of each level, a power of two.
        dimension: width of latents and codes.
        encoder_filters, decoder_filters: channels at the full rate. Each ratio doubles them.
        residual_layers: residual blocks per stage.
        lstm_layers: LSTM layers at the lowest rate, in the encoder and in the decoder; 0 for none.
        causal: whether a frame depends only on earlier samples.
        convolved_skip: whether the skip connection of a residual block has a 1×1 convolution, as in Meta's models.
    """

    sample_rate: int
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    codebooks: int = 2
    codebook_size: int = 1024
    dimension: int = 128
    encoder_filters: int = 32
    decoder_filters: int = 32
    residual_layers: int = 1
    lstm_layers: int = 2
    causal: bool = True
    convolved_skip: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not 1 <= len(self.ratios) <= _MOST_RATIOS:
            raise ValueError(f"a codec needs 1 to {_MOST_RATIOS} ratios, got {len(self.ratios):,}")
        for name, value in vars(self).items():
            kind = bool if name in ("causal", "convolved_skip") else int
            least = 0 if name in ("lstm_layers", "residual_layers") else 1
            for number in value if name == "ratios" else [value]:
                if type(number) is not kind or number < (least if kind is int else 0):
                    raise ValueError(f"{name} of a codec cannot be {value!r:.80}")
        if self.sample_rate > MOST_SAMPLE_RATE:
            raise ValueError(f"sample_rate of a codec may be at most {MOST_SAMPLE_RATE:,} Hz, not {self.sample_rate:,}")
        if self.codebook_size & (self.codebook_size - 1) or self.codebook_size == 1:
            raise ValueError(f"codebook_size must be a power of two for the encodec package, got {self.codebook_size}")

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)


# Meta's 24 kHz model has 32 codebooks. It was trained for 2 of them (1.5 kbit/s) or more.
PRESETS = {
    "words-8khz": CodecConfig(
        8_000, codebooks=1, codebook_size=64, dimension=64, encoder_filters=8, decoder_filters=12, lstm_layers=1,
        causal=False, convolved_skip=False,
    ),
    "words-16khz": CodecConfig(
        16_000, ratios=(2, 4, 5, 8), codebooks=3, dimension=24, encoder_filters=16, decoder_filters=16, lstm_layers=1,
        causal=False, convolved_skip=False,
    ),  # 50 frames/s, 1.5 kbit/s; the first stride is large, because a CPU spends most time at the full rate
    "8khz": CodecConfig(
        8_000, codebooks=2, dimension=128, encoder_filters=12, decoder_filters=16, lstm_layers=1, causal=False,
        convolved_skip=False,
    ),  # 25 frames/s, 0.5 kbit/s
    "16khz": CodecConfig(
        16_000, codebooks=3, dimension=128, encoder_filters=12, decoder_filters=20, lstm_layers=1, causal=False,
        convolved_skip=False,
    ),  # 50 frames/s, 1.5 kbit/s
    "24khz": CodecConfig(24_000, codebooks=8, causal=False),  # 75 frames/s, 6 kbit/s
    "meta-24khz": CodecConfig(24_000, codebooks=32),
}  # fmt: skip


def build_model(config: CodecConfig, seed: int = 0) -> EncodecModel:
    """A model with random weights from `seed`, in evaluation mode. The global random state does not change."""
    same = {
        "dimension": config.dimension,
        "n_residual_layers": config.residual_layers,
        "ratios": list(config.ratios),
        "causal": config.causal,
        "true_skip": not config.convolved_skip,
        "lstm": config.lstm_layers,
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The package uses the older weight_norm, which its checkpoints' names follow.
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        torch.manual_seed(seed)
        encoder = SEANetEncoder(n_filters=config.encoder_filters, **same)
        decoder = SEANetDecoder(n_filters=config.decoder_filters, **same)
        quantizer = ResidualVectorQuantizer(config.dimension, config.codebooks, config.codebook_size)
        model = EncodecModel(encoder, decoder, quantizer, [], config.sample_rate, channels=1)
    return model.eval()


def codebooks_of(quantizer: ResidualVectorQuantizer) -> list[Codebook]:
    """Views of the package's codebooks, first level first."""
    names = ("embed", "cluster_size", "embed_avg")
    return [Codebook(*(book.get_buffer(name) for name in names)) for book in _books(quantizer)]


def mark_started(quantizer: ResidualVectorQuantizer) -> None:
    """Mark the codebooks as initialized, so that the package does not initialize them from its first batch."""
    for book in _books(quantizer):
        book.get_buffer("inited").fill_(1.0)


def _books(quantizer: ResidualVectorQuantizer) -> list[nn.Module]:
    return [layer.get_submodule("_codebook") for layer in quantizer.vq.layers]
