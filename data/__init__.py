"""Tasks and their images. Knows nothing of CLIP, prompts or runs."""
from .benchmarks import absolute
from .errors import UserError, brief, expand, nearest, warn_once
from .images import (
    PIXEL_MEAN,
    PIXEL_STD,
    Images,
    in_order,
    label_tensor,
    normalise,
    plan,
    read_image,
    rendered,
)
from .listing import Listing
from .tasks import BUILT_IN, Task, find_listings, hold_out, load_tasks, with_held_out

__all__ = ["BUILT_IN", "Images", "Listing", "PIXEL_MEAN", "PIXEL_STD", "Task", "UserError",
           "absolute", "brief", "expand", "find_listings", "hold_out", "in_order", "label_tensor",
           "load_tasks", "nearest", "normalise", "plan", "read_image", "rendered", "warn_once",
           "with_held_out"]
