"""Under drop_in(), transformers' names load our models and scripts find what they found; nothing stays behind."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    MMGroundingDinoForObjectDetection,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import gdino_hf
from gdino_hf import GDinoForObjectDetection, GDinoImageProcessor, GDinoModel, GDinoProcessor
from gdino_hf.integrations import replacement, stand_ins
from gdino_hf.registration import register_auto_classes

SCRIPTS = Path(__file__).parent / "scripts"
TEXT = "a cat. a remote control."
METHODS = (FunctionType, classmethod, staticmethod, property)
BOX_TOLERANCE = 1e-4  # in the picture's pixels; float32 rounding reaches some 1e-5


@pytest.fixture(autouse=True)
def _everything_is_as_before():
    """Whatever a test does, all names and registries are transformers' own afterwards."""
    # The type gdino is registered by the first use of an auto class, with or without drop_in.
    register_auto_classes()
    before = state_of_transformers()
    yield
    after = state_of_transformers()
    assert {place for place in before if after.get(place) != before[place]} == set()
    assert (replacement._in_use, replacement._restore) == (0, [])


def state_of_transformers() -> dict[str, Any]:
    """Every method of transformers' auto classes and Grounding DINO classes, and every registry."""
    auto = [module for name, module in sys.modules.items() if name.startswith("transformers.models.auto.")]
    state: dict[str, Any] = {}
    for module in [*auto, *(sys.modules[owner.__module__] for owner in replacement._replacements())]:
        for name, value in vars(module).items():
            place = f"{module.__name__}.{name}"
            if isinstance(value, type) and value.__module__.startswith("transformers."):
                # transformers itself keeps other values on its classes when they are first used.
                state[place] = {key: each for key, each in vars(value).items() if isinstance(each, METHODS)}
            elif hasattr(value, "_extra_content"):
                state[place] = dict(value._extra_content)
    state["tasks"] = {task: dict(entry) for task, entry in PIPELINE_REGISTRY.supported_tasks.items()}
    state["finders"] = list(sys.meta_path)
    return state


class Calls:
    """Counts the forward passes of detection models, whoever makes them."""

    def __enter__(self) -> Calls:
        self.models: list[str] = []
        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        return self

    def _count(self, module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__.endswith("GroundingDinoForObjectDetection"):
            self.models.append(type(module).__module__)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def run_script(name: str, arguments: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script in this process and return its results."""
    results = folder / "results.json"
    monkeypatch.setattr(sys, "argv", [name, *map(str, [*arguments[:2], results, *arguments[2:]])])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return json.loads(results.read_text())


def matched(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Assert that detections have the same labels, boxes and scores, in whatever order."""

    def in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda each: (each["label"], each["score"]))

    assert len(one) == len(other) > 0
    for ours, theirs in zip(in_order(one), in_order(other), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["box"] == pytest.approx(theirs["box"], abs=BOX_TOLERANCE)


def detect(folder: Path, picture: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Detect as most scripts do, and return the outputs and the result of the picture."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=dtype).eval()
    image = Image.open(picture)
    inputs = processor(images=image, text=TEXT, return_tensors="pt").to(dtype)
    with torch.no_grad():
        outputs = model(**inputs)
    result = processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=0.4, text_threshold=0.3, target_sizes=[image.size[::-1]]
    )[0]
    return {"model": model, "processor": processor, "inputs": inputs, "outputs": outputs, "result": result}


def test_scripts_find_the_same_with_one_forward(their_checkpoint, learned_picture, tiny_sam, tmp_path, monkeypatch):
    arguments = [their_checkpoint, learned_picture, tiny_sam]
    theirs = {name: run_script(name, arguments, tmp_path, monkeypatch) for name in scripts()}
    ours, calls = {}, {}
    with gdino_hf.drop_in():
        for name in scripts():
            with Calls() as counted:
                ours[name] = run_script(name, arguments, tmp_path, monkeypatch)
            calls[name] = counted.models
    # The pipeline's pass and the one by hand; page: one picture, and a batch of two.
    assert calls == {name: ["gdino_hf.integrations.stand_ins"] * 2 for name in scripts()}
    matched(ours["zero_shot_task"]["by hand"], theirs["zero_shot_task"]["by hand"])
    matched(ours["grounding_dino_page"]["found"], theirs["grounding_dino_page"]["found"])
    matched(ours["grounded_sam"]["found"], theirs["grounded_sam"]["found"])
    page, their_page = ours["grounding_dino_page"], theirs["grounding_dino_page"]
    assert page["words"] == their_page["words"]
    for boxes, their_boxes in zip(page["batch"], their_page["batch"], strict=True):
        torch.testing.assert_close(
            torch.tensor(sorted(boxes)), torch.tensor(sorted(their_boxes)), rtol=0, atol=BOX_TOLERANCE
        )
    # transformers' pipeline runs each label by itself, with an open prompt; ours agrees with the run by hand.
    assert ours["grounded_sam"]["mask sizes"] == [[2, 3, 64, 96]] * 2
    for found in (ours["zero_shot_task"]["pipeline"], ours["grounded_sam"]["detections"]):
        by_label = {detection["label"].rstrip("."): list(detection["box"].values()) for detection in found}
        assert by_label == {
            each["label"]: [int(side) for side in each["box"]] for each in ours["zero_shot_task"]["by hand"]
        }
    assert {detection["label"] for detection in ours["grounded_sam"]["detections"]} == {"a cat.", "a remote control."}


def scripts() -> list[str]:
    return ["zero_shot_task", "grounding_dino_page", "grounded_sam"]


def test_scripts_run_in_a_process_of_their_own(their_checkpoint, learned_picture, tiny_sam, tmp_path, fresh_python):
    """Before anything of transformers is imported: its lazy names must not outrun drop_in."""
    paths = [str(SCRIPTS / f"{name}.py") for name in scripts()]
    runner = (
        "import json, runpy, sys\nimport gdino_hf\ngdino_hf.drop_in()\n"
        "checkpoint, picture, folder, sam, *paths = sys.argv[1:]\n"
        "for number, path in enumerate(paths):\n"
        "    sys.argv[:] = [path, checkpoint, picture, f'{folder}/{number}.json', sam]\n"
        "    names = runpy.run_path(path, run_name='__main__')\n"
        "    print(type(names['model']).__module__, type(names['processor']).__module__)\n"
    )
    done = fresh_python.run(runner, their_checkpoint, learned_picture, tmp_path, tiny_sam, *paths)
    assert done.returncode == 0, done.stderr
    home = "gdino_hf.integrations.stand_ins"
    assert done.stdout.split() == [home] * 6
    labels = {each["label"] for each in json.loads((tmp_path / "1.json").read_text())["found"]}
    assert labels == {"a cat", "a remote control"}


@pytest.mark.parametrize("kind", ["their_checkpoint", "their_mm_checkpoint"])
def test_every_name_gives_ours(kind, request):
    folder = request.getfixturevalue(kind)
    own = MMGroundingDinoForObjectDetection if "mm" in kind else GroundingDinoForObjectDetection
    before = AutoConfig.from_pretrained(folder)
    with gdino_hf.drop_in():
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is stand_ins.GroundingDinoConfig
        assert config.class_head == ("scaled_bias" if "mm" in kind else "dot")
        assert isinstance(AutoModel.from_pretrained(folder), GDinoModel)
        assert isinstance(AutoModelForZeroShotObjectDetection.from_config(config), GDinoForObjectDetection)
        for model in (
            AutoModelForZeroShotObjectDetection.from_pretrained(folder),
            own.from_pretrained(folder),
            # A configuration that was loaded before, and one of ours.
            own.from_pretrained(folder, config=before),
            AutoModelForZeroShotObjectDetection.from_pretrained(folder, config=before),
            AutoModelForZeroShotObjectDetection.from_pretrained(folder, config=config),
        ):
            assert isinstance(model, GDinoForObjectDetection)
            assert type(model).__name__ == "GroundingDinoForObjectDetection"
        for processor in (AutoProcessor.from_pretrained(folder), GroundingDinoProcessor.from_pretrained(folder)):
            assert isinstance(processor, GDinoProcessor)
            assert isinstance(processor.image_processor, GDinoImageProcessor)
        assert isinstance(AutoImageProcessor.from_pretrained(folder), GDinoImageProcessor)
        assert (
            AutoTokenizer.from_pretrained(folder)("a cat.").input_ids[1:] == processor.tokenizer("a cat.").input_ids[1:]
        )
        detector = pipeline("zero-shot-object-detection", model=str(folder))
        assert isinstance(detector, gdino_hf.GDinoZeroShotObjectDetectionPipeline)
        config, rest = AutoConfig.from_pretrained(folder, num_queries=7, nothing=1, return_unused_kwargs=True)
        assert (config.num_queries, rest) == (7, {"nothing": 1})
    assert type(AutoModelForZeroShotObjectDetection.from_pretrained(folder)) is own
    assert type(AutoProcessor.from_pretrained(folder)) is GroundingDinoProcessor
    assert AutoConfig.from_pretrained(folder).to_dict() == before.to_dict()


def test_outputs_of_mm_checkpoints_are_equal_in_double_precision(their_mm_checkpoint, learned_picture):
    theirs = detect(their_mm_checkpoint, learned_picture, torch.float64)
    with gdino_hf.drop_in():
        ours = detect(their_mm_checkpoint, learned_picture, torch.float64)
    assert dict(ours["inputs"]).keys() - dict(theirs["inputs"]).keys() == {"image_sizes"}
    order = ours["result"]["labels"].index("a cat"), theirs["result"]["labels"].index("a cat")
    torch.testing.assert_close(
        ours["result"]["boxes"][order[0]].double(), theirs["result"]["boxes"][order[1]].double(), rtol=0, atol=1e-4
    )
    assert sorted(ours["result"]["labels"]) == sorted(theirs["result"]["labels"]) == ["a cat", "a remote control"]


def test_outputs_after_leaving_are_bit_equal_to_those_before(their_checkpoint, learned_picture):
    before = detect(their_checkpoint, learned_picture)
    with gdino_hf.drop_in():
        assert isinstance(detect(their_checkpoint, learned_picture)["model"], GDinoForObjectDetection)
    after = detect(their_checkpoint, learned_picture)
    assert type(after["model"]) is type(before["model"]) is GroundingDinoForObjectDetection
    for name in ("logits", "pred_boxes"):
        assert torch.equal(after["outputs"][name], before["outputs"][name])
    assert after["result"]["labels"] == before["result"]["labels"]


def test_biased_heads_under_the_type_grounding_dino_load_right(their_mm_checkpoint, learned_picture, tmp_path):
    """The llmdet_swin_*_hf checkpoints: transformers' class drops the bias and the scale without a word."""
    folder = tmp_path / "llmdet"
    folder.mkdir()
    for file in their_mm_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "grounding-dino", "architectures": ["GroundingDinoForObjectDetection"]}
    (folder / "config.json").write_text(json.dumps(config))
    right = detect(their_mm_checkpoint, learned_picture)["outputs"]
    wrong = detect(folder, learned_picture)["outputs"]
    with gdino_hf.drop_in():
        ours = detect(folder, learned_picture)["outputs"]
    tokens = torch.isfinite(right.logits)
    assert (wrong.logits - right.logits)[tokens].abs().max() > 1
    torch.testing.assert_close(ours.logits[tokens], right.logits[tokens], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.pred_boxes, right.pred_boxes, rtol=0, atol=1e-4)


def test_calls_may_be_nested_and_repeated(their_checkpoint):
    def is_ours() -> bool:
        return isinstance(AutoProcessor.from_pretrained(their_checkpoint), GDinoProcessor)

    first, second = gdino_hf.drop_in(), gdino_hf.drop_in()
    first.undo()
    first.undo()
    assert is_ours()
    with gdino_hf.drop_in():
        second()
        assert is_ours()
    assert not is_ours()
    with pytest.raises(ZeroDivisionError), gdino_hf.drop_in():
        raise ZeroDivisionError
    assert not is_ours()


def test_what_another_library_wrapped_meanwhile_is_left_and_passes_through(their_checkpoint):
    own = vars(AutoProcessor)["from_pretrained"]
    undo = gdino_hf.drop_in()
    replaced = vars(AutoProcessor)["from_pretrained"]
    wrapped = classmethod(lambda cls, *args, **kwargs: replaced.__func__(cls, *args, **kwargs))
    AutoProcessor.from_pretrained = wrapped
    undo()
    try:
        assert vars(AutoProcessor)["from_pretrained"] is wrapped
        assert type(AutoProcessor.from_pretrained(their_checkpoint)) is GroundingDinoProcessor
        with gdino_hf.drop_in():
            assert isinstance(AutoProcessor.from_pretrained(their_checkpoint), GDinoProcessor)
        assert vars(AutoProcessor)["from_pretrained"] is wrapped
    finally:
        AutoProcessor.from_pretrained = own


def test_subclasses_and_other_models_are_left_alone(their_checkpoint, tmp_path):
    class Own(GroundingDinoForObjectDetection):
        pass

    bert = transformers.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(bert).save_pretrained(tmp_path)
    with gdino_hf.drop_in():
        assert type(Own.from_pretrained(their_checkpoint)) is Own
        assert type(AutoModel.from_pretrained(tmp_path)) is transformers.BertModel
        assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.BertConfig


def test_more_labels_than_a_prompt_holds_share_the_image_backbone(their_checkpoint, learned_picture):
    words = ["dog", "hat", "car", "tree", "person", "face", "shield", "sword"]
    labels = [f"the {one} {other} on" for one in words for other in words if one != other]
    with gdino_hf.drop_in():
        detector = pipeline("zero-shot-object-detection", model=str(their_checkpoint))
        backbones = []
        core = detector.model.model.backbone
        core.register_forward_hook(lambda *call: backbones.append(1))
        found = detector(str(learned_picture), candidate_labels=["a cat", *labels, "a remote control"], threshold=0.5)
    assert len(labels) * 5 > 256  # tokens, of which a prompt holds 256
    assert len(backbones) == 1
    assert {"a cat", "a remote control"} <= {each["label"] for each in found}


def test_gdino_checkpoints_follow_the_conventions_meanwhile(learned_picture):
    with gdino_hf.drop_in():
        found = detect(Path(gdino_hf.NANO), learned_picture)
        assert type(found["processor"]) is stand_ins.GroundingDinoProcessor
        assert type(found["model"]).__name__ == "GroundingDinoForObjectDetection"
        assert isinstance(found["result"]["labels"], list)
        assert found["processor"].nms_threshold == GDinoProcessor.from_pretrained(gdino_hf.NANO).nms_threshold == 0.6
    assert type(AutoProcessor.from_pretrained(gdino_hf.NANO)) is GDinoProcessor


def test_models_saved_meanwhile_are_gdino_checkpoints(their_checkpoint, learned_picture, tmp_path):
    with gdino_hf.drop_in():
        first = detect(their_checkpoint, learned_picture)
        first["model"].save_pretrained(tmp_path)
        first["processor"].save_pretrained(tmp_path)
        again = detect(tmp_path, learned_picture)
        assert again["result"]["labels"] == first["result"]["labels"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GDinoForObjectDetection"]
    after = detect(tmp_path, learned_picture)
    assert type(after["model"]) is GDinoForObjectDetection
    assert type(after["processor"]) is GDinoProcessor
    assert torch.equal(after["outputs"].logits, first["outputs"].logits)
    assert after["result"]["text_labels"] == first["result"]["labels"]


def test_saved_pipelines_work_in_and_after_the_block(their_checkpoint, learned_picture, tmp_path):
    with gdino_hf.drop_in():
        detector = pipeline("zero-shot-object-detection", model=str(their_checkpoint))
        detector.save_pretrained(tmp_path)
        again = pipeline("zero-shot-object-detection", model=str(tmp_path))
    after = pipeline("zero-shot-object-detection", model=str(tmp_path))
    found = [each(str(learned_picture), candidate_labels=["a cat"], threshold=0.4) for each in (detector, again, after)]
    assert found[0] == found[1] == found[2] != []


def test_options_of_loading_reach_our_models(their_checkpoint):
    options = {"revision": "main", "token": None, "trust_remote_code": False}
    with gdino_hf.drop_in():
        assert AutoConfig.from_pretrained(their_checkpoint, **options).name_or_path == str(their_checkpoint)
        model, info = AutoModelForZeroShotObjectDetection.from_pretrained(
            str(their_checkpoint),
            dtype=torch.bfloat16,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
        size = {"shortest_edge": 32, "longest_edge": 48}
        processor = AutoProcessor.from_pretrained(their_checkpoint, size=size, **options)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.name_or_path == str(their_checkpoint)
    assert processor.image_processor.size == size


def test_models_of_drop_in_can_be_optimized_and_stay_after_it(their_checkpoint, learned_picture):
    with gdino_hf.drop_in():
        found = detect(their_checkpoint, learned_picture)
    model = found["model"].optimize_for_inference()
    with torch.no_grad():
        outputs = model(**found["inputs"])
    torch.testing.assert_close(outputs.pred_boxes, found["outputs"].pred_boxes, rtol=0, atol=1e-3)
