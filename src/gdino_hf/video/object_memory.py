"""Objects in the memory of a SAM 2 video model: prompted by a box, followed from frame to frame, saved and resumed.

transformers keeps every frame of a session, and has no way to remove one of its objects. Here each object has a session
of its own, which lends only the latest frame and its features, and keeps no more than the model will read.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..detection.loading import usable_device
from ..segmentation.segmenter_inputs import PictureInputs, inputs_of
from ..segmentation.segmenter_loading import DTYPES, load_video_segmenter, wrap_video_segmenter

# The number that stands for the one object of a session.
_OBJECT = 1
# What transformers keeps of a frame for its caller alone.
_UNREAD = ("pred_masks", "high_res_masks")
_POSITIONS = "maskmem_pos_enc"
# Labels of points that stand for the first and the last corner of a box.
_CORNERS = (2, 3)


class ObjectMemory:
    """Follows objects with transformers' SAM 2 video model, in memory that does not grow with the video.

    Args:
        model: Hub id, folder or model object of SAM 2 or SAM 2.1 for videos.
        device: Device of the model; None is the first GPU or the CPU for a name, and leaves a model object where it is.
        dtype: "float32", "bfloat16" or "float16"; None for that of a model object, otherwise "float32".

    Raises:
        TypeError: The model has another type.
        ValueError: The model, the device or the dtype cannot be used here.
    """

    def __init__(self, model: Any, device: str | torch.device | None = None, dtype: str | None = None) -> None:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceCache

        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"The tracker's dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        if isinstance(model, (str, os.PathLike)):
            place: torch.device | None = usable_device("auto" if device is None else device)
            loaded = load_video_segmenter(os.fspath(model), dtype or "float32")
        else:
            place = None if device is None else usable_device(device)
            loaded = wrap_video_segmenter(model)
            if dtype is not None:
                loaded.model.to(getattr(torch, dtype))
        self.model, self._look = loaded.model.eval(), loaded.look
        if place is not None:
            self.model.to(place)
        self._features = Sam2VideoInferenceCache(self.model.device, self.model.device)
        self._inputs: PictureInputs | None = None
        self._place = 0
        # The positions in a frame are those of every other frame.
        self._positions: torch.Tensor | None = None

    def see(self, image: Image.Image, place: int) -> None:
        """Take the next frame.

        Args:
            image: Upright RGB picture.
            place: Index of the frame, larger than that of the frame before.
        """
        self._features.clear_all()
        self._inputs, self._place = inputs_of(image, self._look), place

    def new(self) -> Any:
        """Return the memory of a new object."""
        from transformers import Sam2VideoInferenceSession

        # The type says str, but only a torch.dtype works.
        dtype: Any = self.model.dtype
        memory = Sam2VideoInferenceSession(
            inference_device=self.model.device, inference_state_device=self.model.device, dtype=dtype
        )
        memory.cache = self._features
        memory.obj_id_to_idx(_OBJECT)
        return memory

    def prompt(self, memory: Any, box: np.ndarray) -> np.ndarray:
        """Tell where an object is in the latest frame.

        Args:
            memory: Memory of the object.
            box: (4,) xyxy in pixels of the frame.

        Returns:
            (height, width) bool mask of the object at the frame's size.
        """
        assert self._inputs is not None
        points = {
            "point_coords": self._inputs.boxes(box[None]).reshape(1, 1, 2, 2),
            "point_labels": torch.tensor([[_CORNERS]], dtype=torch.int32),
        }
        memory.add_point_inputs(0, self._place, points)
        memory.obj_with_new_inputs = [_OBJECT]
        return self.follow(memory)

    def follow(self, memory: Any) -> np.ndarray:
        """Find an object that was prompted before in the latest frame.

        Returns:
            (height, width) bool mask of the object at the frame's size, empty where the model does not see it.
        """
        assert self._inputs is not None
        made = self.model(inference_session=memory, frame=self._inputs.pixel_values, frame_idx=self._place)
        self._forget(memory)
        with torch.inference_mode():
            mask = self._inputs.at_picture_size(made.pred_masks.float())[0, 0] > 0
        return mask.cpu().numpy()

    def _forget(self, memory: Any) -> None:
        """Drop what the model will not read in this frame and those to come."""
        config, place = self.model.config, self._place
        memory.processed_frames = {}
        memory.point_inputs_per_obj[0].clear()
        tracked = memory.frames_tracked_per_obj[0]
        memory.frames_tracked_per_obj[0] = {place: tracked[place]} if place in tracked else {}
        frames = memory.output_dict_per_obj[0]
        # This frame may be prompted again: it reads features of num_maskmem - 1 earlier frames, and pointers of more.
        oldest_features = place + 1 - config.num_maskmem
        oldest_pointer = place + 1 - max(config.max_object_pointers_in_encoder, config.num_maskmem)
        latest = frames["non_cond_frame_outputs"]
        for index in [index for index in latest if index < oldest_pointer]:
            del latest[index]
        for index, output in latest.items():
            if index < oldest_features:
                output.pop("maskmem_features", None)
                output.pop(_POSITIONS, None)
        for output in (*frames["cond_frame_outputs"].values(), *latest.values()):
            for name in _UNREAD:
                output.pop(name, None)
            if _POSITIONS in output:
                self._positions = output[_POSITIONS] if self._positions is None else self._positions
                output[_POSITIONS] = self._positions

    def state(self, memory: Any) -> dict[str, Any]:
        """Return an object's memory as numbers, texts and arrays in dicts, without loss."""
        frames = {
            kind: {
                index: {name: _array(value) for name, value in output.items() if name != _POSITIONS}
                for index, output in outputs.items()
            }
            for kind, outputs in memory.output_dict_per_obj[0].items()
        }
        return {"frames": frames, "tracked": list(memory.frames_tracked_per_obj[0])}

    def positions(self) -> tuple[str, np.ndarray] | None:
        """Return what the memories of all objects share as an array, for `resume`; None before the first object."""
        return None if self._positions is None else _array(self._positions)

    def resume(self, state: dict[str, Any], positions: tuple[str, np.ndarray] | None) -> Any:
        """Return the memory whose state and positions were taken.

        Raises:
            KeyError, TypeError, ValueError: It is no such state.
        """
        device = self.model.device
        if positions is not None:
            self._positions = _tensor(positions, device)
        memory = self.new()
        for kind, outputs in state["frames"].items():
            if kind not in memory.output_dict_per_obj[0]:
                raise ValueError(f"there are no frames of kind {kind!r}")
            for index, output in outputs.items():
                made = {name: _tensor(value, device) for name, value in output.items()}
                if "maskmem_features" in made:
                    if self._positions is None:
                        raise ValueError("the positions in a frame are missing")
                    made[_POSITIONS] = self._positions
                memory.output_dict_per_obj[0][kind][int(index)] = made
        memory.frames_tracked_per_obj[0] = {int(index): {"reverse": False} for index in state["tracked"]}
        return memory


def _array(value: torch.Tensor) -> tuple[str, np.ndarray]:
    """Return a tensor as the name of its dtype and an array; numpy has no bfloat16, whose bits stand as integers."""
    name = str(value.dtype).removeprefix("torch.")
    value = value.detach().cpu()
    return name, (value.view(torch.int16) if name == "bfloat16" else value).numpy()


def _tensor(value: Any, device: torch.device) -> torch.Tensor:
    name, array = value
    made = torch.from_numpy(array)
    return (made.view(torch.bfloat16) if name == "bfloat16" else made).to(device)
