"""Train ResNet-50s with SimCLR (Sec. 2, App. A): 3-layer projection head, InfoNCE over two views.

    python train_simclr.py                        # the paper: 224 px, 1300 epochs x 4096 images, seeds 0 1 2
    python train_simclr.py --preset cifar         # SimCLR App. B.9: 32 px, 3x3 stem
    python train_simclr.py --preset small         # 64 px, 20 epochs x 512: minutes on a GPU
    python train_simclr.py --preset demo          # synthetic images, minutes on two CPU cores
    torchrun --nproc-per-node 8 train_simclr.py   # the same batch, shared by 8 GPUs

Writes <out>/simclr_seed<seed>.pt and a .jsonl log; the same command resumes, and skips finished seeds.
"""

import contextlib

import torch

from common import (LARS, build_model, color_jitter, distributed, draw_params, generator_for,
                    info_nce_and_accuracy, load_data, not_counting, open_run, rank0_first, simclr_augment,
                    slice_params, training_arguments, user_errors, warmup_cosine, writable_folder)

PAPER = dict(  # App. A; what it leaves open: see "Differences from the paper and choices" in the README
    data="data", seeds=[0, 1, 2], epochs=1300, batch_size=4096, micro_batch=512, image_size=224,
    stem="imagenet", lr=0.3, weight_decay=1e-6, warmup_epochs=10, temperature=0.1, strength=1.0, blur=True,
    checkpoint_every=10)
PRESETS = {
    "paper": PAPER,
    "cifar": PAPER | dict(micro_batch=1024, image_size=32, stem="cifar", lr=1.0, temperature=0.5,
                          strength=0.5, blur=False),
    "small": PAPER | dict(seeds=[0, 1], epochs=20, batch_size=512, image_size=64, lr=1.5, warmup_epochs=3,
                          temperature=0.5, strength=0.5, blur=False, checkpoint_every=5),
    "demo": PAPER | dict(data="synthetic", seeds=[0, 1], epochs=3, batch_size=64, micro_batch=64,
                         image_size=32, lr=6.0, warmup_epochs=0.5, temperature=0.5, strength=0.5, blur=False,
                         subset=512, checkpoint_every=1),
}


def main():
    """Flags, device, data; then one network after another."""
    args = training_arguments(__doc__, PRESETS)
    torch.backends.cudnn.deterministic = True  # a resumed run must end in the same weights
    with distributed(args.device) as device:
        args.out = rank0_first(lambda: writable_folder(args.out))
        data = rank0_first(lambda: load_data(args.data, device, args.download))
        for seed in args.seeds:
            with open_run(args, "simclr", seed, data, device) as run:
                train(run, data)


def train(run, data):
    """One network, from its first weights (or its last checkpoint) to its last."""
    s, device = run.settings, run.device
    seed, batch_size, temperature = s["seed"], s["batch_size"], s["temperature"]
    model = build_model("simclr", s["stem"], seed=seed).to(device, memory_format=torch.channels_last)
    peak_rate = s["lr"] * batch_size / 256
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = LARS(trained, peak_rate, weight_decay=s["weight_decay"])
    network = run.prepare(model, optimizer)  # resumes; wraps the model where several processes train it
    jitter = torch.compile(color_jitter) if run.args.compile else color_jitter

    def embed(views):
        with torch.autocast(device.type, torch.bfloat16, enabled=s["precision"] == "bfloat16"):
            return network(views).float()

    for epoch in range(run.epoch, s["epochs"]):
        for step in run.steps():  # between steps it shows progress, and saves and leaves after a signal
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * warmup_cosine(step, run.total_steps, run.warmup_steps)
            images = data.train_images[run.images_of(step)]  # uint8 (n, 3, h, w), this process's share

            params = []  # of both views: drawn for the whole batch, so that its division does not matter
            for view in (0, 1):
                generator = generator_for(device, "augmentation", seed, step, view)
                drawn = draw_params(batch_size, *images.shape[2:], device, generator, s["strength"])
                params.append(slice_params(drawn, run.rows))

            chunks = []  # float32 (2 micro_batch, 3, size, size): first views, then second views
            for start in range(0, len(images), s["micro_batch"]):
                rows = slice(start, start + s["micro_batch"])
                views = [simclr_augment(images[rows], s["image_size"], slice_params(p, rows), s["blur"],
                                        jitter) for p in params]
                chunks.append(torch.cat(views).contiguous(memory_format=torch.channels_last))

            if len(chunks) == 1:
                z1, z2 = embed(chunks[0]).chunk(2)  # one forward for both views
                loss, accuracy = info_nce_and_accuracy(z1, z2, temperature)
                loss.backward()
            else:
                loss, accuracy = cached_gradients(embed, chunks, temperature, model, network.no_sync)
            optimizer.step()
            optimizer.zero_grad()
            run.count(loss, accuracy)
        run.end_epoch()


def cached_gradients(embed, chunks, temperature, model, no_sync):
    """InfoNCE of all chunks together and its exact gradient in `model`; returns (loss, contrastive accuracy).

    Cached gradients (Gao et al. 2021, GradCache): embed all chunks without a graph, differentiate the loss
    with respect to the embeddings, then run each chunk again with its graph and push its embeddings' gradient
    through it. Batch norm normalises each chunk by itself and counts it once.
    """
    with torch.no_grad(), not_counting(model):
        embeddings = [embed(chunk) for chunk in chunks]
    for embedding in embeddings:
        embedding.requires_grad_()
    first, second = zip(*(embedding.chunk(2) for embedding in embeddings))
    loss, accuracy = info_nce_and_accuracy(torch.cat(first), torch.cat(second), temperature)
    loss.backward()
    for i, (chunk, embedding) in enumerate(zip(chunks, embeddings)):
        last = i == len(chunks) - 1
        with contextlib.nullcontext() if last else no_sync():  # processes exchange gradients once per step
            embed(chunk).backward(embedding.grad)
    return loss, accuracy


if __name__ == "__main__":
    with user_errors():
        main()
