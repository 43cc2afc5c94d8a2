"""What encode-latents is made of; the story is `stages/encode_latents.py`."""
