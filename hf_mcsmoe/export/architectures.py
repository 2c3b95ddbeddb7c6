"""Which families engines know at all, as data where their lists were read."""

from collections.abc import Sequence

# Classes that llama.cpp's converter registers (conversion/*.py of llama-cpp-python 0.3.36), of families with experts.
LLAMA_CPP = frozenset(
    [
        "AfmoeForCausalLM",
        "Cohere2MoeForCausalLM",
        "DbrxForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Dots1ForCausalLM",
        "Dots3NoteForCausalLM",
        "Dots3NoteForConditionalGeneration",
        "Ernie4_5_MoeForCausalLM",
        "ExaoneMoeForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm4vMoeForConditionalGeneration",
        "Glm5NextForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "GptOssForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "HYV3ForCausalLM",
        "HYV4ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "JambaForCausalLM",
        "KimiLinearForCausalLM",
        "LagunaForCausalLM",
        "Lfm2MoeForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "SolarOpenForCausalLM",
        "Step3p7ForConditionalGeneration",
    ]
)
# Values of model_type that mlx-lm 0.32.2 has a file for (mlx_lm/models), of families with experts.
MLX = frozenset(
    [
        "afmoe",
        "bailing_hybrid",
        "dbrx",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "gemma4",
        "gemma4_text",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt_oss",
        "granitemoe",
        "granitemoehybrid",
        "jamba",
        "kimi_k25",
        "kimi_linear",
        "laguna",
        "lfm2_moe",
        "llama4",
        "llama4_text",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl",
        "mistral4",
        "mixtral",
        "muse_spark",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
        "solar_open",
    ]
)
SOURCES = {"llama.cpp": "conversion/*.py of llama-cpp-python 0.3.36", "mlx": "mlx_lm/models of mlx-lm 0.32.2"}


def check_architecture(engines: Sequence[str], name: str, model_type: str) -> list[str]:
    """Return of which engines it is not known whether they have a family, a sentence each.

    Args:
        name: the family's class.

    Raises:
        ValueError: an engine does not have it.
    """
    known = {"llama.cpp": name in LLAMA_CPP, "mlx": model_type in MLX, "transformers": True}
    for engine in engines:
        if not known.get(engine, True):
            raise ValueError(
                f"{engine} does not know {name} ({model_type}) at all ({SOURCES[engine]}): leave that engine out."
            )
    return [f"Whether {engine} knows `{name}` was not looked up." for engine in engines if engine not in known]
