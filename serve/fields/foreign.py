"""The fields of other servers and of their clients: which of them are ignored and which are refused.

Two tables by place in the request. The check of requests (serve/fields/requests.py, serve/fields/tools.py), the OpenAPI
document, serve/README.md and the tests are made from them. The supported fields stand beside the code that reads them,
in a call of `table(place, ...)`. A name in no table is ignored too, unless --strict-fields is set. So IGNORED holds the
names that are known to be harmless, and REFUSED every name of other servers that would change the answer.

To add a row: write `Field(name, check)` in a call of `table` for a supported field, else a name below. A name may stand
in one class of a place only. The names are those of OpenAI, vLLM, SGLang, llama.cpp, Ollama, LM Studio, TGI, LiteLLM,
OpenRouter, text-generation-webui and KoboldCpp.
"""

from collections.abc import Iterator, Mapping

from serve.fields.reading import Field, ignored, refused

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


def _ignored(why: str, names: str) -> Iterator[Field]:
    return (ignored(name, why) for name in names.split())


def _refused(why: str, names: str, *neutral: object) -> Iterator[Field]:
    return (refused(name, why, *neutral) for name in names.split())


IGNORED: Mapping[str, tuple[Field, ...]] = {
    REQUEST: (
        *_ignored(
            "bookkeeping of OpenAI's service",
            "metadata store service_tier prompt_cache_key prompt_cache_retention prompt_cache_options "
            "safety_identifier user",
        ),
        *_ignored(
            "the model has no such switch",
            "verbosity include_reasoning separate_reasoning stream_reasoning reasoning_format",
        ),
        *_ignored(
            "bookkeeping of other servers, routers and clients",
            "request_id rid session_id conversation_id chat_id tags litellm_metadata litellm_session_id "
            "litellm_trace_id extra_headers extra_query api_base api_key api_version base_url custom_llm_provider "
            "drop_params allowed_openai_params num_retries max_retries request_timeout caching engine "
            "user_security_context trace",
        ),
        *_ignored(
            "how another server loads, routes or caches",
            "keep_alive ttl num_ctx num_keep num_gpu num_thread num_batch use_mmap use_mlock draft_model cache_prompt "
            "id_slot slot_id n_keep n_discard provider route models transforms usage fallbacks cache "
            "kv_transfer_params extra_key data_parallel_rank bootstrap_host bootstrap_port bootstrap_room "
            "guided_decoding_backend backend_sampling speculative.n_max speculative.n_min "
            "speculative.p_min truncation_length max_context_length",
        ),
        *_ignored(
            "setting of a sampler or an input that is refused or off",
            "penalize_nl mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold dry_base dry_allowed_length "
            "dry_penalty_last_n dry_sequence_breakers smoothing_curve adaptive_decay mm_processor_kwargs "
            "media_io_kwargs rep_pen_range rep_pen_slope early_stopping",
        ),
        *_ignored(
            "the reply has only the text and its usage",
            "timings_per_token return_progress response_fields spaces_between_special_tokens",
        ),
    ),
    CHAT: (
        *_ignored("the model has its own format of calls, and calls are always streamed", "chat_format tool_stream"),
    ),
    MESSAGE: (
        *_ignored(
            "reply fields that clients send back",
            "refusal annotations parsed provider_specific_fields extra_content reasoning_details thinking "
            "thinking_blocks reasoning_items citations logprobs finish_reason index usage id type status",
        ),
        *_ignored("a mark for another server's cache", "cache_control prompt_cache_breakpoint"),
        *_ignored("bookkeeping of clients", "metadata additional_kwargs response_metadata created_at timestamp weight"),
    ),
    PART: (
        *_ignored("a mark for another server's cache", "cache_control prompt_cache_breakpoint"),
        *_ignored("reply fields that clients send back", "annotations citations logprobs id index extra_content"),
        *_ignored("bookkeeping of clients", "metadata provider_options providerOptions extras"),
    ),
    CALL: (
        *_ignored("reply fields that clients send back", "index extra_content provider_specific_fields status"),
        *_ignored("a mark for another server's cache", "cache_control"),
    ),
    CALLED: (
        *_ignored("copy of `arguments`", "parsed_arguments"),
        *_ignored("reply fields that clients send back", "description index extra_content provider_specific_fields"),
    ),
    TOOL: (*_ignored("a mark for another server's cache", "cache_control"),),
    FUNCTION: (
        *_ignored("a mark for another server's cache", "cache_control"),
        *_ignored("for the client, not for the model", "annotations output_schema response defer_loading"),
    ),
    STREAM_OPTIONS: (*_ignored("the events are not padded", "include_obfuscation"),),
    STRUCTURED: (*_ignored("how another server compiles", "backend disable_fallback _backend"),),
}
"""By place: fields that change no token, whatever their value is."""

NO_BEAMS = "tokens are sampled one by one, without beams"
NO_SAMPLER = "this sampler is not implemented"
NO_IMAGES = "the model reads text only"
NO_AUDIO = "the model writes text only"
NO_FUNCTIONS = "tools is the newer word for functions"
NO_SEARCH = "this server does not search"
NO_ADAPTERS = "there are no adapters"
NO_LISTS = "tokens are neither forbidden nor allowed by lists; use logit_bias"
NO_TEMPLATE = "the model's own chat template is used"
NO_DETAILS = "the reply has no such part"
AS_FORM = "write it as structured_outputs or response_format"
AT_TOP = "write it at the top level, beside model"

REFUSED: Mapping[str, tuple[Field, ...]] = {
    REQUEST: (
        *_refused(NO_BEAMS, "use_beam_search", False),
        *_refused(NO_BEAMS, "num_beams", 1),
        *_refused(NO_BEAMS, "length_penalty", 1.0, 0),
        *_refused(
            NO_SAMPLER,
            "penalty_alpha mirostat_mode dry_multiplier xtc_probability dynatemp_range smoothing_factor top_a "
            "epsilon_cutoff eta_cutoff no_repeat_ngram_size",
            0,
        ),
        *_refused(NO_SAMPLER, "mirostat", 0, False),
        *_refused(NO_SAMPLER, "dynamic_temperature watermark", False),
        *_refused(NO_SAMPLER, "tfs_z tfs encoder_repetition_penalty guidance_scale", 1.0),
        *_refused(NO_SAMPLER, "top_n_sigma", -1, 0),
        *_refused(NO_SAMPLER, "adaptive_target", -1),
        *_refused(NO_SAMPLER, "min_keep", 0, 1),
        *_refused(NO_SAMPLER, "negative_prompt", ""),
        *_refused("temperature 0 is greedy", "do_sample", True),
        *_refused("penalties look at the whole text", "repeat_last_n", -1, 64),
        *_refused("use typical_p", "typ_p typical", 1.0),
        *_refused("write repetition_penalty", "rep_pen", 1.0),
        *_refused("temperature comes before the filters", "temperature_last", False),
        *_refused("the order of the filters is fixed", "samplers sampler_order", []),
        *_refused(NO_LISTS, "bad_words banned_strings allowed_token_ids", []),
        *_refused(NO_LISTS, "custom_token_bans", ""),
        *_refused("use ignore_eos", "ban_eos_token", False),
        *_refused("clients cannot run code here", "logits_processors", []),
        *_refused("clients cannot run code here", "custom_logit_processor", ""),
        *_refused("clients cannot run code here", "custom_params vllm_xargs", {}),
        *_refused("use stop", "stop_regex", "", []),
        *_refused("use stop", "stop_sequences", []),
        *_refused("use include_stop_str_in_output", "no_stop_trim", False),
        *_refused("use seed", "random_seed"),
        *_refused("use seed", "sampler_seed", -1),
        *_refused("use max_tokens", "max_tokens_to_sample"),
        *_refused("use min_tokens", "min_length", 0),
        *_refused(
            "thinking has no budget of its own",
            "thinking_token_budget thinking_budget thinking_budget_tokens",
            -1,
        ),
        *_refused("use timeout", "t_max_predict_ms", 0, -1),
        *_refused(AS_FORM, "regex ebnf format structural_tag guided_whitespace_pattern", ""),
        *_refused(AS_FORM, "grammar_lazy", False),
        *_refused(NO_ADAPTERS, "lora adapters", []),
        *_refused(NO_ADAPTERS, "lora_path adapter_id", ""),
        *_refused(NO_ADAPTERS, "lora_request", {}),
        *_refused(NO_IMAGES, "images image_data", []),
        *_refused(NO_IMAGES, "multi_modal_data", {}),
        *_refused("use echo with logprobs at /v1/completions", "prompt_logprobs", False),
        *_refused("use logprobs", "n_probs top_n_tokens", 0),
        *_refused(
            NO_DETAILS,
            "details decoder_input_details return_tokens return_token_ids return_tokens_as_token_ids "
            "return_hidden_states post_sampling_probs",
            False,
        ),
        *_refused(NO_DETAILS, "moderation", {}),
        *_refused(NO_DETAILS, "n_indent", 0),
        *_refused("no settings are kept here", "preset", ""),
        *_refused("no sessions are kept here", "session_params", {}),
        *_refused("nothing is stored: send the whole conversation", "previous_response_id conversation", ""),
        *_refused("use truncate_prompt_tokens", "prompt_truncate_len truncate"),
        *_refused(AT_TOP, "options parameters", {}),
        *_refused("use messages or prompt", "inputs input", ""),
        *_refused("use prompt, at /v1/completions", "input_ids", []),
        *_refused("write a message of the role system", "system_prompt instructions", ""),
        *_refused(NO_TEMPLATE, "template chat_template", ""),
        *_refused("use /v1/completions", "raw", False),
        *_refused(NO_SEARCH, "plugins data_sources", []),
        *_refused("answers come from the model", "mock_response", ""),
    ),
    CHAT: (
        *_refused(NO_AUDIO, "audio", {}),
        *_refused(NO_AUDIO, "modalities", ["text"], []),
        *_refused(NO_SEARCH, "web_search_options", {}),
        *_refused(NO_SEARCH, "enable_search", False),
        *_refused(NO_FUNCTIONS, "functions", []),
        *_refused(NO_FUNCTIONS, "function_call", "none", "auto"),
        *_refused("put documents into messages", "documents", []),
        *_refused("a chat's prompt is not repeated", "echo", False),
        *_refused("filling in the middle is not supported", "suffix", ""),
        *_refused("the chat template writes them", "add_special_tokens", False),
        *_refused("write a message of the role system", "system", "", []),
        *_refused("write a message of the role system", "safe_prompt", False),
        *_refused("write a message of the role system", "prompt_mode"),
        *_refused("use messages, or /v1/completions", "prompt", "", []),
        *_refused("the model's own chat template describes the tools", "tool_prompt", ""),
        *_refused("calls are parsed whenever there are tools", "parse_tool_calls", True),
        *_refused("this server calls no tools", "mcp_servers", []),
    ),
    COMPLETION: (
        *_refused("filling in the middle is not supported", "suffix input_prefix input_suffix", ""),
        *_refused("filling in the middle is not supported", "input_extra", []),
        *_refused("prompts are text or token ids", "prompt_embeds", []),
        *_refused("use echo", "return_full_text", False),
        *_refused("use /v1/chat/completions", "messages tools", []),
        *_refused("use /v1/chat/completions", "tool_choice", "none", "auto"),
        *_refused("put token ids into prompt", "context", []),
    ),
    MESSAGE: (
        *_refused(NO_IMAGES, "audio", {}),
        *_refused(NO_IMAGES, "images", []),
        *_refused("use continue_final_message", "prefix partial", False),
        *_refused("send their text as content", "attachments experimental_attachments documents", []),
    ),
    TOKENIZE: (
        *_refused(NO_TEMPLATE, "chat_template", ""),
        *_refused("use return_token_strs", "with_pieces", False),
        *_refused("use prompt", "content", ""),
    ),
    CHOICE: (*_refused("write parallel_tool_calls beside tools", "disable_parallel_tool_use", False),),
    STRUCTURED: (
        *_refused("whitespace is as JSON allows it", "whitespace_pattern", ""),
        *_refused("whitespace is as JSON allows it", "disable_any_whitespace", False),
        *_refused("write additionalProperties", "disable_additional_properties", False),
        *_refused("use json, regex, choice or grammar", "structural_tag", ""),
    ),
}
"""By place: fields that would change the answer, with the reason and the values that ask for nothing."""


TABLES: dict[str, tuple[Field, ...]] = {}
"""By place: every row, filled by the modules that call `table`."""


def table(place: str, *supported: Field, also: str | None = None) -> tuple[Field, ...]:
    """All rows of a place: the supported ones, and those of the tables above, for `place` and for the place `also`."""
    places = (place,) if also is None else (place, also)
    rows = (*supported, *(row for name in places for kinds in (IGNORED, REFUSED) for row in kinds.get(name, ())))
    names = [row.name for row in rows]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{place}: {', '.join(sorted(twice))} in two classes"
    TABLES[place] = rows
    return rows
