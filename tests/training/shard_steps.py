"""Trains one SAE whole and in parts, in forked gloo processes, and prints how far apart they end: see test_shards.py."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig

from sae_italian.saes.sparse import tune
from sae_italian.training.shards import of_all, sharded, whole

D_IN, D_SAE, K, BATCH, STEPS = 16, 128, 4, 64, 10


def batches(dtype):
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(8, D_IN, generator=generator)  # few directions, so that latents die
    return [torch.randn(BATCH, 8, generator=generator).mm(mixed).to(dtype) + 0.5 for _ in range(STEPS)]


def trainer_of(sae):
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=BATCH * STEPS,
        device="cpu", autocast=False, lr=3e-3, lr_end=3e-4, lr_scheduler_name="constant", lr_warm_up_steps=0,
        adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=BATCH,
        dead_feature_window=2, feature_sampling_window=1000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return tune(SAETrainer(cfg=config, sae=sae, data_provider=iter(())))


def sae_of(case):
    torch.manual_seed(0)
    values = {"architecture": "sparse_topk", "d_in": D_IN, "d_sae": D_SAE, "k": K, "start": "mean"}
    values |= case
    silent = values.pop("silent", 0)  # so many of the first latents never fire: all are the first process'
    sae: Any = TrainingSAE.from_dict(values)
    with torch.no_grad():
        sae.b_enc[:silent] = -3.0
    return sae


def counted(sent):
    """Let the collectives add up what this process hands them."""
    gather, add = dist.all_gather, dist.all_reduce

    def all_gather(parts, tensor):
        sent["gather"] += tensor.numel() * tensor.element_size()
        return gather(parts, tensor)

    def all_reduce(tensor):
        kind = "add" if tensor.numel() > D_IN else "small"
        sent[kind] += tensor.numel() * tensor.element_size()
        return add(tensor)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce


def run(rank, world, case, out):
    sae: Any = sae_of(case)
    dtype = getattr(torch, case["dtype"])
    if world:
        store = dist.FileStore(str(out) + ".store", world)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        sae = sharded(sae)
    trainer, sent, losses, dead = trainer_of(sae), {"gather": 0, "add": 0, "small": 0}, [], []
    if world:
        counted(sent)
    by_step = []
    for x in batches(dtype):
        before = dict(sent)
        dead.append(int(trainer.dead_neurons.sum()))
        x = torch.cat(of_all(x.chunk(world)[rank])) if world else x  # as the stream gathers the batch
        output = trainer.step(x)
        trainer.n_training_steps += 1
        losses.append({name: loss.item() for name, loss in output.losses.items()})
        by_step.append({kind: sent[kind] - before[kind] for kind in sent})
    state = whole(sae).state_dict() if world else sae.state_dict()
    found = {"state": state, "losses": losses, "sent": by_step, "dead": dead}
    torch.save(found | {"since_fired": trainer.n_forward_passes_since_fired}, f"{out}.{rank}")
    if world:
        dist.destroy_process_group()


def together(world, case, out):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, world, case, out)) for rank in range(max(world, 1))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, process.exitcode
    return [torch.load(f"{out}.{rank}") for rank in range(max(world, 1))]


def main(folder, cases):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    told = []
    for number, case in enumerate(cases):
        (alone,) = together(0, case, folder / f"{number}-0")
        for world in (2, 4):
            parts = together(world, case, folder / f"{number}-{world}")
            found = parts[0]
            away = max(float((found["state"][name] - tensor).abs().max()) for name, tensor in alone["state"].items())
            agree = all(torch.equal(found["state"]["b_dec"], part["state"]["b_dec"]) for part in parts)
            pairs = zip(alone["losses"], found["losses"], strict=True)
            loss = max(abs(a[name] - b[name]) / (abs(a[name]) + 1e-9) for a, b in pairs for name in a)
            fired = torch.cat([part["since_fired"] for part in parts])
            told.append({
                "world": world, "away": away, "agree": agree, "loss": loss, "sent": found["sent"],
                "counters": torch.equal(fired, alone["since_fired"]), "dead": alone["dead"],
                "dead_by_part": [part["dead"] for part in parts],
                "auxiliary": alone["losses"][-1]["auxiliary_reconstruction_loss"],
            })  # fmt: skip
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
