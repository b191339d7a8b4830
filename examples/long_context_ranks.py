# Copyright 2026 The miras-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Train on sequences longer than one device holds: the ranks sit along the sequence and hand the memory on.

What one learns: all that a Miras model knows of the text so far is its cache, of one size however long the text (the
memory of every layer, the tails of the convolutions, the window of attention layers). So rank r takes the r-th slice of
the sequence, receives the cache of rank r - 1, reads, and sends its own to rank r + 1; the gradient of that cache comes
back the same way. This is exact: `--check` compares loss and gradients with one process that reads everything.
`--truncate` keeps the gradient at home, as truncated backpropagation through time does: the loss is still exact, the
gradients are not, and earlier slices do not learn to remember what later ones need.

What it costs: a rank waits for the one before it. `--micro_batches` splits the rows of a batch, so that rank 1 reads the
first rows while rank 0 reads the next: with m micro-batches on n ranks, (n - 1) / (m + n - 1) of the time is waiting. The
activations of all micro-batches are kept until their gradients come. Ring attention, which is what context parallelism
means in Trainer and Accelerate, exchanges keys and values, and does not apply to memories: both refuse it.

    torchrun --nproc-per-node 2 examples/long_context_ranks.py --smoke
    torchrun --nproc-per-node 8 examples/long_context_ranks.py --preset 170m --tokens 262144 --rows 8 --micro_batches 8

The text is the source of the Python standard library, byte by byte.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, set_seed

import miras_hf
from miras_hf import MirasLayer


CONFIGS = {"moneta": miras_hf.MonetaConfig, "yaad": miras_hf.YaadConfig, "memora": miras_hf.MemoraConfig}


def state_of(cache: DynamicCache) -> list[Tensor]:
    """What the layers of a cache hold, in a fixed order."""
    tensors: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, MirasLayer):
            layer.memory.map(lambda tensor: tensors.append(tensor) or tensor)
            tensors.append(layer.conv_tail)
        else:
            tensors += [layer.keys, layer.values]
    return tensors


def cache_after(model: PreTrainedModel, rows: int, tokens: int) -> DynamicCache:
    """A cache as after reading `tokens` tokens, with the right shapes and nothing of value in it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(rows, 1, dtype=torch.long, device=model.device), cache=cache)
    for layer in cache.layers:
        if isinstance(layer, MirasLayer):
            layer.tokens_seen = tokens
        else:
            window = min(tokens, layer.sliding_window - 1)
            layer.keys, layer.values = (x.expand(-1, -1, window, -1) for x in (layer.keys, layer.values))
            layer.cumulative_length = tokens
    return cache


def fill(cache: DynamicCache, tensors: tuple[Tensor, ...]) -> DynamicCache:
    """Puts tensors into a cache, in the order of `state_of`."""
    state = iter(tensors)
    for layer in cache.layers:
        if isinstance(layer, MirasLayer):
            layer.update_memory(layer.memory.map(lambda _: next(state)), next(state), tokens=0)
        else:
            layer.keys, layer.values = next(state), next(state)
    return cache


class Send(torch.autograd.Function):
    """Sends tensors to a rank. Its zero joins the loss, and brings the tensors' gradients from there."""

    @staticmethod
    def forward(ctx, rank: int, gradients: bool, *tensors: Tensor) -> Tensor:
        ctx.rank, ctx.gradients = rank, gradients
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        for tensor in tensors:
            dist.send(tensor.contiguous(), rank)
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx, _):
        if not ctx.gradients:
            return (None,) * (2 + len(ctx.like))
        received = [None, None]
        for shape, dtype, device in ctx.like:
            gradient = torch.empty(shape, dtype=dtype, device=device) if dtype.is_floating_point else None
            if gradient is not None:
                dist.recv(gradient, ctx.rank)
            received.append(gradient)
        return tuple(received)


class Receive(torch.autograd.Function):
    """Receives tensors like `tensors` from a rank, and sends their gradients back there."""

    @staticmethod
    def forward(ctx, anchor: Tensor, rank: int, gradients: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rank, ctx.gradients = rank, gradients
        received = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
        for tensor in received:
            dist.recv(tensor, rank)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        for gradient in gradients:
            if ctx.gradients and gradient.is_floating_point():
                dist.send(gradient.contiguous(), ctx.rank)
        return (torch.zeros((), device=gradients[0].device), *(None,) * (2 + len(gradients)))


def slice_loss(model: PreTrainedModel, tokens: Tensor, labels: int, truncate: bool = False) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean loss over a sequence.

    Args:
        tokens (`torch.Tensor` of shape `[rows, tokens + 1]`): the whole sequence; every rank reads its slice.
        labels (`int`): tokens that the whole batch predicts, which the losses are divided by.

    Returns:
        The loss, and a scalar to call `backward` on. The losses, and gradients, of all ranks have to be added up.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bounds = [(tokens.shape[1] - 1) * i // ranks for i in range(ranks + 1)]
    start, stop = bounds[rank : rank + 2]
    cache = DynamicCache(config=model.config)
    if rank > 0:
        cache = cache_after(model, len(tokens), start)
        # autograd asks only those for a gradient that have an input with one
        anchor = torch.zeros((), device=model.device, requires_grad=True)
        cache = fill(cache, Receive.apply(anchor, rank - 1, not truncate, *state_of(cache)))
    targets = tokens[:, start + 1 : stop + 1]  # the last of them is the first token of the next rank
    loss = model(
        tokens[:, start:stop],
        cache=cache,
        use_cache=True,
        labels=targets,
        shift_labels=targets.contiguous(),
        num_items_in_batch=torch.tensor(labels, device=model.device),
    ).loss
    total = loss
    if rank + 1 < ranks:
        total = loss + Send.apply(rank + 1, not truncate, *state_of(cache))
    return loss.detach(), total


def training_step(model: PreTrainedModel, tokens: Tensor, micro_batches: int, truncate: bool = False) -> Tensor:
    """The mean loss over `tokens` of shape `[rows, tokens + 1]`; leaves the gradients of all ranks, summed, in the model."""
    labels = tokens[:, 1:].numel()
    parts = [slice_loss(model, rows, labels, truncate) for rows in tokens.chunk(micro_batches)]
    for _, total in reversed(parts):
        total.backward()
    loss = torch.stack([loss for loss, _ in parts]).sum()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(loss)
    return loss


def check(model: PreTrainedModel, tokens: Tensor, micro_batches: int) -> tuple[float, float, float]:
    """Differences from one process that reads everything: of the loss, of the gradients, of truncated gradients. Those
    of gradients are relative, in norm."""

    def gradients() -> Tensor:
        everything = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return everything

    targets = tokens[:, 1:].contiguous()
    expected = model(tokens[:, :-1], labels=targets, shift_labels=targets).loss
    expected.backward()
    whole = gradients()
    loss = training_step(model, tokens, micro_batches)
    exact = gradients()
    training_step(model, tokens, micro_batches, truncate=True)
    exact, truncated = ((found - whole).norm() / whole.norm() for found in (exact, gradients()))
    return (loss - expected).abs().item(), exact.item(), truncated.item()


def batches(rows: int, tokens: int, device: torch.device):
    """Rows of the standard library's bytes, the same on every rank."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - tokens - 1, (rows,), generator=generator).tolist()
        yield torch.stack([text[start : start + tokens + 1] for start in starts]).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", choices=sorted(CONFIGS), default="yaad")
    parser.add_argument("--preset", default="tiny", help="size of the model, a name of `MirasConfig.from_preset`")
    parser.add_argument("--hybrid", action="store_true", help="alternate memories with sliding-window attention")
    parser.add_argument("--tokens", type=int, default=16384, help="length of a sequence, over all ranks")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--micro_batches", type=int, default=4, help="parts of a batch that are in flight at once")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--truncate", action="store_true", help="keep the gradients of the cache at home")
    parser.add_argument("--check", action="store_true", help="compare the first batch with one process")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that everything works")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start with torchrun: torchrun --nproc-per-node 2 examples/long_context_ranks.py")
    overrides = {}
    if args.smoke:
        args.tokens, args.rows, args.micro_batches, args.steps, args.check = 150, 2, 2, 3, True
        args.hybrid, args.learning_rate = True, 1e-2
        overrides = {"hidden_size": 32, "num_attention_heads": 2, "gate_rank": 4}

    # gloo for what is on the CPU, and nccl only where there is a GPU for every rank
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    first = dist.get_rank() == 0

    config = CONFIGS[args.model_type].from_preset(args.preset, vocab_size=256, **overrides)
    if args.hybrid:
        config.layer_types = ["miras_memory", "sliding_attention"] * (config.num_hidden_layers // 2)
        config.sliding_window = 24 if args.smoke else config.sliding_window
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device)
    data = batches(args.rows, args.tokens, device)
    if args.check:
        differences = check(model, next(data), args.micro_batches)
        if first:
            print("differences from one process: loss {:.1e}, gradients {:.1e}, truncated {:.1e}".format(*differences))
    if first:
        size = sum(tensor.nbytes for tensor in state_of(cache_after(model, 1, args.tokens)))
        print(f"{dist.get_world_size()} ranks read {args.tokens} tokens and hand on {size / 2**20:.2f} MiB a row")

    # torch decays everything by default, norms and the learned initial memories, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = training_step(model, next(data), args.micro_batches, args.truncate)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if first and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
