"""Report of a fine-tuning run, written beside the model: metrics, log, curves, evaluation, and the model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..error_text import reason
from ..evaluation.evaluate import evaluate_predictions, write_csv
from ..evaluation.evaluate import write_report as write_evaluation
from ..evaluation.plots import plot_curves
from ..whole_files import write_whole_text
from .fine_tuning import MODEL_FOLDER, DataSets, Outcome

EVALUATION_FOLDER = "evaluation"
_CARD_METRICS = ("AP", "AP50", "AP75")
_TITLE = "## Fine-tuning"
_FILL_IN = "## Fill in before sharing"
# Everything up to the next heading, because resuming a finished run replaces the section it wrote before.
_OWN_SECTION = re.compile(rf"^{_TITLE}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def write_report(folder: Path, outcome: Outcome, sets: DataSets) -> list[str]:
    """Write metrics, log, curves and evaluation, and complete the model card.

    Args:
        folder: The run's folder, which holds the finished model.
        outcome: Result of the training.
        sets: The data sets of the run.

    Returns:
        One line for each part of the report that could not be drawn, with the reason.
    """
    content = {**outcome.facts, "metrics": outcome.metrics}
    write_whole_text(folder / "metrics.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    names = list(dict.fromkeys(name for metrics in outcome.metrics.values() for name in metrics))
    figures = ((title, *(metrics[name] for name in names)) for title, metrics in outcome.metrics.items())
    write_csv(folder / "metrics.csv", ("measured", *names), figures)
    columns = list(dict.fromkeys(name for line in outcome.history for name in line))
    write_csv(folder / "log.csv", columns, ([line.get(name, "") for name in columns] for line in outcome.history))
    _complete_card(folder / MODEL_FOLDER / "README.md", outcome, sets)
    remarks = []
    try:
        plot_curves(outcome.history, folder / "curves.png")
    except ImportError as error:
        remarks.append(str(error).rstrip("."))
    if outcome.final is not None:
        details = folder / EVALUATION_FOLDER
        details.mkdir(exist_ok=True)
        truth, predictions = outcome.final.truth, outcome.final.predictions
        evaluation = evaluate_predictions(truth, predictions, truth.protocol)
        remarks += write_evaluation(details, evaluation, truth, predictions)
    return list(dict.fromkeys(remarks))


def summary(outcome: Outcome, sets: DataSets) -> str:
    """Format the metrics before and after training as a table for the terminal and the model card.

    Args:
        outcome: Result of the training.
        sets: The data sets of the run.

    Returns:
        A Markdown table; empty if nothing was measured.
    """
    rows = []
    for split, before, after in (
        (sets.final, "before", "after"),
        (sets.zero_shot, "zero_shot_before", "zero_shot_after"),
    ):
        if split is None or after not in outcome.metrics:
            continue
        for title, key in (("before", before), ("after", after)):
            metrics = outcome.metrics.get(key)
            if metrics is not None:
                figures = " | ".join(f"{metrics[metric]:.3f}" for metric in _CARD_METRICS)
                rows.append(f"| {split.name} | {title} | {figures} |")
    if not rows:
        return ""
    lines = [f"| data | fine-tuning | {' | '.join(_CARD_METRICS)} |", "|---|---|---|---|---|", *rows]
    federated = [split.name for split in (sets.final, sets.zero_shot) if split is not None and split.truth.is_federated]
    if federated:
        lines += ["", f"AP of {' and '.join(federated)} is LVIS' fixed AP: a name counts in images annotated for it."]
    return "\n".join(lines)


def _complete_card(path: Path, outcome: Outcome, sets: DataSets) -> None:
    """Add training data and metrics to the card that `save_pretrained` wrote."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    facts, train = outcome.facts, sets.train
    section = [
        _TITLE,
        "",
        f"{train.name} with {len(train.labels)} names ({', '.join(train.labels[:20])}"
        f"{', ...' if len(train.labels) > 20 else ''}), {facts['steps']} steps in {facts['minutes']:.1f} minutes, seed "
        f"{facts['seed']}.",
    ]
    if train.groups:
        section.append(f"Left out, because they only group other names: {', '.join(train.groups)}.")
    if sets.replay is not None:
        section.append(f"Images of {sets.replay.name} were mixed in (replay) to limit forgetting.")
    section += ["", summary(outcome, sets), ""]
    head, heading, tail = _OWN_SECTION.sub("", card.text).partition(_FILL_IN)
    card.text = f"{head.rstrip()}\n\n" + "\n".join(section) + (f"\n{heading}{tail}" if heading else "")
    if sets.final is not None:
        card.data.model_name = card.data.model_name or path.parent.parent.name
        card.data.eval_results = [
            EvalResult(
                task_type="zero-shot-object-detection",
                dataset_type="coco",
                dataset_name=sets.final.name,
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=round(outcome.metrics["after"][metric], 4),
            )
            for metric in _CARD_METRICS
        ]
    write_whole_text(path, str(card))


def _name_card(path: Path, name: str) -> None:
    """Replace the local folder by the repository's name, so that the example in the card runs anywhere."""
    text = path.read_text(encoding="utf-8").replace(f"\n# {MODEL_FOLDER}\n", f"\n# {name}\n", 1)
    text = text.replace(f'from_pretrained("{MODEL_FOLDER}"', f'from_pretrained("{name}"')
    write_whole_text(path, text)


def push(folder: Path, repository: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload the finished model and its card to the Hub.

    Args:
        folder: The run's folder.
        repository: Name of the repository, "user/name".
        private: Whether a new repository is private; None for the account's default.
        token: Access token; None for the stored one.

    Returns:
        Address of the upload.

    Raises:
        OSError: The Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        _name_card(folder / MODEL_FOLDER / "README.md", name)
        return str(api.upload_folder(repo_id=name, folder_path=folder / MODEL_FOLDER, commit_message="Fine-tuned"))
    # A failed connection can raise almost any exception in the Hub's client.
    except Exception as error:
        raise OSError(
            f"the upload to {repository} failed: {reason(error)}; log in with `hf auth login` and upload "
            f"{folder / MODEL_FOLDER}"
        ) from error
