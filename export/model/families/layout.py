"""From a family's style and sizes to the description of its decoder: names, linear layers, norms, blocks."""

from collections.abc import Sequence
from typing import NamedTuple

from export.model.description import (
    LM_HEAD,
    Attention,
    Block,
    Embedding,
    Experts,
    Head,
    Linear,
    Mlp,
    ModelConfig,
    Norm,
    Part,
    RopeConfig,
    Rotary,
    Site,
)
from export.model.families.row import Names, Sizes, Style


class Tokens(NamedTuple):
    """Ids with a meaning of their own."""

    eos_ids: tuple[int, ...]
    bos_id: int | None


def describe(
    model_type: str, sizes: Sizes, style: Style, names: Names, rope: RopeConfig, tokens: Tokens, *, is_tied: bool
) -> ModelConfig:
    """The decoder that `style` makes of `sizes`."""
    layout = _Layout(sizes, style, names, rope)
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
            num_positions=sizes.max_len if names.positions else 0,
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
        eos_ids=tokens.eos_ids,
        bos_id=tokens.bos_id,
    )


class _Layout:
    """Builds the parts of one decoder."""

    def __init__(self, sizes: Sizes, style: Style, names: Names, rope: RopeConfig) -> None:
        self._sizes, self._style, self._names = sizes, style, names
        self._rotary = None
        if style.has_rotary:
            dim = sizes.head_dim if style.rotary_dim is None else style.rotary_dim
            self._rotary = Rotary(rope=rope, head_dim=sizes.head_dim, dim=dim, interleaved=style.rotary_interleaved)

    def block(self, layer: int) -> Block:
        names, prefix = self._names, self._names.block.format(layer=layer)

        def norm(name: str) -> Norm | None:
            return self.norm(f"{prefix}.{name}") if name else None

        attention_norm = self.norm(f"{prefix}.{names.attention_norm}")
        mlp_norm = norm(names.mlp_norm)
        return Block(
            attention=self._attention(layer, prefix, attention_norm),
            mlp=self._mlp_or_experts(layer, prefix, mlp_norm or attention_norm),
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            attention_out_norm=norm(names.attention_out_norm),
            mlp_out_norm=norm(names.mlp_out_norm),
            is_parallel=self._style.is_parallel,
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
        )

    def _attention(self, layer: int, prefix: str, reads: Norm) -> Attention:
        sizes, style, names = self._sizes, self._style, self._names
        q_rows, kv_rows = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        parts = [
            Part(f"{prefix}.{name}", rows) for name, rows in zip(names.qkv, (q_rows, kv_rows, kv_rows), strict=True)
        ]
        q_norm, k_norm = (
            self.norm(f"{prefix}.{name}", sizes.head_dim) if style.qk_norm else None
            for name in (names.q_norm, names.k_norm)
        )
        o = self._down(layer, "o", f"{prefix}.{names.o}", q_rows, has_bias=style.o_bias)
        return Attention(
            qkv=self._reading(layer, "qkv", "qkv", parts, reads, has_bias=style.qkv_bias),
            o=o,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            scale=style.attention_scale,
            softcap=style.attention_softcap,
            window=style.windows[layer] if style.windows else None,
            rotary=self._rotary,
            q_norm=q_norm,
            k_norm=k_norm,
        )

    def _mlp_or_experts(self, layer: int, prefix: str, reads: Norm) -> Mlp | Experts:
        style, names = self._style, self._names
        if not style.num_experts:
            return self._mlp(layer, prefix, reads, "")
        router = Part(f"{prefix}.{names.router}", style.num_experts)
        return Experts(
            router=self._reading(layer, "router", "router", [router], reads, has_bias=False),
            experts=tuple(
                self._mlp(layer, f"{prefix}.{names.experts.format(expert=expert)}", reads, f".{expert}")
                for expert in range(style.num_experts)
            ),
            top_k=style.top_k,
        )

    def _mlp(self, layer: int, prefix: str, reads: Norm, number: str) -> Mlp:
        """`number`: of an expert, behind its kinds."""
        sizes, style, names = self._sizes, self._style, self._names
        inner = sizes.intermediate_size
        role = "gate_up" if style.is_gated else "up"
        parts = [Part(f"{prefix}.{name}", inner) for name in (names.gate, names.up)[not style.is_gated :]]
        return Mlp(
            up=self._reading(layer, f"{role}{number}", role, parts, reads, has_bias=style.mlp_bias),
            down=self._down(layer, f"down{number}", f"{prefix}.{names.down}", inner, has_bias=style.mlp_bias),
            activation=sizes.activation,
            is_gated=style.is_gated,
        )

    def _reading(
        self, layer: int, kind: str, role: str, parts: Sequence[Part], reads: Norm, *, has_bias: bool
    ) -> Linear:
        return Linear(
            site=Site(layer, kind),
            role=role,
            parts=tuple(parts),
            num_inputs=self._sizes.hidden_size,
            has_bias=has_bias,
            reads=reads,
        )

    def _down(self, layer: int, kind: str, name: str, num_inputs: int, *, has_bias: bool) -> Linear:
        """A layer that writes to the residual stream."""
        return Linear(
            site=Site(layer, kind),
            role=kind.partition(".")[0],
            parts=(Part(name, self._sizes.hidden_size),),
            num_inputs=num_inputs,
            has_bias=has_bias,
            writes_stream=True,
        )
