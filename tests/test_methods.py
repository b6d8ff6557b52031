"""What holds for every method: a run, --eval, predict and --resume give the same numbers; a step
runs on a GPU, descends on the loss, leaves CLIP unchanged and calls few functions."""
import contextlib
import copy
import csv
import inspect
import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Phases,
    coloured,
    killed,
    numbers,
    random_clip,
    run,
    run_script,
    small_tasks,
    words_of,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import common

# a command, and its trainable parameters for 2 tasks of 3 classes with b = 2 on the small CLIP,
# whose encoders have 3 layers of width 64 and features of length 32
COUPLED = 3 * (2 * 64 + 64 * 64 + 64)
MMAP = 3 * (2 * 32 + 2 + 2)
JSCPT = 3 * (2 * 64 + 3 * 2 * 64) + 2 * 32 + 2 * 32 * 32 + 32 + 32
PARAMETERS = {
    "coop_mt.py": 2 * 64,
    "coop_mt.py --single-task": 2 * 2 * 64,
    "coop_mt.py --single-task --conditional": 2 * (2 * 64 + (32 + 1) * 2 + (2 + 1) * 64),
    "coop_mt.py --single-task --proda 2": 2 * 2 * 2 * 64,
    "vpt_mt.py": 3 * 2 * 64,
    "maple_mt.py": COUPLED,
    "mvlpt.py --prompt coop": 2 * 2 * 64,
    "hipro.py": 3 * 2 * 64,
    "mmap.py --groups 1": 3 * MMAP,
    "jscpt.py --upper-every 2 --terms 1": JSCPT,
    "common.py finetune --lr 0.001": sum(p.numel() for p in random_clip(**TINY).parameters()),
    "common.py finetune --train bias --single-task": 2 * (3 * 2 * 11 * 64 + 3 * 64),
    "common.py finetune --train adapter": 2 * ((32 + 1) * 8 + (8 + 1) * 32),
    "common.py probe": 2 * (32 + 1) * 3,
    "common.py zero-shot": 0,
}
OWN = {"hipro": {"nodes", "affinity"}, "mmap": {"groups", "similarity"}, "mvlpt": {"groups"},
       "jscpt": {"alpha", "beta", "effect", "affinity", "phi", "schedule_parameters"},
       "probe": {"C"}}
GRADIENT = [command for command in PARAMETERS if not command.endswith(("probe", "zero-shot"))]


def method_of(command):
    script, *rest = command.split()
    return common.method_of((rest[0] if script == "common.py" else script[:-3]).replace("-", "_"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Images in the colour of their class; in the second domain the classes have other colours."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    for d, domain in enumerate(("drawn", "painted")):
        for k, name in enumerate(("ball", "cup", "hat")):
            (root / domain / name).mkdir(parents=True)
            for i in range(5):
                number = 100 * d + 10 * k + i
                coloured(number, (k + d) % 3).save(root / domain / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def line_of(shapes, random_pt):
    """command -> the full command line of a small training run."""
    def line(command):
        known = {field.name for field in fields(method_of(command).Args)}
        line = f"{command} --data {shapes} --clip {random_pt} --shots 2 --seeds 1 2 --device cpu"
        if "epochs" in known:
            line += " --epochs 2 --batch-size 3"
        if "lr" in known and "--lr" not in command:
            line += " --lr 0.02"
        return line + " --n-ctx 2" * ("n_ctx" in known)
    return line


@pytest.fixture(scope="module", params=PARAMETERS)
def whole(request, line_of, tmp_path_factory):
    """(command, the folder of a finished run, what it printed); the first command of each file runs
    as a process."""
    command = request.param
    out = tmp_path_factory.mktemp("whole") / "run"
    first = next(one for one in PARAMETERS if one.split()[0] == command.split()[0])
    if command == first:
        done = run_script(f"{line_of(command)} --out {out}", cwd=out.parent)
        code, printed, err = done.returncode, done.stdout, done.stderr
    else:
        code, printed, err = run(f"{line_of(command)} --out {out}")
    assert code == 0 and not err, err
    return command, out, printed


def table(printed):
    return printed[printed.index(" zero-shot"):printed.index(" in %, seeds 1 2")]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_reports_in_its_own_folder(whole):
    command, out, printed = whole
    result = json.loads((out / "result.json").read_text())
    method, count = method_of(command).name, PARAMETERS[command]
    assert (result["method"], result["tasks"]) == (method, ["drawn", "painted"])
    with (out / "log.csv").open() as log:               # also printed while it runs
        for row in csv.DictReader(log):
            assert re.search(rf"^seed {row['seed']}, {row['phase']}: epoch {row['epoch']} of \d, "
                             rf"loss {float(row['loss']):.4g}$", printed, re.MULTILINE), row
    assert (result["split"], result["shots"], result["seeds"]) == (None, 2, [1, 2])
    assert result["settings"]["shots"] == 2 and result["versions"]["torch"] == torch.__version__
    zero_shot, accuracy = result["zero_shot"], result["accuracy"]
    assert all(0 <= zero_shot[task] <= 100 and len(accuracy[task]) == 2 for task in accuracy)
    means = [(a + b) / 2 for a, b in zip(accuracy["drawn"], accuracy["painted"])]
    assert result["average"] == pytest.approx(means) and len(result["seconds"]) == 2
    assert result["trainable_parameters"] == count
    assert f"{count:,} trainable" in printed or not count
    own = result.keys() & set().union(*OWN.values())
    assert own == OWN.get(method, set()) and all(len(result[key]) == 2 for key in own)
    files = {"settings.json", "result.json", "prompts.pt", "log.csv"}
    assert {path.name for path in out.iterdir()} == files
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    phases = {}
    for row in csv.DictReader((out / "log.csv").open()):
        phases.setdefault((row["seed"], row["phase"]), []).append(int(row["epoch"]))
        assert 1 <= len(json.loads(row["losses"])) <= 2
    assert all(epochs == [1, 2][:len(epochs)] for epochs in phases.values())
    assert {seed for seed, _ in phases} == ({"1", "2"} if command in GRADIENT else set())


def test_saved_prompts_score_as_the_run_did_and_nothing_is_written(whole):
    command, out, printed = whole
    before = bytes_of(out)
    if not command.endswith("zero-shot"):
        script = " ".join(command.split()[:1 + command.startswith("common.py")])
        code, again, err = run(f"{script} --eval {out / 'prompts.pt'}")
        assert code == 0 and table(again) == table(printed), err
    code, again, err = run(f"{command} --resume --out {out}")
    assert code == 0 and table(again) == table(printed) and "had already finished" in again, err
    assert bytes_of(out) == before and [path.name for path in out.parent.iterdir()] == ["run"]


def test_predicted_classes_have_the_accuracy_of_the_run(whole, shapes):
    command, out, _ = whole
    accuracy = json.loads((out / "result.json").read_text())["accuracy"]
    for task in common.load_tasks(str(shapes), shots=2, seed=1):
        files = " ".join(map(str, task.test.items))
        code, said, err = run(f"common.py predict {out / 'prompts.pt'} {files} --task {task.name}")
        assert code == 0 and said.startswith(f"{task.name}, seed 1"), err
        best = [part.split("\n")[1].split()[1] for part in said.split("\n\n")[1:]]
        hits = [name == task.class_names[k] for name, k in zip(best, task.test.labels)]
        assert 100 * sum(hits) / len(hits) == pytest.approx(accuracy[task.name][0])


KILLS = [                       # a file, and before which of its writes the run is killed
    ("checkpoint.pt", 1),       # the first epoch is lost
    ("finished.pt", 2),         # the phase's last epoch is in checkpoint.pt, its end is not
    ("checkpoint.pt", 2),       # in the second epoch of a phase, after a finished phase or seed
    ("prompts.pt", 1),          # after the last phase of a seed
    ("result.json", 1),         # after everything else
]


def test_killed_again_and_again_a_run_ends_with_the_same_numbers(whole, line_of, tmp_path):
    """Also if worker processes read the images after the first kill."""
    command, expected, _ = whole
    out, line = tmp_path / "run", line_of(command)
    for file, nth in KILLS:
        if file == "checkpoint.pt" and command not in GRADIENT:
            continue
        with killed(before=file, nth=nth):
            run(f"{line} --out {out}")
        line = f"{command} --resume" + " --workers 2" * command.startswith(("jscpt", "mmap"))
        assert not (out / "result.json").exists() and (out / "finished.pt").exists() == (nth > 0)
    code, _, err = run(f"{line} --out {out}")
    found = numbers(out)
    found["settings"]["workers"] = None
    assert code == 0 and found == numbers(expected), err
    assert (out / "log.csv").read_text() == (expected / "log.csv").read_text()
    states, same = (torch.load(folder / "prompts.pt", weights_only=True)["prompts"]
                    for folder in (out, expected))
    for x, y in zip(tree_leaves(states), tree_leaves(same), strict=True):
        # a regression on features that were encoded in other batches differs in the last digits
        assert torch.equal(x, y) if command in GRADIENT else torch.allclose(x, y, atol=1e-2)
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}


# ---------------------------------------------------------------------------------- training steps

def prepared(command, line_of, **changes):
    """(method, settings of one seed, tasks) of a command."""
    method, words = method_of(command), words_of(line_of(command))
    args = common.parse(method, words[1 + (words[0] == "common.py"):])
    names = ["a"] if getattr(args, "single_task", False) else ["a", "b"]
    return method, replace(args, seeds=(1,), workers=0, **changes), small_tasks(*names)


@pytest.mark.parametrize("command", [one for one in PARAMETERS if one != "common.py zero-shot"])
def test_training_lowers_the_loss_and_leaves_clip_bitwise_unchanged(command, line_of, small):
    longer = dict(epochs=10) if command in GRADIENT else {}
    method, args, tasks = prepared(command, line_of, **longer)
    before, run = copy.deepcopy(small.state_dict()), Phases()
    method.train(args, small, tasks, run)
    for steps in run.steps.values():
        losses = [values["loss"].item() for values in steps if "loss" in values]
        assert not losses or losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in small.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in small.parameters())


BY_VALUE = {torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default,
            torch.ops.aten._local_scalar_dense.default}


class GPU(FakeTensorMode):
    """CUDA tensors are fake and carry their values in `value`; CPU tensors are real.

    Mixing both in one operation raises, as it does on a GPU.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, args=(), settings=None):
        settings = settings or {}
        given = tree_leaves((args, settings))
        fakes = [x for x in given if isinstance(x, FakeTensor)]
        if not fakes and not any(isinstance(x, torch.device) and x.type == "cuda" for x in given):
            return function(*args, **settings)
        if not all(hasattr(x, "value") for x in fakes):            # inside another operation
            return super().__torch_dispatch__(function, types, args, settings)

        def on_cpu(x):
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return x.value if isinstance(x, FakeTensor) else x

        def with_values(fake, values):
            if isinstance(fake, FakeTensor) and fake.device.type == "cuda":
                fake.value = values
                return fake
            return values if torch.is_tensor(values) else fake

        values = function(*tree_map(on_cpu, args), **tree_map(on_cpu, settings))
        if function in BY_VALUE:                                    # the shape depends on values
            fake = tree_map(self.faked, values)
        else:
            fake = super().__torch_dispatch__(function, types, args, settings)
        leaves, structure = tree_flatten(fake)
        return tree_unflatten(map(with_values, leaves, tree_leaves(values)), structure)

    def faked(self, x):
        if not torch.is_tensor(x):
            return x
        return FakeTensor(self, x.to("meta"), torch.device("cuda"))


class Reached(Exception):
    """Training has computed its loss."""


# without mvlpt.py: a module of fake tensors cannot be moved
ON_GPU = [command for command in GRADIENT if not command.startswith("mvlpt")]
ON_GPU += ["coop_mt.py --surgery pcgrad", "hipro.py --grouping random", "mmap.py --grouping all",
           "mmap.py --no-specific --grouping random"]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("command", ON_GPU)
def test_the_loss_of_a_step_and_the_logits_on_a_gpu(command, line_of):
    """`train` runs up to its first gradient, which fake tensors do not have. Its loss is that of
    the CPU, and so are the logits of its prompts."""
    model = random_clip(**dict(TINY, vision_layers=2, transformer_layers=2))
    method, args, tasks = prepared(command, line_of)
    B, T, losses, logits = 4 * len(tasks), len(tasks) - 1, [], []
    batch = torch.randn(B, 3, 32, 32), torch.arange(B) % 3, torch.arange(B) % len(tasks)

    def reached(loss, *_, **__):
        losses.append(getattr(loss, "value", loss).item())
        raise Reached

    for mode, device in ((contextlib.nullcontext(), "cpu"), (GPU(), "cuda")):
        run = Phases()
        with (mode, mock.patch("torch.Tensor.backward", reached),
              mock.patch("torch.autograd.grad", reached)):
            model, batch = model.to(device), [x.to(device) for x in batch]
            with (mock.patch.object(common, "batches", lambda *_, **__: [batch]),
                  pytest.raises(Reached)):
                common.seed_everything(1)
                method.train(args, model, tasks, run)
            if "train" in run.parts:
                how = method.classify(args, model, tasks, run.parts["train"]["prompts"])
                found, _, _ = common.task_logits(args, model, tasks, T, **how)
                logits.append(getattr(found, "value", found).flatten().tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] > 0
    assert not logits or logits[1] == pytest.approx(logits[0], abs=1e-3)


PROMPTS = {     # command -> the text and image prompts of task t, [L, 1, n, d], if it has them
    "coop_mt.py": lambda prompts, t: (prompts.text_prompts(), None),
    "vpt_mt.py": lambda prompts, t: (None, prompts.image_prompts()[:, None]),
    "maple_mt.py": lambda prompts, t: (prompts.text_prompts()[:, None],
                                       prompts.image_prompts()[:, None]),
    "mmap.py --grouping all": lambda prompts, t: (prompts.text_prompts()[:, t:t + 1],
                                                  prompts.image_prompts()[:, t:t + 1]),
}


@pytest.mark.parametrize("command", PROMPTS)
def test_the_first_step_descends_on_the_sum_of_the_tasks_cross_entropies(command, line_of, small):
    """p <- p - lr (sum_t grad L_t + 5e-4 p), with each task computed alone: MmAP, Eq. (5), (11)."""
    method, args, tasks = prepared(command, line_of, epochs=1, batch_size=6, lr=0.1)
    tasks[1].class_names = ["tree", "house", "very long name"]
    steps = []
    for epochs in (1, 0):                       # the same start, without a step
        run = Phases()
        if not epochs:
            run.epochs = lambda *_, **__: ()
        common.seed_everything("start")
        steps.append(method.train(args, small, tasks, run))
        if epochs:
            [logged] = run.logged
    trained, start = steps
    common.seed_everything("test", "train", 0)
    [(images, labels, task)] = common.batches(args, small, tasks)
    losses = []
    for t, one in enumerate(tasks):
        text, image = PROMPTS[command](start, t)
        n, template = (0, one.template) if text is None else (text.shape[2], "{}")
        if command == "maple_mt.py":            # it keeps the words that no prompt replaces
            template = " ".join("a photo of a {}".split()[n:])
        w = common.encode_text(small, common.tokenize(one.class_names, n, template), text)
        x, y = common.encode_image(small, images[task == t], image), labels[task == t]
        cosine = (x[:, None] * w).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
        p = (small.logit_scale.exp() * cosine).exp()
        losses.append(-(p[range(len(y)), y] / p.sum(-1)).log().mean())
    assert logged["losses"].tolist() == pytest.approx([x.item() for x in losses], rel=1e-5)
    assert logged["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    before = list(start.parameters())
    for old, new, g in zip(before, trained.parameters(), torch.autograd.grad(sum(losses), before)):
        assert (new - (old - 0.1 * (g + 5e-4 * old))).abs().max() < 1e-4 * max(1, g.abs().max())
        assert g.any()


def test_one_step_of_mmap_calls_few_of_our_functions(line_of):
    """From the call of `batches` to `optimizer.step`, each counted once."""
    entered, inside = {}, False

    def watch(frame, event, _):
        nonlocal inside
        code = frame.f_code
        ours = code.co_filename.startswith(str(ROOT)) and "tests" not in code.co_filename
        if event == "call" and ours and code.co_name == "batches":
            inside = not entered                    # the first step alone
        if event == "call" and code.co_name == "step" and "optim" in code.co_filename:
            inside = False
        if event == "call" and inside and ours and not code.co_name.startswith("<"):
            entered[code.co_qualname] = None

    line = line_of("mmap.py --grouping all").replace("--seeds 1 2", "--seeds 1 --workers 0")
    sys.setprofile(watch)
    try:
        code, _, err = run(line)
    finally:
        sys.setprofile(None)
    print(f"\n{len(entered)} functions: {', '.join(entered)}")
    assert code == 0 and {"encode_image", "encode_text", "task_losses"} <= entered.keys(), err
    assert len(entered) <= 24


SCRIPTS = dict.fromkeys(" ".join(one.split()[:1 + one.startswith("common.py")])
                        for one in PARAMETERS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_paper_and_every_setting_with_its_default(script):
    code, said, _ = run(f"{script} --help")
    method = method_of(script)
    assert code == 0 and said.startswith(inspect.cleandoc(method.doc) + "\n\n")
    options = " ".join(said[said.index("show this help message"):].split())
    for field in fields(method.Args):
        default = " ".join(map(str, field.default)) if field.name == "seeds" else str(field.default)
        flag, default = field.name, re.escape(default)
        if field.default is True:
            flag, default = f"no-{field.name}", "keep"
        line = rf" --{flag} [^(]*?\w.*? \(default: {default}\)"
        assert re.search(line.replace("_", "-"), options), field.name
    assert not re.search(r"\(default[^)]*\) \(default", options)
    if script == "mmap.py":
        assert ("\nwith tiny: epochs 10, lr 0.1, n_ctx 4, min_crop 0.6\n"
                "with minidomainnet: batch_size 4\n") in said


def test_the_number_of_vectors_before_a_class_name_may_depend_on_the_tasks():
    method = replace(method_of("coop_mt.py"), n_text=lambda args, tasks: 30 * len(tasks))
    with pytest.raises(common.UserError, match="take 12. of the 77 text positions"):
        common.main(method, "--shots 1 --device cpu".split())


# ------------------------------------------------------------------------------------ whole scripts

SECONDS = {             # time limit of a script on the built-in benchmark, 2 idle cores
    "coop_mt.py": 180, "vpt_mt.py": 300, "maple_mt.py": 300, "mvlpt.py": 300, "hipro.py": 300,
    "mmap.py": 300, "jscpt.py": 480, "mvlpt.py --transferability": 900}


@pytest.mark.slow
@pytest.mark.parametrize("command", SECONDS)
def test_the_built_in_defaults_end_in_time_and_within_2_gb_or_3_for_jscpt(command, tmp_path):
    code = (            # the resource module would also count pytest's memory before the fork
        "import re, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "status = open('/proc/self/status').read(); "
        "print('peak', int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) // 1024)")
    words, start = [*command.split(), "--out", str(tmp_path / "run")], time.time()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and time.time() - start < SECONDS[command], done.stderr
    assert int(done.stdout.split("peak")[1]) < (3072 if command == "jscpt.py" else 2048)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["average"][0] > 48            # zero-shot is 53, chance under 2
