"""Every error that revq raises on purpose. Each message is one line: what was expected, what was found, where, how to mend it."""


class RevqError(Exception):
    """The root of all of them; the command line prints its message and exits with 1."""


class ConfigError(RevqError):
    """A setting is outside its range, or two settings exclude each other."""


class ImageError(RevqError):
    """A folder without images, or (under `strict`) an image that cannot be read."""


class VAEError(RevqError):
    """A VAE that cannot be found, loaded or used."""


class StoreError(RevqError):
    """A latent store that is missing, incomplete, damaged or holds unusable values."""


class CodebookError(RevqError):
    """Codebooks that are missing or damaged, or that cannot be fitted on these latents."""


class TokenizerError(RevqError):
    """A tokenizer that is missing or damaged."""


class MismatchError(RevqError):
    """Two things that do not belong together: another VAE, another image size, another run."""


class OutputError(RevqError):
    """An output folder that holds something else, cannot be written, or is on a full disk."""


class HeldError(OutputError):
    """An output folder that another process is writing."""


class TrainingError(RevqError):
    """Training had to stop: the loss is not finite, or no checkpoint can be read."""
