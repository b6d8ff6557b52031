"""What makes the methods fast and small changes no result: pieces, passes, views, images in memory, compilation; and bfloat16."""
import subprocess
import sys
import types

import pytest
import torch
from bench_speed import FLAGS, METHODS, megabytes, passes, tasks_of, training
from conftest import ROOT, TINY, Log, make_tree, random_clip, small_tasks

import common

computing, listings = sys.modules["multitask_prompt_computing"], sys.modules["multitask_prompt_listings"]
NAMES = ["cup", "hat", "red ball", "alarm clock", "tree"]


@pytest.fixture
def model():
    """A random CLIP that a test may write on."""
    return random_clip(**TINY)


def step_of(name, model, **noted):
    """(loss, gradients) of a step with 3 tasks of the same 5 classes and 4 images each.

    noted: what is set on the model once the prompts are there; JSCPT's start magnifies the texts' last bits where classes are few.
    """
    model.max_mem, model.block = None, common._block
    prompts, gradients = training(name, model, tasks_of(model, 3, 4, NAMES), 4, n_ctx=2)
    for key, value in noted.items():
        setattr(model, key, value)
    common.seed_everything(2)               # coop_mt draws which view a step shows
    loss = gradients()
    return loss, {key: p.grad for key, p in prompts.named_parameters() if p.grad is not None}


def agree(one, other, tolerance=1e-5):
    assert (one[0] - other[0]).abs() <= tolerance * other[0].abs() and one[1].keys() == other[1].keys() and one[1]
    for key, g in other[1].items():
        assert (one[1][key] - g).abs().max() <= tolerance * max(1, g.abs().max()), key


# -------------------------------------------------------------------------------------------------------- memory in pieces

@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_pieces_has_the_same_loss_and_gradients(model, name, monkeypatch):
    whole, calls, checkpoint = step_of(name, model), [], computing.checkpoint
    monkeypatch.setattr(computing, "checkpoint", lambda piece, rows, prompts, **how:
                        calls.append(len(rows)) or checkpoint(piece, rows, prompts, **how))
    agree(step_of(name, model, max_mem=2 * 3.5 * computing.bytes_a_row(model, torch.zeros(1, 7), None, trained=True) / 2**30), whole)
    assert len(calls) >= (2 if name == "coop_mt" else 4) and max(calls) <= 3    # texts at once, and one image
    calls.clear()
    agree(step_of(name, model, max_mem=1.0), whole, tolerance=0)
    assert not calls


def test_pieces_keep_less_for_the_backward_pass(model):
    """What autograd keeps: of 40 texts in one piece everything, in pieces the tokens and the prompts."""
    tokens, prompts = common.tokenize([f"class {i}" for i in range(40)], 2), torch.randn(1, 40, 2, 64, requires_grad=True)
    kept = {}
    for room in (None, 1e-3):
        model.max_mem, kept[room] = room, 0

        def pack(x):
            kept[room] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            common.encode_text(model, tokens, prompts)
    assert kept[1e-3] < kept[None] / 10
    assert kept[None] * 4 == pytest.approx(40 * computing.bytes_a_row(model, tokens, prompts, trained=True), rel=0.6)


@pytest.mark.parametrize("prompted", [False, True])
def test_passes_without_gradients_go_in_pieces_too(model, prompted, monkeypatch):
    rows = dict(encode_text=common.tokenize([f"class {i}" for i in range(40)], 2), encode_image=torch.randn(40, 3, 32, 32))
    whole, sizes, block = {}, [], common._block
    prompts = torch.randn(2, 40, 2, 64) if prompted else None
    for room in (None, 2e-3):
        model.max_mem = room
        model.block = lambda layer, x, causal: sizes.append(len(x)) or block(layer, x, causal)
        for name, inputs in rows.items():
            sizes.clear()
            features = getattr(common, name)(model, inputs, prompts)
            assert (features - whole.setdefault(name, features)).abs().max() < 1e-5
            assert max(sizes) == 40 if room is None else 1 < max(sizes) < 20
    resnet = types.SimpleNamespace(visual=torch.nn.Identity(), max_mem=1e-9, logit_scale=torch.zeros(()), dtype=torch.float32, encode_image=lambda images: images)
    assert common.encode_image(resnet, rows["encode_image"]) is rows["encode_image"]        # whose needs are not known


def test_pieces_can_be_differentiated_once_more_and_again(model):
    """JSCPT's upper step, a double backward pass several times over, and surgery, a backward pass a task over one graph."""
    jscpt, coop = common.load_method("jscpt"), common.load_method("coop_mt")
    tasks, results = tasks_of(model, 3, 4, NAMES), []
    args = types.SimpleNamespace(**{**jscpt.PAPER, **FLAGS, "n_ctx": 2, "batch_size": 4, "scale": 0.01, "upper_lr": 0.1})
    for room in (None, 1e-4):
        model.max_mem = None
        common.seed_everything(1)
        prompts = jscpt.build(args, model, tasks)                               # whose start magnifies the texts' last bits
        model.max_mem = room
        batches = [(torch.stack([task.train[i][0] for i in range(4)]), torch.arange(4)) for task in tasks]
        upper = torch.optim.SGD([prompts.alpha, prompts.beta], lr=1.0)
        effect, A = torch.full((3,), 0.7), torch.full((3, 3), 0.3)
        jscpt.upper_step(args, model, jscpt.texts_of(args, tasks), prompts, batches, batches[::-1], effect, A, upper)
        words = types.SimpleNamespace(**{**coop.PAPER, **FLAGS, "n_ctx": 2, "epochs": 2, "batch_size": 4, "surgery": "pcgrad", "views": 1})
        few = [common.Task(t.name, NAMES, "a {}", common.Images(range(6), [0, 1, 2, 3, 4, 0]), None) for t in tasks]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "view_features", lambda model, images, *_: (torch.randn(1, 6, 32), torch.tensor(images.labels)))
            trained = coop.train(words, model, few, Log(), seed=1)
        results.append((prompts.alpha.grad, prompts.beta.grad, trained.vectors.detach()))
    for one, other in zip(*results):
        assert one.abs().max() > 0 and (one - other).abs().max() <= 1e-5 * max(1, other.abs().max())


def test_a_card_gives_nine_tenths_of_what_is_free_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 16 * 2**30))
    model = types.SimpleNamespace(logit_scale=types.SimpleNamespace(device=torch.device("cuda")))
    args = types.SimpleNamespace(amp=False, max_mem=None, compile=False)
    computing.set_up(model, args, None)
    assert model.max_mem == 9 and "9.0 GB" in capsys.readouterr().out
    computing.set_up(model, types.SimpleNamespace(amp=False, max_mem=3.0, compile=False), None)
    assert model.max_mem == 3 and not capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_on_a_cpu_is_near_and_leaves_prompts_and_gradients_in_float32(model, name):
    exact = step_of(name, model)
    model.amp = True
    loss, grads = step_of(name, model)
    assert loss != exact[0] and loss.item() == pytest.approx(exact[0].item(), rel=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    one, other = (torch.cat([g.flatten() for g in part.values()]) for part in (grads, exact[1]))
    assert torch.cosine_similarity(one, other, dim=0) > 0.9
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_float16_of_cards_without_bfloat16_has_the_same_gradients_nearly(model, name, monkeypatch):
    exact = step_of(name, model)
    monkeypatch.setattr(common, "autocast", lambda model: torch.autocast("cpu", torch.float16))
    loss, grads = step_of(name, model)
    assert loss != exact[0] and loss.item() == pytest.approx(exact[0].item(), rel=0.01)
    for key, g in exact[1].items():
        assert grads[key].dtype == torch.float32 and (grads[key] - g).norm() < 0.03 * g.norm(), key


@pytest.mark.parametrize("size", [1e-9, 1, 1e6])
def test_gradients_that_float16_has_no_numbers_for_pass_the_encoders(model, size):
    """Small ones vanish in the encoder without the scale, and large ones are infinite."""
    rows = dict(encode_text=common.tokenize(NAMES, 2), encode_image=torch.randn(5, 3, 32, 32))
    for name, inputs in rows.items():
        encode, prompts, weights = getattr(common, name), torch.randn(2, 2, 64, requires_grad=True), size * torch.randn(5, 32)

        def gradient(encode):
            return torch.autograd.grad((encode(model, inputs, prompts).float() * weights).sum(), prompts)[0]
        exact = gradient(encode)
        with torch.autocast("cpu", torch.float16):
            error = [(gradient(e) - exact).norm() / exact.norm() for e in (encode, encode.__wrapped__.__wrapped__)]
            model.max_mem = 1e-3                                                # in pieces, each with its own scale
            assert (gradient(encode) - exact).norm() < 0.01 * exact.norm()
            features = encode(model, inputs, prompts)
            assert torch.equal(torch.autograd.grad(features[0].sum() * size, features)[0][0], torch.full((32,), float(size)))
        del model.max_mem
        assert error[0] < 0.01 and (size == 1 or not error[1] < 0.5)


@pytest.mark.parametrize("device, bf16, amp, dtype", [("cpu", True, False, None), ("cpu", False, True, torch.bfloat16),
                                                      ("cuda", True, False, torch.bfloat16), ("cuda", False, True, torch.float16)])
def test_bfloat16_is_for_cards_that_have_it_and_for_cpus_on_request(monkeypatch, device, bf16, amp, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: bf16)
    monkeypatch.setattr(torch, "autocast", lambda *words: words)
    model = types.SimpleNamespace(logit_scale=types.SimpleNamespace(device=torch.device(device)), amp=amp)
    assert common.autocast(model) == (device, dtype) if dtype else not isinstance(common.autocast(model), tuple)
    with computing.sdpa_kernel(computing.SDPBackend.MATH):                      # a gradient's gradient, which cannot be scaled
        assert isinstance(common.autocast(model), tuple) == (dtype == torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ compilation

def test_no_compiler_is_told_in_a_line(monkeypatch):
    def broken(function, **how):
        def call(*words):
            raise RuntimeError("Failed to find a C++ compiler")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(common.UserError, match="--compile finds no compiler that works .Failed to find a C.. compiler.: install one"):
        computing.compiled(common._block, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maple_mt", "jscpt"])
def test_compiled_layers_have_the_same_loss_and_gradients(model, name):
    whole = step_of(name, model)
    fast = computing.compiled(common._block, torch.device("cpu"))
    agree(step_of(name, model, block=fast), whole)
    agree(step_of(name, model, block=fast, max_mem=1e-3), whole)
    with computing.sdpa_kernel(computing.SDPBackend.MATH):                      # second derivatives: the layers as they are
        x = torch.randn(2, 5, 64, requires_grad=True)
        [g] = torch.autograd.grad(model.block(model.transformer.resblocks[0], x, causal=True).sum(), x, create_graph=True)
        assert torch.autograd.grad(g.pow(2).sum(), x)[0].abs().max() > 0


# ----------------------------------------------------------------------------------------- what a step and an evaluation run

TEXTS = dict(coop_mt=5, maple_mt=5, mvlpt=5, hipro=25, mmap=15, jscpt=15)       # 5 shared class names; 5 nodes; a prompt a task


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_one_pass_of_all_texts_and_one_of_all_images(model, name):
    seen = passes(lambda: step_of(name, model))
    if name in ("vpt_mt", "jscpt"):
        assert seen.pop(0) == ("text", 5, 9, False)                             # the fixed texts, before the first step
    assert [(kind, rows, trained) for kind, rows, _, trained in seen] == \
        [("text", TEXTS.get(name), True)] * (name != "vpt_mt") + [("image", 12, True)] * (name not in ("coop_mt", "hipro"))
    assert all(tokens < 12 for kind, _, tokens, _ in seen if kind == "text")


@pytest.mark.parametrize("name", METHODS)
def test_gradients_stop_where_the_first_prompt_enters(model, name):
    """What comes before it needs none: its outputs ask for no gradient, and CLIP's weights have none."""
    before = []
    for module in (model.token_embedding, model.visual.conv1):
        module.register_forward_hook(lambda module, given, made: before.append(made.requires_grad))
    step_of(name, model)
    assert before and not any(before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_texts_are_encoded_once_an_evaluation_whatever_the_number_of_images(model, name):
    method, tasks = common.load_method(name), tasks_of(model, 2, 26, NAMES)     # 104 test images a task: two batches
    args = types.SimpleNamespace(**{**method.PAPER, **FLAGS, "n_ctx": 2})
    common.seed_everything(1)
    prompts = method.build(args, model, tasks)
    if name == "mmap":
        prompts.set_groups([[0], [1]])
    seen = passes(lambda: method.score(args, model, lambda image: image, tasks, prompts))
    learned = {"vpt_mt": 0, "hipro": 0, "mvlpt": 2}.get(name, 1)                # hipro keeps its classifiers; mvlpt has a prompt a target
    texts = [rows for kind, rows, tokens, _ in seen if kind == "text"]
    assert len(texts) == learned + 1                                            # and the templates'
    images = sum(rows for kind, rows, _, _ in seen if kind == "image")
    assert images == 208 * (1 if name in ("coop_mt", "hipro") else 2)           # zero-shot features serve a method without image prompts


@pytest.mark.parametrize("name", ["coop_mt", "hipro"])
def test_fixed_views_go_through_the_frozen_encoder_once_a_training(model, name):
    method, tasks = common.load_method(name), small_tasks("a", "b")
    args = types.SimpleNamespace(**{**method.PAPER, **FLAGS, "n_ctx": 2, "epochs": 3, "views": 2, "batch_size": 4, "min_crop": 0.6})
    seen = passes(lambda: method.train(args, model, tasks, Log(), seed=1))
    assert sum(rows for kind, rows, _, _ in seen if kind == "image") == 2 * 2 * 6


# --------------------------------------------------------------------------------------------------------- images in memory

def test_training_images_are_held_in_memory_and_are_the_same(model, tmp_path):
    tasks = common.load_tasks(str(make_tree(tmp_path / "shapes", {f"{d}/{c}": 4 for d in "ab" for c in "xy"})), split=0.5)
    args = types.SimpleNamespace(batch_size=4, min_crop=0.6, views=0)

    def epoch():
        common.seed_everything(1)
        return [x for batches in common.image_batches(model, tasks, args, 1) for x, _ in batches]
    read, room = epoch(), 6 * 4 * 24 * 24 + 100
    for task in tasks:
        for i in range(len(task.train)):
            room = task.train.keep(i, room)
    assert room == 100 and [len(task.train.kept) for task in tasks] == [4, 2]    # six fit
    for path in tasks[0].train.items + list(tasks[1].train.kept):
        path.write_bytes(b"gone")
    assert all(torch.equal(one, other) for one, other in zip(epoch(), read))
    part = tasks[0].train.subset([1, 0])
    assert part[1][0].tobytes() == tasks[0].train[0][0].tobytes()               # a held out part finds them too
    tasks[0].train[0][0].putpixel((0, 0), (1, 2, 3))                            # what is handed out may be drawn on
    assert all(torch.equal(one, other) for one, other in zip(epoch(), read))


def test_the_built_in_benchmark_is_read_without_processes_and_many_files_with():
    [emoji, *_] = common.load_tasks("emoji", split=1 / 2)
    assert len(emoji.train) > 400 and listings.workers([emoji.train]) == 0
    assert emoji.train.keep(0, 10**9) == 10**9 and not emoji.train.kept         # in memory already
    assert listings.workers([common.Images(range(401), range(401))]) > 0 == listings.workers([common.Images(range(400), range(400))])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
def test_the_benchmark_measures_what_a_step_adds_to_memory():
    """What the process holds and held before does not count, nor what the one had that started it."""
    ones = lambda n: torch.ones(n * 2**18)                                      # n MB
    held, before = ones(20), ones(300)
    del before
    assert megabytes("cpu", lambda: ones(100).sum()) == pytest.approx(100, abs=10) and len(held)
    assert megabytes("cpu", lambda: None) < 5
    held = ones(1200)                                                           # a child's ru_maxrss would begin here
    code = "import torch; from bench_speed import megabytes; print(megabytes('cpu', lambda: torch.ones(100 * 2**18).sum()))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    assert float(child.stdout) == pytest.approx(100, abs=20) and len(held)
