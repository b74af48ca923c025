"""An exported model computes what the replaced one does, alone, and comes back bit for bit."""

import copy
import json
import sys

import gguf
import pytest
import torch
import transformers
from tests.hf_models import ARCHITECTURES, build, example, from_config
from tests.host_contract import inputs_of, module_snapshot
from tests.hosts.test_hosts_agree import bridge, nnsight
from tests.saving.test_lens_file import TOKENS, attach

import polylens
from polylens import ArtifactError, AttachmentError, InvalidInputError, TrueStream
from polylens.saving.export import NeuronPolynomial

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

MASK = torch.ones_like(TOKENS)
MASK[1, :5] = 0


def model_of(name, **changes):
    # a width of which no elementwise kernel leaves a rest: same bits for one position as for all
    config, kind, given, _ = ARCHITECTURES[name]
    wide = {"n_inner": 64} if name == "gpt2" else {"intermediate_size": 64}
    return from_config(config, kind, {**given, **wide, **changes})


def outputs(model, tokens=TOKENS, **options):
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


@pytest.fixture(scope="module", params=["gpt2", "llama", "phi3", "bert"])
def pair(request):
    lens = attach(model_of(request.param))
    yield lens, lens.export()
    lens.detach()


def test_outputs_are_those_under_replaced(pair):
    lens, exported = pair
    for options in ({}, {"attention_mask": MASK}):
        true = outputs(lens.host.model, **options)
        with lens.replaced():
            expected = outputs(lens.host.model, **options)
        assert torch.equal(outputs(exported, **options), expected)
        assert not torch.allclose(expected, true, rtol=1e-4)


def test_the_round_trip_gives_the_same_bits(pair, tmp_path):
    _, exported = pair
    exported.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = polylens.load_exported(tmp_path)
    assert type(loaded) is type(exported)
    state, expected = loaded.state_dict(), exported.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert torch.equal(outputs(loaded), outputs(exported))
    loaded.save_pretrained(tmp_path / "again")
    again = polylens.load_exported(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(exported))


@pytest.mark.parametrize(
    "name", ["bloom", "mpt", "falcon", "deberta_v2", "t5", "t5_gated", "modernbert", "apertus"]
)
def test_other_layouts(name, tmp_path):
    given = example(name)
    model = build(name)
    with polylens.attach(model, inputs_of(model, TOKENS), progress=False) as lens:
        exported = lens.export()  # compares with `replaced` itself
    exported.save_pretrained(tmp_path)
    with torch.no_grad():
        found = polylens.load_exported(tmp_path)(**given).logits
        assert torch.equal(found, exported(**given).logits)


@pytest.mark.parametrize("exclude_first", [True, False])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_some_layers_of_a_lower_degree(degree, exclude_first):
    with attach(model_of("llama"), exclude_first=exclude_first) as lens:
        exported = lens.export(layers=1, degree=degree)
        with lens.replaced(layers=1, degree=degree):
            expected = outputs(lens.host.model)
        with lens.replaced():  # an enclosing context changes nothing
            again = lens.export(layers=[1], degree=degree)
    assert torch.equal(outputs(exported), expected)
    assert torch.equal(outputs(again), expected)
    polynomials = [m for m in exported.modules() if isinstance(m, NeuronPolynomial)]
    assert [len(p.P) - 1 for p in polynomials] == [degree]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache(name, tmp_path):
    with attach(model_of(name)) as lens:
        exported = lens.export()
        exported.save_pretrained(tmp_path)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": MASK[:, :6]}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad(), lens.replaced():
            expected = lens.host.model.generate(TOKENS[:, :6], **options)
    for model in (exported, polylens.load_exported(tmp_path)):
        found = model.generate(TOKENS[:, :6], **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_tied_embeddings(tmp_path):
    # loaded, not cast: .to() would round the rotary frequencies, which are not saved
    model_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "true")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "true", dtype=torch.bfloat16
    )
    with attach(model) as lens:
        exported = lens.export()
        with lens.replaced():
            assert torch.equal(outputs(exported), outputs(lens.host.model))
    exported.save_pretrained(tmp_path)
    loaded = polylens.load_exported(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.layers[0].mlp.act_fn.P.dtype == torch.float32
    assert torch.equal(outputs(loaded), outputs(exported))


def write_gguf(path, model):
    """A llama of transformers as a GGUF file of 8 bit blocks."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values, kind = tensor.numpy(), gguf.GGMLQuantizationType.Q8_0
        options = {}
        if tensor.dim() == 2:
            options = {"raw_dtype": kind}
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight",)) + ".weight", values, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers finds no gguf in Python 3.10")
def test_a_model_from_a_gguf_file_is_saved_with_plain_weights(tmp_path):
    write_gguf(tmp_path / "model.gguf", model_of("llama", hidden_size=32))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with attach(model) as lens:
        exported = lens.export()
        with lens.replaced():
            assert torch.equal(outputs(exported), outputs(model))
    exported.save_pretrained(tmp_path / "exported")
    loaded = polylens.load_exported(tmp_path / "exported")
    assert torch.equal(outputs(loaded), outputs(exported))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_the_coefficients(dtype, tmp_path):
    with attach(model_of("llama")) as lens:
        exported = lens.export()
    exported.save_pretrained(tmp_path)
    expected, P = outputs(exported), exported.model.layers[0].mlp.act_fn.P
    for model in (polylens.load_exported(tmp_path, dtype=dtype), exported.to(dtype)):
        assert torch.equal(model.model.layers[0].mlp.act_fn.P, P)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        error = (outputs(model).double() - expected.double()).abs().max()
        assert error < tolerance * expected.abs().max()


def test_nothing_is_shared_and_the_original_stays_attached():
    model = model_of("llama", tie_word_embeddings=True)
    with attach(model) as lens:
        snapshot, true = module_snapshot(model), outputs(model)
        exported = lens.export()
        assert module_snapshot(model) == snapshot
        assert polylens.attached(model) is lens
        assert not hasattr(model.config, "polylens")
        assert type(model).save_pretrained == model.save_pretrained.__func__
        pointers = [
            {t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())}
            for m in (model, exported)
        ]
        assert not pointers[0] & pointers[1]
        assert exported.lm_head.weight is exported.model.embed_tokens.weight
        with lens.replaced():
            expected = outputs(model)
        with torch.no_grad():
            for tensor in (*exported.parameters(), *exported.buffers()):
                tensor.zero_()
        assert torch.equal(outputs(model), true)
        with lens.replaced():
            assert torch.equal(outputs(model), expected)
    names = [n for n, m in exported.named_modules() if "poly" in n]
    hooks = [h for m in exported.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert names == hooks == []


def test_it_is_a_model_like_any_other(tmp_path):
    with attach(model_of("llama")) as lens:
        exported = lens.export()
    twin = copy.deepcopy(exported)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    twin.save_pretrained(tmp_path)  # the copy saves itself
    assert torch.equal(outputs(polylens.load_exported(tmp_path)), outputs(twin))
    assert not torch.equal(outputs(twin), outputs(exported))
    loss = exported(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    for layer in exported.model.layers:
        assert all(float(p.grad.abs().sum()) > 0 for p in layer.mlp.parameters())
    with pytest.raises(polylens.UnsupportedModel):
        attach(exported)


def test_transformers_alone_does_not_load_it(tmp_path):
    with attach(model_of("llama")) as lens:
        lens.export().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_inside_nnsight():
    model = model_of("gpt2")
    with attach(copy.deepcopy(model)) as lens:
        expected = outputs(lens.export())
    with attach(nnsight(model)) as lens:
        exported = lens.export()
        assert torch.equal(outputs(exported), expected)
        with lens.replaced():
            assert torch.equal(outputs(lens.host.module), expected)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: bridge(model_of("gpt2")), {}, "attach to the Hugging Face model"),
        (lambda: model_of("llama"), {"method": TrueStream("joint")}, "joint polynomial"),
        (lambda: build("lfm2"), {}, "function call"),
    ],
)
def test_what_cannot_be_exported_is_refused(make, options, message):
    with attach(make(), **options) as lens:
        with pytest.raises(AttachmentError, match=message):
            lens.export()
        assert lens.is_attached


def test_a_layer_that_does_more_than_its_weights_tell_is_refused():
    model = model_of("llama")
    with attach(model) as lens:
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + 1)
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
        with pytest.raises(AttachmentError, match="does not compute what"):
            lens.export()


def test_a_model_with_an_adapter_is_refused():
    model = model_of("llama")
    model._hf_peft_config_loaded = True  # what add_adapter sets; such a model saves no weights
    with attach(model) as lens, pytest.raises(AttachmentError, match="merge its adapter"):
        lens.export()


def test_a_torch_module_is_exported_without_saving():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 5))
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    with polylens.attach(model, x, example_inputs=x[:2], progress=False) as lens:
        exported = lens.export()
        with torch.no_grad(), lens.replaced():
            torch.testing.assert_close(exported(x), model(x))
    assert isinstance(exported[1], NeuronPolynomial)
    assert not hasattr(exported, "save_pretrained")


def test_bad_requests_and_stale_weights_are_refused():
    model = model_of("llama")
    with attach(model) as lens:
        with pytest.raises(InvalidInputError, match="degree"):
            lens.export(degree=4)
        with pytest.raises(InvalidInputError, match="no layer 7"):
            lens.export(layers=7)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        with pytest.raises(polylens.StalePolynomialError):
            lens.export()
    with pytest.raises(AttachmentError, match="detached"):
        lens.export()


def change(path, edit):
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("polylens"), "without polynomials"),
        (lambda config: config["polylens"].update(format=9), "upgrade"),
        (lambda config: config["polylens"]["layers"].pop("0"), "does not have the weights"),
        (lambda config: config["polylens"]["layers"]["0"].update(act="model.x.y"), "do not fit"),
        (lambda config: config.update(architectures=["Nonesuch"]), "no Nonesuch"),
    ],
)
def test_a_damaged_directory_is_refused(edit, message, tmp_path):
    with attach(model_of("llama")) as lens:
        lens.export().save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ArtifactError, match=message):
        polylens.load_exported(tmp_path)
