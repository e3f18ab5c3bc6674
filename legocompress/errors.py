"""The package's own errors; each tells what was wrong, where, what is allowed, what to do next."""


class LegoError(Exception):
    """Base of every error that this package raises on purpose.

    `exit_code` is what the command line ends with: 1 for a failure, 2 for wrong usage.
    """

    exit_code = 1


class UsageError(LegoError):
    """The caller asked for something that cannot be meant: wrong option, value or name."""

    exit_code = 2


class SpecError(UsageError):
    """A compression setting (m, o, k, dtype, rule) is out of range or malformed."""


class RecipeError(UsageError):
    """A fine-tuning recipe is missing, or says something that it may not."""


class PatternError(UsageError):
    """A layer name or pattern matches nothing."""


class ModelNameError(UsageError):
    """No library knows a model of this name."""


class OutputExistsError(UsageError):
    """The output exists and overwriting it was not asked for."""


class PlanError(LegoError):
    """The model holds nothing that can be converted, or does not fit the plan."""


class ConversionError(LegoError):
    """A layer cannot be converted as planned, such as one with weights that are not finite."""


class DenseOnlyError(LegoError):
    """An operation needs the dense weight as a tensor of its own; `to_dense` gives it back."""


class WeightsError(LegoError):
    """Weights cannot be had, read, or do not fit the architecture."""


class DeployError(LegoError):
    """A network cannot be deployed on this device, or not with these choices."""


class CheckpointError(LegoError):
    """A compressed folder is missing, damaged, or says something that cannot be true."""


class ExportError(LegoError):
    """A network cannot be written in this form, or what was written is not equal to it."""


class DataError(LegoError):
    """Images cannot be found or read."""


class KernelError(LegoError):
    """The fused kernel is not there, cannot run this layer, or was called with what cannot fit."""


class TrainingError(LegoError):
    """Training cannot go on: the loss is no number, memory is out, a worker has died."""


class OutputError(LegoError):
    """An output could not be written."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters; its type where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
