"""Train ResNet-50s with supervision (App. A): linear classifier, cross-entropy, ImageNet crops (footnote 3).

    python train_supervised.py                        # the paper: 224 px, 300 epochs x 8192, seeds 0 1 2
    python train_supervised.py --preset cifar         # 32 px, 3x3 stem
    python train_supervised.py --preset small         # 64 px, 16 epochs x 512: minutes on a GPU
    python train_supervised.py --preset demo          # synthetic images, minutes on two CPU cores
    torchrun --nproc-per-node 8 train_supervised.py   # the same batch, shared by 8 GPUs

Writes <out>/supervised_seed<seed>.pt and a .jsonl log; the same command resumes, and skips finished seeds.
"""

import contextlib

import torch
from torch.nn import functional as F

from common import (LARS, average_statistics, build_model, distributed, draw_params, generator_for,
                    imagenet_augment, load_data, open_run, rank, rank0_first, resize, slice_params,
                    standardise, sum_over_ranks, training_arguments, user_errors, warmup_cosine, world_size,
                    writable_folder)

PAPER = dict(  # App. A; what it leaves open: see "Differences from the paper and choices" in the README
    data="data", seeds=[0, 1, 2], epochs=300, batch_size=8192, micro_batch=1024, image_size=224,
    stem="imagenet", lr=0.3, weight_decay=1e-4, warmup_epochs=10, checkpoint_every=10)
PRESETS = {
    "paper": PAPER,
    "cifar": PAPER | dict(micro_batch=2048, image_size=32, stem="cifar"),
    "small": PAPER | dict(seeds=[0, 1], epochs=16, batch_size=512, micro_batch=512, image_size=64, lr=2.0,
                          warmup_epochs=2, checkpoint_every=5),
    "demo": PAPER | dict(data="synthetic", seeds=[0, 1], epochs=3, batch_size=32, micro_batch=32,
                         image_size=32, lr=12.0, warmup_epochs=0.5, subset=1088, checkpoint_every=1),
}


def main():
    """Flags, device, data; then one network after another."""
    args = training_arguments(__doc__, PRESETS)
    torch.backends.cudnn.deterministic = True  # a resumed run must end in the same weights
    with distributed(args.device) as device:
        args.out = rank0_first(lambda: writable_folder(args.out))
        data = rank0_first(lambda: load_data(args.data, device, args.download))
        for seed in args.seeds:
            with open_run(args, "supervised", seed, data, device) as run:
                train(run, data)


def train(run, data):
    """One network, from its first weights (or its last checkpoint) to its last."""
    s, device = run.settings, run.device
    seed, batch_size, micro_batch = s["seed"], s["batch_size"], s["micro_batch"]
    model = build_model("supervised", s["stem"], len(s["classes"]), seed)
    model = model.to(device, memory_format=torch.channels_last)
    peak_rate = s["lr"] * batch_size / 256
    optimizer = LARS(model.parameters(), peak_rate, weight_decay=s["weight_decay"])
    network = run.prepare(model, optimizer)  # resumes; wraps the model where several processes train it

    def classify(network, inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=s["precision"] == "bfloat16"):
            return network(inputs.contiguous(memory_format=torch.channels_last))

    for epoch in range(run.epoch, s["epochs"]):
        for step in run.steps():  # between steps it shows progress, and saves and leaves after a signal
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * warmup_cosine(step, run.total_steps, run.warmup_steps)
            chosen = run.images_of(step)  # this process's share of the batch
            images, labels, n = data.train_images[chosen], data.train_labels[chosen], len(chosen)

            # drawn for the whole batch, so that they do not depend on its division among processes
            generator = generator_for(device, "augmentation", seed, step, 0)
            params = draw_params(batch_size, *images.shape[2:], device, generator)
            params = slice_params(params, run.rows)

            loss, accuracy = torch.zeros((), device=device), torch.zeros((), device=device)
            for start in range(0, n, micro_batch):
                rows, last = slice(start, start + micro_batch), start + micro_batch >= n
                inputs = imagenet_augment(images[rows], s["image_size"], slice_params(params, rows))
                inputs = standardise(inputs, s["mean"], s["std"])
                with contextlib.nullcontext() if last else network.no_sync():  # processes exchange once
                    logits = classify(network, inputs)
                    part = F.cross_entropy(logits.float(), labels[rows], reduction="sum") / n
                    part.backward()  # gradients add up over the micro-batches
                loss += part.detach()
                accuracy += (logits.argmax(1) == labels[rows]).float().sum() / n
            optimizer.step()
            optimizer.zero_grad()
            run.count(loss, accuracy)
        run.end_epoch(test_accuracy=test_accuracy(model, classify, data, s))


@torch.no_grad()
def test_accuracy(model, classify, data, s):
    """Share of test images classified correctly, by the model in eval mode; the processes share the work."""
    average_statistics(model)
    model.eval()
    right = torch.zeros((), device=data.test_labels.device)
    for start in range(rank() * 256, len(data.test_images), world_size() * 256):
        rows = slice(start, start + 256)
        inputs = standardise(resize(data.test_images[rows], s["image_size"]), s["mean"], s["std"])
        right += (classify(model, inputs).argmax(1) == data.test_labels[rows]).sum()
    model.train()
    return sum_over_ranks(right).item() / len(data.test_labels)


if __name__ == "__main__":
    with user_errors():
        main()
