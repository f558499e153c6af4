"""The exceptions this library raises.

The reference checks its input with `assert`, so programs written for it catch `AssertionError`. Ours are ordinary
`ValueError`s (or `FileNotFoundError`s) that are `AssertionError`s as well, and `python -O` doesn't remove them.
"""


class InputError(ValueError, AssertionError):
    """An argument is invalid; the message gives its value and what would be valid."""


class CheckpointError(InputError):
    """A checkpoint or tokenizer file is damaged, hostile or not supported; the message names the file."""


class MissingFileError(FileNotFoundError, AssertionError):
    """A file or folder does not exist; the message says what was looked for and what is there instead."""


class DownloadError(RuntimeError):
    """The default model could not be downloaded; the message says what to do."""
