"""Image tokenizer on diffusers' `VQModel`: any folder of one, any size that fits its stride, grey or RGB.

tokenizer.py   VQTokenizer, the plugin
folder.py      a VQModel's folder, read and written with every name and shape checked
pictures.py    picture files to pixels and back
training.py    VQTraining, for `multidiff fit`, with PictureData of data.py; presets.py: sizes, quantizers.py: vq, fsq
               and lfq, losses.py: gradient, perceptual and PatchGAN
weights/       what comes with it: `VQTokenizer("digits")`, `VQTokenizer("openmoji")`
"""

from multidiff_vq.tokenizer import VQTokenizer

__all__ = ["VQTokenizer"]
