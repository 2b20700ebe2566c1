"""Train the demo network on the photographs inside the scikit-image wheel; needs no network and no GPU.

Run with no options, this reproduces the tensors of `torchlens_viz/models/demo_net.safetensors`, to the last
bit on the same version of torch and the same kind of CPU. It takes two to four minutes on two cores:

    python -m pip install "torchlens_viz[demo]"
    python examples/train_demo_net.py --out demo_net.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import skimage
import skimage.data
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchlens_viz.models.demo_net import DEMO_PHOTOGRAPHS, DemoNet, normalize

PATCH = 64
TURNS = 4
HELD_OUT = 1 / 5
GAIN = 0.25
TINT = 0.1
# The random start of an 11 x 11 kernel is noise that the loss hardly sees: it would stay in the picture of
# the kernel for good. Decaying the first layer faster leaves what was learned. (Starting lower instead makes
# cleaner kernels too, but fewer: most then settle on flat colours.)
FIRST_LAYER_DECAY = 0.3


def load_photographs() -> list[Tensor]:
    """Read the photographs: each `(3, H, W)` float32 in [0, 1], gray ones repeated to three channels."""
    photographs = []
    for name in DEMO_PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(skimage.data, name)().copy())
        if pixels.ndim == 2:
            pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)
        photographs.append(pixels.permute(2, 0, 1).to(torch.float32).div(255).contiguous())
    return photographs


def split(photographs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Cut every photograph into the part to train on, at the left, and the strip held out, at the right."""
    edges = [round(photograph.shape[-1] * (1 - HELD_OUT)) for photograph in photographs]
    left = [photograph[..., :edge] for photograph, edge in zip(photographs, edges, strict=True)]
    right = [photograph[..., edge:] for photograph, edge in zip(photographs, edges, strict=True)]
    return left, right


def cut_patches(regions: list[Tensor], labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cut one patch per label from anywhere in its photograph and turn it: `(N, 3, 64, 64)` in [0, 1]."""
    places = torch.rand(len(labels), 2, generator=generator).tolist()
    patches = []
    for label, (down, across) in zip(labels.tolist(), places, strict=True):
        photograph, turn = divmod(label, TURNS)
        region = regions[photograph]
        row = int(down * (region.shape[-2] - PATCH + 1))
        column = int(across * (region.shape[-1] - PATCH + 1))
        patch = region[:, row : row + PATCH, column : column + PATCH]
        patches.append(torch.rot90(patch, turn, dims=(-2, -1)))
    return torch.stack(patches)


def vary_light(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness and tint a little, so that structure tells more than the exact colour does."""
    gain = 1 + GAIN * (2 * torch.rand(len(patches), 1, 1, 1, generator=generator) - 1)
    tint = 1 + TINT * (2 * torch.rand(len(patches), 3, 1, 1, generator=generator) - 1)
    return (patches * gain * tint).clamp(0, 1)


@torch.no_grad()
def evaluate(model: nn.Module, regions: list[Tensor], per_class: int, seed: int) -> dict[str, float]:
    """Measure accuracy on patches of `regions`: of the class, and of the photograph whatever its turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(regions) * TURNS).repeat_interleave(per_class)
    guesses = torch.cat(
        [model(normalize(cut_patches(regions, chunk, generator))).argmax(1) for chunk in labels.split(512)]
    )
    return {
        "class": (guesses == labels).float().mean().item(),
        "photograph": (guesses // TURNS == labels // TURNS).float().mean().item(),
    }


@torch.no_grad()
def count_dead(model: DemoNet, photographs: list[Tensor]) -> dict[str, list[int]]:
    """List, per ReLU, the channels that stay at zero on every photograph, whole and in every turn."""
    peaks: dict[str, Tensor] = {}
    for photograph in photographs:
        for turn in range(TURNS):
            x = normalize(torch.rot90(photograph, turn, dims=(-2, -1))).unsqueeze(0)
            for name, layer in model.features.named_children():
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    peak = x.amax((0, 2, 3))
                    peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
    return {
        f"features.{name}": (peak == 0).nonzero().flatten().tolist()
        for name, peak in sorted(peaks.items(), key=lambda item: int(item[0]))
    }


def train(model: DemoNet, regions: list[Tensor], *, steps: int, batch: int, seed: int) -> None:
    """Train in place: AdamW with one learning rate cycle, cross-entropy on random patches."""
    generator = torch.Generator().manual_seed(seed)
    first = model.features[0].weight
    rest = [parameter for parameter in model.parameters() if parameter is not first]
    groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": FIRST_LAYER_DECAY}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        labels = torch.randint(len(regions) * TURNS, (batch,), generator=generator)
        patches = vary_light(cut_patches(regions, labels, generator), generator)
        loss = nn.functional.cross_entropy(model(normalize(patches)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Train, measure and write the weights with their provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps of 128 patches (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and patches (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_net.safetensors"), help="file to write")
    arguments = parser.parse_args()

    torch.set_num_threads(2)  # sums are added in another order with another number of threads
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    photographs = load_photographs()
    seen, held_out = split(photographs)
    model = DemoNet()
    train(model, seen, steps=arguments.steps, batch=128, seed=arguments.seed)

    model.eval().half().float()  # measure what is stored
    result = {
        "training region": evaluate(model, seen, per_class=128, seed=1),
        "held out": evaluate(model, held_out, per_class=128, seed=2),
    }
    for part, accuracy in result.items():
        print(f"{part}: class {accuracy['class']:.1%}, photograph {accuracy['photograph']:.1%}")
    for layer, dead in count_dead(model, photographs).items():
        print(f"{layer}: {len(dead)} dead {dead}")

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()},
        arguments.out,
        metadata={
            "model": "torchlens_viz.models.demo_net.DemoNet",
            "trained_by": "examples/train_demo_net.py",
            "data": f"photographs of scikit-image {skimage.__version__}: {', '.join(DEMO_PHOTOGRAPHS)}",
            "steps": str(arguments.steps),
            "seed": str(arguments.seed),
            "torch": torch.__version__,
            "accuracy": ", ".join(f"{part} {accuracy['class']:.3f}" for part, accuracy in result.items()),
            "license": "BSD-3-Clause",
        },
    )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
