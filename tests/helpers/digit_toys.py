"""Throwaway tokenizers of real items: letters of a text, a mosaic of a picture, the loudness of a sound."""

import soundfile
import torch
from PIL import Image

from multidiff.tokenizer import Audio, Codes
from tests.helpers.toys import Frames, Grid


class Letters(Frames):
    """The 128 ASCII characters."""

    modality = "text"

    def __init__(self):
        super().__init__((128,))

    def encode(self, items):
        return [self._codes(list(item.encode()), self.canvas(tokens=len(item))) for item in items]

    def decode(self, codes):
        return ["".join(map(chr, code.ids_N.tolist())) for code in codes]

    def canvas(self, tokens=24):
        place_N = torch.arange(tokens)
        return Codes(place_N * 0, place_N * 0, place_N[:, None].repeat(1, 3), {"tokens": tokens})

    def examples(self):
        return ["a seven"]


class Mosaic(Grid):
    """32x32 pictures as 8x8 tiles of eight greys."""

    modality = "image"

    def __init__(self):
        super().__init__(8, 8, 8)

    def encode(self, items):
        tiles = (item.resize((8, 8), Image.Resampling.BOX).tobytes() for item in items)
        return [self._codes([grey // 32 for grey in tile], self.canvas()) for tile in tiles]

    def decode(self, codes):
        greys = ((code.ids_N * 36).to(torch.uint8).view(8, 8).numpy() for code in codes)
        return [Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR) for grey in greys]

    def read(self, value, folder):
        return Image.open(folder / value).convert("L")

    def preview(self, item):
        return item

    def examples(self):
        return [Image.new("L", (32, 32))]


class Beeps(Frames):
    """Loudness and zero crossings of 20 ms at 8 kHz, played as a tone."""

    modality = "audio"

    def __init__(self):
        super().__init__((8, 4))

    def encode(self, items):
        encoded = []
        for item in items:
            frames_FT = item.waveform.mean(0)[:: item.sample_rate // 8000].unfold(0, 160, 160)
            loud_F = (frames_FT.square().mean(1).sqrt() * 20).long().clamp(0, 7)
            pitch_F = (frames_FT.sign().diff().abs().mean(1) * 4).long().clamp(0, 3)
            ids = torch.stack([loud_F, pitch_F], 1).flatten().tolist()
            encoded.append(self._codes(ids, self.canvas(frames=len(frames_FT))))
        return encoded

    def decode(self, codes):
        sounds = []
        for code in codes:
            loud_F, pitch_F = code.ids_N.view(-1, 2).repeat_interleave(160, 0).unbind(1)
            phase_T = (0.2 * (1 + pitch_F)).cumsum(0)
            sounds.append(Audio((loud_F / 20 * phase_T.sin())[None].float(), 8000))
        return sounds

    def canvas(self, frames=24):
        return super().canvas(frames)

    def read(self, value, folder):
        waveform, rate = soundfile.read(folder / value, dtype="float32", always_2d=True)
        return Audio(torch.from_numpy(waveform.T), rate)

    def preview(self, item):
        heights = (torch.cat([item.waveform[0], torch.zeros(1)])[::160].abs() * 255).to(torch.uint8)
        return Image.fromarray(heights[None].repeat(24, 1).numpy())

    def examples(self):
        return [Audio(torch.zeros(1, 1600), 8000)]
