"""Where CLIP's weights come from: checkpoint formats, the two hosts of OpenAI's weights, and the
errors for files that cannot be used; and what importing `common` needs."""
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import clip
import conftest
import pytest
import torch
from conftest import RESNET, ROOT, TINY, Trap, random_clip
from safetensors.torch import save, save_file

import common

# ------------------------------------------------------------------------------- kinds of file

def a_clip(kind="ViT", half=False, **shape):
    """A CLIP with random tensors; before training, some are all zeros or ones."""
    model = random_clip(**(dict(TINY, **shape) if kind == "ViT" else RESNET))
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim:
            tensor.normal_(std=0.1)
            tensor += "running_var" in key
    return model.half().float() if half else model


def cast(state, half):
    """The state dict as it is stored; as safetensors requires, no two tensors share memory."""
    kind = torch.float16 if half else torch.float32
    return {key: (value.to(kind) if value.is_floating_point() else value).clone().contiguous()
            for key, value in state.items()}


def transformers_state(model):
    """The state dict that transformers' CLIPModel would have, module by module."""
    visual = model.visual
    found = {
        "logit_scale": model.logit_scale,
        "text_projection.weight": model.text_projection.T,
        "visual_projection.weight": visual.proj.T,
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
    }
    modules = {
        "text_model.final_layer_norm": model.ln_final,
        "vision_model.pre_layrnorm": visual.ln_pre,
        "vision_model.post_layernorm": visual.ln_post,
    }
    for encoder, transformer in dict(text=model.transformer, vision=visual.transformer).items():
        for number, block in enumerate(transformer.resblocks):
            layer = f"{encoder}_model.encoder.layers.{number}"
            modules[f"{layer}.layer_norm1"] = block.ln_1
            modules[f"{layer}.layer_norm2"] = block.ln_2
            modules[f"{layer}.mlp.fc1"] = block.mlp.c_fc
            modules[f"{layer}.mlp.fc2"] = block.mlp.c_proj
            modules[f"{layer}.self_attn.out_proj"] = block.attn.out_proj
            for name, weight, bias in zip("qkv", block.attn.in_proj_weight.chunk(3),
                                          block.attn.in_proj_bias.chunk(3)):
                found[f"{layer}.self_attn.{name}_proj.weight"] = weight
                found[f"{layer}.self_attn.{name}_proj.bias"] = bias
    for name, module in modules.items():
        found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return found


def save_archive(model, path, half):
    """Save a TorchScript archive with the three sizes that OpenAI's archives have as tensors."""
    size = model.visual.input_resolution
    example = torch.zeros(1, 3, size, size), torch.zeros(1, 77, dtype=torch.long)
    for name, value in dict(input_resolution=size, context_length=77, vocab_size=49408).items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    traced = torch.jit.trace(model, example, check_trace=False)
    (traced.half() if half else traced).save(str(path))


FILES = {
    "TorchScript archive": ("archive.pt", save_archive),
    "OpenAI's state dict": (
        "openai.pt", lambda model, path, half: torch.save(cast(model.state_dict(), half), path)
    ),
    "training checkpoint of several GPUs": (
        "epoch_3.pt",
        lambda model, path, half: torch.save(dict(epoch=3, state_dict={
            f"module.{key}": value for key, value in cast(model.state_dict(), half).items()
        }), path),
    ),
    "OpenCLIP, .bin": (
        "open_clip_pytorch_model.bin",
        lambda model, path, half: torch.save(cast(model.state_dict(), half), path),
    ),
    "OpenCLIP, .safetensors": (
        "open_clip_model.safetensors",
        lambda model, path, half: save_file(cast(model.state_dict(), half), path),
    ),
    "transformers, .bin": (
        "pytorch_model.bin",
        lambda model, path, half: torch.save(cast(transformers_state(model), half), path),
    ),
    "transformers, .safetensors": (
        "model.safetensors",
        lambda model, path, half: save_file(cast(transformers_state(model), half), path),
    ),
}


@pytest.mark.filterwarnings("ignore")       # torch's, about tracing and TorchScript
@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("file, kind", [
    *[(file, "ViT") for file in FILES],
    *[(file, "ResNet") for file in FILES if "transformers" not in file],    # it has no ResNets
])
def test_a_loaded_model_has_the_features_of_the_saved_one_bit_for_bit(
    tmp_path, file, kind, half
):
    name, write = FILES[file]
    write(a_clip(kind, half), tmp_path / name, half)
    model, preprocess = common.load_clip(str(tmp_path / name))
    wanted = a_clip(kind, half)
    size = wanted.visual.input_resolution
    images, tokens = torch.rand(2, 3, size, size), clip.tokenize(["a cup.", "a red ball."])
    assert torch.equal(model.encode_image(images), wanted.encode_image(images))
    assert torch.equal(model.encode_text(tokens), wanted.encode_text(tokens))
    assert wanted.encode_text(tokens).std() > 1e-3 < wanted.encode_image(images).std()
    assert model.logit_scale == wanted.logit_scale and not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
    assert preprocess(conftest.noise(1, 48)).shape == (3, size, size)


# ------------------------------------------------------------------------- files of other things

def other_family():
    return {f"trunk.{key}": value for key, value in cast(a_clip().state_dict(), False).items()}


def siglip():
    """SigLIP's names in transformers: no class embedding, a bias beside the logits' scale."""
    state = cast(transformers_state(a_clip()), False)
    del state["vision_model.embeddings.class_embedding"], state["visual_projection.weight"]
    return dict(state, logit_bias=torch.zeros(1))


def misfit():
    return cast(dict(a_clip().state_dict(), text_projection=torch.ones(64, 48)), False)


WRONG = {
    "a truncated safetensors file": ("c.safetensors", lambda: save(misfit())[:-100]),
    "a safetensors file that is a text": ("c.safetensors", lambda: b"dear diary"),
    "another family": ("c.safetensors", lambda: save(other_family())),
    "SigLIP": ("c.safetensors", lambda: save(siglip())),
    "an encoder alone": ("c.pt", lambda: {
        key: value for key, value in a_clip().state_dict().items() if "visual." in key
    }),
    "shapes that do not fit": ("c.safetensors", lambda: save(misfit())),
    "shorter texts": ("c.pt", lambda: a_clip(context_length=32).state_dict()),
    "another vocabulary": ("c.pt", lambda: a_clip(vocab_size=32000).state_dict()),
    "a dict of numbers": ("c.pt", lambda: {"visual.proj": 1}),
    "code": ("c.bin", lambda: dict(a_clip().state_dict(), more=Trap())),
    "code in a plain pickle": ("c.bin", lambda: pickle.dumps(Trap())),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_cannot_be_used_gives_one_line_that_says_what_can(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    name, content = WRONG[what]
    content = content()
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(common.UserError) as error:
        common.load_clip(str(tmp_path / name))
    line = str(error.value)
    assert line.isprintable() and str(tmp_path / name) in line, line
    assert "give a TorchScript archive" in line and "transformers' CLIPModel" in line, line
    assert not (tmp_path / "trap").exists()


def test_a_folder_in_place_of_a_file_is_distinguished_from_an_unknown_name(tmp_path):
    with pytest.raises(common.UserError, match="a folder.* its model.safetensors"):
        common.load_clip(str(tmp_path))


GELU = {
    "OpenCLIP": ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, True),
    "OpenCLIP, QuickGELU": ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, False),
    "transformers, text": ("config.json", {"text_config": {"hidden_act": "gelu"}}, True),
    "transformers, images": (
        "config.json",
        {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_act": "gelu"}},
        True,
    ),
    "transformers, QuickGELU": (
        "config.json", {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {}}, False
    ),
    "timm": ("config.json", {"architecture": "vit_base_patch16_clip_224"}, False),
    "something else": ("config.json", ["gelu"], False),
}


@pytest.mark.parametrize("case", GELU)
def test_weights_whose_config_says_gelu_give_one_line_and_exit_code_2(tmp_path, here, case):
    name, config, refused = GELU[case]
    torch.save(a_clip().state_dict(), tmp_path / "model.pt")
    (tmp_path / name).write_text(json.dumps(config), encoding="utf-8")
    if not refused:
        common.load_clip(str(tmp_path / "model.pt"))
        return
    code, out, err = here("coop_mt.py", "--clip", tmp_path / "model.pt", "--out", tmp_path / "run")
    assert code == 2 and not out and err.count("\n") == 1 and not (tmp_path / "run").exists()
    for word in ("model.pt was trained with GELU", str(tmp_path / name), "use weights"):
        assert word in err


# --------------------------------------------------------------------------------- the two hosts

class Host(BaseHTTPRequestHandler):
    """Answers with what `server.files` has for a path: (status, headers, body), or 404."""

    def do_GET(self):
        status, headers, body = self.server.files.get(self.path, (404, {}, b""))
        if body is None:
            self.server.over.wait(10)
        self.send_response(status)
        for header in dict({"Content-Length": len(body or b"")}, **headers).items():
            self.send_header(header[0], str(header[1]))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A local server in place of OpenAI's host and of Hugging Face, and an empty home folder.

    `host.files` is what it serves: {path: (status, headers, body)}; a body of None is never sent.
    """
    allowed = socket.socket.connect.__globals__["connect"]      # what tests/offline has replaced

    def connect(self, address):
        assert address[0] == "127.0.0.1"
        return allowed(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda *args: None        # if a client hangs up
    server.files, server.over = {}, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "home" / ".cache" / "clip"
    openai = f"{server.url}/{'0' * 64}/ViT-B-16.pt"
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", openai)
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(common, "TIMEOUT", 0.3)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


COPY = "/timm/vit_base_patch16_clip_224.openai/resolve/main/open_clip_model.safetensors"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def weights():
    return save(cast(a_clip().state_dict(), False))


def behind_a_redirect(body, etag):
    """As Hugging Face answers: the ETag of the server behind the redirect means something else."""
    return {
        COPY: (302, {"Location": "/near", "X-Linked-ETag": f'"{etag}"'}, b""),
        "/near": (302, {"Location": "/cdn"}, b""),
        "/cdn": (200, {"ETag": f'"{sha256(b"other")}"'}, body),
    }


COMES = {
    "behind a redirect": lambda body: behind_a_redirect(body, sha256(body)),
    "from a renamed repository": lambda body: {
        COPY: (307, {"Location": "/renamed"}, b""),
        "/renamed": (302, {"Location": "/cdn", "X-Linked-ETag": f'"{sha256(body)}"'}, b""),
        "/cdn": (200, {}, body),
    },
    "from the host itself": lambda body: {COPY: (200, {"ETag": f'W/"{sha256(body)}"'}, body)},
    "from a mirror": lambda body: {
        COPY: (302, {"Location": "/mirror"}, b""),
        "/mirror": (200, {"X-Linked-ETag": sha256(body), "ETag": sha256(b"other")}, body),
    },
}


@pytest.mark.parametrize("way", COMES)
def test_if_openai_does_not_answer_the_copy_is_downloaded_and_kept(host, way):
    host.files = COMES[way](weights())
    model, _ = common.load_clip("ViT-B/16")
    assert torch.equal(model.visual.proj, a_clip().visual.proj)
    [kept] = host.cache.iterdir()
    assert kept.name == "vit_base_patch16_clip_224.openai.safetensors"
    assert kept.read_bytes() == weights()
    host.files = {}                 # no host is needed again, as if the file had come by hand
    assert torch.equal(common.load_clip("ViT-B/16")[0].visual.proj, model.visual.proj)


FAILS = {
    "truncated": (
        lambda body: {COPY: (200, {"ETag": sha256(body), "Content-Length": 9999999}, body[:999])},
        "incomplete or altered",
    ),
    "a wrong hash": (lambda body: behind_a_redirect(body, sha256(b"x")), "incomplete or altered"),
    "no hash": (lambda body: {COPY: (200, {"ETag": "5"}, body)}, "does not give the file's SHA"),
    "the hash of the server behind": (
        lambda body: {COPY: (302, {"Location": "/cdn"}, b""),
                      "/cdn": (200, {"ETag": sha256(body)}, body)},
        "does not give the file's SHA",
    ),
    "not there": (lambda body: {}, "404"),
    "slow": (lambda body: {COPY: (200, {}, None)}, "timed out"),
    "slow after a while": (
        lambda body: {COPY: (302, {"Location": "/cdn", "X-Linked-ETag": sha256(body)}, b""),
                      "/cdn": (200, {}, None)},
        "timed out",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_failed_download_gives_one_line_with_both_sources_and_leaves_no_file(
    host, tree, tmp_path, here, case
):
    files, reason = FAILS[case]
    host.files = files(weights())
    code, out, err = here("coop_mt.py", "--data", tree, "--shots", 2, "--clip", "ViT-B/16",
                          "--out", tmp_path / "run")
    assert code == 2 and not out and err.count("\n") == 1 and not (tmp_path / "run").exists()
    for word in (clip.clip._MODELS["ViT-B/16"], host.url + COPY, reason, "~/.cache/clip",
                 "ViT-B-16.pt", "vit_base_patch16_clip_224.openai.safetensors"):
        assert word in err, err
    assert list(host.cache.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_openais_archive_comes_first_and_is_checked_each_time(host, monkeypatch, tmp_path):
    save_archive(a_clip(half=True), tmp_path / "archive.pt", True)
    body = (tmp_path / "archive.pt").read_bytes()
    path = f"/{sha256(body)}/ViT-B-16.pt"
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", host.url + path)
    host.files = {path: (200, {}, body)}
    model, _ = common.load_clip("ViT-B/16")
    assert torch.equal(model.visual.proj, a_clip(half=True).visual.proj)
    [kept] = host.cache.iterdir()
    assert kept.name == "ViT-B-16.pt" and kept.read_bytes() == body
    kept.write_bytes(body[:-1])
    with pytest.raises(common.UserError, match="ViT-B-16.pt is not OpenAI's file.* move it away"):
        common.load_clip("ViT-B/16")
    assert kept.read_bytes() == body[:-1]


def test_every_backbone_of_openai_has_a_copy():
    assert list(common.COPIES) == clip.available_models()
    assert common.BACKBONES == ["tiny", *clip.available_models()]


# ------------------------------------------------------------------------ what importing needs

def fresh(code, *folders):
    """A separate Python process, with folders ahead of the installed packages."""
    paths = os.pathsep.join(map(str, folders))
    return subprocess.run([sys.executable, *code], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=paths))


def test_a_script_imports_only_what_it_uses_and_clip_without_pkg_resources(tmp_path):
    """setuptools 82 removed pkg_resources; other packages that ask for it find no stand-in."""
    (tmp_path / "pkg_resources.py").write_text("raise ImportError('gone')")
    done = fresh(["-c", """
import sys, common
for name in "coop_mt vpt_mt maple_mt mvlpt hipro mmap jscpt".split():
    common.load_method(name)
late = "pandas sklearn scipy matplotlib safetensors pkg_resources"
print(sorted(set(late.split()) & set(sys.modules)))"""], tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("script", ["mmap.py", "common.py"])
def test_the_clipboard_manager_called_clip_gives_one_line_and_exit_code_2(tmp_path, script):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("__version__ = '0.2.0'\n")
    done = fresh([script, "--help"], tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert "not OpenAI's CLIP" in done.stderr and "clip-anytorch" in done.stderr
