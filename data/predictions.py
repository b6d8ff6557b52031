"""What `--eval CKPT --predict IMAGE...` does: name the likeliest classes of a few images, with any method's saved prompts."""
from pathlib import Path

import common
from common import Images, Task, UserError, read_image


def check(args, saved):
    """Refuse images that are missing or broken and tasks that are not there; returns the name of the task to predict for."""
    names = list(saved["tasks"])
    if args.task is None and len(names) > 1:
        raise UserError(f"{args.eval} has {len(names)} tasks: say with --task which one the images are of: {', '.join(names)}")
    if args.task is not None and args.task not in names:
        near = common._nearest(args.task, names)
        raise UserError(f"{args.eval} has no task '{args.task}'{near}: give --task one of {', '.join(names)}")
    for path in args.predict:
        if not Path(path).is_file():
            raise UserError(f"there is no image {path}: give --predict the files of images")
        read_image(path)
    return args.task or names[0]


def tasks_of(args, saved, chosen, kept):
    """The saved tasks with the images to predict for in place of test images; no dataset is needed.

    `score` evaluates every task, so the others get a single image. The chosen task's metric puts the scores [B, C] that it is
    called with into the list `kept`. A file without templates is older than they are: then the dataset has them.
    """
    templates = saved.get("templates")
    if templates is None:
        tasks = common.load_tasks(args.data, args.split, args.shots, args.seeds[0], args.root)
        templates = {task.name: task.template for task in tasks}
    if templates.keys() != saved["tasks"].keys():
        raise UserError(f"{args.eval} was saved without templates, and --data {args.data} has other tasks: give the --data that it "
                        "was trained on")
    keep = lambda scores, labels: kept.append(scores) or 0.0
    images = Images(args.predict, [0] * len(args.predict))
    return [Task(name, classes, templates[name], images, images if name == chosen else images.subset([0]),
                 metric=keep if name == chosen else "accuracy") for name, classes in saved["tasks"].items()]


def predict(args, saved, build, restore, score):
    """Print the five likeliest classes of every image of args.predict, with their probabilities in per cent.

    build, score: a method's; restore(prompts, seed) fills untrained prompts. Of several seeds the first one's prompts serve.
    """
    chosen, kept, seed = check(args, saved), [], args.seeds[0]
    model, preprocess = common.load_clip(args.clip, args.device)
    tasks = tasks_of(args, saved, chosen, kept)
    prompts = build(args, model, tasks)
    restore(prompts, seed)
    score(args, model, preprocess, tasks, prompts)
    probabilities = kept[-1].float().softmax(dim=-1).cpu()                      # a method scores zero-shot CLIP first, then itself
    print(f"{chosen}, seed {seed}, per cent")
    for path, row in zip(args.predict, probabilities):
        print(f"\n{path}")
        for p, k in zip(*(x.tolist() for x in row.topk(min(5, len(row))))):
            print(f"{100 * p:6.1f}  {saved['tasks'][chosen][k]}")
