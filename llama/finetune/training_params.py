"""What a run of fine-tuning can be asked for."""

from dataclasses import asdict, dataclass
from typing import Any

from llama.errors import InputError

# What `train` may be -> what the names of the trained parameters have in common, and a usual learning rate.
TRAIN = {
    "all": ("", 2e-5),
    "attention": (".attention.", 2e-5),
    "norms": ("norm.weight", 1e-3),
    "lora": ("", 2e-4),  # of the adapters
}
FORMATS = ("chat", "plain")


@dataclass(frozen=True)
class TrainingParams:
    """How to fine-tune. `llama.finetune.finetune` says what each means, and what it is when left out."""

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
    def peak_rate(self) -> float:
        return TRAIN[self.train][1] if self.lr is None else self.lr

    def check(self) -> None:
        """Raise InputError for a value that can't be used."""
        for name, known in (("format", FORMATS), ("train", tuple(TRAIN))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {list(known)}")
        for name in ("epochs", "batch_size", "grad_accum", "max_seq_len", "save_every", "lora_rank"):
            if not _is_number(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not _is_number(self.seed, int):
            raise InputError(f"seed={self.seed!r} must be a whole number")
        if not _is_number(self.peak_rate, float) or not 0 < self.peak_rate < 1:
            raise InputError(f"lr={self.lr!r} must be a number above 0 and below 1, such as 2e-5")
        for name in ("weight_decay", "clip"):
            if not _is_number(getattr(self, name), float) or not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if not _is_number(self.warmup, float) or not 0 <= self.warmup <= 1:
            raise InputError(f"warmup={self.warmup!r} must be a part of the steps, from 0 to 1")
        if not _is_number(self.val_fraction, float) or not 0 <= self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction!r} must be a part of the examples, from 0 to below 1")
        if not isinstance(self.activation_checkpointing, bool):
            raise InputError(f"activation_checkpointing={self.activation_checkpointing!r} must be True or False")

    def settings(self) -> dict[str, Any]:
        """All that the outcome depends on, as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


def _is_number(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else int
    return isinstance(value, kinds) and not isinstance(value, bool)
