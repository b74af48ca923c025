"""Files with a right checksum and wrong contents: an error, or a polynomial that works."""

import random

import pytest
import torch
from tests.oracles import FITS, generator, input_model, random_layer

from polylens.errors import ArtifactError, PolylensError
from polylens.files import format as storage

CASES = [
    ("gaussian", "neuron", "mlp"),
    ("gaussian", "neuron", "glu"),
    ("mixture", "global", "mlp"),
    ("mixture", "neuron", "glu"),
    ("samples", "joint", "glu"),
]
X = torch.randn(7, 4, dtype=torch.float64, generator=generator(5))
VALUES = (None, True, -1, 0, 1, 13, 10**12, 0.5, -2.5, "x", "silu", [], [1, "a"], {}, {"a": None})


def forged_tensor(tensor, choice):
    """The tensor with something wrong, None for none."""
    flat = tensor.clone().flatten()
    changes = [
        lambda: None,
        lambda: flat,
        lambda: tensor.mT.contiguous() if tensor.dim() > 1 else flat[:-1],
        lambda: tensor.movedim(0, -1).contiguous() if tensor.dim() else flat,
        lambda: tensor[None],
        lambda: tensor[:0] if tensor.dim() else flat,
        lambda: -tensor if tensor.dtype != torch.bool else tensor,
        lambda: tensor.to(torch.float32),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.bool),
        lambda: torch.full_like(tensor, float("nan")),
        lambda: torch.full_like(tensor, float("inf")),
        lambda: torch.full_like(tensor, 1e300),
        lambda: torch.zeros_like(tensor),
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else flat,
    ]
    return choice(changes)()


def forged(metadata, tensors, seed):
    """One thing changed, of the tensors or anywhere in the metadata."""
    rng = random.Random(seed)
    tensors = dict(tensors)
    if rng.random() < 0.6:
        name = rng.choice(sorted(tensors))
        changed = forged_tensor(tensors.pop(name), rng.choice)
        if changed is not None:
            tensors[name] = changed
        return metadata, tensors, name
    places = []

    def walk(node, path):
        for key in sorted(node) if isinstance(node, dict) else range(len(node)):
            places.append((*path, key))
            if isinstance(node[key], dict | list):
                walk(node[key], (*path, key))

    metadata = storage.json.loads(storage.json.dumps(metadata))
    walk(metadata, ())
    path = rng.choice(places)
    node = metadata
    for key in path[:-1]:
        node = node[key]
    if rng.random() < 0.2:
        del node[path[-1]]
    else:
        node[path[-1]] = rng.choice(VALUES)
    return metadata, tensors, path


@pytest.mark.parametrize("count", [25, pytest.param(800, marks=pytest.mark.laws)])
@pytest.mark.parametrize(("model", "scope", "kind"), CASES)
def test_forged_files(count, model, scope, kind, tmp_path):
    saved = FITS[scope](random_layer(3, kind, "silu"), input_model(model, 1), 2)
    saved.r2  # noqa: B018  kept in the file
    if (model, scope, kind) == CASES[1]:
        saved = saved.with_ends(torch.tensor([[-1.0], [2.0]]).double().expand(2, 6).contiguous())
    path, wrong = tmp_path / "x", []
    saved.save(path)
    metadata, tensors = storage.read(path, saved.kind)
    for seed in range(count):
        meta, forgery, what = forged(metadata, tensors, seed)
        storage.write(path, saved.kind, meta, forgery)
        try:
            loaded = type(saved).load(path)
        except ArtifactError:
            continue
        except Exception as error:
            wrong.append((seed, what, f"{type(error).__name__}: {error}"))
            continue
        try:
            values = [loaded(X), loaded.truncate(1)(X)]
            assert all(t is None or torch.isfinite(t).all() for t in loaded.state_dict().values())
            huge = any(t.numel() and t.double().abs().max() > 1e200 for t in forgery.values())
            assert huge or all(torch.isfinite(v).all() for v in values)
            loaded.r2  # noqa: B018
            repr(loaded)
        except PolylensError:
            continue
        except Exception as error:
            wrong.append((seed, what, f"loaded, then {type(error).__name__}: {error}"))
    assert not wrong, "\n".join(map(str, wrong))
