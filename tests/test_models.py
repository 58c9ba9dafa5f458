"""Isolation of packed documents, sizes from the tokenizer, and checkpoints that stock transformers loads and trains."""

import dataclasses
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig

import lmssl
from lmssl import forward, models, packing
from lmssl.data.stream import Stream, borders
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.toy import vocab
from lmssl.optimizers import muon_groups
from lmssl.tasks import generation, make_task
from lmssl.tasks.base import Backbone
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, saved_backbone, sentences, small_model, token_set, tokenizer

VOCAB = vocab(64)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", SMALL)
def test_no_document_sees_another(architecture, implementation):
    """Changing one document's tokens moves no other's logits: encoder side, decoder side, both."""
    model = forward.prepare(small_model(architecture, VOCAB, 32, attn_implementation=implementation)).eval()
    segments = torch.tensor([[1] * 7 + [2] * 8 + [3] * 3 + [0] * 2, [1] * 10 + [2] * 10])
    x, y = torch.randint(5, 50, (2, 20)), torch.randint(5, 50, (2, 20))
    other_x, other_y = x.clone(), y.clone()
    other_x[0, 7:15], other_y[0, 7:15] = torch.randint(5, 50, (8,)), torch.randint(5, 50, (8,))

    def logits(x, y):
        more = {"decoder_input_ids": y, "decoder_segments": segments} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model(input_ids=x, segments=segments, **more).logits

    base, changed_document = logits(x, y), segments == 2
    changed_document[1] = False
    sides = [(other_x, y)] if not model.config.is_encoder_decoder else [(other_x, y), (x, other_y), (other_x, other_y)]
    for changed in sides:
        moved = (logits(*changed) - base).abs().amax(-1)
        assert moved[~changed_document].max() <= 1e-6
        assert moved[changed_document].max() > 1e-4, "the test sees what it changes"


@pytest.mark.parametrize("architecture", [name for name in SMALL if name not in ("t5", "bart")])
def test_the_kernel_of_a_gpu_is_given_each_document(architecture, monkeypatch):
    """With a kernel written out in its place: where documents begin reaches every layer, and the logits are the mask's."""
    calls = []

    def varlen_attn(query, key, value, starts, ends, longest, longest_key, *, scale, window_size):
        calls.append(starts)
        assert starts is ends
        assert (longest, longest_key) == (20, 20)
        parts = [[t[a:b].transpose(0, 1)[None] for t in (query, key, value)] for a, b in pairwise(starts.tolist()) if a < b]
        return torch.cat([F.scaled_dot_product_attention(*part, scale=scale, is_causal=window_size == (-1, 0))[0].transpose(0, 1) for part in parts])

    monkeypatch.setattr(packing, "varlen_attn", varlen_attn)
    model = forward.prepare(small_model(architecture, VOCAB, 32, attn_implementation="sdpa"), True).eval()
    assert model.config._attn_implementation == (packing.BEFORE if architecture in ("gpt2", "llama") else packing.BOTH)
    segments = torch.tensor([[1] * 7 + [2] * 8 + [3] * 3 + [0] * 2, [1] * 10 + [2] * 10])
    ids = torch.randint(5, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    starts = torch.from_numpy(borders(segments.numpy(), 5))
    assert starts.tolist() == [0, 7, 15, 18, 20, 30, 40, 40, 40, 40, 40]

    def logits(**keys):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, segments=segments, **keys).logits.float()

    found, masked = logits(borders=starts), logits()
    layers = SMALL[architecture].get("num_hidden_layers", 2)
    # ModernBERT looks through a window in two layers of three: those take the mask.
    assert len(calls) == (2 if architecture == "modernbert" else layers)
    assert (found - masked).norm() / masked.norm() < 2e-2
    forward.check_isolated(model, VOCAB, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, segments=segments, borders=starts).logits, model(input_ids=ids, segments=segments).logits), "float32 takes the mask"


def test_what_the_kernel_cannot_do_takes_the_mask(monkeypatch):
    """Dropout, float32, windows, widths that it has no code for."""
    monkeypatch.setattr(packing, "varlen_attn", None)
    layer = torch.nn.Identity()
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    for autocast, width, keys in [
        (False, 16, {}),
        (True, 16, {"dropout": 0.1}),
        (True, 12, {}),
        (True, 264, {}),
        (True, 16, {"sliding_window": 4}),
    ]:
        query = torch.randn(1, 2, 8, width)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, _ = packing.attend(layer, query, query, query, torch.zeros(1, 1, 8, 8), causal=True, cu_seq_lens_q=starts, max_length_q=8, **keys)
        assert out.shape == (1, 8, 2, width)
    states = [torch.randn(1, 2, 8, 16)] * 3
    with torch.autocast("cpu", torch.bfloat16):  # a mask for each head
        out, _ = packing.attend(layer, *states, torch.zeros(1, 2, 8, 8), causal=True, cu_seq_lens_q=starts, max_length_q=8)
    assert out.shape == (1, 8, 2, 16)
    with pytest.raises(TypeError), torch.autocast("cpu", torch.bfloat16):
        packing.attend(layer, *states, None, causal=True, cu_seq_lens_q=starts, max_length_q=8)


@pytest.mark.parametrize(("architecture", "window", "kernel"), [("qwen2_moe", None, True), ("qwen2_moe", 8, False), ("mistral", 8, True)])
def test_layers_whose_mask_alone_knows_their_window_keep_it(architecture, window, kernel):
    """Mistral's tell their attention, which then takes the mask; those of qwen2_moe do not."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "max_window_layers": 0} if architecture == "qwen2_moe" else {}
    config = transformers.AutoConfig.for_model(architecture, **sizes, sliding_window=window, use_sliding_window=window is not None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    packing.use_kernel(model, True)
    assert (model.config._attn_implementation == packing.BEFORE) is kernel


def test_rows_of_very_many_documents_take_the_mask(shared_dir, monkeypatch):
    """The kernel keeps a tile for each document that a row can hold."""
    monkeypatch.setattr(packing, "supported", lambda: True)
    tokens, gpu = token_set(shared_dir), torch.device("cuda")
    many = lmssl.from_iterable([f"{n}" for n in range(300)], tokenizer(), shared_dir / "many", 0.1)
    stream, crowded = (Stream(t, NextToken(), 128, 0, 10) for t in (tokens, many))
    assert packing.most_documents(stream, "decoder", gpu) == stream.most_documents() < 16
    assert packing.most_documents(crowded, "decoder", gpu) is None
    assert packing.most_documents(stream, "encoder-decoder", gpu) is None
    assert packing.most_documents(stream, "encoder", torch.device("cpu")) is None


SEEING = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("architecture", [*SMALL, *SEEING])
def test_architectures_whose_documents_see_each_other_are_refused(architecture):
    objective = OBJECTIVE.get(architecture, NextToken())
    model = forward.prepare(models.build({"architecture": architecture, **(SMALL | SEEING)[architecture]}, VOCAB, objective, 32, 0)).train()
    if architecture in SMALL:
        forward.check_isolated(model, VOCAB, 32)
        assert model.training
        return
    with pytest.raises(UserError, match="see each other"):
        forward.check_isolated(model, VOCAB, 32)


@pytest.mark.skipif("deepseek_v4" not in transformers.CONFIG_MAPPING, reason="is newer")
def test_a_leak_that_only_long_rows_show_is_found():
    """Its layers look at summaries of more than a hundred tokens, whichever document they are of."""
    section = {"architecture": "deepseek_v4", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    model = forward.prepare(models.build(section, VOCAB, NextToken(), 320, 0))
    forward.check_isolated(model, VOCAB, 32)
    with pytest.raises(UserError, match="see each other in 'deepseek_v4'"):
        forward.check_isolated(model, VOCAB, 320)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "mobilebert", "num_hidden_layers": 2, "trigram_input": False}, "'mobilebert' projects the vocabulary outside of its output embeddings"),
        ({"architecture": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4}, "this 'gptj' cannot read a row of packed documents"),
    ],
)
def test_what_cannot_read_a_packed_row_is_refused(section, message):
    model = forward.prepare(models.build(section, VOCAB, MaskedTokens() if section["architecture"] == "mobilebert" else NextToken(), 32, 0))
    with pytest.raises(UserError, match=message):
        forward.check_isolated(model, VOCAB, 32)


def test_positions_that_a_plain_call_counts_otherwise_are_refused(monkeypatch):
    """Nystromformer's begin at 2 there, and so do those of its kin."""
    monkeypatch.setattr(forward, "position_offset", lambda model: 2)
    model = forward.prepare(small_model("bert", VOCAB, 64))
    with pytest.raises(UserError, match="'bert' reads a row otherwise where it is not told"):
        forward.check_isolated(model, VOCAB, 32)
    section = {"architecture": "nystromformer", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_landmarks": 64}
    monkeypatch.undo()
    model = forward.prepare(models.build(section, VOCAB, MaskedTokens(), 64, 0))
    with pytest.raises(UserError, match="'nystromformer' "):
        forward.check_isolated(model, VOCAB, 64)


def test_windows_that_differ_by_layer_are_refused():
    class Config(transformers.BertConfig):
        layer_types = ("sliding_attention",)

        @property
        def sliding_window(self):
            raise ValueError("ambiguous")

    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL["bert"], vocab_size=50))
    model.config = Config(**SMALL["bert"])
    with pytest.raises(UserError, match="'bert' has a window of its own in each layer"):
        forward.prepare(model)


def test_an_architecture_that_takes_no_such_mask_is_refused():
    keys = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = forward.prepare(models.build({"architecture": "deberta-v2", **keys}, VOCAB, MaskedTokens(), 32, 0))
    with pytest.raises(UserError, match="cannot read a row of packed documents"):
        forward.check_isolated(model, VOCAB, 32)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "modernbert", "t5"])
def test_packed_equals_alone(architecture):
    """A document's logits in the middle of a row are those it has alone (BART's positions are absolute)."""
    model = forward.prepare(small_model(architecture, VOCAB, 32)).eval()
    x = torch.randint(5, 50, (1, 20))
    segments = torch.tensor([[1] * 7 + [2] * 8 + [3] * 5])
    more = {"decoder_input_ids": x, "decoder_segments": segments} if architecture == "t5" else {}
    alone = {"decoder_input_ids": x[:, 7:15]} if architecture == "t5" else {}
    with torch.no_grad():
        packed = model(input_ids=x, segments=segments, **more).logits[:, 7:15]
        single = model(input_ids=x[:, 7:15], **alone).logits
    torch.testing.assert_close(packed, single, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", SMALL)
def test_projection_at_labels_equals_full_logits(architecture):
    model = forward.prepare(small_model(architecture, VOCAB, 32)).eval()
    x, segments = torch.randint(5, 50, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    more = {"decoder_input_ids": x, "decoder_segments": segments} if model.config.is_encoder_decoder else {}
    at = torch.tensor([0, 3, 25, 39])
    with torch.no_grad():
        full = model(input_ids=x, segments=segments, **more).logits.reshape(40, -1)
        some = model(input_ids=x, segments=segments, label_positions=at, **more).logits
    torch.testing.assert_close(some, full[at], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", SMALL)
def test_checkpoint_is_ordinary(architecture, shared_dir, tmp_path):
    """Pretrained on text, saved, loaded by plain `from_pretrained` without a stray key, trained on by the stock Trainer."""
    tokens = token_set(shared_dir)
    model = small_model(architecture, tokens.vocab())
    trainer = lmssl.PretrainTrainer(model, OBJECTIVE[architecture], tokens, arguments(tmp_path / "run", max_steps=2), 32, quiet=True)
    trainer.run()
    model.save_pretrained(tmp_path)
    tokens.tokenizer.save(tmp_path)
    auto = models.AUTO[models.family_of(model.config)]
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    text = sentences(1, seed=9)[0]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer().encode([text])[0].tolist()
    ids = torch.randint(110, 200, (4, 16))
    args = transformers.TrainingArguments(str(tmp_path / "stock"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
    before = loaded.get_input_embeddings().weight.detach().clone()
    transformers.Trainer(loaded, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert not torch.equal(before, loaded.get_input_embeddings().weight)


def test_loads_without_lmssl(tmp_path):
    """In a process that never imports lmssl."""
    small_model("bert", VOCAB).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForMaskedLM as A; m, i = A.from_pretrained(sys.argv[1], output_loading_info=True);"
        "assert not any(i.values()) or not any(i[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')); assert 'lmssl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("architecture", SMALL)
def test_everything_comes_from_the_tokenizer(architecture):
    config = small_model(architecture, VOCAB, 40).config
    assert config.vocab_size == 64
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    if config.is_encoder_decoder:
        assert config.decoder_start_token_id == VOCAB.start
    needed = max(n for ns in OBJECTIVE[architecture].lengths(40).values() for n in ns)
    assert models.max_length(config) in (None, needed)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_learned_positions_begin_by_looking_near_by(architecture):
    """A token's attention at the start prefers its neighbours, more the nearer they are; the usual start has no preference."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

    def attention(init):
        model = models.build({"architecture": architecture, "init": init, "attn_implementation": "eager", **sizes}, VOCAB, MaskedTokens(), 64, 0).eval()
        ids = torch.randint(20, 60, (8, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            seen = model(input_ids=ids, output_attentions=True).attentions[0].mean((0, 1))
        return model, {d: seen.diagonal(d).mean().item() * 64 for d in (0, 1, 4, 30)}

    model, near = attention("local")
    assert near[0] > near[1] > near[4] > near[30]
    assert near[1] > 2 * near[30]
    flat = attention("default")[1]
    assert all(abs(share - 1) < 0.1 for share in flat.values())
    table = model.base_model.embeddings.position_embeddings
    if table.padding_idx is not None:
        assert not table.weight[table.padding_idx].any(), "padding stands nowhere"
    (group,) = (g for g in muon_groups(model, 0.1, 1e-3) if any(p is table.weight for p in g["params"]))
    assert group["lr"] == pytest.approx(1e-3 * models.SLOW)
    assert sum(len(g["params"]) for g in muon_groups(model, 0.1, 1e-3)) == len(list(model.parameters()))


def test_families():
    expected = {"gpt2": "decoder", "llama": "decoder", "bert": "encoder", "roberta": "encoder", "modernbert": "encoder", "t5": "encoder-decoder", "bart": "encoder-decoder"}
    for name, family in expected.items():
        assert models.family_of(AutoConfig.for_model(name)) == family
    with pytest.raises(UserError, match="'bert' is an encoder"):
        models.check_family(AutoConfig.for_model("bert"), NextToken(), "next_token")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "bertt"}, "did you mean 'bert'"),
        ({"architecture": "bert", "hiden_size": 48}, "did you mean 'hidden_size'"),
        ({"architecture": "bert", "hidden_size": "wide"}, "refuses this configuration"),
        ({"architecture": "bert", "from": "x"}, "either an architecture"),
        ({}, "either an architecture"),
        ({"from": "/nowhere/at/all"}, "no checkpoint folder"),
        ({"architecture": "bert", "max_position_embeddings": 16}, "need 32"),
        ({"architecture": "bert", "vocab_size": 99}, "the tokenizer has 64 ids"),
        ({"architecture": "bert", "hidden_size": 50}, "cannot be built|refuses"),
        ({"architecture": "clip"}, "no architecture"),
    ],
)
def test_refusals(section, message):
    with pytest.raises(UserError, match=message):
        models.build(section, VOCAB, MaskedTokens(), 32, 0)


def test_weights_that_are_a_pickle_are_refused_with_a_way_out(tmp_path):
    model = small_model("bert", VOCAB)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its \*.bin is a pickle, .* make safetensors of it"):
        models.build({"from": str(tmp_path)}, VOCAB, MaskedTokens(), 32, 0)
    with pytest.raises(UserError, match="a hub id reads owner/name"):
        models.read_config("bert-base-german-cased", "model.from")


def test_continue_grows_the_embeddings(tmp_path):
    """`from:` a checkpoint whose tokenizer lacks sentinels: new rows are the mean of the old."""
    small_model("t5", VOCAB).save_pretrained(tmp_path)
    bigger = vocab(80)
    model = models.build({"from": str(tmp_path)}, bigger, SpanCorruption(), 32, 0)
    table = model.get_input_embeddings().weight
    assert table.shape[0] == 80
    mean = table[:64].mean(0)
    assert (table[64:] - mean).norm(dim=1).max() < 0.1 * mean.norm() + 0.1 * table[:64].std()


def test_twins_of_neighbouring_seeds_share_no_weights(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path, 64)
    loaded = Backbone.load(str(tmp_path))
    first, second = (generation.model(loaded, False, seed, 1) for seed in (0, 1))
    ours, theirs = first.decoder.get_input_embeddings().weight, second.encoder.get_input_embeddings().weight
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("init", ["default", "local"])
def test_a_token_that_is_also_padding_learns(init, shared_dir):
    """Of a tokenizer without pad, padding is eos: with bos the same, the token that begins every document."""
    vocab = dataclasses.replace(token_set(shared_dir).vocab(), pad=token_set(shared_dir).vocab().eos)
    model = small_model("llama", vocab, init=init)
    table = model.get_input_embeddings()
    assert table.weight[vocab.eos].norm() > 0.2 * table.weight.norm(dim=1).median()
    model(input_ids=torch.tensor([[vocab.eos, 300, vocab.eos]])).logits.square().sum().backward()
    assert table.weight.grad[vocab.eos].abs().sum() > 0
    real = small_model("llama", token_set(shared_dir).vocab(), init=init)
    assert real.get_input_embeddings().padding_idx == token_set(shared_dir).vocab().pad


def test_fine_tuning_trains_it_too(shared_dir, tmp_path):
    vocab = dataclasses.replace(token_set(shared_dir).vocab(), pad=token_set(shared_dir).vocab().eos)
    small_model("llama", vocab).save_pretrained(tmp_path)
    token_set(shared_dir).tokenizer.save(tmp_path)
    loaded = Backbone.load(str(tmp_path), classes=("a", "b"))
    assert loaded.config.pad_token_id == vocab.eos
    for pretrained in (True, False):
        assert make_task({"name": "sentiment"}).model(loaded, pretrained, 0).get_input_embeddings().padding_idx is None


def test_both_tables_of_a_bart_learn_where_pad_is_eos():
    words = dataclasses.replace(VOCAB, pad=VOCAB.eos)
    model = small_model("bart", words, 24)
    ids = torch.tensor([[*words.ordinary[:4].tolist(), words.eos]])
    for table in (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens):
        assert table.padding_idx is None
        table.weight.grad = None
        table(ids).sum().backward()
        assert table.weight.grad[words.eos].any()


def test_a_configuration_that_takes_no_none_is_refused_in_a_line():
    words = dataclasses.replace(VOCAB, bos=None)
    with pytest.raises(UserError, match="modernbert-decoder cannot be built from this configuration"):
        models.build({"architecture": "modernbert-decoder", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, words, NextToken(), 16, 0)


def test_bigbird_sees_all_of_a_row_from_the_start():
    model = models.build({"architecture": "big_bird", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}, VOCAB, MaskedTokens(), 800, 0)
    assert model.config.attention_type == model.bert.attention_type == "original_full"


def test_mpnet_counts_positions_as_transformers_does(shared_dir):
    vocab = token_set(shared_dir).vocab()
    section = {"architecture": "mpnet", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = models.build(section, vocab, MaskedTokens(), 32, 0).eval()
    assert models.position_offset(model) == 2
    assert models.max_length(model.config) == 32
    ids = torch.from_numpy(vocab.ordinary[None, :32]).long()
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        ours = forward.prepare(model)(input_ids=ids, segments=torch.ones_like(ids)).logits
    assert apart(ours, theirs) < 1e-5
    with pytest.raises(UserError, match="numbers positions from the pad id on, which is 300"):
        models.build({"architecture": "roberta", **SMALL["roberta"]}, dataclasses.replace(vocab, pad=300), OBJECTIVE["roberta"], 32, 0)


def test_which_attention_a_cpu_takes(monkeypatch):
    """Plain products for short rows, and for T5's trained biases in any; a recipe wins, and a GPU has its own way."""
    bert, t5 = (models.config_of({"architecture": name}) for name in ("bert", "t5"))
    plain = {"attn_implementation": "eager"}
    assert [models.attention(length, config) for config in (bert, t5) for length in (256, 512)] == [plain, {}, plain, plain]
    assert models.attention(512, t5, {"attn_implementation": "sdpa"}) == {"attn_implementation": "sdpa"}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert models.attention(128, t5) == {}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "nllb-moe"}, "leave out tokens beyond their capacity"),
        ({"architecture": "switch_transformers"}, "leave out tokens beyond their capacity"),
        ({"architecture": "mixtral", "output_router_logits": True}, "balances the load of experts"),
        ({"architecture": "llama", "return_dict": False}, r"model\.return_dict"),
    ],
)
def test_what_would_not_be_exact_or_have_no_effect_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        models.config_of(section)


def test_rotations_by_the_longest_document_of_a_batch_are_refused():
    keys = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    rotations = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 16}
    section = {"architecture": "phi3", "rope_parameters": rotations, "pad_token_id": 0, **keys}
    assert models.build(section, VOCAB, NextToken(), 16, 0)
    with pytest.raises(UserError, match=r"data\.seq_length: 32; beyond 16 tokens 'phi3' rotates a whole batch"):
        models.build(section, VOCAB, NextToken(), 32, 0)
