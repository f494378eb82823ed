"""A rough perceptual distance between two sounds.

Shape suffixes: B sounds, T samples, t frames, F frequencies, M mel bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks


class MelLoss(nn.Module):
    """The mean over window lengths of |Δ log mel| + |Δ mel| of magnitude spectrograms (Défossez et al. 2022, eq. 2).

    Args:
        sample_rate: in Hz.
        windows: lengths of the windows, in samples. The hops are half as long.
        floor: smaller magnitudes are treated as this one. A full-scale sine has about 6 at 256 samples.
    """

    def __init__(self, sample_rate: int, windows: tuple[int, ...] = (64, 128, 256, 512, 1024), floor: float = 3e-3):
        super().__init__()
        self.windows, self.floor = windows, floor
        for window in windows:
            bands = min(64, window // 8)
            filters_FM = melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney")
            self.register_buffer(f"filters_{window}", filters_FM * (sample_rate / window), persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, restored_BT: Tensor, waveform_BT: Tensor) -> Tensor:
        both_BT = torch.cat([restored_BT, waveform_BT]).float()
        losses = []
        for window in self.windows:
            hann = self.get_buffer(f"hann_{window}")
            spectrum_BFt = torch.stft(
                both_BT, window, window // 2, window=hann, pad_mode="constant", return_complex=True
            )
            power_BFt = spectrum_BFt.real.square() + spectrum_BFt.imag.square()
            magnitude_BFt = (power_BFt + 1e-9).sqrt() / hann.square().sum().sqrt()
            mel_BMt = self.get_buffer(f"filters_{window}").T @ magnitude_BFt
            restored_BMt, target_BMt = mel_BMt.chunk(2)
            restored_log, target_log = (mel.clamp_min(self.floor).log() for mel in (restored_BMt, target_BMt))
            losses.append(F.l1_loss(restored_log, target_log) + F.l1_loss(restored_BMt, target_BMt))
        return torch.stack(losses).mean()
