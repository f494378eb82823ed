"""Training code that the image and audio tokenizers share: codebooks that stay in use, and a discriminator."""
