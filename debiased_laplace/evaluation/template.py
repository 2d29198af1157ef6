"""A task for `debiased-laplace evaluate`: what network to judge, and on what data.

This one runs as it is, on scikit-learn's small digits. Change it for your network and data:

    debiased-laplace doctor task.py                # is everything as it should be?
    debiased-laplace evaluate task.py --quick      # a try
    debiased-laplace evaluate task.py              # in earnest
    debiased-laplace fit task.py                   # a posterior in a file
    debiased-laplace predict task.py posterior.safetensors
    debiased-laplace predict task.py posterior.safetensors --inputs folder-of-images

Functions may have any of these parameters, by name: `seed` (of everything random), `data_dir` (the folder of
--data-dir, or None), `cache` (a folder to keep trained weights in), `quick` (whether little will do), `device`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NAME = "my digits"
DESCRIPTION = "The 1,797 digits of scikit-learn and a network with one hidden layer."
#: "classification" (targets are class indices) or "regression" (targets are numbers, [N, C]).
LIKELIHOOD = "classification"
#: Training data spent on measuring curvature by the mini-batch methods.
BUDGET = 128
#: How many seeds are run unless --seeds says otherwise, and what a seed decides.
SEEDS = 3
SEEDS_NOTE = "A seed decides the initial weights, the order of the training data and the draw of the curvature data."
#: N_DATA = 50_000  # size of the training set, where train_loader yields only a part of it

digits = load_digits()
inputs = torch.from_numpy(digits.images).float()[:, None] / 16
targets = torch.from_numpy(digits.target).long()
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
train, validation, test = order.split([900, 400, 497])


def model(seed: int, quick: bool) -> nn.Module:
    """The trained network. With yours: build it, load its weights, return it."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(3 if quick else 20):
        for x, y in DataLoader(TensorDataset(inputs[train], targets[train]), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network


def loader(part: torch.Tensor) -> DataLoader:
    """Batches (inputs, targets); any iterable of such pairs will do."""
    return DataLoader(TensorDataset(inputs[part], targets[part]), batch_size=100)


def train_loader() -> DataLoader:
    """The data that the network was trained on, as it saw them, without random augmentation if you can."""
    return loader(train)


def val_loader() -> DataLoader:
    """Held-out data: prior precisions and temperatures are tuned on them."""
    return loader(validation)


def test_loader() -> DataLoader:
    """Held-out data that nothing was tuned on: everything is judged on them."""
    return loader(test)


# -- optional: delete what you do not need --------------------------------------------------------------


def shifted_loaders(seed: int) -> dict:
    """The test data, made harder: {name: loader}, or {name: {severity: loader}} with severities 1 to 5."""
    from debiased_laplace.evaluation.shifts import gaussian_noise

    noisy = {severity: gaussian_noise(inputs[test], 0.1 * severity, seed=seed) for severity in (1, 2, 3, 4, 5)}
    return {"noise": {severity: [(images, targets[test])] for severity, images in noisy.items()}}


def ood_loaders(seed: int) -> dict:
    """Data of another kind, which the network should not be sure about: {name: loader}."""
    from debiased_laplace.evaluation.shifts import shuffle_patches

    return {"shuffled digits": [(shuffle_patches(inputs[test], 2, seed=seed), targets[test])]}


def images(batch: torch.Tensor) -> torch.Tensor:
    """Inputs as images [N, channels, height, width] in [0, 1], for the report."""
    return batch


# def transform(image):
#     """An image of `predict --inputs FOLDER` (of PIL) as the network takes it: here [1, 8, 8], from 0 to 1.
#
#     Without this function images have to be of the network's size, and are scaled to [0, 1]. Of `--inputs table.csv`
#     it is given each row, a tensor [columns]: standardise it here as the training data were.
#     """
#     return torch.from_numpy(np.array(image.convert("L").resize((8, 8))) / 255).float()[None]


# def ensemble(seed):
#     """Trained networks of several runs, as a baseline: [network, ...]."""
