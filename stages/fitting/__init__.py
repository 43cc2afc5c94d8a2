"""What fit-codebooks is made of; the story is `stages/fit_codebooks.py`."""
