"""Files of a run: written whole or not at all, read without running any code in them. `common` passes these names on."""
import os
import warnings

import torch

from common import UserError, _brief


def write_whole(path, content, new=False):
    """Write text or bytes to a temporary name and rename it: the file is there whole or not at all.

    new: FileExistsError where the file is there already, even if another process has made it at this very moment.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")                   # its own, should a second process write here
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        (_claim if new else os.replace)(part, path)
    except FileExistsError:
        part.unlink(missing_ok=True)
        raise
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): free the disk or choose another --out") from error


def _claim(part, path):
    """os.replace, but FileExistsError where the new name is taken (which a file system without hard links cannot tell)."""
    try:
        os.link(part, path)
        part.unlink()
    except FileExistsError:
        raise
    except OSError:
        os.replace(part, path)


def load_saved(path, what, keys, remedy):
    """A dict from `torch.save`, read without running any code in it; UserError where the file is not what it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:              # truncated, foreign and malicious files fail in many ways, all of them here
        raise UserError(f"{path} is not {what} of this project ({_brief(error)}): {remedy}") from error
    kinds = dict(settings=dict, prompts=dict, tasks=dict, templates=dict, finished=dict, rows=list, current=(dict, type(None)))
    if not isinstance(saved, dict) or not {"method", "settings", *keys} <= saved.keys() or \
            not all(isinstance(saved[key], kind) for key, kind in kinds.items() if key in saved):
        raise UserError(f"{path} is not {what} of this project (it holds something else): {remedy}")
    return saved


def load_prompts(path, method):
    """What a run saved as prompts.pt: method, settings, tasks (name -> class names) and prompts (seed -> state dict)."""
    saved = load_saved(path, "a prompts.pt", ["prompts", "tasks"], f"give the prompts.pt that a run of {method} wrote")
    if saved["method"] != method:
        raise UserError(f"{path} holds prompts of {saved['method']}, not of {method}: use {saved['method']}.py --eval {path}")
    return saved
