"""Train ResNet-50s with SimCLR (Sec. 2, App. A): a 3-layer projection head and InfoNCE over two views of every image.

    python train_simclr.py                        # the paper: 224 px, 1300 epochs x 4096 images, seeds 0 1 2
    python train_simclr.py --preset cifar         # SimCLR App. B.9: 32 px, 3x3 stem
    python train_simclr.py --preset small         # 32 px, 12 epochs x 256: an afternoon on two CPU cores, minutes on a GPU
    python train_simclr.py --preset demo          # synthetic images, minutes on two CPU cores
    torchrun --nproc-per-node 8 train_simclr.py   # the same batch, shared by 8 GPUs

Writes <out>/simclr_seed<seed>.pt and a .jsonl log; the same command resumes, and skips seeds that are finished.
"""

import contextlib

import torch

from common import frozen_statistics, info_nce_and_accuracy, simclr_augment, simclr_params, slice_params, train_all, user_errors

PAPER = dict(  # App. A; what it leaves open: see "Differences from the paper and choices" in the README
    data="data", seeds=[0, 1, 2], epochs=1300, batch_size=4096, micro_batch=512, image_size=224, stem="imagenet",
    lr=0.3, weight_decay=1e-6, warmup_epochs=10, temperature=0.1, strength=1.0, blur=True, checkpoint_every=10)
PRESETS = {
    "paper": PAPER,
    "cifar": PAPER | dict(micro_batch=1024, image_size=32, stem="cifar", lr=1.0, temperature=0.5, strength=0.5, blur=False),
    "small": PAPER | dict(seeds=[0, 1], epochs=12, batch_size=256, micro_batch=256, image_size=32, lr=2.0, warmup_epochs=1,
                          temperature=0.5, strength=0.5, blur=False, checkpoint_every=1),
    "demo": PAPER | dict(data="synthetic", seeds=[0, 1], epochs=3, batch_size=64, micro_batch=64, image_size=32, lr=6.0,
                         warmup_epochs=0.5, temperature=0.5, strength=0.5, blur=False, subset=512, checkpoint_every=1),
}


def contrastive_gradients(run, batch):
    """InfoNCE of the whole batch, exact however small the micro-batch; returns (loss, contrastive accuracy).

    Cached gradients (Gao et al. 2021, GradCache): embed all chunks without a graph, differentiate the loss with respect
    to the embeddings, then run each chunk again with its graph and push its embeddings' gradient through it. Batch norm
    normalises each chunk by itself and counts it once.
    """
    s, size = run.settings, run.settings["micro_batch"]
    params = [batch.params(simclr_params, view, strength=s["strength"]) for view in (0, 1)]
    chunks = []
    for start in range(0, len(batch.images), size):
        rows = slice(start, start + size)
        views = [simclr_augment(batch.images[rows], s["image_size"], s["strength"], s["blur"],
                                params=slice_params(p, rows)) for p in params]
        chunks.append(torch.cat(views).contiguous(memory_format=torch.channels_last))  # one forward for both views

    def embed(chunk):
        with run.autocast():
            return run.network(chunk).float()

    if len(chunks) == 1:
        loss, accuracy = info_nce_and_accuracy(*embed(chunks[0]).chunk(2), s["temperature"])
        loss.backward()
        return loss.detach(), accuracy
    with torch.no_grad(), frozen_statistics(run.model):
        embeddings = [embed(chunk) for chunk in chunks]
    embeddings = [e.requires_grad_() for e in embeddings]
    z1, z2 = (torch.cat(z) for z in zip(*(e.chunk(2) for e in embeddings)))
    loss, accuracy = info_nce_and_accuracy(z1, z2, s["temperature"])
    loss.backward()
    for i, (chunk, embedding) in enumerate(zip(chunks, embeddings)):
        last = i == len(chunks) - 1
        with contextlib.nullcontext() if last else run.no_sync():  # ranks exchange gradients once per step
            embed(chunk).backward(embedding.grad)
    return loss.detach(), accuracy


if __name__ == "__main__":
    with user_errors():
        train_all(__doc__, "simclr", PRESETS, contrastive_gradients)
