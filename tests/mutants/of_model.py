"""Mutants of the layers, the model, attention and stages."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LAYERS = "model/layers.py"
LLAMA = "model/llama.py"
ATTENTION = "model/attention.py"
STAGES = "model/stages.py"
TIED = "model.tie_word_embeddings=true"
ONE_KEY_HEAD = ("model.num_attention_heads=8", "model.num_key_value_heads=1")

NORMED = ("model.qk_norm=true",)

OF_MODEL = [
    Mutant(
        "column-without-copy-to",
        LAYERS,
        "return column_linear(x, self.weight, self.tp, self.sequence_parallel, self.part, self.matmuls)",
        "return F.linear(all_gather(x, SEQUENCE, self.tp) if self.sequence_parallel else x, self.weight)",
        "gradient",
        "the gradient of a layer's input is this rank's share",
        "tp2-nosp",
    ),
    Mutant(
        "column-gathers-its-own",
        LAYERS,
        "return matmuls.forward(all_gather(x, SEQUENCE, tp) if cut else x, weight)",
        "return matmuls.forward(torch.cat([x] * tp.size, SEQUENCE) if cut else x, weight)",
        "other",
        "a rank sees its own part of the sequence in the place of the others'",
    ),
    Mutant(
        "column-weight-of-its-own-part",
        LAYERS,
        "ctx.matmuls.by_weight(grad, x if gathered is None else gathered.wait())",
        "ctx.matmuls.by_weight(grad, x if gathered is None else torch.cat([x] * tp.size, SEQUENCE))",
        "gradient",
        "the gradient of a weight is of this rank's part of the sequence",
    ),
    Mutant(
        "column-input-not-summed",
        LAYERS,
        "return grad_x if summed is None else summed.wait(), grad_weight",
        "return grad_x if grad_x is None else grad_x.chunk(tp.size, SEQUENCE)[tp.rank], grad_weight",
        "gradient",
        "the gradient of a layer's input misses the other ranks' shares",
    ),
    Mutant(
        "column-input-and-weight-swapped",
        LAYERS,
        "by_weight = ctx.part.weights and ctx.needs_input_grad[1]",
        "by_weight = ctx.part.inputs and ctx.needs_input_grad[1]",
        "gradient",
        "in a split backward weights get their gradients with the inputs, where they are dropped",
        "tp2-pp2-zbvzerobubble-acc4-full",
    ),
    Mutant(
        "column-computes-both",
        LAYERS,
        "by_weight = ctx.part.weights and ctx.needs_input_grad[1]",
        "by_weight = ctx.needs_input_grad[1]",
        "other",
        "a split backward computes the gradients of weights in both parts",
        "tp2-pp2-zbvzerobubble-acc4-full",
    ),
    Mutant(
        "row-cuts-without-sum",
        LAYERS,
        '''shares."""
        if self.sequence_parallel:
            return reduce_scatter(partial, SEQUENCE, self.tp)''',
        '''shares."""
        if self.sequence_parallel:
            return partial.chunk(self.tp.size, SEQUENCE)[self.tp.rank]''',
        "other",
        "a rank goes on with its share of the sum",
    ),
    Mutant(
        "row-without-reduce-from",
        LAYERS,
        """        return reduce_from(partial, self.tp)

    def matmul""",
        """        return partial

    def matmul""",
        "other",
        "a rank goes on with its share of the sum",
        "tp2-nosp",
    ),
    Mutant(
        "embedding-cuts-without-sum",
        LAYERS,
        """.masked_fill(elsewhere[..., None], 0.0)
        if self.sequence_parallel:
            return reduce_scatter(partial, SEQUENCE, self.tp)""",
        """.masked_fill(elsewhere[..., None], 0.0)
        if self.sequence_parallel:
            return partial.chunk(self.tp.size, SEQUENCE)[self.tp.rank]""",
        "other",
        "tokens of another rank's rows are embedded as zeros",
    ),
    Mutant(
        "embedding-without-reduce-from",
        LAYERS,
        """        return reduce_from(partial, self.tp)


class RMSNorm""",
        """        return partial


class RMSNorm""",
        "other",
        "tokens of another rank's rows are embedded as zeros",
        "tp2-nosp",
    ),
    Mutant(
        "embedding-keeps-foreign-rows",
        LAYERS,
        ".masked_fill(elsewhere[..., None], 0.0)",
        "",
        "other",
        "tokens of another rank's rows add the first row of this one",
    ),
    Mutant(
        "vocabulary-from-the-start",
        LAYERS,
        "self.first = tp.rank * self.rows",
        "self.first = 0 * self.rows",
        "other",
        "every rank holds the first rows of the vocabulary",
    ),
    Mutant(
        "norm-without-mark",
        LAYERS,
        "        if share:\n",
        "        if False:\n",
        "gradient",
        "the gradient of a norm is of this rank's part of the sequence",
    ),
    Mutant(
        "norm-always-summed",
        LLAMA,
        "share=tp_context.sequence_parallel",
        "share=tp_context.tp.size > 1",
        "gradient",
        "without sequence parallelism the gradient of a norm is summed over ranks that each have all of it",
        "tp2-nosp",
    ),
    Mutant(
        "query-norm-of-its-own-heads",
        LLAMA,
        '_head_norm("q_norm", config, tp)',
        '_head_norm("q_norm", config, ALONE)',
        "gradient",
        "the gradient of the queries' norm is of this rank's heads",
        words=NORMED,
    ),
    Mutant(
        "key-norm-of-its-own-heads",
        LLAMA,
        '_head_norm("k_norm", config, tp)',
        '_head_norm("k_norm", config, ALONE)',
        "gradient",
        "the gradient of the keys' norm is of this rank's heads",
        "tp2-nosp",
        words=(*NORMED, *ONE_KEY_HEAD),
    ),
    Mutant(
        "shards-unmarked",
        LAYERS,
        "    weight.tensor_model_parallel = True  # type: ignore[attr-defined]\n",
        "",
        "gradient",
        "the norm counts the shards of the first rank alone, and so does the clip",
    ),
    Mutant(
        "column-piece-of-the-first-rank",
        LAYERS,
        "cut = (self.tp.rank * width, 0)",
        "cut = (0, 0)",
        "other",
        "every rank draws and saves the first rows of a layer",
    ),
    Mutant(
        "row-piece-of-the-first-rank",
        LAYERS,
        "(0, self.tp.rank * width)",
        "(0, 0)",
        "other",
        "every rank draws and saves the first columns of a layer",
    ),
    Mutant(
        "head-without-copy-to",
        LLAMA,
        "else copy_to(hidden, self.tp)",
        "else hidden",
        "gradient",
        "the gradient of the last hidden states is of this rank's part of the vocabulary",
        "tp2-nosp",
    ),
    Mutant(
        "head-gathers-without-gradient",
        LLAMA,
        "hidden = gather(hidden, SEQUENCE, self.tp)",
        "hidden = all_gather(hidden, SEQUENCE, self.tp)",
        "gradient",
        "no gradient reaches the layers below the head",
    ),
    Mutant(
        "keys-gathered-without-gradient",
        LLAMA,
        "gather(x, x.dim() - 1, self.tp)",
        "all_gather(x, x.dim() - 1, self.tp)",
        "gradient",
        "with fewer key heads than ranks their projections get no gradient",
        words=ONE_KEY_HEAD,
    ),
    Mutant(
        "key-head-of-another-group",
        LLAMA,
        "queries // (self.heads // self.kv_heads)",
        "queries % self.kv_heads",
        "other",
        "query heads read key heads that are not theirs",
        "tp4",
        words=("model.num_key_value_heads=1",),
    ),
    Mutant(
        "key-heads-of-the-first-rank",
        LLAMA,
        "torch.arange(self.tp.rank * local, (self.tp.rank + 1) * local, device=x.device)",
        "torch.arange(local, device=x.device)",
        "other",
        "every rank reads the key heads of the first",
        "tp4",
        words=("model.num_key_value_heads=1",),
    ),
    Mutant(
        "tied-weights-apart",
        LLAMA,
        "if config.tie_word_embeddings and self.lm_head is not None and self.embed_tokens is not None:",
        "if False and self.lm_head is not None and self.embed_tokens is not None:",
        "other",
        "embedding and head of a tied model are two matrices",
        words=(TIED,),
    ),
    Mutant(
        "tied-ends-of-a-v-apart",
        STAGES,
        "if config.tie_word_embeddings and first.embed_tokens is not None and last.lm_head is not None:",
        "if False and first.embed_tokens is not None and last.lm_head is not None:",
        "gradient",
        "embedding and head in two stages of one rank are two matrices",
        "pp2-dualpipev",
        words=(TIED,),
    ),
    Mutant(
        "positions-of-a-cut-sequence",
        LLAMA,
        "x.shape[SEQUENCE] * (self.tp_context.tp.size if self.tp_context.sequence_parallel else 1)",
        "x.shape[SEQUENCE]",
        "other",
        "a later stage rotates by the length of its part of the sequence",
        "tp2-pp2-zbvzerobubble-acc4-full",
    ),
    Mutant(
        "recomputation-forgets-documents",
        LLAMA,
        "checkpoint(self._layer, x, cos, sin, core, ",
        "checkpoint(self._layer, x, cos, sin, None, ",
        "other",
        "with full recomputation attention crosses documents",
        "full",
        words=("data.document_mask=true",),
    ),
    Mutant(
        "logits-of-one-rank",
        LLAMA,
        "all_gather(logits, logits.dim() - 1, self.tp)[",
        "logits[",
        "other",
        "logits are of this rank's part of the vocabulary",
    ),
    Mutant(
        "attention-sees-the-future",
        ATTENTION,
        "is_causal=causal and mask is None",
        "is_causal=False",
        "other",
        "each position attends to those after it",
    ),
    Mutant(
        "documents-see-those-before",
        ATTENTION,
        "keys = slice(row * length + begin, row",
        "keys = slice(row * length, row",
        "other",
        "attention crosses into the documents before",
        words=("data.document_mask=true",),
    ),
    Mutant(
        "positions-of-the-row",
        ATTENTION,
        "return torch.arange(documents.shape[1], device=documents.device) - beginnings(documents)",
        "return torch.arange(documents.shape[1], device=documents.device).expand_as(documents)",
        "other",
        "positions do not begin anew in each document",
        words=("data.document_mask=true",),
    ),
    Mutant(
        "stages-of-another-rank",
        STAGES,
        "if stage.rank == rank",
        "if stage.rank != rank",
        "other",
        "a rank holds the stages of another",
        "pp2",
    ),
]
