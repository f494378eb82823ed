"""An image tokenizer for diffusers' `VQModel`: greyscale or RGB, any size that is a multiple of the model's stride.

tokenizer.py   VQTokenizer, the plugin
folder.py      reads and writes the folder of a VQModel, and checks every name and shape
pictures.py    reads and writes image files
resize.py      brings images to a size that fits the model
training.py    VQTraining for `multidiff fit`, with data.py (PictureData), presets.py (sizes), quantizers.py (vq, fsq
               and lfq) and losses.py (gradient, perceptual and PatchGAN)
weights/       shipped weights: `VQTokenizer("digits")` and `VQTokenizer("openmoji")`
"""

from multidiff_vq.tokenizer import VQTokenizer

__all__ = ["VQTokenizer"]
