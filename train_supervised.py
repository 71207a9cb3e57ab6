"""Train ResNet-50s with supervision (App. A): a linear classifier, cross-entropy, ImageNet augmentations (footnote 3).

    python train_supervised.py                        # the paper: 224 px, 300 epochs x 8192 images, seeds 0 1 2
    python train_supervised.py --preset cifar         # 32 px, 3x3 stem
    python train_supervised.py --preset small         # 32 px, 10 epochs x 256: an afternoon on two CPU cores, minutes on a GPU
    python train_supervised.py --preset demo          # synthetic images, minutes on two CPU cores
    torchrun --nproc-per-node 8 train_supervised.py   # the same batch, shared by 8 GPUs

Writes <out>/supervised_seed<seed>.pt and a .jsonl log; the same command resumes, and skips seeds that are finished.
"""

import contextlib

import torch
from torch.nn import functional as F

from common import imagenet_augment, imagenet_params, slice_params, train_all, user_errors

PAPER = dict(  # App. A; what it leaves open: see "Differences from the paper and choices" in the README
    data="data", seeds=[0, 1, 2], epochs=300, batch_size=8192, micro_batch=1024, image_size=224, stem="imagenet",
    lr=0.3, weight_decay=1e-4, warmup_epochs=10, checkpoint_every=10)
PRESETS = {
    "paper": PAPER,
    "cifar": PAPER | dict(micro_batch=2048, image_size=32, stem="cifar"),
    "small": PAPER | dict(seeds=[0, 1], epochs=10, batch_size=256, micro_batch=256, image_size=32, lr=2.0, warmup_epochs=1,
                          checkpoint_every=1),
    "demo": PAPER | dict(data="synthetic", seeds=[0, 1], epochs=3, batch_size=32, micro_batch=32, image_size=32, lr=12.0,
                         warmup_epochs=0.5, subset=1088, checkpoint_every=1),
}


def supervised_gradients(run, batch):
    """Mean cross-entropy over the batch, accumulated over micro-batches; returns (loss, training accuracy)."""
    s, size, n = run.settings, run.settings["micro_batch"], len(batch.images)
    params = batch.params(imagenet_params)
    total, right = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    for start in range(0, n, size):
        rows, last = slice(start, start + size), start + size >= n
        images = imagenet_augment(batch.images[rows], s["image_size"], s["mean"], s["std"],
                                  params=slice_params(params, rows))
        with contextlib.nullcontext() if last else run.no_sync():  # ranks exchange gradients once per step
            with run.autocast():
                logits = run.network(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), batch.labels[rows], reduction="sum") / n
            loss.backward()
        total += loss.detach()
        right += (logits.argmax(1) == batch.labels[rows]).float().sum() / n
    return total, right


if __name__ == "__main__":
    with user_errors():
        train_all(__doc__, "supervised", PRESETS, supervised_gradients)
