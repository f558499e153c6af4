"""The exceptions this library raises.

The reference checks its input with `assert`, so programs written for it catch `AssertionError`. Ours are proper
`ValueError`s (or `FileNotFoundError`s) that are `AssertionError`s too, and that `python -O` doesn't remove.
"""


class InputError(ValueError, AssertionError):
    """An argument can't be used; the message gives its value and what would be right."""


class CheckpointError(InputError):
    """A checkpoint or tokenizer file is damaged, hostile, or doesn't fit; the message names the file."""


class MissingFileError(FileNotFoundError, AssertionError):
    """A file or folder isn't there; the message says what was looked for and what was found instead."""


class DownloadError(RuntimeError):
    """The default model could not be fetched; the message says what to do."""
