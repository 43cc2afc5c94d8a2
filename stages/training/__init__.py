"""What train-rectifier is made of; the story is `stages/train_rectifier.py`."""
