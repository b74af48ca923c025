"""Weights, tokens and models in the states in which people have them: right, or refused by name."""

import copy
import io

import pytest
import torch
from torch import nn

import polylens
from polylens import AttachmentError, InvalidInputError, StalePolynomialError, UnsupportedModel
from tests.hf_models import D_VOCAB, build

TOKENS = torch.randint(3, D_VOCAB, (16, 24), generator=torch.Generator().manual_seed(3))


def attach(model, tokens=TOKENS, **options):
    return polylens.attach(model, tokens, progress=False, **{"degree": 2, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_neuron_edited_in_place_is_noticed(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(dtype).eval()
    x = torch.randn(512, 64, dtype=dtype)
    with attach(model, x, example_inputs=x[:4]) as lens:
        with lens.replaced():
            model(x)
        model[0].weight.data[7] *= 1 + max(2 * torch.finfo(dtype).eps, 1e-9)
        with pytest.raises(StalePolynomialError, match="layer 0"), lens.replaced():
            pass


@pytest.mark.parametrize("lr", [1e-6, 1e-4])
def test_one_small_step_of_training_is_noticed(lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    x = torch.randn(512, 64)
    with attach(model, x, example_inputs=x[:4]) as lens:
        model(x).square().mean().backward()
        torch.optim.Adam(model.parameters(), lr).step()
        with pytest.raises(StalePolynomialError), lens.replaced():
            pass


def test_moves_between_dtypes_are_none_of_the_weights():
    model = build("llama")
    with attach(model) as lens:
        model.double()
        with lens.replaced(), torch.no_grad():
            assert model(TOKENS).logits.isfinite().all()
        model.bfloat16()
        with lens.replaced(), torch.no_grad():
            assert model(TOKENS).logits.isfinite().all()


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = build("llama")
    with attach(model) as lens, torch.inference_mode(), lens.replaced():
        assert model(TOKENS).logits.isfinite().all()


def test_a_copy_of_a_replaced_model_is_the_true_one():
    model = build("llama")
    with torch.no_grad():
        true = model(TOKENS).logits
        with attach(model) as lens, lens.replaced():
            copies = [copy.deepcopy(model)]
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
            assert not torch.equal(model(TOKENS).logits, true)
        for each in copies:
            assert torch.equal(each(TOKENS).logits, true)
            assert polylens.attached(each) is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ids_beyond_the_vocabulary_are_refused(name):
    with pytest.raises(InvalidInputError, match=f"from 0 to {D_VOCAB - 1}, got"):
        attach(build(name), TOKENS + D_VOCAB - 10)


def test_sequences_beyond_learned_positions_are_refused():
    long = TOKENS.repeat(1, 4)
    with pytest.raises(InvalidInputError, match="96 positions per sequence, the model has 48"):
        attach(build("gpt2"), long)
    attach(build("llama"), long).detach()  # rotary


def test_compiled_models_are_refused_and_autocast_is_named():
    model = build("llama")
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0 is compiled"):
        attach(model)
    with pytest.raises(UnsupportedModel, match="is compiled"):
        attach(torch.compile(build("llama"), backend="eager"))
    with pytest.raises(UnsupportedModel, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        attach(build("llama"))


class Blocks(nn.Module):
    """A stack whose layers are instances of one class, which share what dynamo compiles."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_after_attach_and_seen_by_what_is_compiled_before():
    x = torch.randn(300, 8)
    with torch.no_grad():
        torch.compile(Blocks().eval(), backend="eager")(x)  # shares its graph with its class
        model = Blocks().eval()
        before = torch.compile(model, backend="eager")
        true = before(x)
        with attach(model, x) as lens:
            after = torch.compile(model, backend="eager")
            with lens.replaced():
                expected = model(x)
                assert not torch.equal(expected, true)
                for compiled in (after, before):
                    torch.testing.assert_close(compiled(x), expected)
            assert torch.equal(after(x), true)
        torch.testing.assert_close(after(x), true)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_as_one_graph_or_layer_by_layer_and_with_gradients():
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(300, 8)
    with attach(model, x) as lens:
        whole = torch.compile(model, backend="eager", fullgraph=True)
        true = model(x)
        for options in ({}, {"degree": 1}, {"layers": 1}, {}):
            with lens.replaced(**options):
                expected = model(x)
                assert not torch.equal(expected, true)
                torch.testing.assert_close(whole(x), expected)
        with lens.replaced():
            for block in model.blocks:
                block.compile(backend="eager")
            torch.testing.assert_close(model(x), expected)
            some = x[:5].clone().requires_grad_()
            gradients = (torch.autograd.grad(f(some).sum(), some)[0] for f in (whole, model))
            torch.testing.assert_close(*gradients)
            with torch.no_grad():
                torch.testing.assert_close(whole(x), expected)
                model.blocks[0][2].weight.mul_(1.01)
                with pytest.raises(StalePolynomialError, match="layer 0"):
                    whole(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_of_torch_take_a_replacement_along_or_say_so():
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(20_000, 8)
    with attach(model, x[:300]) as lens, lens.replaced(), torch.no_grad():
        traced = torch.jit.trace(model, x[:3], check_trace=False)
        torch.testing.assert_close(traced(x), model(x))
        with pytest.raises(AttachmentError, match=r"layer 0.*torch\.export.*lens\.export"):
            torch.export.export(model, (x,), strict=False)


def test_transforms_of_torch_func_by_what_flows():
    model = build("llama")
    model.set_attn_implementation("eager")  # others have no forward derivatives
    embedded = model.get_input_embeddings()(TOKENS[:1, :4]).detach()

    def some(x):
        return model(inputs_embeds=x, use_cache=False).logits[0, -1, :3]

    with attach(model) as lens, lens.replaced():
        expected = torch.autograd.functional.jacobian(some, embedded)
        torch.testing.assert_close(torch.func.jacrev(some)(embedded), expected)
        value, tangent = torch.func.jvp(some, (embedded,), (embedded,))
        torch.testing.assert_close(value, some(embedded))
        torch.testing.assert_close(tangent, (expected * embedded).sum((1, 2, 3)))
        with lens.replaced(degree=1):  # the first to ask for it
            again = torch.func.vmap(lambda x: some(x[None]))(embedded)
            torch.testing.assert_close(again[0], some(embedded))


def test_weights_that_are_variables_of_torch_func():
    model, text = build("llama"), TOKENS[:2]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights):
        options = {"labels": text, "use_cache": False}
        return torch.func.functional_call(model, weights, (text,), options).loss

    with attach(model) as lens:
        assert torch.func.grad(loss)(weights).keys() == weights.keys()
        with pytest.raises(AttachmentError, match=r"layer 0.*torch\.func"), lens.replaced():
            torch.func.grad(loss)(weights)


def test_weights_that_were_offloaded_or_quantised_after_attach():
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    with attach(model) as lens:
        accelerate.cpu_offload(model, execution_device="cpu")
        with pytest.raises(AttachmentError, match=r"layer 0.*offloaded after attach"):
            lens.replaced().__enter__()

    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.T.__get__:
                raise NotImplementedError("as of torchao")
            return super().__torch_function__(function, types, args, kwargs)

    model = build("llama")
    with attach(model) as lens:
        projection = model.model.layers[1].mlp.up_proj
        projection.weight = nn.Parameter(projection.weight.data.as_subclass(Quantised))
        with pytest.raises(AttachmentError, match=r"layer 1.*a Quantised .* quantised"):
            lens.replaced().__enter__()


class Adapted(nn.Module):
    """As LoRA: adds nothing until it is trained."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.A = nn.Parameter(torch.randn(inner.in_features, 2))
        self.B = nn.Parameter(torch.zeros(2, inner.out_features))

    def forward(self, x):
        return self.inner(x) + x @ self.A @ self.B


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_an_adapter_that_may_be_trained_is_refused(name):
    model = build("llama")
    mlp = model.model.layers[1].mlp
    setattr(mlp, name, Adapted(getattr(mlp, name)))
    with attach(model) as lens:
        assert lens.layers == (0,)
        assert "merge the adapter" in lens.refused[1]
    mlp = model.model.layers[0].mlp
    with attach(model):
        setattr(mlp, name, Adapted(getattr(mlp, name)))
        with pytest.raises(AttachmentError, match=f"{name} of a LlamaMLP was replaced"):
            model(TOKENS[:2])
