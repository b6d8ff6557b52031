"""Images as a person sees them, nothing skipped silently, no image on both sides of a split."""

import io
import multiprocessing
import os
import pickle
import resource
import sys

import numpy as np
import pytest
import torch
import torchvision
from clip.clip import _transform
from conftest import make_tree, noise, rendered, says, table
from PIL import Image, ImageOps

import data
from data.benchmarks.lists import spoken


def read(tmp_path, image, name="x.png", **how):
    path = tmp_path / name
    image.save(path, **how)
    return np.asarray(data.read_image(path))


# ------------------------------------------------------------------------------- the right pixels


# file: data type, values, the grey levels that are read
SHADES = table("""
    16 bits.png       uint16   0 25700 51400 65535   0 100 200 255
    dark.png          uint16   0 1                   0 1
    big-endian.tiff   >u2      0 2313 65535          0 9 255
    32 bits.tiff      int32    1000 2600 5000        0 102 255
    high.tiff         int32    70000 2147483647      0 255
    small.tiff        int32    0 17 200              0 17 200
    unit.tiff         float32  0 0.2 1               0 51 255
    signed.tiff       float32  -2 0 2                0 128 255
    bytes.tiff        float32  0 17 255              0 17 255
    """)


@pytest.mark.parametrize("name", SHADES)
def test_grey_of_more_than_eight_bits_is_scaled_by_its_range(tmp_path, name):
    """32-bit integers and floats have no fixed range: they are rescaled if they leave 0..255."""
    kind, values, wanted = SHADES[name]
    values = np.array([values.split()], dtype=float).astype(kind)
    [found] = read(tmp_path, Image.fromarray(values), name)[..., 0].tolist()
    assert found == list(map(int, wanted.split()))


def test_sixteen_bits_that_pillow_opens_as_thirty_two(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535 " + bytes([0, 0, 5, 5, 15, 160]))
    assert np.asarray(data.read_image(tmp_path / "x.pgm"))[..., 0].tolist() == [[0, 5, 16]]
    old = Image.fromarray(np.array([[0, 257 * 5, 4000]], dtype=np.int32))   # a PNG in Pillow 10
    assert np.asarray(data.images.rgb(old, "PNG"))[..., 0].tolist() == [[0, 5, 16]]


def test_transparency_is_put_on_white_in_every_mode(tmp_path):
    """Fully transparent black becomes white; half transparent black becomes mid-grey."""
    rgba = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    assert read(tmp_path, Image.fromarray(rgba))[..., 0].tolist() == [[255, 0, 127]]
    la = np.array([[[0, 0], [0, 128], [200, 255]]], dtype=np.uint8)
    assert read(tmp_path, Image.fromarray(la, "LA"), "la.png")[..., 1].tolist() == [[255, 127, 200]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((1, 0), 1)
    found = read(tmp_path, palette, "p.png", transparency=0)
    assert found.tolist() == [[[255, 255, 255], [200, 10, 20]]]
    black = read(tmp_path, Image.new("RGB", (2, 2)), "rgb.png", transparency=(0, 0, 0))
    assert black.min() == 255
    frames = [Image.new("RGBA", (4, 4), colour) for colour in ((0, 0, 0, 0), (9, 9, 9, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    assert np.asarray(data.read_image(tmp_path / "a.gif")).min() == 255


def jpeg(image, **how):
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))                        # the left half
    found = read(tmp_path, image, "x.jpg", exif=turned(6))      # rotate clockwise
    assert found.shape == (40, 20, 3)
    assert found[:15].min() > 200
    assert found[25:].max() < 50
    found = read(tmp_path, image, exif=b"Exif\0\0garbage")
    assert found.shape == (20, 40, 3)


def files():
    """{case: (file name, bytes)}"""
    ramps = np.stack(np.meshgrid(np.arange(97) * 2, np.arange(61) * 4), axis=-1)
    image = Image.fromarray(np.dstack([ramps, ramps.sum(axis=-1)]).astype(np.uint8))
    image.paste(noise(1), (5, 5))
    plain, cmyk, png = jpeg(image), jpeg(image.convert("CMYK")), io.BytesIO()
    image.save(png, "PNG")
    scan = plain.index(b"\xff\xda") + 300
    size = plain.index(b"\xff\xc0") + 5
    found = dict(
        rgb=plain,
        grey=jpeg(image.convert("L")),
        progressive=jpeg(image, progressive=True, quality=40),
        upright=jpeg(image, exif=turned(1)),
        damaged_exif=jpeg(image, exif=b"Exif\0\0garbage"),
        damaged=plain[:scan] + bytes(40) + plain[scan + 40:],
        on_its_side=jpeg(image, exif=turned(6)),
        cmyk=cmyk,
        png=png.getvalue(),
        truncated=plain[:len(plain) // 2],
        two_hundred_megapixels=plain[:size] + b"\x36\xb0\x36\xb0" + plain[size + 4:],
        text=b"no image",
    )
    names = dict(rgb="a.png", png="a.jpg")
    return {case: (names.get(case, "a.jpeg"), content) for case, content in found.items()}


@pytest.mark.parametrize("case", files())
def test_a_jpeg_is_read_as_pillow_reads_it(tmp_path, monkeypatch, capfd, case):
    """torchvision's decoder reads the first six. Damage prints nothing."""
    name, content = files()[case]
    (tmp_path / name).write_bytes(content)
    decode, decoded = torchvision.io.decode_jpeg, []

    def spy(*given):
        decoded.append(decode(*given))
        return decoded[-1]

    monkeypatch.setattr(torchvision.io, "decode_jpeg", spy)
    try:
        with Image.open(tmp_path / name) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, Image.DecompressionBombError):
        with pytest.raises(data.UserError, match=f"^{tmp_path / name} cannot be decoded[^\n]*$"):
            data.read_image(tmp_path / name)
        assert not decoded
    else:
        found = np.asarray(data.read_image(tmp_path / name))
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).max() <= 1        # 0 if both use one libjpeg
        assert len(decoded) == (list(files()).index(case) < 6)
    assert capfd.readouterr() == ("", "")


def test_without_torchvisions_decoder_pillow_reads_the_jpeg(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(files()["rgb"][1])
    found = np.asarray(data.read_image(tmp_path / "x.jpg"))
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    assert np.abs(np.asarray(data.read_image(tmp_path / "x.jpg")).astype(int) - found).max() <= 1


def test_a_drawing_is_found_by_number_in_a_sheet_of_forty_per_row(tmp_path):
    sheet = Image.new("RGB", (40 * 64, 2 * 64))
    sheet.paste("red", (64, 64, 128, 128))
    sheet.save(tmp_path / "sheet.png")
    drawing = data.images.read_tile((str(tmp_path / "sheet.png"), 41))
    assert drawing.getcolors() == [(64 * 64, (255, 0, 0))]


def test_whatever_error_a_decoder_raises_the_image_is_named(tmp_path):
    """Pillow raises NotImplementedError, RuntimeError and others for damaged files."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.dds")
    damaged = bytearray((tmp_path / "x.dds").read_bytes())
    damaged[80:84] = bytes(4)                                   # the flags of its pixel format
    (tmp_path / "x.dds").write_bytes(damaged)
    with pytest.raises(NotImplementedError):
        Image.open(tmp_path / "x.dds")
    with pytest.raises(data.UserError, match="x.dds cannot be decoded as an image"):
        data.read_image(tmp_path / "x.dds")


def test_evaluation_uses_clips_own_preprocessing():
    """`in_order` and `normalise` equal the clip package's to within one grey level."""
    images = data.Images(range(3), [0, 1, 2], lambda i: noise(i, 50 + 7 * i).resize((60, 40 + i)))
    batches = list(data.in_order(images, 32, workers=0, batch=2))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2]]
    wanted = torch.stack([_transform(32)(image) for image, _ in images])
    found = data.normalise(torch.cat([pixels for pixels, _ in batches]))
    assert (found - wanted).abs().max() < 1.1 / 255 / 0.26


def test_normalise_is_clips_to_tensor_and_normalize():
    images = [noise(i) for i in range(3)]
    clips = _transform(32).transforms[-2:]                      # ToTensor, Normalize
    wanted = torch.stack([clips[1](clips[0](image)) for image in images])
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    assert torch.equal(data.normalise(torch.from_numpy(pixels)), wanted)


def test_a_view_of_the_whole_area_is_the_image_or_its_mirror():
    """With min_crop=1 a square image can only be resized, and is flipped half of the time."""
    lists = [data.Images([0], [0], lambda i: noise(i, 24))]
    steps = [[(0, 0, view) for view in range(40)]]
    [(x, _, _)] = rendered(lists, steps, 24, seed=1, min_crop=1)
    plain = torch.from_numpy(np.asarray(noise(0, 24)).transpose(2, 0, 1).copy())
    plainly = sum(torch.equal(view, plain) for view in x)
    mirrored = sum(torch.equal(view, plain.flip(2)) for view in x)
    assert plainly + mirrored >= 20
    assert min(plainly, mirrored) >= 5


def test_augmentation_is_set_per_task():
    """Task 0 is augmented: its two views differ; task 1 is only resized."""
    lists = [data.Images([0], [0], lambda i: noise(i, 50)) for _ in range(2)]
    step = [(0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2)]
    [(x, _, tasks)] = rendered(lists, [step], 16, 1, augment=[True, False])
    assert tasks.tolist() == [0, 0, 1, 1]
    assert not torch.equal(x[0], x[1])
    assert torch.equal(x[2], x[3])
    plain = np.asarray(noise(0, 50).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(x[2].permute(1, 2, 0).numpy() - plain).max() <= 1


def test_a_view_depends_only_on_seed_task_index_and_view():
    lists = [data.Images([0, 1], [0, 1], lambda i: noise(i, 40)) for _ in range(2)]

    def view(*step, seed=1):
        [(x, _, _)] = rendered(lists, [list(step)], 16, seed)
        return x[-1]

    one = view((0, 1, 7))
    assert torch.equal(one, view((1, 0, 3), (0, 1, 7)))
    for other in (view((0, 1, 8)), view((1, 1, 7)), view((0, 1, 7), seed=2)):
        assert not torch.equal(one, other)
    steps = [[(0, 0, 7)], [(1, 1, 2)], [(0, 1, 7)]]
    assert torch.equal(one, list(rendered(lists, steps, 16, 1))[2][0][0])
    lists = [data.Images([0, 1], [0, 1], lambda i: noise(1, 40))]       # the same image twice
    assert torch.equal(one, view((0, 1, 7)))
    assert not torch.equal(one, view((0, 0, 7)))


def test_views_are_the_same_in_every_version(tmp_path):
    """Pixel sums per channel, and of the left half's red, to within one grey level: recorded from
    Pillow's resize with the same seeds, in torch 2.6 and 2.14."""
    x, y = np.meshgrid(np.arange(60), np.arange(40))
    ramps = np.stack([4 * x, 6 * y, (x + y) % 50 * 5], axis=-1).astype(np.uint8)
    lists = [data.Images(range(4), [0] * 4, lambda i: Image.fromarray(ramps))] * 2
    golden = {
        (0, 0, 12710949): [43008, 18432, 27490, 17792],
        (0, 0, 4686059): [16896, 39168, 36115, 12544],
        (1, 3, 6762380): [33792, 37632, 28792, 11888],
        (1, 3, 0): [30208, 29184, 31743, 10480],
    }
    [(views, _, _)] = rendered(lists, [list(golden)], 16, seed=7, min_crop=0.3)
    sums = torch.cat([views.sum(dim=(2, 3)), views[:, :1, :, :8].sum(dim=(2, 3))], dim=1)
    assert ((sums - torch.tensor(list(golden.values()))).abs() <= 256).all()
    torch.manual_seed(1)
    drawn = (4686059, 6762380, 12325960, 491263)
    assert data.plan([2, 1], 2) == [list(zip([0, 0, 1, 1], [1, 0, 0, 0], drawn))]
    assert max(view for step in data.plan([9000], 900) for _, _, view in step) < 2**24


# ------------------------------------------------------------------------------- worker processes


def test_workers_return_arrays_and_errors_as_one_line(tree):
    """Tensors would go through shared memory, of which Docker has 64 MB."""
    [task, _] = data.load_tasks(str(tree), split=0.4)
    found = data.views([task.train], 16, 1).dataset[[(0, 0, 0)]]
    assert all(isinstance(part, np.ndarray) for part in found)
    assert found[1:] == ([0], [0])
    task.train.items[0].write_bytes(b"broken")
    line = f"^{task.train.items[0]} cannot be decoded[^\n]*$"
    for workers in (0, 2):
        with pytest.raises(data.UserError, match=line):
            list(rendered([task.train], [[(0, 0, 0)], [(0, 1, 0)]], 16, 1, workers=workers))
        with pytest.raises(data.UserError, match=line):
            data.keep_all([task.train], 10**6, workers)


def test_worker_processes_start_once_and_an_epoch_draws_no_random_numbers(tree):
    """Also after an unfinished epoch; `close` ends them."""
    [task, _] = data.load_tasks(str(tree), split=0.8)
    steps = [[(0, i, 0)] for i in range(6)]
    wanted = [images for images, _, _ in rendered([task.train], steps, 16, 1)]
    views, started = data.views([task.train], 16, 1, workers=2), []
    state = torch.get_rng_state()
    for _ in range(3):
        found = [images for images, _, _ in views.load(steps)]
        started.append({process.pid for process in multiprocessing.active_children()})
        assert all(map(torch.equal, found, wanted))
        next(views.load(steps[3:]))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(started[0]) == 2
    assert started[0] == started[1] == started[2]
    views.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("system, default, chosen, wanted", [
    ("linux", "fork", None, "fork"), ("linux", "forkserver", None, "fork"),
    ("linux", "forkserver", "spawn", "spawn"), ("darwin", "spawn", None, "spawn")])
def test_workers_are_forked_on_linux_unless_the_program_has_set_another_method(
        monkeypatch, system, default, chosen, wanted):
    """Python 3.14 does not fork by default, and without a fork no images are in memory."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: [default])
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    monkeypatch.setattr(sys, "platform", system)
    assert data.images.start_method() == wanted


def test_an_epoch_interrupted_by_another_one_is_an_error(tree):
    """The two would get each other's steps."""
    [task, _] = data.load_tasks(str(tree), split=0.8)
    views = data.views([task.train], 16, 1, workers=1)
    one = views.load([[(0, 0, 0)], [(0, 1, 0)]])
    next(one)
    next(views.load([[(0, 2, 0)]]))
    with pytest.raises(RuntimeError, match="another epoch"):
        next(one)


def test_all_images_are_decoded_and_kept_while_there_is_room(tree):
    """Each takes 3 x 24 x 24 bytes; the eighth does not fit. Images with another `read` are not
    kept, and a subset of a list finds what the list keeps."""
    lists = [task.train for task in data.load_tasks(str(tree), split=0.8)]
    read = []
    lists.append(data.Images([0, 1], [0, 1], lambda i: read.append(i) or noise(i, 24)))
    for workers in (0, 2):
        for images in lists:
            images.kept.clear()
        data.keep_all(lists, 8 * 3 * 24 * 24 - 1, workers)
        assert list(lists[0].kept) == lists[0].items[:7]
        assert not lists[1].kept
        assert not lists[2].kept
        for path, pixels in lists[0].kept.items():
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 24)
            assert pixels.permute(1, 2, 0).tolist() == np.asarray(Image.open(path)).tolist()
    assert read == [0, 1]
    lists[0].items[0].write_bytes(b"gone")
    image, _ = lists[0].subset([3, 0])[1]
    assert image.tobytes() == lists[0].pixels(0).permute(1, 2, 0).numpy().tobytes()
    image.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() != lists[0][0][0].tobytes()          # what is handed out is a copy


def test_a_process_that_is_not_forked_reads_the_files_again(tree):
    lists = [task.train for task in data.load_tasks(str(tree), split=0.8)]
    data.keep_all(lists, 10**6, workers=0)
    here = data.views(lists, 16, 1).dataset
    sent, step = pickle.loads(pickle.dumps(here)), [(0, 1, 7), (1, 2, 3)]
    assert np.array_equal(sent[step][0], here[step][0])
    lists[0].items[1].write_bytes(b"gone")
    assert "cannot be decoded" in sent[step]
    assert len(here[step][0]) == 2


def test_a_worker_that_dies_is_reported_in_one_line(tree):
    [task, _] = data.load_tasks(str(tree), split=0.4)
    views = data.views([task.train], 16, 1, workers=1)
    read, task.train.read = task.train.read, lambda path: os._exit(1)
    with pytest.raises(data.UserError, match="died.*--workers 0"):
        list(views.load([[(0, 0, 0)]]))
    task.train.read = read
    assert len(list(views.load([[(0, 0, 0)]]))) == 1           # in new processes


@pytest.mark.parametrize("more", [2, 8])
def test_workers_that_cannot_start_are_reported_in_one_line(tree, capfd, more):
    """The limit on open files stops the first process or the second; no process is left."""
    [task, _] = data.load_tasks(str(tree), split=0.8)
    free, (soft, hard) = os.dup(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
    try:
        with pytest.raises(data.UserError, match=r"died \(Too many open files\): give --workers 0"):
            data.keep_all([task.train], 0, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(free)
    assert capfd.readouterr() == ("", "")
    assert not multiprocessing.active_children()


# ----------------------------------------------------------------------------- folders and names


def test_every_extension_that_pillow_reads_is_read_and_the_rest_is_counted(tmp_path, capsys):
    folder = make_tree(tmp_path / "t", {"d/cup": 2, "d/hat": 3, "d/hat/deep": 1}) / "d"
    for number, name in enumerate(("a.jfif", "b.jpe", "c.ppm", "d.BMP")):
        noise(70 + number).save(folder / "cup" / name, "JPEG" if "j" in name else None)
    (folder / "hat/notes.txt").write_text("x")
    noise(78).save(tmp_path / "t/stray.png")
    noise(79).save(folder / "beside.png")
    [task] = data.load_tasks(str(tmp_path / "t"), split=0.5)
    said = capsys.readouterr().err
    assert len(task.train) + len(task.test) == 9
    assert task.class_names == ["cup", "hat"]
    says(said, "skipped 1 file in", "notes.txt")
    says(said, "skipped 1 image in folders below the class folder")
    says(said, "skipped 1 image beside the domains", "stray.png")
    says(said, "skipped 1 image beside the classes in", "beside.png")


def test_a_folder_of_train_val_test_is_one_task_with_its_own_split(tmp_path, capsys):
    """Also with the extra files of an archive made on a Mac."""
    sizes = {f"{part}/{c}": n for part, n in dict(train=5, val=3, test=4).items()
             for c in ("cup", "hat")}
    root = make_tree(tmp_path / "shapes", {**sizes, "__MACOSX/train": 0})
    (root / ".DS_Store").write_text("x")
    for name in (str(root), f"shapes={root}"):
        [task] = data.load_tasks(name, shots=2)
        assert task.name == "shapes"
        assert task.class_names == ["cup", "hat"]
        assert [len(x) for x in (task.train, task.val, task.test)] == [4, 4, 8]
        assert all("/test/" in str(path) for path in task.test.items)
    assert "is taken as one task, shapes, with its own split" in capsys.readouterr().err
    make_tree(root / "test", {"dog": 1})
    with pytest.raises(data.UserError, match="different classes .'dog' is in only one of them"):
        data.load_tasks(str(root), shots=2)


def test_two_classes_with_one_name_are_rejected(tmp_path):
    make_tree(tmp_path / "t", {"d/red_ball": 2, "d/Red Ball": 2})
    with pytest.raises(data.UserError, match="both called 'red ball'"):
        data.load_tasks(str(tmp_path / "t"), split=0.5)


@pytest.mark.parametrize("folder, name", [
    *table("""
        Alarm_Clock   alarm clock
        AnnualCrop    annual crop
        t-shirt       t-shirt
        TV            tv
        707-320       707-320
        iPhone        iphone
        """).items(),
    ("Cafe\u0301", ["caf\u00e9"]),
    ("caf\udce9", ["caf\ufffd"]),
])
def test_folder_names_become_spoken_names(folder, name):
    assert [spoken(folder)] == name


def test_names_that_are_not_utf8_or_differ_in_normalisation_are_read(tmp_path):
    for domain, name in (("one", "caf\u00e9"), ("two", "cafe\u0301")):
        make_tree(tmp_path / "t" / domain, {name: 3, "cup": 3})
    one, two = data.load_tasks(str(tmp_path / "t"), shots=1)
    assert one.class_names == two.class_names == ["caf\u00e9", "cup"]
    os.rename(tmp_path / "t" / "two" / "cup" / "000.png", tmp_path / "t/two/cup" / "\udce9.png")
    os.rename(tmp_path / "t" / "two", tmp_path / "t" / "zw\udcf6")
    tasks = data.load_tasks(str(tmp_path / "t"), shots=2)
    assert [task.name for task in tasks] == ["one", "zw\ufffd"]
    assert all(image.size == (24, 24) for image, _ in [*tasks[1].train, *tasks[1].test])


def test_a_domain_has_one_name_and_one_split_whichever_system_unpacked_it(tmp_path):
    """A Mac stores the letter and its dots as two characters."""
    found = []
    for here, name in (("linux", "Z\u00fcrich"), ("mac", "Zu\u0308rich")):
        make_tree(tmp_path / here / name, {"cup": 6, "hat": 6})
        [task] = data.load_tasks(str(tmp_path / here), shots=2)
        found.append((task.name, [(x.parent.name, x.name) for x in task.train.items]))
    assert found[0] == found[1] and found[0][0] == "Z\u00fcrich"


@pytest.mark.parametrize("given, absolute", [
    ("emoji24:*Food+Noto Things", "emoji24:*Food+Noto Things"),
    ("dtd, eurosat", "dtd,eurosat"),
    ("./t", "{here}/t"),
    ("x=t/a,emoji", "x={here}/t/a,emoji"),
    ("x=~/t/a, y=~/t/b", "x={home}/t/a,y={home}/t/b"),
    ("a,b", "{here}/a,b"),
    ("nowhere", "nowhere"),
])
def test_absolute_means_the_same_from_any_folder(tmp_path, monkeypatch, given, absolute):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "t/a", home / "t/b", here / "t/a", here / "a,b"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    found = data.absolute(given)
    assert found == absolute.format(home=home, here=here)
    monkeypatch.chdir("/")
    assert data.absolute(found) == found


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_tree(tmp_path / "t", {f"{d}/{c}": 3 for d in "ab" for c in ("cup", "hat")})
    for given, names in (("~/t", ["a", "b"]), ("x=~/t/a,y=~/t/b", ["x", "y"])):
        assert [task.name for task in data.load_tasks(given, shots=1)] == names
