"""Records what quantization tools write for a tiny model, and how each tool itself dequantizes it.

Not run by the tests, which read the recorded files: a tool is installed in an environment of its own, with the packages
of the `oracle` extra, and this is run there:

    python -m tests.support.tiny.recorded.record auto-round

For each case of the tool it writes a folder `TOOL/CASE`: the checkpoint as the tool saved it, and expected.safetensors
with the tool's own float32 weights of some layers, and the logits of a model that has them.
"""

import copy
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
LAYERS = ("self_attn.k_proj",)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def library(name: str) -> Any:
    """A package that only the tool's environment has."""
    return importlib.import_module(name)


def base_model(**changes: Any) -> Any:
    """A tiny random Llama in float32, with weights that differ in size from row to row."""
    torch, transformers = library("torch"), library("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **changes}, architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * (0.5 + torch.rand(len(weight), 1)) / weight.shape[1] ** 0.5)
            if name.endswith("norm.weight"):
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def saved(directory: Path, model: Any) -> Path:
    """The directory with the model saved."""
    model.save_pretrained(directory)
    return directory


def record(tool: str, case: str, checkpoint: Path, weights: Mapping[str, Any], **changes: Any) -> Any:
    """Keep a checkpoint that a tool wrote; returns the logits of a model with its weights.

    weights: float32 weights by module name, as the tool dequantizes them; other weights are those in the checkpoint
    """
    torch, save_file, load_file = library("torch"), *_safetensors()
    target = HERE / tool / case
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in checkpoint.glob("*"):
        if file.suffix == ".safetensors" or file.name == "config.json":
            shutil.copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("transformers_version", None)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    model = base_model(**changes)
    stored = load_file(target / "model.safetensors")
    floats = {name: value.float() for name, value in stored.items() if value.is_floating_point()}
    state = {name: weights.get(name.removesuffix(".weight"), floats.get(name)) for name in model.state_dict()}
    missing = [name for name, value in state.items() if value is None]
    assert not missing, missing
    model.load_state_dict(
        {name: value.float().reshape(model.state_dict()[name].shape) for name, value in state.items()}
    )
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    kept = {f"{name}.weight": weights[name] for name in weights if name.endswith(LAYERS) or name == "lm_head"}
    expected = {name: value.detach().float().contiguous() for name, value in kept.items()}
    save_file({**expected, "logits": logits.contiguous()}, target / "expected.safetensors")
    sys.stdout.write(f"{tool}/{case}: {len(weights)} layers\n")
    return logits


def _safetensors() -> tuple[Callable[..., Any], Callable[..., Any]]:
    torch_files = library("safetensors.torch")
    return torch_files.save_file, torch_files.load_file


def linear_names(model: Any, *, has_head: bool = False) -> list[str]:
    """Names of the linear layers."""
    linear = library("torch").nn.Linear
    return [
        name for name, module in model.named_modules() if isinstance(module, linear) and has_head >= (name == "lm_head")
    ]


def _tokenizer() -> Any:
    """A tokenizer of single letters, for tools that demand one."""
    tokenizers = library("tokenizers")
    letters = {letter: i for i, letter in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    return library("transformers").PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<unk>")


def auto_round(temporary: Path) -> None:
    """AutoRound in both packings, with other bits for single layers and a quantized LM head. Weights: its QuantLinear's
    product with the identity, which is how it dequantizes."""
    torch = library("torch")
    cases: dict[str, dict[str, Any]] = {
        "auto-gptq": {"format": "auto_round:auto_gptq", "bits": 4, "sym": True},
        "gptqmodel-asymmetric": {"format": "auto_round:gptqmodel", "bits": 4, "sym": False},
        "auto-awq": {"format": "auto_round:auto_awq", "bits": 4, "sym": False},
        "auto-gptq-3-bits": {"format": "auto_round:auto_gptq", "bits": 3, "sym": False},
        "auto-gptq-2-bits": {"format": "auto_round:auto_gptq", "bits": 2, "sym": True},
        "mixed": {"format": "auto_round:auto_gptq", "bits": 4, "sym": True, "layers": {
            "lm_head": {"bits": 8, "group_size": 32, "sym": True},
            "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32, "sym": True},
        }},
        "awq": {"format": "auto_awq", "bits": 4, "sym": False},
    }  # fmt: skip
    awq = "auto_round.export.export_to_awq.utils"
    data = [
        torch.randint(0, SIZES["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    for case, settings in cases.items():
        model = base_model(vocab_size=32)
        tuned = library("auto_round").AutoRound(
            model, tokenizer=_tokenizer(), bits=settings["bits"], group_size=32, sym=settings["sym"], iters=2,
            dataset=data, seqlen=32, nsamples=8, batch_size=2, layer_config=settings.get("layers"), device_map="cpu",
            enable_torch_compile=False,
        )  # fmt: skip
        tuned.quantize_and_save(str(temporary / case), format=settings["format"])
        saved_at = next(path.parent for path in (temporary / case).glob("**/config.json"))
        stored, weights, plain = _safetensors()[1](saved_at / "model.safetensors"), {}, base_model()
        for name in linear_names(plain, has_head=case == "mixed"):
            qweight, qzeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
            if settings["format"].endswith("awq"):
                weights[name] = library(awq).dequantize_gemm(qweight, qzeros, scales.float(), 4, 32).T
                continue
            kind = "qlinear_torch" if "gptqmodel" in settings["format"] else "qlinear_torch_zp"
            linear, bits = plain.get_submodule(name), settings.get("layers", {}).get(name, settings)["bits"]
            layer = library(f"auto_round_extension.torch.{kind}").QuantLinear(
                bits, 32, linear.in_features, linear.out_features, bias=False
            )
            layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales.float()
            weights[name] = layer(torch.eye(linear.in_features)).T
        record("auto-round", case, saved_at, weights)


def compressed_tensors(temporary: Path) -> None:
    """LLM Compressor's schemes. Weights: compressed-tensors' own decompression, with scales in float32."""
    torch, llmcompressor = library("torch"), library("llmcompressor")
    modifiers, args = library("llmcompressor.modifiers.quantization"), library("compressed_tensors.quantization")
    fp4 = library("compressed_tensors.compressors.nvfp4.helpers")
    dequantize = library("compressed_tensors.quantization.lifecycle.forward").dequantize
    packed = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    cases: dict[str, dict[str, Any]] = {
        "w4a16": {"weights": {**packed, "symmetric": True}},
        "w4a16-asymmetric": {"weights": {**packed, "symmetric": False}},
        "w4a16-channel": {"weights": {**packed, "symmetric": True, "strategy": "channel", "group_size": None}},
        "w8a16": {"weights": {**packed, "num_bits": 8, "symmetric": True}},
        "w8a8-static": {
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
        },
        "w8a8-dynamic": {
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        },
        "fp8-block": {
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
                        "block_structure": [32, 32]},
        },
        "fp8-channel": {"weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}},
        "nvfp4": {
            "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
                        "group_size": 16},
        },
    }  # fmt: skip
    data = [{"input_ids": torch.randint(0, 32, (1, 32), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    source = saved(temporary / "base", base_model())
    for case, settings in cases.items():
        model = library("transformers").AutoModelForCausalLM.from_pretrained(source)
        scheme = args.QuantizationScheme(targets=["Linear"], **settings)
        head = [] if case == "w4a16" else ["lm_head"]
        recipe = modifiers.QuantizationModifier(config_groups={"group_0": scheme}, ignore=head)
        llmcompressor.oneshot(
            model=model,
            recipe=recipe,
            dataset=torch.utils.data.DataLoader(data, batch_size=None),
            pipeline="basic",
            processor=_tokenizer(),
        )
        target = temporary / case
        model.save_pretrained(target, save_compressed=True)
        config = json.loads((target / "config.json").read_text())["quantization_config"]
        stored, weights = _safetensors()[1](target / "model.safetensors"), {}
        scheme = args.QuantizationConfig.model_validate(config).config_groups["group_0"]
        compressor = library("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(config["format"])
        for name in linear_names(base_model(), has_head=not head):
            parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
            if parts["weight_scale"].dtype != torch.float8_e4m3fn:
                parts["weight_scale"] = parts["weight_scale"].float()
            if case == "nvfp4":  # its decompression rounds to bfloat16
                packed = parts["weight_packed"]
                values = fp4.unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
                scales, whole = parts["weight_scale"].float(), parts["weight_global_scale"]
                weights[name] = dequantize(values, scales, args=scheme.weights, global_scale=whole)
            else:
                weights[name] = compressor.decompress(parts, scheme)["weight"].float()
        record("compressed-tensors", case, target, weights)


def bitsandbytes(temporary: Path) -> None:
    """bitsandbytes through transformers. Weights: its own dequantization."""
    torch, transformers, bnb = library("torch"), library("transformers"), library("bitsandbytes")
    source = saved(temporary / "base", base_model())
    kinds: dict[str, dict[str, Any]] = {"int8": {"load_in_8bit": True}}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            kinds[f"{kind}-nested" if nested else kind] = {
                "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
                "bnb_4bit_compute_dtype": torch.float32,
            }  # fmt: skip
    for case, settings in kinds.items():
        config = transformers.BitsAndBytesConfig(**settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        target, weights = saved(temporary / case, model), {}
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            elif isinstance(module, bnb.nn.Linear8bitLt):
                scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                weights[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
        record("bitsandbytes", case, target, weights)


def hqq(temporary: Path) -> None:
    """HQQ's own layers, in the names and types that transformers gave them. Weights: HQQLinear.dequantize."""
    torch, core = library("torch"), library("hqq.core.quantize")
    for case, bits, axis in (("4-bits", 4, 1), ("3-bits-axis-0", 3, 0), ("2-bits", 2, 1), ("8-bits", 8, 1)):
        model = base_model()
        state, weights = dict(model.state_dict()), {}
        for name in linear_names(model):
            settings = core.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
            layer = core.HQQLinear(
                model.get_submodule(name), settings, compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            weights[name] = layer.dequantize()
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        target = temporary / case
        model.config.save_pretrained(target)
        _safetensors()[0]({key: value.contiguous() for key, value in state.items()}, target / "model.safetensors")
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "hqq", "skip_modules": ["lm_head"],
            "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": 32, "axis": axis}},
        }  # fmt: skip
        (target / "config.json").write_text(json.dumps(config))
        record("hqq", case, target, weights)


def modelopt(temporary: Path) -> None:
    """ModelOpt's unified export. Weights: its fake-quantized ones, times the factors of the inputs where they stay."""
    torch, mtq = library("torch"), library("modelopt.torch.quantization")
    export = library("modelopt.torch.export").export_hf_checkpoint
    cases = {
        "int8": "INT8_SMOOTHQUANT_CFG", "int4-awq": "INT4_AWQ_CFG", "fp8": "FP8_DEFAULT_CFG",
        "nvfp4": "NVFP4_DEFAULT_CFG", "int8-weights": "INT8_WEIGHT_ONLY_CFG",
    }  # fmt: skip
    data = [torch.randint(0, 32, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    for case, setting in cases.items():
        config = copy.deepcopy(getattr(mtq, setting))
        if case == "int4-awq":
            for rule in config["quant_cfg"]:
                if "block_sizes" in rule.get("cfg", {}):
                    rule["cfg"]["block_sizes"][-1] = 32
        model = mtq.quantize(base_model(), config, lambda module: [module(ids) for ids in data])
        with torch.inference_mode():
            before = None if case == "nvfp4" else model(torch.tensor([IDS])).logits[0]  # that needs a GPU
            export(model, dtype=torch.float32, export_dir=temporary / case)
        stored, weights = _safetensors()[1](temporary / case / "model.safetensors"), {}
        for name in linear_names(base_model()):
            weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"].float()
            quantizer = model.get_submodule(name).weight_quantizer
            if case == "nvfp4":
                tensor = library("modelopt.torch.quantization.qtensor").NVFP4QTensor
                shape = torch.Size((len(weight), 2 * weight.shape[1]))
                weights[name] = tensor(shape, torch.float32, weight).dequantize(
                    scale=stored[f"{name}.weight_scale"], double_scale=stored[f"{name}.weight_scale_2"],
                    block_sizes=quantizer.block_sizes,
                )  # fmt: skip
            elif case == "int4-awq":
                # ModelOpt has no reader of its own: the logits show below that this is what it wrote.
                halves = torch.stack([weight & 15, weight >> 4], 1).reshape(-1, weight.shape[1]).to(torch.int8)
                values = torch.where(halves > 7, halves - 16, halves).float()
                weights[name] = values * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)
            else:
                weights[name] = weight.float() * (scale[:, None] if scale.dim() else scale)
            if (factors := stored.get(f"{name}.pre_quant_scale")) is not None:
                weights[name] = weights[name] * factors
        logits = record("modelopt", case, temporary / case, weights)
        if before is not None:
            difference = (logits - before).abs().max() / before.std()
            sys.stdout.write(f"logits differ from the model's with rounded inputs by {difference:.2g} deviations\n")


TOOLS: dict[str, Callable[[Path], None]] = {
    "auto-round": auto_round,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    "modelopt": modelopt,
}


if __name__ == "__main__":
    for tool in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as directory:
            TOOLS[tool](Path(directory))
