"""The table of supported architectures. A family's row is in a file of its own, or beside its relatives'."""

from collections.abc import Mapping
from types import MappingProxyType

from export.model.families.dense.cohere import COHERE, COHERE2
from export.model.families.dense.gemma import GEMMA, GEMMA2, GEMMA3_TEXT, VAULTGEMMA
from export.model.families.dense.glm import GLM, GLM4
from export.model.families.dense.granite import GRANITE, HYPERCLOVAX, MINICPM
from export.model.families.dense.hunyuan import HUNYUAN_V1_DENSE
from export.model.families.dense.internlm2 import INTERNLM2
from export.model.families.dense.layer_norms import JAIS2, NEMOTRON, PHI, STABLELM, STARCODER2
from export.model.families.dense.llama import LLAMA, MINISTRAL, MISTRAL, QWEN2, QWEN3
from export.model.families.dense.olmo import OLMO, OLMO2, OLMO3
from export.model.families.dense.phi3 import PHI3
from export.model.families.dense.relatives import ARCEE, ERNIE4_5, EXAONE, HELIUM, INTERNLM3, IQUESTCODER, SEED_OSS
from export.model.families.dense.without_rotary import EXAONE4, SMOLLM3
from export.model.families.experts.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from export.model.families.experts.ernie import ERNIE4_5_MOE
from export.model.families.experts.glm import GLM4_MOE
from export.model.families.experts.gpt_oss import GPT_OSS
from export.model.families.experts.granite import GRANITEMOE, GRANITEMOESHARED
from export.model.families.experts.hunyuan import HUNYUAN_V1_MOE
from export.model.families.experts.mixtral import MIXTRAL
from export.model.families.experts.olmoe import OLMOE
from export.model.families.experts.phimoe import PHIMOE
from export.model.families.experts.qwen import QWEN2_MOE, QWEN3_MOE
from export.model.families.gpt.gpt2 import GPT2
from export.model.families.gpt.gpt_bigcode import GPT_BIGCODE
from export.model.families.gpt.gptj import GPT_NEO, GPTJ
from export.model.families.gpt.neox import BLOOM, FALCON, GPT_NEOX
from export.model.families.gpt.opt import MPT, OPT
from export.model.families.hybrid.falcon_h1 import FALCON_H1
from export.model.families.hybrid.granite import GRANITE_MOE_HYBRID
from export.model.families.hybrid.lfm2 import LFM2, LFM2_MOE
from export.model.families.hybrid.mamba import BAMBA
from export.model.families.hybrid.qwen import QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT
from export.model.families.row import Architecture

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "arcee": ARCEE,
        "bamba": BAMBA,
        "bloom": BLOOM,
        "cohere": COHERE,
        "cohere2": COHERE2,
        "deepseek_v2": DEEPSEEK_V2,
        "deepseek_v3": DEEPSEEK_V3,
        "ernie4_5": ERNIE4_5,
        "ernie4_5_moe": ERNIE4_5_MOE,
        "exaone": EXAONE,
        "exaone4": EXAONE4,
        "falcon": FALCON,
        "falcon_h1": FALCON_H1,
        "gemma": GEMMA,
        "gemma2": GEMMA2,
        "gemma3_text": GEMMA3_TEXT,
        "glm": GLM,
        "glm4": GLM4,
        "glm4_moe": GLM4_MOE,
        "gpt2": GPT2,
        "gpt_bigcode": GPT_BIGCODE,
        "gpt_neo": GPT_NEO,
        "gpt_neox": GPT_NEOX,
        "gpt_oss": GPT_OSS,
        "gptj": GPTJ,
        "granite": GRANITE,
        "granitemoe": GRANITEMOE,
        "granitemoehybrid": GRANITE_MOE_HYBRID,
        "granitemoeshared": GRANITEMOESHARED,
        "helium": HELIUM,
        "hunyuan_v1_dense": HUNYUAN_V1_DENSE,
        "hunyuan_v1_moe": HUNYUAN_V1_MOE,
        "hyperclovax": HYPERCLOVAX,
        "internlm2": INTERNLM2,
        "internlm3": INTERNLM3,
        "iquestcoder": IQUESTCODER,
        "jais2": JAIS2,
        "lfm2": LFM2,
        "lfm2_moe": LFM2_MOE,
        "llama": LLAMA,
        "minicpm": MINICPM,
        "ministral": MINISTRAL,
        "mistral": MISTRAL,
        "mixtral": MIXTRAL,
        "mpt": MPT,
        "nemotron": NEMOTRON,
        "olmo": OLMO,
        "olmo2": OLMO2,
        "olmo3": OLMO3,
        "olmoe": OLMOE,
        "opt": OPT,
        "phi": PHI,
        "phi3": PHI3,
        "phimoe": PHIMOE,
        "qwen2": QWEN2,
        "qwen2_moe": QWEN2_MOE,
        "qwen3": QWEN3,
        "qwen3_5_moe_text": QWEN3_5_MOE_TEXT,
        "qwen3_5_text": QWEN3_5_TEXT,
        "qwen3_moe": QWEN3_MOE,
        "qwen3_next": QWEN3_NEXT,
        "seed_oss": SEED_OSS,
        "smollm3": SMOLLM3,
        "stablelm": STABLELM,
        "starcoder2": STARCODER2,
        "vaultgemma": VAULTGEMMA,
    }
)
"""By config.json's `model_type`."""
