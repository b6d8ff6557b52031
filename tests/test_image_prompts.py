"""VPT-MT and MaPLe-MT: parameters, the coupling formula, the words around the prompts."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_tasks

import common

vpt, maple = common.load_method("vpt_mt"), common.load_method("maple_mt")
encode = common.clip.clip._tokenizer.encode


def settings(method, **changes):
    usual = dict(n_ctx=3, epochs=1, lr=0.1, batch_size=6, min_crop=0.6, workers=0)
    return method.Args(**dict(usual, **changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_at_vit_b16():
    assert count(vpt.ImagePrompts(12, 16, 768)) == 147_456
    assert count(maple.CoupledPrompts(12, 16, 512, 768)) == 4_826_112
    assert count(maple.CoupledPrompts(9, 2, 512, 768)) == 3_555_072


def test_depth_and_length_are_those_of_the_settings(small):
    tasks = small_tasks("a", "b")
    assert vpt.build(settings(vpt), small, tasks).image_prompts().shape == (3, 3, 64)
    prompts = maple.build(settings(maple, depth=2), small, tasks)
    assert prompts.image_prompts().shape == prompts.text_prompts().shape == (2, 3, 64)


@pytest.mark.parametrize("clip, expected", [("ViT-B/16", (4, 5, 16)), ("tiny", (4, 10, 4))])
def test_minidomainnet_has_batches_of_4_with_every_backbone(clip, expected):
    for method in (vpt, maple, common.load_method("mmap")):
        line = f"--data minidomainnet --split 0.01 --clip {clip}"
        args = common.parse(method.METHOD, line.split())
        assert (args.batch_size, args.epochs, args.n_ctx) == expected


@pytest.mark.parametrize("b, text", [(2, "of a cup."), (4, "cup."), (6, "cup.")])
def test_maples_prompts_replace_as_many_words_of_a_photo_of_a(small, b, text):
    """With two, "[v][v] of a cup.": they start as "a photo", and the text keeps the other words."""
    args, tasks = settings(maple, n_ctx=b), small_tasks("a")
    first = maple.build(args, small, tasks).text_prompts()[0]
    words = [encode(word)[0] for word in "a photo of a".split()[:b]]
    if b <= 4:
        assert torch.equal(first, small.token_embedding.weight[words])
    else:
        assert first.std().item() == pytest.approx(0.02, rel=0.2)
    row = maple.texts_of(args, tasks).tokens[0].tolist()
    assert [i for i in row if i] == [49406, *encode("X") * b, *encode(text), 49407]


def test_maple_scores_test_images_with_the_texts_of_its_training(small):
    args, [task] = settings(maple, n_ctx=2), small_tasks("a")
    prompts = maple.build(args, small, [task])
    tokens = common.tokenize([f"of a {name}" for name in task.class_names], 2)
    w = common.encode_text(small, tokens, prompts.text_prompts())
    found = maple.classify(args, small, [task], prompts)
    assert (found["classifiers"][0] - F.normalize(w, dim=-1)).abs().max() < 1e-6
    assert torch.equal(found["image_prompts"][:, 0], prompts.image_prompts())


def test_vpt_uses_the_plain_text_of_the_template(small):
    args, [task] = settings(vpt), small_tasks("a")
    found = vpt.classify(args, small, [task], vpt.build(args, small, [task]))
    w = small.encode_text(common.clip.tokenize([f"a {name}." for name in task.class_names]))
    assert (found["classifiers"][0] - F.normalize(w, dim=-1)).abs().max() < 1e-5


def test_maple_couples_every_layer_and_normalises_the_first(small):
    """F_k(P_k) = P_k W_k^T + c_k by hand; the first layer's prompts also go through CLIP's ln_pre.
    """
    one = maple.build(settings(maple), small, small_tasks("a"))
    for k, (made, coupling, source) in enumerate(zip(one.image_prompts(), one.F, one.P)):
        by_hand = (source[:, None] * coupling.weight[None]).sum(-1) + coupling.bias
        if k == 0:
            centred = by_hand - by_hand.mean(-1, keepdim=True)
            by_hand = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            by_hand = by_hand * small.visual.ln_pre.weight + small.visual.ln_pre.bias
        assert (made - by_hand).abs().max() < 1e-5
    assert not any("ln_pre" in name for name, _ in one.named_parameters())


def test_views_are_a_fixed_number_or_fresh(small):
    [task] = small_tasks("a")
    task.train = task.train.subset([0])         # one image, so that every step shows it

    def shown(views):
        args, seen = settings(vpt, views=views, batch_size=2), set()
        for epoch in range(8):
            common.seed_everything(1, epoch)
            for images, _, _ in common.batches(args, small, [task]):
                seen |= {tuple(image.flatten()[:50].tolist()) for image in images}
        return seen

    assert len(shown(1)) == 1 and len(shown(3)) == 3 and len(shown(0)) > 7
    assert shown(1) < shown(3) == shown(3)      # view 0 is the same
