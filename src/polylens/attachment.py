"""`attach` and `load`: put a polynomial beside every MLP of a model."""

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from polylens.calibration import streams
from polylens.calibration.offload import store_for
from polylens.calibration.sampling import sampled
from polylens.calibration.streams import Calibration
from polylens.checks import Layer, check_layers, labelled
from polylens.errors import ArtifactError, AttachmentError, InvalidInputError, UnsupportedModel
from polylens.fitting.estimator import require_degree
from polylens.fitting.fit import estimator, fit
from polylens.hosts import host_for
from polylens.hosts.base import Host, MLPSite
from polylens.hosts.passage import require_free
from polylens.inputs.gaussian import Gaussian
from polylens.installed.emitter import Fitted
from polylens.lens import Lens, attached
from polylens.report.report import Report
from polylens.saving import lens_file as artifact
from polylens.saving.checkpoint import Checkpoint, identity

# Each with how many sequences are sampled from a model where no tokens are given.
STREAMS = {"true": 32, "sequential": 256}
SAMPLED_LENGTH = 128
# In front of the name of a repository.
HUB = "hf://"


def find_mlps(model: Any, example_inputs: Any = None) -> list[MLPSite]:
    """Every MLP and GLU of the model that has a normal form, verified by a tiny forward pass.

    Args:
        model: as in `attach`.
        example_inputs: as in `attach`.

    Raises:
        UnsupportedModel: an unknown kind of model, or one in which no layer can be read.
    """
    sites, refused = host_for(model, example_inputs).sites()
    _require_sites(sites, refused, model)
    return sites


def attach(
    model: Any,
    tokens: Tensor | None = None,
    *,
    inputs: Gaussian | Mapping[Layer, Gaussian] | str | None = None,
    calibration: str = "true",
    weighting: str | None = None,
    clip: bool | float | None = None,
    degree: int = 2,
    layers: Iterable[Layer] | Layer | None = None,
    attention_mask: Tensor | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    example_inputs: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    offload: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Lens:
    """Fit a polynomial to every MLP of the model and add it as hook points.

    The model computes exactly what it did before; the hook points `hook_poly_in`,
    `hook_poly_out`, `hook_poly_error` and `hook_poly_degree_k` appear on each MLP, and
    `lens.replaced()` lets the polynomials flow on.

    To study single layers, take the default: each polynomial is the optimum for the inputs
    that its layer has in the true model. To replace many layers at once, take
    calibration="sequential": each is the optimum for what the already replaced layers below
    produce, so that errors do not pile up.

    Args:
        model: a HookedTransformer or a TransformerBridge, an nnsight model, a Hugging Face or
            any other torch module.
        tokens: [batch, pos] token ids on which the layers' inputs are seen. Without tokens
            (and inputs) 32 x 128 tokens are sampled from the model itself, for "sequential"
            256 x 128, which takes minutes on a CPU. Variety counts: text of one's own and as much
            from `polylens.sample_tokens` serve "sequential" better than either. For a model that
            reads no token ids, the floats [batch, ...] it reads: images, features.
        inputs: "gaussian": the Gaussian with the moments of the inputs, whose optimum is in
            closed form the one over all polynomials (default); "samples": least squares over
            the inputs themselves, neuron by neuron, which heavier tails than a Gaussian's do
            not mislead (default for "sequential"); "joint": the same with the features of all
            neurons for every output, closer and dearer. Without tokens: "norm", the data-free model
            that the preceding normalisation implies, a Gaussian, or one for each layer.
        calibration: "true", on the stream of the unchanged model; "sequential", layer by
            layer on the stream that the replaced layers below produce.
        weighting: of the inputs in the fit: "equal" (default), or "output" (default for
            "sequential"): by 1 / |true output|. What comes after a layer is normalised, so
            that rare huge outputs, which decide equal squares, matter less than their size.
        clip: where a neuron's polynomial ends; beyond, its preactivation follows the asymptote
            of the activation, which is 0 or y for SiLU and GELU (see `Polynomial.with_ends`).
            True (default for "gaussian" in "sequential"): at the ends of the range
            that calibration saw: far outside, a polynomial grows without bound. A share, 0.05
            (default for "samples" and "joint"): also, for no more than that share of the layer's
            preactivations, further inside, at the neurons and on the sides where it pays most;
            the fit knows, and what it spent on following them goes into the rest. False (default
            for "gaussian" on the true stream): polynomials everywhere.
        degree: fitted degree, 0 ... 12; lower ones come with it.
        layers: which layers; all that can be read by default.
        attention_mask: [batch, pos], 0 at padding, which is left out.
        exclude_first: leave position 0 out of the fit and R2, and true under `replaced`:
            language models park attention there, far from all other inputs. Of models that
            read no token ids nothing is left out.
        batch_size: sequences per forward pass.
        seed: of the text sampled when there are no tokens.
        example_inputs: what a torch module is called with, where that cannot be guessed.
        checkpoint: for "sequential": a file that gets the polynomials so far after each layer,
            for a run that may be interrupted. The same call finds them there and goes on behind
            them, after a forward pass through the finished layers, to the same polynomials bit
            for bit (without the Gaussians that they were fitted to, as after `load`). In the
            end it is the file that `Lens.save` writes; the same call then takes all from it.
        offload: for "sequential": where the activations of the batches that wait are kept,
            "cpu" for CPU memory (of a model on a GPU), or a directory, from which the files are
            removed at the end; None leaves them all where they are.
        progress: show progress bars.

    Returns:
        A Lens; also a context manager that detaches.

    Raises:
        InvalidInputError: tokens, layers, degree or inputs that cannot be used.
        UnsupportedModel: no readable MLP, or a named layer that was refused (with the reason).
        AttachmentError: already attached, or in training mode with dropout.
        ArtifactError: a checkpoint that is damaged, or belongs to another model, other tokens
            or other arguments (it says which); it is left as it is.
        OSError: checkpoint or offload cannot be written.

    Cost: one forward pass over the tokens, and for each layer
    - "gaussian": d_in^2 float64 of memory and one product cov @ W;
    - "samples": (2 degree + 2)^2 float64 per neuron and about the layer's own products;
    - "joint": two Gram matrices of 1 + d_in + 2 (degree - 1) d_mlp features in float64 (half of
      the d_mlp without a gate), and as many multiplications for each token as one has entries;
    - clip of a share: about three fits of "samples" to 1,200 tokens, which are kept until then;
    - "sequential": the polynomial's output, too; all batches are in memory at once, with
      about four activations of d_model for every token. With offload one batch is, and they
      are written and read once for each layer. A checkpoint is written anew for each layer,
      and all weights of the model are hashed once.
    If anything fails nothing stays attached.
    """
    if calibration not in STREAMS:
        raise InvalidInputError(
            f"calibration={calibration!r} is unknown; there are {', '.join(map(repr, STREAMS))}"
        )
    require_degree(degree)
    sequential = calibration == "sequential"
    if not sequential:
        _require_none("checkpoint", checkpoint, "fits all layers after one pass; lens.save() them")
        _require_none("offload", offload, "lets no batch wait for the others")
    store = store_for(offload)
    kind = None
    if inputs is None or (isinstance(inputs, str) and inputs != "norm"):
        kind = estimator(inputs or ("samples" if sequential else "gaussian"))
    elif tokens is not None:
        raise InvalidInputError("give tokens= or inputs=, not both: each defines the input model")
    elif sequential:
        raise InvalidInputError(
            f"calibration={calibration!r} sees the inputs on tokens; inputs= says what they are. "
            "Give one of the two"
        )
    if kind is None and (weighting is not None or clip):
        raise InvalidInputError(
            f"weighting={weighting!r} and clip={clip!r} are about the inputs seen on tokens; "
            "inputs= says what they are. Give tokens, or neither of these"
        )
    weighting = ("output" if sequential else "equal") if weighting is None else weighting
    tails = (0.0 if clip else None) if isinstance(clip, bool) else clip
    if kind is not None:
        stream = "replaced" if sequential else "true"
        tails = kind.default_tails[stream] if clip is None else tails
        kind.check_tails(tails)
    host, found, refused = _read(model, example_inputs)
    streams.require_deterministic(host.module)
    sites = {site.layer: site for site in found}
    sites = {layer: sites[layer] for layer in check_layers(layers, sites, refused)}
    exclude_first = exclude_first and host.reads_tokens
    saved = None
    if kind is not None:
        origin = "tokens"
        if tokens is None:
            tokens = sampled(host, STREAMS[calibration], SAMPLED_LENGTH, seed, progress)
            origin = "tokens sampled from the model"
        data = Calibration.on(
            host,
            tokens,
            attention_mask,
            exclude_first=exclude_first,
            weighting=weighting,
            tails=tails,
            batch_size=batch_size,
            progress=progress,
        )
        if sequential:
            streams.require_ordered(sites)
            if checkpoint is not None:
                own = identity(data, sites, kind.name, degree)
                saved = Checkpoint(checkpoint, own, found, refused)
            with store or nullcontext():
                polynomials = streams.on_replaced_stream(
                    data, sites, kind, degree, store=store, saved=saved
                )
        else:
            polynomials = dict(streams.on_true_stream(data, sites, kind, degree, refused))
        layer_by_layer = ["layer by layer"] * sequential
        summary = ", ".join([kind.name, *data.describe(origin), *layer_by_layer])
    else:
        assert inputs is not None  # else there is a kind
        models, summary = _given(host, sites, inputs)
        polynomials = _fitted(sites, models, degree, progress)
    sites = {layer: sites[layer] for layer in polynomials}
    _require_sites(list(sites.values()), refused, model)
    lens = Lens(host, sites, polynomials, refused, summary, exclude_first)
    if saved is not None:
        try:
            saved.finish(lens.header(), lens.layers)
        except BaseException:
            lens.detach()
            raise
    return lens


def load(
    address: str | os.PathLike[str],
    model: Any,
    *,
    example_inputs: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Lens:
    """Attach the polynomials that `Lens.save` or `Lens.push_to_hub` wrote, without a fit.

    The model may be in another framework than the one it was in when the lens was saved, as
    long as its layers have the same weights. A report in the file that this version cannot read
    is left out with a UserWarning: `saved_report` is None.

    Args:
        address: path of the file, or "hf://user/name" of a repository on the Hugging Face Hub.
        model, example_inputs: as in `attach`.
        revision: of a repository: branch, tag or commit.
        token: of the Hub; by default the one of `hf auth login`.

    Raises:
        ArtifactError: a damaged or cut file, one of another kind or a later format, a repository
            without one, another model, other weights, or a layer that the model has not. Nothing
            is attached.
        OSError: no such file; no such repository or revision, no access to it, or no connection.
        AttachmentError, InvalidInputError, UnsupportedModel: as `attach`.
    """
    on_hub = isinstance(address, str) and address.startswith(HUB)
    if not on_hub and not (revision is None and token is None):
        raise InvalidInputError(
            f"revision= and token= are of a repository on the Hub; {address} is a path. Give "
            f"{HUB}user/name"
        )
    host, found, refused = _read(model, example_inputs)
    path = address
    if on_hub:
        from polylens.saving import hub

        path = hub.download(str(address).removeprefix(HUB), revision, token)
    try:
        header, polynomials = artifact.read(path, found, refused)
    except ArtifactError as error:
        if not on_hub:
            raise
        raise ArtifactError(f"{address}: {error}") from error
    sites = {site.layer: site for site in found if site.layer in polynomials}
    refused = {**refused, **{labelled(n): why for n, why in header["refused"].items()}}
    report = _saved_report(address, header["report"])
    lens = Lens(host, sites, polynomials, refused, header["inputs"], header["exclude_first"])
    lens.saved_report = report
    return lens


def _saved_report(path: str | os.PathLike[str], saved: Any) -> Report | None:
    """The report of a file, None without one; and with a warning for one that cannot be read."""
    if saved is None:
        return None
    try:
        return Report.from_dict(saved)
    except InvalidInputError as error:
        warnings.warn(
            f"{path}: the polynomials are loaded, the report beside them is not, and "
            f"lens.saved_report is None: {error}; lens.report(...) measures anew",
            stacklevel=3,
        )
        return None


def _read(model: Any, example_inputs: Any) -> tuple[Host, list[MLPSite], dict[Layer, str]]:
    """The host of a model that has no lens yet, and what can be attached to in it."""
    host = host_for(model, example_inputs)
    if attached(model) is not None:
        raise AttachmentError(
            "this model has a lens already: polylens.attached(model); detach() it first, or use "
            "lens.replaced(degree=...) for a lower degree"
        )
    require_free(host.module)
    found, refused = host.sites()
    _require_sites(found, refused, model)
    return host, found, refused


def _require_none(name: str, value: Any, reason: str) -> None:
    if value is not None:
        raise InvalidInputError(
            f'{name}={value!r} is for calibration="sequential"; calibration="true" {reason}'
        )


def _require_sites(sites: list[MLPSite], refused: dict[Layer, str], model: Any) -> None:
    if not sites:
        reasons = "; ".join(refused.values()) or (
            "it has no MLP in which nothing but an activation, or its product with a linear "
            "branch, is between two linear maps"
        )
        raise UnsupportedModel(f"{type(model).__name__} has no layer to attach to: {reasons}")


def _given(
    host: Host, sites: Mapping[Layer, MLPSite], inputs: Gaussian | Mapping[Layer, Gaussian] | str
) -> tuple[Mapping[Layer, Gaussian], str]:
    """The input model of every layer, and what they are."""
    if isinstance(inputs, str):
        return streams.norm_inputs(host, sites), "data-free Gaussian implied by the norm"
    if not isinstance(inputs, Mapping):
        return dict.fromkeys(sites, inputs), f"given {type(inputs).__name__}"
    missing = sorted(set(sites) - set(inputs))
    if missing:
        raise InvalidInputError(
            f"inputs has no entry for layers {missing}; give one for each of {sorted(sites)}, "
            "or restrict layers="
        )
    return inputs, "given input models"


def _fitted(
    sites: Mapping[Layer, MLPSite], models: Mapping[Layer, Gaussian], degree: int, progress: bool
) -> dict[Layer, Fitted]:
    polynomials: dict[Layer, Fitted] = {}
    for layer, site in tqdm(sites.items(), "fitting", disable=not progress):
        with streams.naming(layer, site):
            polynomials[layer] = fit(site.weights(), models[layer], degree)
    return polynomials
