"""`attach` and `load`: put a polynomial beside every MLP of a model."""

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from polylens.calibration.given import FromInputs, FromNorm, under_models
from polylens.calibration.overlap import TokenSketch
from polylens.calibration.sampling import sampled
from polylens.calibration.seen import (
    NOT_REACHED,
    Calibration,
    SeenInputs,
    require_deterministic,
)
from polylens.calibration.sequential import Sequential, on_replaced_stream, require_ordered
from polylens.calibration.telling import told_once
from polylens.calibration.tokens import opened
from polylens.calibration.true_stream import TrueStream, on_true_stream
from polylens.checks import Layer, Layers, check_layers, labelled, renamed
from polylens.devices import memory_named
from polylens.errors import ArtifactError, InvalidInputError, UnsupportedModel
from polylens.fitting.estimator import require_degree
from polylens.hosts import host_for
from polylens.hosts.base import Host, MLPSite
from polylens.hosts.batch import Inputs
from polylens.hosts.direction import uses
from polylens.hosts.passage import require_free
from polylens.hosts.quiet import require_as_is
from polylens.lens import Lens, attached
from polylens.ranks import Ranks, together
from polylens.report.report import Report
from polylens.saving import lens_file
from polylens.saving.checkpoint import Checkpoint, identity

# Positions of each sequence that is sampled from a model where no tokens are given.
SAMPLED_LENGTH = 128
# In front of the name of a repository.
HUB = "hf://"

Method = TrueStream | Sequential | FromNorm | FromInputs


def find_mlps(model: Any, example_inputs: Any = None) -> list[MLPSite]:
    """Every MLP and GLU of the model that has a normal form, verified by a tiny forward pass.

    Args:
        model: as in `attach`.
        example_inputs: as in `attach`.

    Raises:
        UnsupportedModel: an unknown kind of model, or one in which no layer can be read.
    """
    sites, refused = _host(model, example_inputs).sites()
    _require_sites(sites, refused, model)
    return sites


@renamed(
    inputs='method=TrueStream(estimator="samples") or Sequential(estimator="joint") for fits to '
    'tokens, FromNorm() for inputs="norm", FromInputs(gaussian) for input models of your own',
    calibration='method=TrueStream() for "true", method=Sequential() for "sequential"',
    weighting='the method\'s, such as method=TrueStream(weighting="output")',
    clip="tails= of the method, such as method=Sequential(tails=0.05): a share as before, None for "
    "False, 0.0 for True",
    seed="tokens=polylens.sample_tokens(model, seed=...)",
    checkpoint="method=Sequential(checkpoint=path)",
    offload="method=Sequential(offload=directory)",
)
def attach(
    model: Any,
    tokens: Inputs | None = None,
    *,
    degree: int = 3,
    method: Method | None = None,
    layers: Layers | None = None,
    attention_mask: Tensor | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    example_inputs: Any = None,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Lens:
    """Fit a polynomial to every MLP of the model and add it as hook points.

    The model computes exactly what it did before; the hook points `hook_poly_in`,
    `hook_poly_out`, `hook_poly_error` and `hook_poly_degree_k` appear on each MLP, and
    `lens.replaced()` lets the polynomials flow on.

        attach(model, tokens)                         # to study single layers
        attach(model, tokens, method=Sequential())    # to replace many at once
        attach(model, method=FromNorm())              # without data

    Args:
        model: a HookedTransformer or a TransformerBridge, an nnsight model, a Hugging Face or
            any other torch module.
        tokens: [batch, pos] token ids on which the layers' inputs are seen (`tokenize` makes
            them of text), or what a tokenizer returns, with its attention_mask; sampled from the
            model itself where there are none. For a model that reads no token ids, the floats
            [batch, ...] it reads: images, features. For one that takes several inputs, a mapping
            of all of them, as tokenizers and processors return it, with a row of each for every
            sequence: a decoder beside an encoder needs its `decoder_input_ids` or `labels`.
            Layers that the inputs do not pass through are left out, see `Lens.refused`.
        degree: fitted degree, 0 ... 12; lower ones come with it.
        method: what the polynomials are fitted to, with its options and its cost:
            - `TrueStream()` (default): the inputs that each layer has in the true model;
            - `Sequential()`: those that it has when the layers below are replaced already, so
              that errors do not pile up;
            - `FromNorm()`: the Gaussian that the norm in front of it implies;
            - `FromInputs(inputs)`: input models of one's own.
        layers: which layers, as numbers, -1 for the last, or "0-5,10"; all that can be read by
            default.
        attention_mask: [batch, pos], 0 at padding, which is left out. In a mapping it may be
            among the inputs, also under another name (`...padding_mask`, True at padding).
        exclude_first: leave the first position of each sequence out of the fit and R2: language
            models park attention there, far from all other inputs. It is replaced like the
            others. Where a model reads both ways, and of one that reads no token ids, nothing is
            left out.
        batch_size: sequences per forward pass.
        example_inputs: what a torch module is called with, where no guess nor tokens will do.
        ranks: `Ranks()`, where each process of torch.distributed gives tokens of its own and all
            get one lens, that of all tokens. All weights are hashed once, to know that they are
            the same. The first 4,096 inputs are seen by every rank, so that all decide alike.
        progress: show progress bars.

    Returns:
        A Lens; also a context manager that detaches.

    Raises:
        InvalidInputError: tokens, layers, degree or method that cannot be used.
        UnsupportedModel: no readable MLP, or a named layer that was refused (with the reason).
        AttachmentError: a lens on the model that replaces layers, or a model in training mode
            with dropout.
        ArtifactError: a checkpoint that is damaged, or belongs to another model, other tokens
            or other arguments (it says which); it is left as it is.
        OutOfMemory: what the estimator keeps is more than is free, or an allocation failed.
        OSError: checkpoint or offload cannot be written.
        RankError: another rank failed, died, or did not answer in time.

    A lens that is on the model already is detached, with a warning, once the new one is there.

    Cost: one forward pass over the tokens, and for each layer what the method says. If anything
    fails the model is as it was.

    >>> import polylens
    >>> model = polylens.demo.load_model()
    >>> text = "A polynomial is something that linear algebra can take apart. " * 20
    >>> tokens = polylens.demo.batches(text, n_seq=8, seq_len=64)
    >>> with polylens.attach(model, tokens, degree=2, progress=False) as lens:
    ...     true = model(tokens).logits
    ...     with lens.replaced(layers=3):
    ...         replaced = model(tokens).logits
    >>> bool((true == replaced).all()), lens.layers
    (False, (0, 1, 2, 3))
    """
    remedy = "a smaller batch_size, fewer layers, or Sequential(), which keeps one at a time"
    lasting = _in_place_of(attached(model), 5)
    with memory_named("attach", remedy), told_once(), lasting, together(ranks):
        require_degree(degree)
        method = TrueStream() if method is None else method
        _check_method(method, tokens, ranks)
        tokens, attention_mask = opened(tokens, attention_mask)
        host, found, refused = _read(model, example_inputs, tokens)
        require_deterministic(host.module)
        sites = {site.layer: site for site in found}
        sites = {layer: sites[layer] for layer in check_layers(layers, sites, refused)}
        saved = sketch = None
        if isinstance(method, FromNorm | FromInputs):
            exclude_first = exclude_first and host.reads_tokens
            polynomials = under_models(method.models(host, sites), sites, degree, progress)
            summary = method.describe()
        else:
            origin = "tokens"
            if tokens is None:
                tokens = sampled(host, method.sampled, SAMPLED_LENGTH, 0, progress)
                origin = "tokens sampled from the model"
            data = Calibration.on(
                host,
                tokens,
                attention_mask,
                sites,
                exclude_first=exclude_first,
                batch_size=batch_size,
                progress=progress,
                ranks=None if origin != "tokens" else ranks,
            )
            if ranks is not None:
                data = replace(data, ranks=ranks)
                ranks.require_same(identity(data, sites, method, degree))
            exclude_first, sketch = data.exclude_first, TokenSketch.of(data.steps)
            if isinstance(method, Sequential):
                there = uses(host, data.steps[0], sites)
                require_ordered(sites, there)
                for layer in sites.keys() - there:
                    refused[layer] = NOT_REACHED.format(sites[layer].path)
                sites = {layer: site for layer, site in sites.items() if layer in there}
                if method.checkpoint is not None:
                    own = identity(data, sites, method, degree)
                    saved = Checkpoint(method.checkpoint, own, found, refused)
                polynomials = on_replaced_stream(data, sites, method, degree, saved)
            else:
                polynomials = dict(on_true_stream(data, sites, method, degree, refused))
            summary = ", ".join([method.kind.name, *data.describe(origin), *method.describe()])
        sites = {layer: sites[layer] for layer in polynomials}
        _require_sites(list(sites.values()), refused, model)
        lens = Lens(host, sites, polynomials, refused, summary, exclude_first, sketch)
        try:
            if ranks is not None:
                ranks.gathered(None)  # all have theirs
            if saved is not None:
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

    >>> import polylens
    >>> model = polylens.demo.load_model()
    >>> with polylens.attach(model, method=polylens.FromNorm(), degree=2, progress=False) as lens:
    ...     lens.save("demo.safetensors")
    >>> polylens.load("demo.safetensors", model).inputs_summary == lens.inputs_summary
    True
    """
    if not isinstance(address, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(
            f"load(address, model) takes the path or hf:// address first, got a "
            f"{type(address).__name__}"
        )
    if not _on_hub(address) and not (revision is None and token is None):
        raise InvalidInputError(
            f"revision= and token= are of a repository on the Hub; {address} is a path. Give "
            f"{HUB}user/name"
        )
    with _in_place_of(attached(model), 4):
        return _load(address, model, example_inputs, revision, token)


def _load(
    address: str | os.PathLike[str],
    model: Any,
    example_inputs: Any,
    revision: str | None,
    token: str | bool | None,
) -> Lens:
    on_hub = _on_hub(address)
    host, found, refused = _read(model, example_inputs)
    path = address
    if on_hub:
        from polylens.saving import hub

        path = hub.download(str(address).removeprefix(HUB), revision, token)
    try:
        header, polynomials = lens_file.read(path, found, refused)
    except ArtifactError as error:
        if not on_hub:
            raise
        raise ArtifactError(f"{address}: {error}") from error
    sites = {site.layer: site for site in found if site.layer in polynomials}
    refused = {**refused, **{labelled(n): why for n, why in header["refused"].items()}}
    report = _saved_report(address, header["report"])
    # files of 0.1 say whether sequences also stay true where they start
    kept_true = header.get("exclude_first", False)
    left_out = header.get("starts_left_out", kept_true)
    sketch = TokenSketch.from_json(header.get("calibrated_on"))
    lens = Lens(host, sites, polynomials, refused, header["inputs"], left_out, sketch)
    lens.saved_report = report
    if kept_true:
        lens_file.warn_of_starts(address)
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
            stacklevel=4,
        )
        return None


def _on_hub(address: str | os.PathLike[str]) -> bool:
    return isinstance(address, str) and address.startswith(HUB)


@contextmanager
def _in_place_of(lens: Lens | None, stacklevel: int) -> Generator[None, None, None]:
    """Within the context the model has no lens; the one that it had comes back after an error."""
    if lens is None:
        yield
        return
    with lens.giving_way():
        yield
    warnings.warn(
        "this model had a lens, which is detached now: the new one takes its place "
        "(lens.replaced(degree=...) gives lower degrees without a new fit)",
        stacklevel=stacklevel,
    )


def _host(model: Any, example_inputs: Any) -> Host:
    require_as_is(getattr(model, "_module", model))
    return host_for(model, example_inputs)


def _read(
    model: Any, example_inputs: Any, inputs: Any = None
) -> tuple[Host, list[MLPSite], dict[Layer, str]]:
    """The host of a model that has no lens yet, and what can be attached to in it.

    Args:
        inputs: what it is going to be run on; serves where `example_inputs` cannot be guessed.
    """
    host = _host(model, example_inputs)
    host.offer(inputs)
    require_free(host.module)
    found, refused = host.sites()
    _require_sites(found, refused, model)
    return host, found, refused


def _check_method(method: Any, tokens: Inputs | None, ranks: Any) -> None:
    """InvalidInputError for what is no method, or tokens that it would not read."""
    if not isinstance(method, Method):
        raise InvalidInputError(
            f"method must be TrueStream(), Sequential(), FromNorm() or FromInputs(inputs), got "
            f"{method!r:.80}"
        )
    if tokens is not None and not isinstance(method, SeenInputs):
        raise InvalidInputError(
            f"give tokens= or method={type(method).__name__}, not both: each defines the input "
            "model"
        )
    if ranks is None:
        return
    if not isinstance(method, SeenInputs):
        raise InvalidInputError(
            f"{type(method).__name__} runs the model on nothing, so that ranks have nothing to "
            "share; leave out ranks="
        )
    if isinstance(method, Sequential) and method.checkpoint is not None:
        raise InvalidInputError("checkpoint= is of one process; leave out either it or ranks=")


def _require_sites(sites: list[MLPSite], refused: dict[Layer, str], model: Any) -> None:
    if not sites:
        reasons = "; ".join(refused.values()) or (
            "it has no MLP in which nothing but an activation, or its product with a linear "
            "branch, is between two linear maps"
        )
        raise UnsupportedModel(f"{type(model).__name__} has no layer to attach to: {reasons}")
