"""Which fields are taken without effect and which are refused: one table of each, by the place in the request.

The check of requests (serve/fields/requests.py, serve/fields/tools.py), the OpenAPI document, serve/README.md and the
tests are made of these two tables; the honoured fields stand beside the code that reads them, in `table(place, ...)`.
A name in no table is taken without effect, too, unless --strict-fields refuses it, so TAKEN holds the names that are
known to be harmless, and REFUSED every name of other servers that would change the answer.

To add a row: `Field(name, check)` in the call of `table` for an honoured field, else a line below; a name may stand in
one class of a place only. Names are those of OpenAI, vLLM, SGLang, llama.cpp, Ollama, LM Studio, TGI, LiteLLM,
OpenRouter, text-generation-webui and KoboldCpp.
"""

from collections.abc import Iterator, Mapping

from serve.fields.tables import Field, refused, taken

REQUEST = "request"
CHAT = "chat request"
COMPLETION = "completion request"
TOKENIZE = "tokenize request"
DETOKENIZE = "detokenize request"
MESSAGE = "messages[]"
PART = "messages[].content[]"
CALL = "messages[].tool_calls[]"
CALLED = "messages[].tool_calls[].function"
TOOL = "tools[]"
FUNCTION = "tools[].function"
CHOICE = "tool_choice"
STREAM_OPTIONS = "stream_options"
RESPONSE_FORMAT = "response_format"
JSON_SCHEMA = "response_format.json_schema"
STRUCTURED = "structured_outputs"


def _taken(why: str, names: str) -> Iterator[Field]:
    return (taken(name, why) for name in names.split())


TAKEN: Mapping[str, tuple[Field, ...]] = {
    REQUEST: (
        *_taken(
            "bookkeeping of OpenAI's service",
            "metadata store service_tier prompt_cache_key prompt_cache_retention prompt_cache_options "
            "safety_identifier user",
        ),
        *_taken(
            "the model has no such switch",
            "verbosity include_reasoning separate_reasoning stream_reasoning reasoning_format",
        ),
        *_taken(
            "bookkeeping of other servers, routers and clients",
            "request_id rid session_id conversation_id chat_id tags litellm_metadata litellm_session_id "
            "litellm_trace_id extra_headers extra_query api_base api_key api_version base_url custom_llm_provider "
            "drop_params allowed_openai_params num_retries max_retries request_timeout caching engine "
            "user_security_context trace",
        ),
        *_taken(
            "how another server loads, routes or caches",
            "keep_alive ttl num_ctx num_keep num_gpu num_thread num_batch use_mmap use_mlock draft_model cache_prompt "
            "id_slot slot_id n_keep n_discard provider route models transforms usage fallbacks cache "
            "kv_transfer_params extra_key data_parallel_rank bootstrap_host bootstrap_port bootstrap_room "
            "guided_decoding_backend backend_sampling speculative.n_max speculative.n_min "
            "speculative.p_min truncation_length max_context_length",
        ),
        *_taken(
            "belongs to a sampler or an input that is refused or off",
            "penalize_nl mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold dry_base dry_allowed_length "
            "dry_penalty_last_n dry_sequence_breakers smoothing_curve adaptive_decay mm_processor_kwargs "
            "media_io_kwargs rep_pen_range rep_pen_slope early_stopping",
        ),
        *_taken(
            "nothing but the text and its usage comes back",
            "timings_per_token return_progress response_fields spaces_between_special_tokens",
        ),
    ),
    CHAT: (*_taken("the format of calls is the model's, and they are always streamed", "chat_format tool_stream"),),
    MESSAGE: (
        *_taken(
            "reply fields that clients send back",
            "refusal annotations parsed provider_specific_fields extra_content reasoning_details thinking "
            "thinking_blocks reasoning_items citations logprobs finish_reason index usage id type status",
        ),
        *_taken("a mark for another server's cache", "cache_control prompt_cache_breakpoint"),
        *_taken("bookkeeping of clients", "metadata additional_kwargs response_metadata created_at timestamp weight"),
    ),
    PART: (
        *_taken("a mark for another server's cache", "cache_control prompt_cache_breakpoint"),
        *_taken("reply fields that clients send back", "annotations citations logprobs id index extra_content"),
        *_taken("bookkeeping of clients", "metadata provider_options providerOptions extras"),
    ),
    CALL: (
        *_taken("reply fields that clients send back", "index extra_content provider_specific_fields status"),
        *_taken("a mark for another server's cache", "cache_control"),
    ),
    CALLED: (
        *_taken("made of `arguments`", "parsed_arguments"),
        *_taken("reply fields that clients send back", "description index extra_content provider_specific_fields"),
    ),
    TOOL: (*_taken("a mark for another server's cache", "cache_control"),),
    FUNCTION: (
        *_taken("a mark for another server's cache", "cache_control"),
        *_taken("for the client, not for the model", "annotations output_schema response defer_loading"),
    ),
    STREAM_OPTIONS: (*_taken("the events are not padded", "include_obfuscation"),),
    STRUCTURED: (*_taken("how another server compiles", "backend disable_fallback _backend"),),
}
"""By place: fields that change no token, whatever their value."""

NO_BEAMS = "tokens are sampled one by one, without beams"
NO_SAMPLER = "this sampler is not built"
NO_IMAGES = "the model reads text only"
NO_AUDIO = "the model writes text only"
NO_FUNCTIONS = "tools is the newer word for functions"
NO_SEARCH = "this server searches nothing"
NO_ADAPTERS = "one set of weights is served"
NO_LISTS = "tokens are neither forbidden nor allowed by lists; use logit_bias"
NO_TEMPLATE = "the model's own chat template is used"
NO_DETAILS = "the reply has no such part"
AS_FORM = "write it as structured_outputs or response_format"
AT_TOP = "write it beside model"

REFUSED: Mapping[str, tuple[Field, ...]] = {
    REQUEST: (
        refused("use_beam_search", NO_BEAMS, False),
        refused("num_beams", NO_BEAMS, 1),
        refused("length_penalty", NO_BEAMS, 1.0, 0),
        refused("penalty_alpha", NO_SAMPLER, 0),
        refused("do_sample", "temperature 0 is greedy", True),
        refused("mirostat", NO_SAMPLER, 0, False),
        refused("mirostat_mode", NO_SAMPLER, 0),
        refused("dry_multiplier", NO_SAMPLER, 0),
        refused("xtc_probability", NO_SAMPLER, 0),
        refused("dynatemp_range", NO_SAMPLER, 0),
        refused("dynamic_temperature", NO_SAMPLER, False),
        refused("smoothing_factor", NO_SAMPLER, 0),
        refused("tfs_z", NO_SAMPLER, 1.0),
        refused("tfs", NO_SAMPLER, 1.0),
        refused("top_a", NO_SAMPLER, 0),
        refused("top_n_sigma", NO_SAMPLER, -1, 0),
        refused("epsilon_cutoff", NO_SAMPLER, 0),
        refused("eta_cutoff", NO_SAMPLER, 0),
        refused("adaptive_target", NO_SAMPLER, -1),
        refused("repeat_last_n", "penalties look at the whole text", -1, 64),
        refused("min_keep", NO_SAMPLER, 0, 1),
        refused("typ_p", "use typical_p", 1.0),
        refused("typical", "use typical_p", 1.0),
        refused("no_repeat_ngram_size", NO_SAMPLER, 0),
        refused("encoder_repetition_penalty", NO_SAMPLER, 1.0),
        refused("rep_pen", "write repetition_penalty", 1.0),
        refused("guidance_scale", NO_SAMPLER, 1.0),
        refused("negative_prompt", NO_SAMPLER, ""),
        refused("temperature_last", "temperature comes before the filters", False),
        refused("samplers", "the order of the filters is fixed", []),
        refused("sampler_order", "the order of the filters is fixed", []),
        refused("watermark", NO_SAMPLER, False),
        refused("bad_words", NO_LISTS, []),
        refused("banned_strings", NO_LISTS, []),
        refused("custom_token_bans", NO_LISTS, ""),
        refused("allowed_token_ids", NO_LISTS, []),
        refused("ban_eos_token", "use ignore_eos", False),
        refused("logits_processors", "no code of clients is run", []),
        refused("custom_logit_processor", "no code of clients is run", ""),
        refused("custom_params", "no code of clients is run", {}),
        refused("vllm_xargs", "no code of clients is run", {}),
        refused("stop_regex", "use stop", "", []),
        refused("stop_sequences", "use stop", []),
        refused("no_stop_trim", "use include_stop_str_in_output", False),
        refused("random_seed", "use seed"),
        refused("sampler_seed", "use seed", -1),
        refused("max_tokens_to_sample", "use max_tokens"),
        refused("min_length", "use min_tokens", 0),
        refused("thinking_token_budget", "thinking has no budget of its own", -1),
        refused("thinking_budget", "thinking has no budget of its own", -1),
        refused("thinking_budget_tokens", "thinking has no budget of its own", -1),
        refused("t_max_predict_ms", "use timeout", 0, -1),
        refused("regex", AS_FORM, ""),
        refused("ebnf", AS_FORM, ""),
        refused("format", AS_FORM, ""),
        refused("structural_tag", AS_FORM, ""),
        refused("guided_whitespace_pattern", AS_FORM, ""),
        refused("grammar_lazy", AS_FORM, False),
        refused("lora", NO_ADAPTERS, []),
        refused("lora_path", NO_ADAPTERS, ""),
        refused("lora_request", NO_ADAPTERS, {}),
        refused("adapter_id", NO_ADAPTERS, ""),
        refused("adapters", NO_ADAPTERS, []),
        refused("images", NO_IMAGES, []),
        refused("image_data", NO_IMAGES, []),
        refused("multi_modal_data", NO_IMAGES, {}),
        refused("prompt_logprobs", "use echo with logprobs at /v1/completions", False),
        refused("n_probs", "use logprobs", 0),
        refused("top_n_tokens", "use logprobs", 0),
        refused("details", NO_DETAILS, False),
        refused("decoder_input_details", NO_DETAILS, False),
        refused("return_tokens", NO_DETAILS, False),
        refused("return_token_ids", NO_DETAILS, False),
        refused("return_tokens_as_token_ids", NO_DETAILS, False),
        refused("return_hidden_states", NO_DETAILS, False),
        refused("post_sampling_probs", NO_DETAILS, False),
        refused("moderation", NO_DETAILS, {}),
        refused("n_indent", NO_DETAILS, 0),
        refused("preset", "no settings are kept here", ""),
        refused("session_params", "no sessions are kept here", {}),
        refused("previous_response_id", "nothing is stored: send the whole conversation", ""),
        refused("conversation", "nothing is stored: send the whole conversation", ""),
        refused("prompt_truncate_len", "use truncate_prompt_tokens"),
        refused("truncate", "use truncate_prompt_tokens"),
        refused("options", AT_TOP, {}),
        refused("parameters", AT_TOP, {}),
        refused("inputs", "use messages or prompt", ""),
        refused("input", "use messages or prompt", ""),
        refused("input_ids", "use prompt, at /v1/completions", []),
        refused("system_prompt", "write a message of the role system", ""),
        refused("instructions", "write a message of the role system", ""),
        refused("template", NO_TEMPLATE, ""),
        refused("chat_template", NO_TEMPLATE, ""),
        refused("raw", "use /v1/completions", False),
        refused("plugins", NO_SEARCH, []),
        refused("data_sources", NO_SEARCH, []),
        refused("mock_response", "answers are the model's", ""),
    ),
    CHAT: (
        refused("audio", NO_AUDIO, {}),
        refused("modalities", NO_AUDIO, ["text"], []),
        refused("web_search_options", NO_SEARCH, {}),
        refused("enable_search", NO_SEARCH, False),
        refused("functions", NO_FUNCTIONS, []),
        refused("function_call", NO_FUNCTIONS, "none", "auto"),
        refused("documents", "documents belong into messages", []),
        refused("echo", "the template's text is not repeated", False),
        refused("suffix", "filling in the middle is not supported", ""),
        refused("add_special_tokens", "the chat template writes them", False),
        refused("system", "write a message of the role system", "", []),
        refused("prompt", "use messages, or /v1/completions", "", []),
        refused("tool_prompt", "the model's own chat template tells of tools", ""),
        refused("safe_prompt", "write a message of the role system", False),
        refused("prompt_mode", "write a message of the role system"),
        refused("parse_tool_calls", "calls are read wherever there are tools", True),
        refused("mcp_servers", "this server calls no tools", []),
    ),
    COMPLETION: (
        refused("suffix", "filling in the middle is not supported", ""),
        refused("input_prefix", "filling in the middle is not supported", ""),
        refused("input_suffix", "filling in the middle is not supported", ""),
        refused("input_extra", "filling in the middle is not supported", []),
        refused("prompt_embeds", "prompts are text or token ids", []),
        refused("return_full_text", "use echo", False),
        refused("messages", "use /v1/chat/completions", []),
        refused("tools", "use /v1/chat/completions", []),
        refused("tool_choice", "use /v1/chat/completions", "none", "auto"),
        refused("context", "token ids belong into prompt", []),
    ),
    MESSAGE: (
        refused("audio", NO_IMAGES, {}),
        refused("images", NO_IMAGES, []),
        refused("prefix", "use continue_final_message", False),
        refused("partial", "use continue_final_message", False),
        refused("attachments", "send their text as content", []),
        refused("experimental_attachments", "send their text as content", []),
        refused("documents", "send their text as content", []),
    ),
    TOKENIZE: (
        refused("chat_template", NO_TEMPLATE, ""),
        refused("with_pieces", "use return_token_strs", False),
        refused("content", "use prompt", ""),
    ),
    CHOICE: (refused("disable_parallel_tool_use", "write parallel_tool_calls beside tools", False),),
    STRUCTURED: (
        refused("whitespace_pattern", "whitespace is JSON's", ""),
        refused("disable_any_whitespace", "whitespace is JSON's", False),
        refused("disable_additional_properties", "write additionalProperties", False),
        refused("structural_tag", "use json, regex, choice or grammar", ""),
    ),
}
"""By place: fields whose meaning would be missing from the answer, with why and the values that ask for nothing."""


TABLES: dict[str, tuple[Field, ...]] = {}
"""By place: every row, once the modules that call `table` are imported."""


def table(place: str, *honoured: Field, also: str | None = None) -> tuple[Field, ...]:
    """Every row of a place: the honoured ones, and those of the tables above. `also`: a second place's rows, too."""
    places = (place,) if also is None else (place, also)
    rows = (*honoured, *(row for name in places for kinds in (TAKEN, REFUSED) for row in kinds.get(name, ())))
    names = [row.name for row in rows]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{place}: {', '.join(sorted(twice))} in two classes"
    TABLES[place] = rows
    return rows
