"""A calibration that survives an interruption: the layers so far, in one checked file."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from polylens.calibration.seen import Calibration, SeenInputs
from polylens.checks import Layer, label
from polylens.errors import ArtifactError
from polylens.files import format as storage
from polylens.hosts.base import MLPSite
from polylens.hosts.batch import TOKENS
from polylens.hosts.offloaded import digests
from polylens.polynomials.joint import Fitted
from polylens.saving import lens_file as artifact

# What is named, at most, of the weights that differ.
NAMED = 3


class Checkpoint:
    """The polynomials of a calibration so far, written anew after each layer.

    The file is that of `Lens.save` with the identity of the calibration in its header, marked
    as unfinished until `finish`. A crash leaves the file of the layer before.

    Args:
        path: of the file; one that does not exist is written, without layers.
        identity: of the calibration that it belongs to.
        sites: all layers of the model that can be read.
        refused: why others cannot.

    Attributes:
        found: the polynomials that are in the file, in the order in which they were fitted.

    Raises:
        ArtifactError: a damaged file, or one that belongs to something else; it is left as is.
        OSError: it cannot be read or written.

    Cost: the whole file for each layer, that is n^2 / 2 times a layer's share of it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        sites: Iterable[MLPSite],
        refused: Mapping[Layer, str],
    ) -> None:
        self.path, self.found = path, dict[Layer, Fitted]()
        self._sites = {site.layer: site for site in sites}
        self._header = {"calibration": dict(identity), "unfinished": True}
        self._finished = False
        if os.path.exists(path):
            header, tensors = storage.read(path, artifact.KIND)
            _require_same(path, header.get("calibration"), identity)
            self.found = artifact.decode(path, header, tensors, self._sites.values(), refused)
            self._finished = not header.get("unfinished")
        self._entries = {n: artifact.entry(self._sites[n], p) for n, p in self.found.items()}
        if not self.found:
            self._write()

    def add(self, layer: Layer, polynomial: Fitted) -> None:
        """Write the file with one more layer."""
        self._entries[layer] = artifact.entry(self._sites[layer], polynomial)
        self._write()

    def finish(self, header: Mapping[str, Any], layers: Iterable[Layer]) -> None:
        """Make it the file of a lens with this header and these layers, in their order."""
        if not self._finished:
            self._header = {**header, "calibration": self._header["calibration"]}
            self._entries = {layer: self._entries[layer] for layer in layers}
            self._write()

    def _write(self) -> None:
        artifact.write(self.path, self._header, self._entries.values())


def identity(
    calibration: Calibration, layers: Iterable[Layer], method: SeenInputs, degree: int
) -> dict[str, Any]:
    """All that the polynomials of a calibration depend on, as JSON.

    Cost: one SHA-256 over all weights of the model and over the tokens.
    """
    host, steps = calibration.host, calibration.steps
    inputs = [{n: t for n, t in step.leaves() if t.dim()} for step in steps]
    main = next((name for name in (TOKENS, "inputs") if name in inputs[0]), min(inputs[0]))
    there = [step.streams[step.about].there.long() for step in steps if step.about in step.streams]
    padded = any(bool((each == 0).any()) for each in there)
    others = sorted(inputs[0].keys() - {main, "attention_mask"})
    return {
        "host": host.name,
        "weights": digests(host.module),
        "tokens": _data([each[main] for each in inputs]),
        "attention_mask": _data(there) if padded else None,
        **{name: _data([each[name] for each in inputs]) for name in others},
        "batch_size": len(steps[0]),
        "starts_left_out": calibration.exclude_first,
        "weighting": method.weighting,
        "tails": method.share_beyond,
        "estimator": method.kind.name,
        "degree": degree,
        "layers": [label(layer) for layer in layers],
    }


def _data(batches: list[Tensor]) -> str:
    shape = [sum(map(len, batches)), *batches[0].shape[1:]]
    return f"{batches[0].dtype} {shape} with SHA-256 {storage.sha256(('', b) for b in batches)}"


def _in_words_of_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """An identity, also one whose estimator and tails were called inputs and clip.

    One with "exclude_first" is of a stream on which starts of sequences stayed true: another one.
    """
    saved = dict(saved)
    if not saved.pop("exclude_first", True):
        saved["starts_left_out"] = False
    if "clip" in saved:
        clip = saved.pop("clip")
        saved["tails"] = (0.0 if clip else None) if isinstance(clip, bool) else clip
        saved["estimator"] = saved.pop("inputs")
    return saved


def _require_same(path: Any, saved: Any, mine: Mapping[str, Any]) -> None:
    if saved is None:
        raise ArtifactError(
            f"{path} holds a lens that was saved, not a calibration that can go on; "
            "polylens.load it, or give another path as checkpoint="
        )
    saved = _in_words_of_now(saved)
    different = [
        f"{name} was {saved.get(name)}, now it is {value}"
        for name, value in mine.items()
        if name != "weights" and saved.get(name) != value
    ]
    before, now = saved["weights"], mine["weights"]
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        different.append(f"other weights ({', '.join(changed[:NAMED])}{more})")
    if different:
        raise ArtifactError(
            f"{path} belongs to another calibration: {'; '.join(different)}. Attach as then, or "
            "give another path as checkpoint= (this file is as it was)"
        )
