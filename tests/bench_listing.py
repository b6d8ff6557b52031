"""How long it takes, and how much memory, to list and split a DomainNet of 600,000 lines: `python tests/bench_listing.py`.

The lists and the folders are generated with DomainNet's shape (6 domains, 345 classes); its images are empty files, which listing
does not open. Asserted: under 10 seconds of this process (the clock's are printed too) and under 1 GB, PyTorch included.
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
A_CLASS = 290                   # 6 x 345 x 290 = 600,300 images


def generate(root):
    (root / "domainnet" / "splits").mkdir(parents=True)
    for domain in DOMAINS:
        lines = dict(train=[], test=[])
        for label in range(345):
            folder = root / "domainnet" / domain / f"some_class_{label}"
            folder.mkdir(parents=True)
            for i in range(A_CLASS):
                (folder / f"{domain}_{label:03d}_{i:06d}.jpg").touch()
                path = f"{domain}/some_class_{label}/{domain}_{label:03d}_{i:06d}.jpg"
                lines["train" if i % 10 < 7 else "test"].append(f"{path} {label}\n")
        for part, content in lines.items():
            (root / "domainnet" / "splits" / f"{domain}_{part}.txt").write_text("".join(content))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        start, own = time.time(), time.process_time()
        tasks = common.load_tasks("domainnet", split=0.01, root=folder)
        seconds, own = time.time() - start, time.process_time() - own
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2) / 1024
        print(f"{len(DOMAINS) * 345 * A_CLASS:,} lines: {seconds:.1f} s ({own:.1f} s of this process), {peak:.2f} GB at most; "
              f"{sum(len(t.train) for t in tasks):,} training and {sum(len(t.test) for t in tasks):,} test images")
        assert own < 10 and peak < 1
