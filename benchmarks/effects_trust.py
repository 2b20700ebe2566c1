"""How far estimated effects can be trusted: against the exact ones, for every channel of the demo network.

python benchmarks/effects_trust.py

Prints the table of docs/effects.md: Spearman's rank correlation per layer, on patches of the photographs.
"""

from __future__ import annotations

import argparse

import skimage.data
import torch

from torchlens_viz import ablate, survey
from torchlens_viz.models.demo_net import DEMO_PHOTOGRAPHS, load_demo_net, normalize

SIZE = 64
LAYERS = ("features.0", "features.1", "features.3", "features.4", "features.6", "features.7")


def patches(each: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut patches of every class: of each photograph, turned each way; a batch for each photograph."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, name in enumerate(DEMO_PHOTOGRAPHS):
        pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
        photograph = pixels[None].expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        height, width = photograph.shape[1:]
        images, labels = [], []
        for turn in range(4):
            for _ in range(each):
                y = int(torch.randint(height - SIZE + 1, (), generator=generator))
                x = int(torch.randint(width - SIZE + 1, (), generator=generator))
                images.append(torch.rot90(photograph[:3, y : y + SIZE, x : x + SIZE], turn, (1, 2)))
                labels.append(4 * number + turn)
        found.append((normalize(torch.stack(images)), torch.tensor(labels)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=8, help="patches of each of the 48 classes (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    net, data = load_demo_net(), patches(arguments.each, arguments.seed)
    found = survey(net, data, LAYERS, loss="cross_entropy", top_k=0, progress=False)
    print("| layer | channels | loss, accuracy | by zero | by the mean |")
    print("|---|--:|---|--:|--:|")
    for layer in LAYERS:
        exact = {by: ablate(net, data, layer, loss="cross_entropy", by=by) for by in ("zero", "mean")}
        zero = exact["zero"]
        trust = [found.effects.trust(each) for each in exact.values()]
        whole = f"{zero.loss:.3f}, {zero.accuracy:.3f}"
        print(f"| `{layer}` | {len(zero.channels)} | {whole} | {trust[0]:.3f} | {trust[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
