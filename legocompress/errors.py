"""The errors of this package: what is wrong, where, what is allowed, and what to do next."""


class LegoError(Exception):
    """Base of all errors that this package raises on purpose.

    `exit_code` is what the command line ends with: 1 for a failure, 2 for wrong usage.
    """

    exit_code = 1


class UsageError(LegoError):
    """An option, value or name is wrong."""

    exit_code = 2


class SpecError(UsageError):
    """A compression setting (m, o, k, dtype, rule) is out of range or malformed."""


class RecipeError(UsageError):
    """A fine-tuning recipe is missing or not valid."""


class PatternError(UsageError):
    """A layer name or pattern matches nothing."""


class ModelNameError(UsageError):
    """No library knows a model of this name."""


class OutputExistsError(UsageError):
    """The output exists already, and `force` was not given."""


class PlanError(LegoError):
    """The model holds nothing that can be converted, or does not fit the plan."""


class ConversionError(LegoError):
    """A layer cannot be converted as planned, such as one with weights that are not finite."""


class DenseOnlyError(LegoError):
    """An operation needs the dense weight as a tensor; `to_dense` restores it."""


class WeightsError(LegoError):
    """Weights cannot be downloaded or read, or do not fit the architecture."""


class DeployError(LegoError):
    """A network cannot be deployed on this device, or not with these choices."""


class QuantizationError(LegoError):
    """A network cannot be quantised, or is quantised already."""


class CheckpointError(LegoError):
    """A compressed folder is missing, damaged or contradictory."""


class ExportError(LegoError):
    """A network cannot be exported in this form, or the exported file computes something else."""


class DataError(LegoError):
    """Images cannot be found or read."""


class KernelError(LegoError):
    """The kernels are not available, cannot run this layer, or got arguments that do not fit."""


class TrainingError(LegoError):
    """Training cannot go on: the loss is not finite, memory is full, or a worker has died."""


class OutputError(LegoError):
    """An output could not be written."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters; its type where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
