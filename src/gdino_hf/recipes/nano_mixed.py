"""Train gdino-nano further, on everyday and wild photographs, with its teacher's boxes for the decoder too.

    python -m gdino_hf.recipes.nano_mixed --everyday everyday --wild wild --backbone csp_pan_head --output runs/mixed
    python -m gdino_hf.recipes.nano_rating runs/mixed --everyday everyday --wild wild

The second command rates the newest checkpoint at any time. To resume an interrupted run, repeat the first: it continues
from the last checkpoint, which is at most four minutes old. The defaults below are the configuration of the run.

What differs from `gdino_hf.recipes.nano`, and why:

- On everyday/val at 320x320, the closed-set teacher reaches AP50 0.373 (AP 0.230) with one linear layer on the frozen
  backbone's features; the shipped model's encoder reaches 0.311 (0.176) with non-maximum suppression, and its decoder
  0.259 (0.156), or 0.287 (0.164) with suppression; `gdino_hf.recipes.nano_stages` measures this. The decoder loses
  most, so it gets a teacher of its own, see teacher_boxes.py, and the backbone stays frozen unless
  `--backbone-lr-factor` is given.
- Wild photographs are `--wild-share` of all, each set with its rare names sampled more often, see mixed_data.py.
- Every 20th everyday photograph is never drawn: nano_scores.py fits the scores on these.
- A share of the names is replaced by synonyms, plurals and phrases, see wordings.py.
- With `--mosaic`, a share of the everyday photographs has others beside them, see side_by_side.py.
- It starts from a trained model with a learning rate of 5e-5, level until the last `--decay-steps`. Steps and not
  time drive the schedule, because a run in the background of a busy machine gets an unknown share of it. Weights are
  averaged, so that a checkpoint in the level part can be rated and kept.
- With `--paste`, a share of them has objects of others pasted into it, every name as often, see pasted_objects.py.
- With `--region-model`, regions that nobody annotated get names from this model and an ImageNet classifier, see
  region_names.py.
- With `--image-sizes`, each batch has one of several sizes.
- States of the frozen text encoder are kept by phrase, see phrase_states.py. Decoding and resizing photographs takes
  1.7 % of a step, which storing them would not be worth.

Cost: 2.5 to 3.7 s on one core of a busy machine for a step of 8 photographs, a fifth more with the backbone trained.
Result of the first 215 steps, from the embedded model of AP 0.156 / AP50 0.259 on everyday/val and 0.058 / 0.103 on
wild/val: 0.166 / 0.267 and 0.083 / 0.141. Suppression would still add 0.014 / 0.039 to the decoder. The next 580 steps
at the same learning rate changed nothing; the model card's laboratory record has the figures and what they say.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.coco import category_names, read_coco
from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.reproducible_sampling import ReproducibleDataset
from ..data.transforms import Compose
from ..model.csp_pan import CspPanBackbone
from ..model.losses import LossWeights
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from ..training.saving import last_checkpoint
from ..whole_files import write_whole_text
from .closed_set_teacher import RESIDUAL_OUTPUTS, DenseLoss, same_weights
from .mixed_data import HOLD_OUT, held_out, mixed_weights
from .nano import Lesson, NanoTrainer, add_shared_options, augmentation, export, teacher_of, warm_start
from .nano_rating import told_model
from .nano_rows import read_rows
from .pasted_objects import PastedObjects
from .phrase_states import PhraseStates
from .recipe_training import train_to_the_end, training_arguments
from .side_by_side import SideBySide
from .teacher_boxes import set_loss, teacher_boxes
from .teacher_start import start_from_teacher
from .wordings import Reworded, Wordings

# Where the parameters of the image's way through the encoder lie, and where those lie that follow it.
ENCODER = ("model.input_proj_vision.", "model.level_embed", "model.encoder.", "model.enc_output")
DECODER = ("model.decoder.", "bbox_embed.", "model.encoder_output_bbox_embed.", "class_embed.")
# Options that a resumed run may change.
_FREE = (
    "steps", "decay_steps", "minutes", "output", "export", "everyday", "wild", "backbone", "start", "workers", "device",
    "region_model", "region_classifier", "region_class_names",
)  # fmt: skip


class MixedTrainer(NanoTrainer):
    """NanoTrainer whose decoder learns from the teacher's boxes too, and whose backbone may be trained.

    Args:
        *args: Arguments of NanoTrainer; `model`, `args` and `names` must be given by name.
        wordings: Wordings of all names, so that the teacher knows its classes under each of them.
        set_weight: Weight of the class term of `set_loss`.
        teacher_backbone: The image backbone that the teacher was trained with.
        without: Names that the teacher must not tell anything about.
        decoder_only: Whether only the parameters that follow the encoder are trained.
        branch_factor: Factor of the learning rate of the residual branches' last matrices.
        encoder_factor: Factor of the encoder's learning rate.
        **kwargs: Arguments of NanoTrainer.
    """

    def __init__(
        self,
        *args: Any,
        wordings: Wordings,
        set_weight: float,
        teacher_backbone: CspPanBackbone,
        without: Sequence[str] = (),
        decoder_only: bool = False,
        branch_factor: float = 1.0,
        encoder_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # The teacher reads the features that it was trained on, which a trained backbone does not compute.
        own = self.detector.model.backbone.conv_encoder.model
        shared = "backbone" in self.args.freeze and same_weights(own, teacher_backbone)
        self._teacher_backbone = None if shared else teacher_backbone.to(self.args.device)
        self.branch_factor, self.encoder_factor = branch_factor, encoder_factor
        if decoder_only:
            for name, parameter in self.detector.named_parameters():
                if not name.startswith(DECODER):
                    parameter.requires_grad_(False)
        self.teacher_weights["set"] = set_weight
        left_out = {wordings.meaning(name) for name in without}
        classes = wordings.indices(kwargs["names"])
        self.classes = {label: place for label, place in classes.items() if wordings.meaning(label) not in left_out}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; the encoder and the outputs of residual branches have learning rates of their own."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            names = {parameter: name for name, parameter in self.detector.named_parameters()}
            for group in list(optimizer.param_groups):
                by_factor: dict[float, list[Any]] = {1.0: []}
                for parameter in group["params"]:
                    by_factor.setdefault(self._rate_factor(names[parameter]), []).append(parameter)
                group["params"] = by_factor.pop(1.0)
                for factor, parameters in by_factor.items():
                    optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * factor})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return self.optimizer

    def _rate_factor(self, name: str) -> float:
        factor = self.encoder_factor if name.startswith(ENCODER) else 1.0
        return factor * (self.branch_factor if name.endswith(RESIDUAL_OUTPUTS) else 1.0)

    def teacher_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of a batch that the teacher reads, from the teacher's own backbone if needed."""
        if self._teacher_backbone is None:
            return super().teacher_maps(pixel_values)
        with torch.no_grad():
            return tuple(self._teacher_backbone(pixel_values).feature_maps)

    def teacher_losses(self, lesson: Lesson, outputs: Any) -> dict[str, DenseLoss]:
        """Compare proposals with the teacher's cells, and the queries of every decoder layer with its boxes."""
        found = teacher_boxes(
            lesson.scores, lesson.boxes, lesson.phrase_classes, lesson.phrase_ids, lesson.attention_mask
        )
        layers = [*(outputs.auxiliary_outputs or ()), {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
        of_queries = set_loss(
            [layer["logits"] for layer in layers],
            [layer["pred_boxes"] for layer in layers],
            found,
            lesson.attention_mask > 0,
            LossWeights.from_config(self.detector.config),
        )
        return {**super().teacher_losses(lesson, outputs), "set": of_queries}


def _schedule(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a schedule by steps; one by time needs none."""
    if args.minutes is not None:
        return {}
    return {
        "max_steps": args.steps,
        "warmup_steps": args.warmup_steps,
        "lr_scheduler_kwargs": {"num_decay_steps": args.decay_steps, "min_lr_ratio": 0.02, "decay_type": "linear"},
    }


def make_trainer(args: argparse.Namespace, model: GDinoForObjectDetection, processor: GDinoProcessor) -> MixedTrainer:
    """Read both sets and build the trainer.

    Args:
        args: The command line's options.
        model: The model to train.
        processor: The model's processor.

    Returns:
        The trainer.

    Raises:
        ValueError: The teacher has another number of classes than everyday photographs have names.
    """
    found = read_rows(args, processor.image_processor)
    kept_back = set(held_out(found.num_everyday, args.hold_out))
    drawn = [place for place in range(found.num_everyday) if place not in kept_back]
    everyday, wild = found.weighing[: found.num_everyday], found.weighing[found.num_everyday :]
    sampler = PromptSampler(found.names, (args.least_labels, args.most_labels))
    transform = Compose(
        [
            SideBySide(found.rows, drawn, found.asked, args.mosaic),
            *([PastedObjects(found.rows, drawn, found.weighing, found.asked, args.paste)] if args.paste else []),
            *found.transforms,
            augmentation(args.strong),
            Reworded(found.wordings, args.reworded),
        ]
    )
    model.model.text_feature_cache = PhraseStates()
    if args.image_sizes:
        # Batches come at the largest size, and the trainer makes them smaller.
        processor = copy.deepcopy(processor)
        processor.image_processor.size = {"height": max(args.image_sizes), "width": max(args.image_sizes)}
    return MixedTrainer(
        model=model,
        teacher=found.teacher,
        names=found.names,
        wordings=found.wordings,
        teacher_weight=args.teacher_weight,
        set_weight=args.set_weight,
        teacher_backbone=found.backbone,
        without=args.without,
        decoder_only=args.decoder_only,
        branch_factor=args.branch_lr_factor,
        encoder_factor=args.encoder_lr_factor,
        image_sizes=args.image_sizes or (),
        args=training_arguments(
            args.output,
            minutes=args.minutes,
            **_schedule(args),
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            backbone_lr_factor=args.backbone_lr_factor,
            freeze=["text"] if args.backbone_lr_factor > 0 else ["backbone", "text"],
            ema_decay=args.ema_decay,
            max_grad_norm=0.5,
            logging_steps=10,
            seed=args.seed,
            use_cpu=args.device == "cpu",
            dataloader_num_workers=args.workers,
        ),
        train_dataset=ReproducibleDataset(found.rows),
        row_weights=mixed_weights(everyday, wild, args.wild_share, args.rare, args.hold_out, found.factors),
        data_collator=GDinoDataCollator(
            processor, prompt_sampler=sampler, transform=transform, seed=args.seed, return_text=True
        ),
    )


def untrained(args: argparse.Namespace, start: GDinoForObjectDetection, processor: GDinoProcessor) -> Any:
    """Return a model of pretrained parts and an untrained trunk that knows the teacher's classes.

    Args:
        args: The command line's options. The image backbone is that of `backbone`; names of `without` are left out of
            what the trunk knows.
        start: The model to take configuration and text encoder from.
        processor: Its processor.
    """
    model = GDinoForObjectDetection(start.config)
    # The start's own backbone may have learned the names that are left out.
    pretrained = CspPanBackbone.from_pretrained(args.backbone)
    model.model.backbone.conv_encoder.model.load_state_dict(pretrained.state_dict())
    model.model.text_backbone.load_state_dict(start.model.text_backbone.state_dict())
    file = Path(args.everyday) / "train.json"
    names = category_names(file)
    kept = [place for place, name in enumerate(names) if name not in args.without]
    teacher = teacher_of(args.backbone, names).of_classes(kept)
    every = [*names, *category_names(Path(args.wild) / "train.json")]
    # Names that are left out must not be kept from getting scores either.
    vocabulary = [name for name in every if name not in args.without]
    rows, known = read_coco(file), [names[place] for place in kept]
    if args.teacher_start:
        start_from_teacher(model, processor, teacher, rows, known, vocabulary)
    else:
        warm_start(model, processor, teacher, rows, known)
    return model


def keep_options(args: argparse.Namespace) -> None:
    """Write the options beside the checkpoints, or compare them with those that the run began with.

    Args:
        args: The command line's options.

    Raises:
        ValueError: The run began with other options.
    """
    path = Path(args.output) / "options.json"
    own = {name: value for name, value in vars(args).items() if name not in _FREE}
    if args.region_model is not None:
        # Its path may change.
        own["region_model"] = "given"
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        odd = sorted(name for name in own.keys() | begun.keys() if own.get(name) != begun.get(name))
        if odd:
            raise ValueError(
                f"The run in {args.output} began with {odd[0]}={begun.get(odd[0])}, not {own.get(odd[0])}; repeat its "
                "options, or choose another --output."
            )
    write_whole_text(path, json.dumps(own, indent=2))


def train(args: argparse.Namespace) -> MixedTrainer:
    """Train or resume until the last step; the trainer's model gets the averaged weights."""
    torch.manual_seed(args.seed)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    keep_options(args)
    model, processor = told_model(argparse.Namespace(model=args.start, processor=None))
    if args.image_size is not None:
        processor.image_processor.size = {"height": args.image_size, "width": args.image_size}
    if args.teacher_start:
        # They start from text features, without the constant beside which that start is exact: losses of ten thousands.
        model.config.num_denoising_queries = 0
    # A checkpoint brings its own weights.
    if args.untrained and last_checkpoint(Path(args.output)) is None:
        model = untrained(args, model, processor)
    # The commands that rate a checkpoint find it here.
    processor.save_pretrained(args.output)
    trainer = make_trainer(args, model, processor)
    train_to_the_end(trainer)
    if args.export:
        export(model, processor, Path(args.export))
    return trainer


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everyday", required=True, help="folder with train.json and images/, annotated for all names")
    parser.add_argument("--wild", required=True, help="folder with train.json and images/, annotated for some names")
    parser.add_argument("--backbone", required=True, help="folder of the image backbone with its detection head")
    parser.add_argument("--output", required=True, help="folder for checkpoints and log")
    parser.add_argument(
        "--start", default="nano", help="run, checkpoint or model to start from (default: nano, the embedded model)"
    )
    parser.add_argument("--untrained", action="store_true", help="take only --start's text encoder and configuration")
    parser.add_argument(
        "--without",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=[],
        metavar="NAMES",
        help="names without boxes, with commas, to measure what the model makes of new ones; use it with --untrained; "
        "--region-model may still give regions these names, or deny them",
    )
    parser.add_argument(
        "--image-size", type=int, help="height and width in pixels that the model sees from now on (default: as before)"
    )
    parser.add_argument(
        "--image-sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="heights and widths of which each batch gets one, multiples of 32 (default: the model's own alone)",
    )
    parser.add_argument(
        "--region-model",
        metavar="FOLDER",
        help="run, checkpoint or model that finds regions nobody annotated, see region_names.py (default: none)",
    )
    parser.add_argument("--region-classifier", metavar="FILE", help="weights that tell what regions show")
    parser.add_argument("--region-class-names", metavar="FILE", help="imagenet_classes.js, the names of its classes")
    parser.add_argument("--hold-out", type=int, default=HOLD_OUT, help="keep back every so many-th everyday photograph")
    parser.add_argument("--export", help="folder for the finished model")
    parser.add_argument("--minutes", type=float, help="time budget over all runs, in place of the next three options")
    parser.add_argument("--steps", type=int, default=6000, help="steps over all runs")
    parser.add_argument("--warmup-steps", type=int, default=50, help="steps in which the learning rate rises")
    parser.add_argument("--decay-steps", type=int, default=2000, help="last steps, in which the learning rate falls")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="peak learning rate of the trunk")
    parser.add_argument(
        "--backbone-lr-factor", type=float, default=0.0, help="factor of the backbone's learning rate; 0 freezes it"
    )
    parser.add_argument(
        "--branch-lr-factor", type=float, default=1.0, help="factor of the rate of the residual branches' last matrices"
    )
    parser.add_argument(
        "--teacher-start",
        action="store_true",
        help="with --untrained: start with the teacher's scores and boxes, and train without denoising queries",
    )
    parser.add_argument("--encoder-lr-factor", type=float, default=1.0, help="factor of the encoder's learning rate")
    parser.add_argument("--decoder-only", action="store_true", help="train what follows the encoder, and nothing else")
    parser.add_argument("--ema-decay", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--wild-share", type=float, default=0.4, help="share of wild photographs")
    parser.add_argument("--rare", type=float, default=0.1, help="names on a smaller share of images are sampled more")
    parser.add_argument("--reworded", type=float, default=0.3, help="share of present names in another wording")
    parser.add_argument(
        "--mosaic", type=float, default=0.0, help="share of everyday photographs with others beside them"
    )
    parser.add_argument("--paste", type=float, default=0.0, help="share of everyday photographs with pasted objects")
    parser.add_argument("--strong", action="store_true", help="change photographs more strongly")
    parser.add_argument("--set-weight", type=float, default=4, help="weight of the teacher's scores of boxes")
    add_shared_options(parser)
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message if options are out of range or do not go together."""
    for share in ("wild_share", "rare", "reworded", "mosaic", "paste"):
        if not 0 <= getattr(options, share) <= 1:
            parser.error(f"--{share.replace('_', '-')} is {getattr(options, share):g}; it must lie in 0..1")
    if any(side < 32 or side % 32 for side in options.image_sizes or ()):
        parser.error(f"--image-sizes are {options.image_sizes}; they must be multiples of 32")
    regions = (options.region_model, options.region_classifier, options.region_class_names)
    if None in regions and any(regions):
        parser.error("--region-model, --region-classifier and --region-class-names go together; give all or none")
    if options.teacher_start and not options.untrained:
        parser.error("--teacher-start initializes an untrained trunk; give --untrained as well")
    for name in ("steps", "warmup_steps", "decay_steps"):
        if options.minutes is not None and getattr(options, name) != parser.get_default(name):
            parser.error(f"--minutes replaces --{name.replace('_', '-')}; give one of the two")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train until the last step."""
    train(parse_arguments(arguments))


if __name__ == "__main__":
    main()
