"""The options of a fine-tuning run."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from llama.errors import InputError


class TrainableWeights(NamedTuple):
    """What one value of the option `train` means."""

    name_part: str  # the trained parameters are those with this in their names
    default_lr: float


TRAIN = {
    "all": TrainableWeights("", 2e-5),
    "attention": TrainableWeights(".attention.", 2e-5),
    "norms": TrainableWeights("norm.weight", 1e-3),
    "lora": TrainableWeights("", 2e-4),  # not the model's own weights, but the LoRA matrices
}
FORMATS = ("chat", "plain")


@dataclass(frozen=True)
class TrainingParams:
    """The options of a fine-tuning run; `llama.finetune.finetune` describes them."""

    format: str
    train: str
    lr: float | None
    epochs: int
    batch_size: int
    grad_accum: int
    max_seq_len: int
    warmup: float
    weight_decay: float
    clip: float
    val_fraction: float
    save_every: int
    seed: int
    lora_rank: int
    activation_checkpointing: bool

    @property
    def peak_lr(self) -> float:
        """The highest learning rate: `lr`, or the default for what is trained."""
        return TRAIN[self.train].default_lr if self.lr is None else self.lr

    def check(self) -> None:
        """Raise InputError for a value that is out of range or of the wrong type."""
        for name, choices in (("format", FORMATS), ("train", tuple(TRAIN))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {list(choices)}")
        for name in ("epochs", "batch_size", "grad_accum", "max_seq_len", "save_every", "lora_rank"):
            if not _is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not _is_integer(self.seed):
            raise InputError(f"seed={self.seed!r} must be a whole number")
        if not _is_number(self.peak_lr) or not 0 < self.peak_lr < 1:
            raise InputError(f"lr={self.lr!r} must be a number above 0 and below 1, such as 2e-5")
        for name in ("weight_decay", "clip"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if not _is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise InputError(f"warmup={self.warmup!r} must be a fraction of at least 0 and at most 1")
        if not _is_number(self.val_fraction) or not 0 <= self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction!r} must be a fraction of at least 0 and below 1")
        if not isinstance(self.activation_checkpointing, bool):
            raise InputError(f"activation_checkpointing={self.activation_checkpointing!r} must be True or False")

    def settings(self) -> dict[str, Any]:
        """Return the options that the result depends on, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
