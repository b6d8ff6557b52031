"""Tasks and their images. Knows nothing of CLIP, prompts or runs."""
from .benchmarks import absolute
from .errors import UserError, brief, expand, nearest
from .images import (
    Images,
    in_order,
    label_tensor,
    normalise,
    plan,
    read_image,
    rendered,
)
from .listing import Listing
from .tasks import Task, built_in_shots, find_listings, hold_out, load_tasks, with_held_out

__all__ = ["Images", "Listing", "Task", "UserError", "absolute", "brief", "built_in_shots",
           "expand", "find_listings", "hold_out", "in_order", "label_tensor", "load_tasks",
           "nearest", "normalise", "plan", "read_image", "rendered", "with_held_out"]
