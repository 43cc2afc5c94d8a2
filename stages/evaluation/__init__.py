"""What evaluate is made of; the story is `stages/evaluate.py`."""
