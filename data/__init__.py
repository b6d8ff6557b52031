"""Tasks and their images. Knows nothing of CLIP, prompts or runs."""
from .benchmarks import absolute, printable
from .errors import UserError, brief, expand, nearest
from .images import (
    Images,
    in_order,
    keep_all,
    label_tensor,
    normalise,
    plan,
    read_image,
    views,
)
from .listing import Listing
from .seen import contents, tested, tests_of, trained_on
from .tasks import (
    Task,
    built_in_shots,
    check_size,
    find_listings,
    hold_out,
    load_tasks,
    with_held_out,
)

__all__ = ["Images", "Listing", "Task", "UserError", "absolute", "brief", "built_in_shots",
           "check_size", "contents", "expand", "find_listings", "hold_out", "in_order", "keep_all",
           "label_tensor", "load_tasks", "nearest", "normalise", "plan", "printable", "read_image",
           "tested", "tests_of", "trained_on", "views", "with_held_out"]
