"""The prompted encoders against the clip package's own, and against a slow version that walks the
package's own blocks."""

import math

import clip
import pytest
import torch

import common

NAMES = ["bird", "musical instrument", "truck or bus"]


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item()), (a - b).abs().max()


def images(model, n=2):
    return torch.randn(
        n,
        3,
        model.visual.input_resolution,
        model.visual.input_resolution,
        generator=torch.Generator().manual_seed(1),
    )


def random(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def slow_text(model, tokens, prompts):
    """Deep text prompts for 77 positions, position first and with CLIP's own layers and mask."""
    n = prompts.shape[-2]
    x = model.token_embedding(tokens).clone()
    for row in range(len(x)):
        x[row, 1 : 1 + n] = prompts[0][row]
    x = (x + model.positional_embedding).permute(1, 0, 2)
    for i, block in enumerate(model.transformer.resblocks):
        if 0 < i < len(prompts):
            x = x.clone()
            for row in range(x.shape[1]):
                x[1 : 1 + n, row] = prompts[i][row]
        x = block(x)
    x = model.ln_final(x.permute(1, 0, 2))
    return (
        torch.stack([x[i, tokens[i].tolist().index(49407)] for i in range(len(x))])
        @ model.text_projection
    )


def slow_image(model, pictures, prompts, order=None):
    """Deep image prompts with CLIP's own layers; `order` permutes all tokens behind the class token
    at the input."""
    v, n = model.visual, prompts.shape[-2]
    x = v.conv1(pictures).flatten(2).permute(0, 2, 1)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
    x = v.ln_pre(x)
    for i, block in enumerate(v.transformer.resblocks):
        if i < len(prompts):
            rest = x[:, 1:] if i == 0 else x[:, 1 + n :]
            x = torch.cat([x[:, :1], prompts[i], rest], 1)
        if i == 0 and order is not None:
            x = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)
        x = block(x.permute(1, 0, 2)).permute(1, 0, 2)
    return v.ln_post(x[:, 0]) @ v.proj


@pytest.mark.parametrize("shape", ["small", "vit_b16", "rn50"])
def test_without_prompts_both_encoders_are_clip_itself(shape, request):
    model = request.getfixturevalue(shape)
    tokens = clip.tokenize([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        close(common.encode_text(model, tokens), model.encode_text(tokens))
        close(common.encode_image(model, images(model)), model.encode_image(images(model)))


@pytest.mark.parametrize("shape", ["small", "vit_b16", "rn50"])
def test_cutting_the_text_at_its_longest_row_changes_nothing(shape, request):
    model = request.getfixturevalue(shape)
    tokens = common.tokenize(NAMES, n_ctx=4)
    padded = torch.zeros(len(NAMES), 77, dtype=torch.long)
    padded[:, : tokens.shape[1]] = tokens
    prompts = random(2, 4, model.ln_final.weight.shape[0])
    with torch.no_grad():
        close(
            common.encode_text(model, tokens, prompts), common.encode_text(model, padded, prompts)
        )


@pytest.mark.parametrize("shape", ["small", "vit_b16"])
def test_prompts_a_row_equal_shared_prompts_repeated(shape, request):
    model = request.getfixturevalue(shape)
    tokens, pictures = common.tokenize(NAMES, n_ctx=3), images(model)
    text, image = (
        random(2, 3, model.ln_final.weight.shape[0]),
        random(2, 3, model.visual.conv1.out_channels),
    )
    with torch.no_grad():
        close(
            common.encode_text(model, tokens, text),
            common.encode_text(model, tokens, text[:, None].repeat(1, 3, 1, 1)),
        )
        close(
            common.encode_image(model, pictures, image),
            common.encode_image(model, pictures, image[:, None].repeat(1, 2, 1, 1)),
        )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_deep_prompts_agree_with_a_slow_walk_through_clips_own_layers(small, layers):
    """With fewer layers than the encoder has, the prompt tokens stay and flow on."""
    tokens = common.tokenize(NAMES, n_ctx=3)
    padded = torch.zeros(len(NAMES), 77, dtype=torch.long)
    padded[:, : tokens.shape[1]] = tokens
    text, image = (
        random(layers, 3, 3, 64),
        random(layers, 2, 3, 64),
    )  # a set of its own for every row
    with torch.no_grad():
        close(common.encode_text(small, tokens, text), slow_text(small, padded, text))
        close(
            common.encode_image(small, images(small), image),
            slow_image(small, images(small), image),
        )


def test_image_prompts_may_stand_anywhere_behind_the_class_token(small):
    prompts = random(1, 2, 5, 64)
    order = torch.randperm(5 + 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        close(
            common.encode_image(small, images(small), prompts),
            slow_image(small, images(small), prompts, order),
        )


def test_the_place_of_a_text_prompt_matters(small):
    tokens, prompts = common.tokenize(NAMES, n_ctx=3), random(1, 3, 64)
    with torch.no_grad():
        a, b = (
            common.encode_text(small, tokens, prompts),
            common.encode_text(small, tokens, prompts.flip(1)),
        )
    assert (a - b).abs().max() > 1e-3


def test_text_prompts_work_on_a_resnet_and_image_prompts_are_refused(rn50):
    tokens, prompts = common.tokenize(NAMES, n_ctx=4), random(1, 4, 512)
    with torch.no_grad():
        plain, prompted = (
            common.encode_text(rn50, tokens),
            common.encode_text(rn50, tokens, prompts),
        )
    assert plain.shape == prompted.shape == (3, 1024) and (plain - prompted).abs().max() > 1e-3
    with pytest.raises(common.UserError, match="ViT"):
        common.encode_image(rn50, images(rn50), random(1, 4, 64))


def test_more_prompts_than_places_are_refused(small):
    with pytest.raises(ValueError, match="do not fit"):
        common.encode_text(small, common.tokenize(NAMES, n_ctx=2), random(1, 9, 64))
    with pytest.raises(ValueError, match="do not fit"):
        common.encode_image(small, images(small), random(4, 2, 64))


def test_gradients_reach_the_prompts_and_nothing_else(small):
    prompts = random(3, 2, 64).requires_grad_()
    common.encode_text(small, common.tokenize(NAMES, n_ctx=2), prompts).sum().backward()
    assert all(prompts.grad[i].abs().sum() > 0 for i in range(3))
    assert all(p.grad is None for p in small.parameters())


def test_logits_by_hand(small):
    """exp(logit_scale) times the cosine: (3, 4) and (4, 3) have cosine 24 / 25, (3, 4) and (0, -2)
    have -4 / 5."""
    got = common.logits(small, torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0], [0.0, -2.0]]))
    scale = small.logit_scale.exp().item()
    assert got[0].tolist() == pytest.approx([scale * 0.96, scale * -0.8], rel=1e-5)


def test_tokens_are_start_placeholders_name_full_stop_end():
    words = clip.clip._tokenizer
    tokens = common.tokenize(["bird", "musical instrument"], n_ctx=3)
    assert tokens.shape == (2, 1 + 3 + 2 + 1 + 1)  # the longest row, not 77
    x = words.encode("X")
    assert tokens[0].tolist() == [
        49406,
        *x * 3,
        *words.encode("bird"),
        *words.encode("."),
        49407,
        0,
    ]
    assert tokens[1].tolist() == [
        49406,
        *x * 3,
        *words.encode("musical instrument"),
        *words.encode("."),
        49407,
    ]
    ours = common.tokenize(NAMES, template="a photo of a {}")
    theirs = clip.tokenize([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(ours, theirs[:, : ours.shape[1]]) and theirs[:, ours.shape[1] :].sum() == 0


def test_too_many_context_vectors_name_the_class_and_the_most_that_fit():
    with pytest.raises(common.UserError, match="'musical instrument'.*at most 72") as error:
        common.tokenize(["bird", "musical instrument"], n_ctx=90)
    assert common.tokenize(["bird", "musical instrument"], n_ctx=72).shape == (2, 77), error


@pytest.mark.parametrize("shape", ["small", "vit_b16"])
@pytest.mark.parametrize("sets", [[0, 0, 0], [0, 1, 1], [1, 0, 1], [2, 1, 0], [2, 2, 2]])
def test_a_set_per_task_equals_a_set_per_row(shape, sets, request):
    """Features and gradients of the shared prefix against a walk that shares nothing."""
    model = request.getfixturevalue(shape)
    tokens, pictures = common.tokenize(NAMES, n_ctx=3), images(model, 3)
    padded = torch.zeros(len(NAMES), 77, dtype=torch.long)
    padded[:, : tokens.shape[1]] = tokens
    text = random(2, 3, 3, len(model.ln_final.weight)).requires_grad_()
    image = random(2, 3, 3, len(model.visual.class_embedding)).requires_grad_()
    got = [
        common.encode_text(model, tokens, text, torch.tensor(sets)),
        common.encode_image(model, pictures, image, torch.tensor(sets)),
    ]
    wanted = [slow_text(model, padded, text[:, sets]), slow_image(model, pictures, image[:, sets])]
    for ours, slow, prompts in zip(got, wanted, [text, image]):
        weights = random(*ours.shape, seed=5)
        close(ours, slow)
        (ours_grad,) = torch.autograd.grad((ours * weights).sum(), prompts)
        (slow_grad,) = torch.autograd.grad((slow * weights).sum(), prompts)
        close(ours_grad / slow_grad.abs().max(), slow_grad / slow_grad.abs().max())


def test_the_prefix_is_computed_once_per_set(small):
    """Linear layers see S prefixes of 1 + n tokens and each text's own tokens, and no more."""
    rows, layer = [], small.transformer.resblocks[0].ln_1
    hook = layer.register_forward_hook(lambda module, x, y: rows.append(x[0].shape[:-1].numel()))
    tokens = common.tokenize(NAMES, n_ctx=8)
    common.encode_text(small, tokens, random(1, 2, 8, 64), torch.tensor([0, 1, 1]))
    hook.remove()
    assert rows == [2 * 9 + 3 * (tokens.shape[1] - 9)]


def test_the_encoders_are_twice_differentiable_under_the_math_kernel(small):
    """A Hessian-vector product against the difference of two gradients."""
    tokens = common.tokenize(NAMES, n_ctx=2)
    prompts = random(2, 2, 64).requires_grad_()
    direction, weights = random(2, 2, 64, seed=7), random(3, 32, seed=8)

    def gradient(p, **how):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            text = common.encode_text(small, tokens, p)
            image = common.encode_image(small, images(small, 3), p)
        return torch.autograd.grad((text * image * weights).sum(), p, **how)[0]

    (product,) = torch.autograd.grad(gradient(prompts, create_graph=True), prompts, direction)
    step = 1e-2
    ahead = gradient((prompts + step * direction).detach().requires_grad_())
    behind = gradient((prompts - step * direction).detach().requires_grad_())
    close(product / product.abs().max(), (ahead - behind) / (2 * step) / product.abs().max(), 5e-3)


def test_checkpointing_recomputes_layers_and_changes_nothing(small):
    tokens, prompts = common.tokenize(NAMES, n_ctx=2), random(3, 2, 64).requires_grad_()
    found = []
    for on in (False, True):
        small.checkpoint = on
        loss = (
            common.encode_text(small, tokens, prompts).sum()
            + common.encode_image(small, images(small), prompts).square().sum()
        )
        found.append((loss, *torch.autograd.grad(loss, prompts)))
    small.checkpoint = False
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_quick_gelu_is_one_silu():
    """x sigmoid(1.702 x) = silu(1.702 x) / 1.702, in the package's own block."""
    block = clip.model.ResidualAttentionBlock(8, 2)
    x = random(5, 8)
    close(common._mlp(block, x), x + block.mlp(block.ln_2(x)), 1e-6)


def test_features_that_were_computed_before_are_passed_through(small):
    x = random(4, 32)
    assert common.encode_image(small, x) is x


def task_of(names, name="t"):
    return common.Task(name, names, "a {}", None, None)


def test_texts_of_several_tasks_are_one_batch_and_share_rows():
    tasks = [task_of(NAMES), task_of(["cup", "hat"]), task_of(NAMES)]
    shared = common.Texts(tasks, 4)
    assert shared.start.tolist() == [0, 3, 0] and shared.sets.tolist() == [0] * 5
    assert shared.mine.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(shared.tokens, common.tokenize([*NAMES, "cup", "hat"], 4))
    owned = common.Texts(tasks, 4, sets=[0, 1, 1])
    assert owned.start.tolist() == [0, 3, 5] and owned.sets.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    templates = common.Texts(tasks, templates=True)
    assert torch.equal(templates.tokens, common.tokenize([*NAMES, "cup", "hat"], template="a {}"))


def test_task_losses_by_hand(small):
    """Task 0 has classes 0-2, task 1 classes 3-4; the logits are made by orthogonal features."""
    tasks = [task_of(NAMES), task_of(["cup", "hat"])]
    texts, w = common.Texts(tasks), torch.eye(5, 32)
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 1], x[1, 3], x[2, 4] = 1.0, 3.0, 4.0, 1.0  # cosines 1; 0.6 and 0.8; 1
    labels, task = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    s = small.logit_scale.exp().item()
    first = math.log(math.exp(s) + 2) - s  # classes 0-2: s, 0, 0
    second = math.log(1 + math.exp(0.6 * s) + 1)  # 0, 0.6 s, 0 and label 0
    third = math.log(1 + math.exp(s))  # classes 3-4: 0, s and label 0
    got = common.task_losses(small, x, w, labels, task, texts)
    assert got.tolist() == pytest.approx([(first + second) / 2, third], rel=1e-5)
    absent = common.task_losses(small, x[:2], w, labels[:2], task[:2], texts)
    assert absent.tolist() == pytest.approx([(first + second) / 2, 0.0], rel=1e-5)


def test_task_losses_are_those_of_each_task_alone(small):
    tasks = [task_of(NAMES), task_of(["cup", "hat"])]
    texts, w = common.Texts(tasks), random(5, 32)
    x, labels, task = (
        random(6, 32, seed=3),
        torch.tensor([0, 2, 1, 0, 1, 2]),
        torch.tensor([0, 0, 1, 1, 1, 0]),
    )
    got = common.task_losses(small, x, w, labels, task, texts)
    for t, columns in enumerate([w[:3], w[3:]]):
        one = torch.nn.functional.cross_entropy(
            common.logits(small, x[task == t], columns), labels[task == t]
        )
        assert got[t].item() == pytest.approx(one.item(), rel=1e-5)


def test_every_tensor_follows_the_model_to_cuda():
    """On fake CUDA tensors a forward pass raises where a tensor made on the CPU meets one on the
    card."""
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode

    tokens = common.tokenize(NAMES, n_ctx=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CLIP(**TINY).eval()
            text_prompts, image_prompts, pictures = (
                torch.randn(2, 2, 64),
                torch.randn(2, 2, 64),
                torch.randn(2, 3, 32, 32),
            )
        text = common.encode_text(model, tokens, text_prompts)
        image = common.encode_image(model, pictures, image_prompts)
        assert common.logits(model, image, text).device.type == "cuda"
