"""Every error that revq raises on purpose. Each message is one line: what was expected, what was found, where, how to mend it.

Where Python has a word for what went wrong, the error is that too: `except FileNotFoundError` finds a store that is missing.
"""

import re

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class RevqError(Exception):
    """The root of all of them; the command line prints its message and exits with 1."""


class NotFoundError(RevqError, FileNotFoundError):
    """Nothing is there. It is an OSError, so reading a single image never raises it: an OSError there is that image's own fault."""


class ConfigError(RevqError, ValueError):
    """A setting is outside its range, or two settings exclude each other."""


class ConfigNotFoundError(ConfigError, NotFoundError):
    """A file that a setting names is missing."""


class ImageError(RevqError):
    """A folder without images, or (under `strict`) an image that cannot be read."""


class ImageNotFoundError(ImageError, NotFoundError):
    """A source of images that is missing, or a part of it."""


class VAEError(RevqError):
    """A VAE that cannot be found, loaded or used."""


class VAENotFoundError(VAEError, NotFoundError):
    """A VAE that is neither here nor to be had from the model hub."""


class StoreError(RevqError):
    """A latent store that is missing, incomplete, damaged or holds unusable values."""


class StoreNotFoundError(StoreError, NotFoundError):
    """A latent store that is missing."""


class CodebookError(RevqError):
    """Codebooks that are missing or damaged, or that cannot be fitted on these latents."""


class CodebookNotFoundError(CodebookError, NotFoundError):
    """A folder without codebooks, or no folder at all."""


class TokenizerError(RevqError):
    """A tokenizer that is missing or damaged."""


class TokenizerNotFoundError(TokenizerError, NotFoundError):
    """A tokenizer that is neither here nor to be had from the model hub."""


class MismatchError(RevqError, ValueError):
    """Two things that do not belong together: another VAE, another image size, another run."""


class OutputError(RevqError):
    """An output folder that holds something else, cannot be written, or is on a full disk."""


class HeldError(OutputError, BlockingIOError):
    """An output folder that another process is writing."""


class TrainingError(RevqError, RuntimeError):
    """Training had to stop: the loss is not finite, or no checkpoint can be read."""


def one_line(error: BaseException, *, most: int | None = 200) -> str:
    """What an error says, in one line of at most `most` characters (None: all), or its type where it says nothing.

    Addresses of memory are left out: the same damaged file gives the same reason in every run.
    """
    return _ADDRESS.sub("", " ".join(str(error).split()))[:most] or type(error).__name__
