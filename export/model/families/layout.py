"""Builds the description of a decoder from its family's style, names and sizes."""

from collections.abc import Sequence
from dataclasses import replace

from export.model.description import (
    LM_HEAD,
    Attention,
    Block,
    Embedding,
    Experts,
    Head,
    Latent,
    Linear,
    Mamba2,
    Mixer,
    Mlp,
    ModelConfig,
    Norm,
    Part,
    Rotary,
    Site,
)
from export.model.families.row import LatentSizes, Names, Sizes, Style
from export.model.families.window_ropes import Ropes


def describe(model_type: str, sizes: Sizes, style: Style, names: Names, ropes: Ropes, *, is_tied: bool) -> ModelConfig:
    """Describe a decoder, without its special token ids."""
    layout = _Layout(sizes, style, names, ropes)
    head = Part(names.embedding if is_tied else names.head, sizes.vocab_size)
    final_norm = layout.norm(names.final_norm)
    return ModelConfig(
        model_type=model_type,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_len,
        embedding=Embedding(
            name=names.embedding,
            scale=style.embedding_scale,
            positions=names.positions or None,
            num_positions=sizes.max_len + style.position_offset if names.positions else 0,
            position_offset=style.position_offset,
            norm=layout.norm(names.embedding_norm) if names.embedding_norm else None,
        ),
        blocks=tuple(layout.block(layer) for layer in range(sizes.num_layers)),
        final_norm=final_norm,
        head=Head(
            linear=Linear(
                site=Site(sizes.num_layers, LM_HEAD),
                role=LM_HEAD,
                parts=(head,),
                num_inputs=sizes.hidden_size,
                has_bias=style.head_bias,
                reads=final_norm,
            ),
            scale=style.logit_scale,
            softcap=style.logit_softcap,
        ),
    )


class _BlockParts:
    """`BlockParts` of one block."""

    def __init__(self, layout: "_Layout", layer: int, prefix: str, reads: Norm) -> None:
        self._layout, self._layer, self.prefix, self.reads = layout, layer, prefix, reads

    def linear(
        self,
        kind: str,
        parts: Sequence[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool = False,
        reads: Norm | None = None,
    ) -> Linear:
        named = [Part(name, num_rows) for name, num_rows in parts]
        return self._layout.linear(self._layer, kind, named, num_inputs, has_bias=has_bias, reads=reads)

    def norm(self, name: str, size: int) -> Norm:
        return self._layout.norm(name, size)


class _Layout:
    """Builds the parts of one decoder."""

    def __init__(self, sizes: Sizes, style: Style, names: Names, ropes: Ropes) -> None:
        self._sizes, self._style, self._names, self._ropes = sizes, style, names, ropes

    def rotary(self, layer: int) -> Rotary | None:
        """The rotary embedding of a layer."""
        sizes, style = self._sizes, self._style
        if not (style.rotates[layer] if style.rotates else style.has_rotary):
            return None
        has_window = bool(style.windows) and style.windows[layer] is not None
        rope = self._ropes.windowed if has_window else self._ropes.full
        dim = sizes.head_dim if style.rotary_dim is None else style.rotary_dim
        return Rotary(rope=rope, head_dim=sizes.head_dim, dim=dim, interleaved=style.rotary_interleaved)

    def block(self, layer: int) -> Block:
        names, prefix = self._names, self._names.block.format(layer=layer)

        def norm(name: str) -> Norm | None:
            return self.norm(f"{prefix}.{name}") if name else None

        attention_norm = norm(names.attention_norm)
        mlp_norm = norm(names.mlp_norm)
        return Block(
            mixer=self._mixer(layer, prefix, attention_norm),
            beside=self._beside(layer, prefix, attention_norm),
            mlp=self._mlp_or_experts(layer, prefix, mlp_norm or (attention_norm if self._style.is_parallel else None)),
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            attention_out_norm=norm(names.attention_out_norm),
            mlp_out_norm=norm(names.mlp_out_norm),
            is_parallel=self._style.is_parallel,
            residual_scale=self._style.residual_scale,
        )

    def norm(self, name: str, size: int | None = None) -> Norm:
        style = self._style
        return Norm(
            name=name,
            size=size or self._sizes.hidden_size,
            epsilon=self._sizes.norm_eps,
            kind=style.norm_kind,
            has_bias=style.norm_bias,
            adds_one=style.norm_adds_one,
            has_weight=style.norm_weight,
        )

    def _mixer(self, layer: int, prefix: str, reads: Norm | None) -> Mixer:
        make = self._style.mixers[layer] if self._style.mixers else None
        if make is None:
            return self._attention(layer, prefix, reads)
        assert reads is not None, "recurrences have a norm before them"
        return make(_BlockParts(self, layer, prefix, reads))

    def _beside(self, layer: int, prefix: str, reads: Norm | None) -> Mamba2 | None:
        if self._style.beside is None:
            return None
        assert reads is not None, "recurrences have a norm before them"
        return self._style.beside(_BlockParts(self, layer, prefix, reads))

    def _attention(self, layer: int, prefix: str, reads: Norm | None) -> Attention:
        sizes, style, names = self._sizes, self._style, self._names
        if style.latent is not None:
            return self._latent_attention(layer, prefix, reads, style.latent)
        q_rows, kv_rows = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        parts = [
            Part(f"{prefix}.{name}", rows) for name, rows in zip(names.qkv, (q_rows, kv_rows, kv_rows), strict=True)
        ]
        q_norm, k_norm = (
            self.norm(f"{prefix}.{name}", rows if style.qk_norm_is_whole else sizes.head_dim) if style.qk_norm else None
            for name, rows in ((names.q_norm, q_rows), (names.k_norm, kv_rows))
        )
        o_parts, gate_parts = (
            [Part(f"{prefix}.{names.o}", sizes.hidden_size)],
            [Part(f"{prefix}.{names.attention_gate}", q_rows)],
        )
        return Attention(
            qkv=self.linear(
                layer, "qkv", parts, sizes.hidden_size, has_bias=style.qkv_bias, reads=reads, writes_stream=False
            ),
            o=self.linear(layer, "o", o_parts, q_rows, has_bias=style.o_bias, reads=None),
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            scale=style.attention_scale,
            softcap=style.attention_softcap,
            window=style.windows[layer] if style.windows else None,
            rotary=self.rotary(layer),
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=f"{prefix}.{names.sinks}" if style.has_sinks else None,
            norms_rotated=style.qk_norm_is_rotated,
            clip=style.qkv_clip,
            alibi=style.alibi,
            gate=self.linear(layer, "gate", gate_parts, sizes.hidden_size, has_bias=style.qkv_bias, reads=reads)
            if style.has_attention_gate
            else None,
        )

    def _latent_attention(self, layer: int, prefix: str, reads: Norm | None, latent: LatentSizes) -> Attention:
        """Its narrow norms have an epsilon of their own, which no config.json says."""
        sizes, style, names = self._sizes, self._style, self._names
        heads, head_dim = sizes.num_heads, latent.still_dim + latent.rotating_dim

        def narrow_norm(name: str, size: int) -> Norm:
            return replace(self.norm(f"{prefix}.self_attn.{name}", size), epsilon=1e-6)

        def widened(kind: str, name: str, rows: int, norm: Norm) -> Linear:
            parts = [Part(f"{prefix}.self_attn.{name}", rows)]
            return self.linear(layer, kind, parts, norm.size, has_bias=False, reads=norm)

        q_norm = None if latent.q_rank is None else narrow_norm("q_a_layernorm", latent.q_rank)
        kv_norm = narrow_norm("kv_a_layernorm", latent.kv_rank)
        queries = Part(f"{prefix}.self_attn.q_proj", heads * head_dim)
        if latent.q_rank is not None:
            queries = Part(f"{prefix}.self_attn.q_a_proj", latent.q_rank)
        narrow = Part(f"{prefix}.self_attn.kv_a_proj_with_mqa", latent.kv_rank + latent.rotating_dim)
        o_parts = [Part(f"{prefix}.{names.o}", sizes.hidden_size)]
        rotary = self.rotary(layer)
        assert rotary is not None
        return Attention(
            qkv=self.linear(layer, "qkv", [queries, narrow], sizes.hidden_size, has_bias=style.qkv_bias, reads=reads),
            o=self.linear(layer, "o", o_parts, heads * latent.value_dim, has_bias=style.o_bias, reads=None),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=style.attention_scale,
            rotary=replace(rotary, head_dim=head_dim, dim=latent.rotating_dim),
            latent=Latent(
                q_norm=q_norm,
                q=None if q_norm is None else widened("qkv.q", "q_b_proj", heads * head_dim, q_norm),
                kv_norm=kv_norm,
                kv=widened("qkv.kv", "kv_b_proj", heads * (latent.still_dim + latent.value_dim), kv_norm),
                still_dim=latent.still_dim,
                value_dim=latent.value_dim,
            ),
        )

    def _mlp_or_experts(self, layer: int, prefix: str, reads: Norm | None) -> Mlp | Experts:
        mixture, names, hidden = self._style.mixture, self._names, self._sizes.hidden_size
        if mixture is None or layer in mixture.dense_layers:
            parts = [f"{prefix}.{name}" for name in (names.gate, names.up, names.down)]
            inner = self._style.intermediate_size or self._sizes.intermediate_size
            return self._mlp(layer, parts, inner, reads, "", has_bias=self._style.mlp_bias)

        def expert(name: str, size: int, number: str) -> Mlp:
            parts = [f"{prefix}.{name}.{part}" for part in names.expert_parts]
            has_bias = mixture.expert_bias or self._style.mlp_bias
            return replace(self._mlp(layer, parts, size, reads, number, has_bias=has_bias), clamp=mixture.clamp)

        def logits(kind: str, name: str, num_rows: int, *, has_bias: bool) -> Linear:
            return self.linear(
                layer, kind, [Part(f"{prefix}.{name}", num_rows)], hidden, has_bias=has_bias, reads=reads
            )

        return Experts(
            router=logits("router", names.router, mixture.num_experts, has_bias=mixture.router_bias),
            experts=tuple(
                expert(names.experts.format(expert=idx), mixture.intermediate_size, f".{idx}")
                for idx in range(mixture.num_experts)
            ),
            routing=mixture.routing,
            choice_bias=f"{prefix}.{names.choice_bias}" if mixture.has_choice_bias else None,
            shared=expert(names.shared, mixture.shared_size, ".shared") if mixture.shared_size else None,
            shared_gate=logits("router.shared", names.shared_gate, 1, has_bias=False)
            if mixture.has_shared_gate
            else None,
        )

    def _mlp(
        self, layer: int, names: Sequence[str], inner: int, reads: Norm | None, number: str, *, has_bias: bool
    ) -> Mlp:
        """names: of gate, up and down; number: an expert's suffix of its kinds, like ".3"."""
        sizes, style = self._sizes, self._style
        hidden = sizes.hidden_size
        kind = "gate_up" if style.is_gated else "up"
        up_parts = [Part(name, inner) for name in names[not style.is_gated : 2]]
        return Mlp(
            up=self.linear(
                layer, f"{kind}{number}", up_parts, hidden, has_bias=has_bias, reads=reads, writes_stream=False
            ),
            down=self.linear(layer, f"down{number}", [Part(names[2], hidden)], inner, has_bias=has_bias, reads=None),
            activation=sizes.activation,
            is_gated=style.is_gated,
        )

    def linear(
        self,
        layer: int,
        kind: str,
        parts: Sequence[Part],
        num_inputs: int,
        *,
        has_bias: bool,
        reads: Norm | None,
        writes_stream: bool | None = None,
    ) -> Linear:
        """A linear layer. One that does not read a norm writes to the residual stream, if `writes_stream` is None."""
        return Linear(
            site=Site(layer, kind),
            role=kind.partition(".")[0],
            parts=tuple(parts),
            num_inputs=num_inputs,
            has_bias=has_bias,
            reads=reads,
            writes_stream=reads is None if writes_stream is None else writes_stream,
        )
