//! The decoder graph of an LFM2 model, from primitive operators only.
//!
//! Source of the computation: `transformers` 5.17.0, `models/lfm2_moe/modeling_lfm2_moe.py` and `models/lfm2`. Weight names
//! are the checkpoint's, except for experts: one weight holds all of them, `..experts.w1.weight [experts, width, hidden]`.

use crate::ir::config::{Config, Experts, FeedForward, Mixer};
use crate::ir::{
    BinaryFn, DType, Dim, Graph, Layout, Op, OpKind, Operand, Sym, Type, UnaryFn, ValueId, Weight, WeightId, shape,
};

/// What the graph depends on beside the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BuildOptions {
    /// Element type of activations and caches.
    pub dtype: DType,
    /// Sequence slots.
    pub max_sequences: u64,
    /// Positions of one sequence.
    pub max_context: u64,
    /// Pages of the KV cache.
    pub pages: u64,
    /// Positions of one page.
    pub page_tokens: u64,
    /// Columns of the convolution state of a slot.
    pub ring_columns: u64,
    /// Makes each router's choice of experts an input, `experts.N` `i32[T,k]` for layer N.
    pub forced_routing: bool,
}

/// Builds the graph. `weight_dtype` gives a weight's element type in the pool by its name.
///
/// Inputs: `tokens`, `pos`, `slot`, `i32[T]`, and `rows`, `i32[R]`; results: `next`, `i32[R]`, `logits`, `f32[R,vocab]`, and the
/// states.
///
/// # Errors
/// Sizes that do not fit together, such as a ring shorter than the convolution.
pub fn build(config: &Config, options: &BuildOptions, weight_dtype: &dyn Fn(&str) -> DType) -> Result<Graph, String> {
    let mut graph = Graph::new("lfm2");
    let i32_rows = |sym: Sym| Type::new(DType::I32, [sym]);
    let input = |graph: &mut Graph, name: &str, sym: Sym| {
        let id = graph.add_value(name, i32_rows(sym));
        graph.inputs.push(id);
        id
    };
    let tokens = input(&mut graph, "tokens", Sym::T);
    let pos = input(&mut graph, "pos", Sym::T);
    let slot = input(&mut graph, "slot", Sym::T);
    let rows = input(&mut graph, "rows", Sym::R);
    let mut builder = Builder {
        graph,
        config,
        options,
        weight_dtype,
        pos,
        slot,
        pages: None,
        prefix: String::new(),
        scope: String::new(),
        final_states: vec![],
    };
    builder.model(tokens, rows)?;
    Ok(builder.graph)
}

struct Builder<'a> {
    graph: Graph,
    config: &'a Config,
    options: &'a BuildOptions,
    weight_dtype: &'a dyn Fn(&str) -> DType,
    pos: ValueId,
    slot: ValueId,
    pages: Option<ValueId>,
    /// Of value names: `l3.`.
    prefix: String,
    scope: String,
    final_states: Vec<ValueId>,
}

impl Builder<'_> {
    fn model(&mut self, tokens: ValueId, rows: ValueId) -> Result<(), String> {
        let (vocab, hidden) = (self.config.vocab, self.config.hidden);
        let embedding = self.weight("model.embed_tokens.weight", &[vocab, hidden]);
        self.scope = "embed".into();
        let mut h = self.op(OpKind::Embed, &[tokens.into(), embedding.into()], "h")?;
        for (i, layer) in self.config.layers.iter().enumerate() {
            self.prefix = format!("l{i}.");
            let base = format!("model.layers.{i}");
            self.scope = format!("layers.{i}.{}", if layer.mixer == Mixer::Conv { "conv" } else { "attention" });
            let n = self.norm(h, &format!("{base}.operator_norm.weight"), hidden)?;
            let mixed = match layer.mixer {
                Mixer::Conv => self.short_conv(n, &base, i)?,
                Mixer::Attention => self.attention(n, &base, i)?,
            };
            h = self.binary(BinaryFn::Add, h, mixed, "h")?;
            self.scope = format!("layers.{i}.ffn");
            let n = self.norm(h, &format!("{base}.ffn_norm.weight"), hidden)?;
            let out = match &layer.feed_forward {
                FeedForward::Dense(width) => self.dense(n, &base, *width)?,
                FeedForward::Experts(experts) => self.experts(n, &base, i, experts)?,
            };
            h = self.binary(BinaryFn::Add, h, out, "h")?;
        }
        self.prefix.clear();
        self.scope = "head".into();
        let chosen = self.op(OpKind::GatherRows, &[h.into(), rows.into()], "hidden")?;
        let n = self.norm(chosen, "model.embedding_norm.weight", hidden)?;
        let head = if self.config.tied_head { embedding } else { self.weight("lm_head.weight", &[vocab, hidden]) };
        let logits = self.op_as(OpKind::Matmul, &[n.into(), head.into()], "logits", DType::F32)?;
        let params = Type::new(DType::I32, [self.options.max_sequences, shape::SAMPLING_COLUMNS]);
        let sampling = self.state("sampling", params);
        let operands = [logits.into(), rows.into(), self.pos.into(), self.slot.into(), sampling.into()];
        let next = self.op_as(OpKind::Sample, &operands, "next", DType::I32)?;
        self.graph.outputs = vec![next, logits];
        self.graph.outputs.extend(&self.final_states);
        Ok(())
    }

    fn short_conv(&mut self, n: ValueId, base: &str, layer: usize) -> Result<ValueId, String> {
        let (hidden, taps) = (self.config.hidden, self.config.conv_taps);
        let projected =
            self.linear(n, &format!("{base}.conv.in_proj"), 3 * hidden, hidden, self.config.conv_bias, "bcx")?;
        let split = OpKind::Split { sizes: vec![hidden; 3], block: None };
        let parts = self.ops(split, &[projected.into()], &[("b", None), ("c", None), ("x", None)])?;
        let gated = self.binary(BinaryFn::Mul, parts[0], parts[2], "u")?;
        let ring = Type::new(self.options.dtype, [self.options.max_sequences, self.options.ring_columns, hidden]);
        let state = self.state(&format!("conv.{layer}"), ring);
        let weight = self.weight(&format!("{base}.conv.conv.weight"), &[hidden, taps]);
        let operands = [gated.into(), weight.into(), state.into(), self.pos.into(), self.slot.into()];
        let prefix = std::mem::take(&mut self.prefix);
        let names = [(&*format!("{prefix}y"), None), (&*format!("conv.{layer}.next"), None)];
        let results = self.ops(OpKind::Conv1dCausal, &operands, &names)?;
        self.prefix = prefix;
        self.final_states.push(results[1]);
        let mut y = results[0];
        if self.config.conv_bias {
            y = self.bias(y, &format!("{base}.conv.conv.bias"), hidden)?;
        }
        let gated = self.binary(BinaryFn::Mul, parts[1], y, "g")?;
        self.linear(gated, &format!("{base}.conv.out_proj"), hidden, hidden, self.config.conv_bias, "o")
    }

    fn attention(&mut self, n: ValueId, base: &str, layer: usize) -> Result<ValueId, String> {
        let Config { heads, kv_heads, head_dim, hidden, rope_theta, .. } = *self.config;
        let base = format!("{base}.self_attn");
        let q = self.linear(n, &format!("{base}.q_proj"), heads * head_dim, hidden, false, "q")?;
        let k = self.linear(n, &format!("{base}.k_proj"), kv_heads * head_dim, hidden, false, "k")?;
        let v = self.linear(n, &format!("{base}.v_proj"), kv_heads * head_dim, hidden, false, "v")?;
        let rope = || OpKind::Rope { theta: rope_theta, head_dim };
        let q = self.norm(q, &format!("{base}.q_layernorm.weight"), head_dim)?;
        let q = self.op(rope(), &[q.into(), self.pos.into()], "qr")?;
        let k = self.norm(k, &format!("{base}.k_layernorm.weight"), head_dim)?;
        let k = self.op(rope(), &[k.into(), self.pos.into()], "kr")?;
        let table = self.block_table();
        let cache = [self.options.pages, 2, kv_heads, self.options.page_tokens, head_dim];
        let kv = self.state(&format!("kv.{layer}"), Type::new(self.options.dtype, cache));
        let operands = [k.into(), v.into(), kv.into(), table.into(), self.pos.into(), self.slot.into()];
        let prefix = std::mem::take(&mut self.prefix);
        let written = self.op(OpKind::KvWrite, &operands, &format!("kv.{layer}.next"))?;
        self.prefix = prefix;
        self.final_states.push(written);
        let operands = [q.into(), written.into(), table.into(), self.pos.into(), self.slot.into()];
        let scale = (head_dim as f64).powf(-0.5);
        let attended = self.op(OpKind::Attention { heads, scale }, &operands, "a")?;
        self.linear(attended, &format!("{base}.out_proj"), hidden, heads * head_dim, false, "o")
    }

    fn dense(&mut self, n: ValueId, base: &str, width: u64) -> Result<ValueId, String> {
        let base = format!("{base}.feed_forward");
        let gate = self.linear(n, &format!("{base}.w1"), width, self.config.hidden, false, "gate")?;
        let up = self.linear(n, &format!("{base}.w3"), width, self.config.hidden, false, "up")?;
        let silu = self.op(OpKind::Unary(UnaryFn::Silu), &[gate.into()], "silu")?;
        let product = self.binary(BinaryFn::Mul, silu, up, "m")?;
        self.linear(product, &format!("{base}.w2"), self.config.hidden, width, false, "d")
    }

    fn experts(&mut self, n: ValueId, base: &str, layer: usize, experts: &Experts) -> Result<ValueId, String> {
        let base = format!("{base}.feed_forward");
        let Experts { count, per_token, width, .. } = *experts;
        let hidden = self.config.hidden;
        let gate = self.weight(&format!("{base}.gate.weight"), &[count, hidden]);
        let router = self.op_as(OpKind::Matmul, &[n.into(), gate.into()], "router", DType::F32)?;
        let scores = self.op_as(OpKind::Unary(UnaryFn::Sigmoid), &[router.into()], "scores", DType::F32)?;
        let chosen = if self.options.forced_routing {
            let chosen = self.graph.add_value(
                &format!("experts.{layer}"),
                Type::new(DType::I32, [Dim::from(Sym::T), Dim::fixed(per_token)]),
            );
            self.graph.inputs.push(chosen);
            chosen
        } else {
            self.selection(scores, &base, experts)?
        };
        let mut weights = self.op_as(OpKind::GatherColumns, &[scores.into(), chosen.into()], "weights", DType::F32)?;
        if experts.normalise {
            let sum = self.op_as(OpKind::RowSum, &[weights.into()], "sum", DType::F32)?;
            let sum = self.scalar(BinaryFn::Add, sum, 1e-6, "sum")?;
            let divide = OpKind::Binary(BinaryFn::Div);
            weights = self.op_as(divide, &[weights.into(), sum.into()], "weights", DType::F32)?;
        }
        weights = self.scalar(BinaryFn::Mul, weights, experts.scaling, "weights")?;
        let w1 = self.weight(&format!("{base}.experts.w1.weight"), &[count, width, hidden]);
        let w3 = self.weight(&format!("{base}.experts.w3.weight"), &[count, width, hidden]);
        let w2 = self.weight(&format!("{base}.experts.w2.weight"), &[count, hidden, width]);
        let gate = self.op(OpKind::ExpertMatmul, &[n.into(), w1.into(), chosen.into()], "gate")?;
        let up = self.op(OpKind::ExpertMatmul, &[n.into(), w3.into(), chosen.into()], "up")?;
        let silu = self.op(OpKind::Unary(UnaryFn::Silu), &[gate.into()], "silu")?;
        let product = self.binary(BinaryFn::Mul, silu, up, "m")?;
        let down = self.op(OpKind::ExpertMatmul, &[product.into(), w2.into(), chosen.into()], "d")?;
        self.op(OpKind::WeightedSum, &[down.into(), weights.into(), chosen.into()], "moe")
    }

    /// The columns of the experts that the router chooses.
    fn selection(&mut self, scores: ValueId, base: &str, experts: &Experts) -> Result<ValueId, String> {
        let mut selection = scores;
        if experts.bias {
            let bias = self.f32_weight(&format!("{base}.expert_bias"), &[experts.count]);
            let add = OpKind::Binary(BinaryFn::Add);
            selection = self.op_as(add, &[scores.into(), bias.into()], "selection", DType::F32)?;
        }
        let top = OpKind::TopK { k: experts.per_token };
        self.op_as(top, &[selection.into(), self.slot.into()], "experts", DType::I32)
    }

    fn norm(&mut self, x: ValueId, weight: &str, width: u64) -> Result<ValueId, String> {
        let weight = self.weight(weight, &[width]);
        self.op(OpKind::RmsNorm { eps: self.config.norm_eps }, &[x.into(), weight.into()], "n")
    }

    fn linear(&mut self, x: ValueId, base: &str, n: u64, k: u64, bias: bool, name: &str) -> Result<ValueId, String> {
        let weight = self.weight(&format!("{base}.weight"), &[n, k]);
        let product = self.op(OpKind::Matmul, &[x.into(), weight.into()], name)?;
        if bias { self.bias(product, &format!("{base}.bias"), n) } else { Ok(product) }
    }

    fn bias(&mut self, x: ValueId, name: &str, width: u64) -> Result<ValueId, String> {
        let bias = self.weight(name, &[width]);
        self.op(OpKind::Binary(BinaryFn::Add), &[x.into(), bias.into()], "biased")
    }

    fn binary(&mut self, function: BinaryFn, x: ValueId, y: ValueId, name: &str) -> Result<ValueId, String> {
        self.op(OpKind::Binary(function), &[x.into(), y.into()], name)
    }

    fn scalar(&mut self, function: BinaryFn, x: ValueId, y: f64, name: &str) -> Result<ValueId, String> {
        let dtype = self.graph.ty(x).dtype;
        self.op_as(OpKind::Binary(function), &[x.into(), Operand::Const(y)], name, dtype)
    }

    fn weight(&mut self, name: &str, sizes: &[u64]) -> WeightId {
        let dtype = (self.weight_dtype)(name);
        self.add_weight(name, dtype, sizes)
    }

    fn f32_weight(&mut self, name: &str, sizes: &[u64]) -> WeightId {
        self.add_weight(name, DType::F32, sizes)
    }

    fn add_weight(&mut self, name: &str, dtype: DType, sizes: &[u64]) -> WeightId {
        let ty = Type::new(dtype, sizes.iter().copied());
        self.graph.add_weight(Weight { name: name.to_owned(), ty, layout: Layout::Tensor })
    }

    fn state(&mut self, name: &str, ty: Type) -> ValueId {
        let id = self.graph.add_value(name, ty);
        self.graph.states.push(id);
        id
    }

    fn block_table(&mut self) -> ValueId {
        if let Some(table) = self.pages {
            return table;
        }
        let per_sequence = self.options.max_context.div_ceil(self.options.page_tokens);
        let table = self.state("pages", Type::new(DType::I32, [self.options.max_sequences, per_sequence]));
        self.pages = Some(table);
        table
    }

    /// An operator with one result of the activation type.
    fn op(&mut self, kind: OpKind, operands: &[Operand], name: &str) -> Result<ValueId, String> {
        let dtype = self.options.dtype;
        self.op_as(kind, operands, name, dtype)
    }

    fn op_as(&mut self, kind: OpKind, operands: &[Operand], name: &str, dtype: DType) -> Result<ValueId, String> {
        Ok(self.ops(kind, operands, &[(name, Some(dtype))])?[0])
    }

    /// An operator with results of these names and types (the activation type where none is given).
    fn ops(
        &mut self,
        kind: OpKind,
        operands: &[Operand],
        results: &[(&str, Option<DType>)],
    ) -> Result<Vec<ValueId>, String> {
        let types: Vec<Type> = operands.iter().map(|operand| self.graph.operand_type(operand)).collect();
        let shapes: Vec<Vec<Dim>> = shape::result_shapes(&kind, &types)
            .map_err(|fault| format!("{}: `{}`: {fault}", self.scope, kind.mnemonic()))?;
        let ids: Vec<ValueId> = shapes
            .into_iter()
            .zip(results)
            .map(|(shape, (name, dtype))| {
                let ty = Type { dtype: dtype.unwrap_or(self.options.dtype), shape };
                self.graph.add_value(&format!("{}{name}", self.prefix), ty)
            })
            .collect();
        self.graph.ops.push(Op::new(kind, operands.to_vec(), ids.clone(), &self.scope));
        Ok(ids)
    }
}

#[cfg(test)]
mod tests;
