"""Loggers of transformers' Trainer (`--report-to`): whether each can be used, said before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Modules of which one must be installed, and what to install.
_NEEDED = {
    "azure_ml": (("azureml.core",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": (("kubeflow",), "kubeflow"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
_WORDS = ("all", "none")


def check_loggers(names: str | Sequence[str] | None) -> None:
    """Check that loggers exist and are installed.

    Args:
        names: Value of `report_to`; "all" means those that are installed.

    Raises:
        ImportError: A logger is not installed; the message says what to install.
        ValueError: There is no logger of a name.
    """
    for name in [names] if isinstance(names, str) else names or ():
        if name in _WORDS:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(set(INTEGRATION_TO_CALLBACK) & set(_NEEDED)))
            raise ValueError(f"--report-to {name} is not supported; give none, all, or some of {known}.")
        modules, package = _NEEDED.get(name, ((name,), name))
        if not any(_is_installed(module) for module in modules):
            raise ImportError(f"--report-to {name} needs {package}; pip install {package}, or leave the option out.")


def failed_logger(error: BaseException) -> str | None:
    """Return the logger whose own exception an error is, such as wandb's if there is no API key; None for others."""
    module = type(error).__module__.partition(".")[0]
    return next((name for name, (modules, _) in _NEEDED.items() if module in modules), None)


def _is_installed(module: str) -> bool:
    try:
        found = find_spec(module)
        # A folder of that name in the working directory, such as the one that wandb writes to, is no package.
        return found is not None and found.origin is not None
    except (ImportError, ValueError):
        return False
