"""What trained tokenizers of pictures and of sounds share: codebooks that stay in use, and an adversary."""
