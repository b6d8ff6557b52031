"""The prompted encoders against the clip package's own and against a slow pass through the
package's own blocks; texts and losses against hand arithmetic."""

import math

import clip
import pytest
import torch

import common

NAMES = ["bird", "musical instrument", "truck or bus"]


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item()), (a - b).abs().max()


def random(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def images(model, n=2):
    size = model.visual.input_resolution
    return 2 * random(n, 3, size, size, seed=1)


def padded(tokens):
    """Tokens padded to CLIP's 77 positions."""
    return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))


def slow_text(model, tokens, prompts):
    """Deep text prompts [L, C, n, d] for 77 positions, with CLIP's own layers and mask."""
    n = prompts.shape[-2]
    x = model.token_embedding(tokens).clone()
    x[:, 1:1 + n] = prompts[0]
    x = (x + model.positional_embedding).permute(1, 0, 2)
    for i, block in enumerate(model.transformer.resblocks):
        if 0 < i < len(prompts):
            x = x.clone()
            x[1:1 + n] = prompts[i].permute(1, 0, 2)
        x = block(x)
    x = model.ln_final(x.permute(1, 0, 2))
    ends = [x[i, row.index(49407)] for i, row in enumerate(tokens.tolist())]
    return torch.stack(ends) @ model.text_projection


def slow_image(model, pictures, prompts):
    """Deep image prompts [L, B, n, d] with CLIP's own layers."""
    v, n = model.visual, prompts.shape[-2]
    x = v.conv1(pictures).flatten(2).permute(0, 2, 1)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
    x = v.ln_pre(x)
    for i, block in enumerate(v.transformer.resblocks):
        if i < len(prompts):
            rest = x[:, 1:] if i == 0 else x[:, 1 + n:]
            x = torch.cat([x[:, :1], prompts[i], rest], 1)
        x = block(x.permute(1, 0, 2)).permute(1, 0, 2)
    return v.ln_post(x[:, 0]) @ v.proj


@pytest.mark.parametrize("shape", ["small", "vit_b16", "rn50"])
@torch.no_grad()
def test_without_prompts_both_encoders_equal_clips(shape, request):
    model = request.getfixturevalue(shape)
    tokens = clip.tokenize([f"a photo of a {name}." for name in NAMES])
    close(common.encode_text(model, tokens), model.encode_text(tokens))
    close(common.encode_image(model, images(model)), model.encode_image(images(model)))


@torch.no_grad()
def test_a_set_for_each_row_equals_one_set_repeated(small):
    tokens, pictures = common.tokenize(NAMES, 3), images(small)
    text, image = random(2, 3, 64), random(2, 3, 64, seed=3)
    texts = text[:, None].repeat(1, 3, 1, 1)
    close(common.encode_text(small, tokens, text), common.encode_text(small, tokens, texts))
    prompts = image[:, None].repeat(1, 2, 1, 1)
    close(common.encode_image(small, pictures, image),
          common.encode_image(small, pictures, prompts))


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_deep_prompts_agree_with_a_slow_pass_through_clips_own_layers(small, layers):
    """With prompts for fewer layers than the encoder has, the last ones flow through the rest."""
    tokens, pictures = common.tokenize(NAMES, 3), images(small)
    text, image = random(layers, 3, 3, 64), random(layers, 2, 3, 64)
    close(common.encode_text(small, tokens, text), slow_text(small, padded(tokens), text))
    close(common.encode_image(small, pictures, image), slow_image(small, pictures, image))


@pytest.mark.parametrize("sets", [[0, 0, 0], [1, 0, 1], [2, 1, 0]])
def test_a_set_for_each_task_equals_a_set_for_each_row(small, sets):
    """Features and gradients of the shared prefix against a pass that shares nothing."""
    tokens, pictures, given = common.tokenize(NAMES, 3), images(small, 3), torch.tensor(sets)
    text, image = random(2, 3, 3, 64).requires_grad_(), random(2, 3, 3, 64).requires_grad_()
    for ours, slow, prompts in [
        (common.encode_text(small, tokens, text, given),
         slow_text(small, padded(tokens), text[:, sets]), text),
        (common.encode_image(small, pictures, image, given),
         slow_image(small, pictures, image[:, sets]), image),
    ]:
        close(ours, slow)
        weights = random(*ours.shape, seed=5)
        g, expected = (torch.autograd.grad((x * weights).sum(), prompts)[0] for x in (ours, slow))
        close(g / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("sets", [[1, 0, 1, 0], [0, 0, 0, 1]])
@torch.no_grad()
def test_texts_in_any_order_and_number_have_the_features_of_those_sorted_by_set(small, sets):
    """Two sets with two texts each are computed with one product per set if they are in order, and
    otherwise with one per text."""
    tokens, prompts = common.tokenize([*NAMES, "cup"], 3), random(2, 2, 3, 64)
    order = sorted(range(4), key=sets.__getitem__)
    in_order = common.encode_text(small, tokens[order], prompts, sorted(sets))
    close(common.encode_text(small, tokens, prompts, sets)[order], in_order)
    assert (in_order - common.encode_text(small, tokens[order], prompts[:, 0])).abs().max() > 1e-3


@torch.no_grad()
def test_text_prompts_work_on_a_resnet_and_image_prompts_do_not(rn50):
    tokens = common.tokenize(NAMES, 4)
    plain = common.encode_text(rn50, tokens)
    prompted = common.encode_text(rn50, tokens, random(1, 4, 512))
    assert plain.shape == prompted.shape == (3, 1024) and (plain - prompted).abs().max() > 1e-3
    with pytest.raises(common.UserError, match="ViT"):
        common.encode_image(rn50, images(rn50), random(1, 4, 64))


def test_more_prompts_than_fit_are_rejected(small):
    with pytest.raises(ValueError, match="do not fit"):
        common.encode_text(small, common.tokenize(NAMES, 2), random(1, 9, 64))
    with pytest.raises(ValueError, match="do not fit"):
        common.encode_image(small, images(small), random(4, 2, 64))


def test_the_encoders_are_twice_differentiable_under_the_math_kernel(small):
    """A Hessian-vector product against the difference of two gradients."""
    tokens = common.tokenize(NAMES, 2)
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


def test_recompute_runs_each_layer_again_in_the_backward_pass_and_changes_nothing(
    small, monkeypatch
):
    tokens, prompts = common.tokenize(NAMES, 2), random(3, 2, 64).requires_grad_()
    found, ran = [], []
    layers = [*small.transformer.resblocks, *small.visual.transformer.resblocks]
    hooks = [one.ln_1.register_forward_hook(lambda *_: ran.append(1)) for one in layers]
    for on in (False, True):
        monkeypatch.setattr(small, "recompute", on, raising=False)
        ran.clear()
        loss = common.encode_text(small, tokens, prompts).sum()
        loss = loss + common.encode_image(small, images(small), prompts).square().sum()
        found.append((loss, *torch.autograd.grad(loss, prompts)))
        assert len(ran) == (12 if on else 6)
    for hook in hooks:
        hook.remove()
    assert all(map(torch.equal, *found))


# ------------------------------------------------------------------------- tokens, texts and losses

def test_logits_are_cosines_times_the_exponential_of_the_scale(small):
    """(3, 4) and (4, 3) have cosine 24 / 25, (3, 4) and (0, -2) have -4 / 5."""
    got = common.logits(small, torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0], [0.0, -2.0]]))
    scale = small.logit_scale.exp().item()
    assert got[0].tolist() == pytest.approx([scale * 0.96, scale * -0.8], rel=1e-5)


def test_tokens_are_start_placeholders_name_full_stop_end():
    encode = clip.clip._tokenizer.encode
    x, stop = encode("X"), encode(".")
    assert common.tokenize(NAMES[:2], 3).tolist() == [
        [49406, *x * 3, *encode("bird"), *stop, 49407, 0],             # the longest row, not 77
        [49406, *x * 3, *encode("musical instrument"), *stop, 49407],
    ]
    ours = common.tokenize(NAMES, template="a photo of a {}")
    assert torch.equal(padded(ours), clip.tokenize([f"a photo of a {name}." for name in NAMES]))


def task_of(*names):
    return common.Task("t", list(names), "a {}", None, None)


def test_texts_of_several_tasks_are_one_batch_and_share_rows():
    tasks = [task_of(*NAMES), task_of("cup", "hat"), task_of(*NAMES)]
    shared = common.Texts(tasks, 4)
    assert shared.start.tolist() == [0, 3, 0] and shared.sets.tolist() == [0] * 5
    assert shared.mine.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(shared.tokens, common.tokenize([*NAMES, "cup", "hat"], 4))
    owned = common.Texts(tasks, 4, sets=[0, 1, 1])
    assert owned.start.tolist() == [0, 3, 5]
    assert owned.sets.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    tasks[2].template = "no {}"                             # with the class names of tasks[0]
    templates = common.Texts(tasks, templates=True)
    assert templates.start.tolist() == [0, 3, 5]
    for tokens, template in ((templates.tokens[:3], "a {}"), (templates.tokens[5:], "no {}")):
        assert torch.equal(tokens, common.tokenize(NAMES, template=template))


def test_task_losses_by_hand(small):
    """Task 0 has classes 0-2, task 1 classes 3-4; the logits are made by orthogonal features."""
    texts, w = common.Texts([task_of(*NAMES), task_of("cup", "hat")]), torch.eye(5, 32)
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 1], x[1, 3], x[2, 4] = 1.0, 3.0, 4.0, 1.0     # cosines 1; 0.6 and 0.8; 1
    labels, task = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    s = small.logit_scale.exp().item()
    first = math.log(math.exp(s) + 2) - s                       # classes 0-2: s, 0, 0
    second = math.log(1 + math.exp(0.6 * s) + 1)                # 0, 0.6 s, 0 and label 0
    third = math.log(1 + math.exp(s))                           # classes 3-4: 0, s and label 0
    got = common.task_losses(small, x, w, labels, task, texts)
    assert got.tolist() == pytest.approx([(first + second) / 2, third], rel=1e-5)
    absent = common.task_losses(small, x[:2], w, labels[:2], task[:2], texts)
    assert absent.tolist() == pytest.approx([(first + second) / 2, 0.0], rel=1e-5)
    logged = common.nan_where_absent(absent, task[:2])
    assert logged[0] == absent[0] and logged[1].isnan()


def test_the_mean_over_pairs_counts_the_steps_with_images_of_both_tasks():
    """Task 2 is only in the second step, with task 0; tasks 1 and 2 are never together."""
    pairs = common.PairMean(3)
    pairs.add(torch.tensor([[1.0, 2, 9], [2, 3, 9], [9, 9, 9]]), torch.tensor([1, 0, 1]))
    pairs.add(torch.tensor([[5.0, 9, 6], [9, 9, 9], [6, 9, 7]]), torch.tensor([2, 0]))
    assert pairs.mean().tolist() == [[3, 2, 6], [2, 3, 0], [6, 0, 7]]
    resumed = common.PairMean(3)
    resumed.load_state_dict(pairs.state_dict())
    resumed.add(torch.full((3, 3), 6.0), torch.tensor([0]))
    assert resumed.mean().tolist() == [[4, 2, 6], [2, 3, 0], [6, 0, 7]]


def test_no_gradient_copies_slices(small):
    """An in-place operation on a view, such as a linear layer's output, would cause such copies."""
    prompts = random(2, 2, 64).requires_grad_()
    text = common.encode_text(small, common.tokenize(NAMES, n_ctx=2), prompts)
    nodes, seen = [text.grad_fn, common.encode_image(small, images(small), prompts).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert len(seen) > 100 and not any("CopySlices" in name for name in names), names
