//! Random valid graphs for property tests.

use std::collections::HashSet;

use proptest::prelude::*;

use crate::ir::{BinaryFn, DType, Dim, Graph, Layout, Op, OpKind, Operand, Stage, Sym, Type, UnaryFn, ValueId};
use crate::ir::{Weight, WeightId, outside_operands};

/// Valid graphs of up to some fifty operators of most kinds, some fused.
pub(crate) fn graphs() -> impl Strategy<Value = Graph> {
    let steps = prop::collection::vec((0..14u8, any::<u16>(), any::<u16>()), 0..40);
    let fusions = prop::collection::vec((0..8usize, 1..6usize), 0..6);
    (steps, fusions, any::<u16>()).prop_map(|(steps, fusions, output)| {
        let mut builder = Builder::new();
        for (kind, a, b) in steps {
            builder.step(kind, a as usize, b as usize);
        }
        builder.finish(&fusions, output as usize)
    })
}

struct Builder {
    graph: Graph,
    /// Rows of floats, of 8 or 16 columns.
    rows: Vec<ValueId>,
    /// The latest version of each state.
    versions: Vec<ValueId>,
    tokens: ValueId,
    pos: ValueId,
    slot: ValueId,
    table: ValueId,
    scope: String,
}

impl Builder {
    fn new() -> Self {
        let mut graph = Graph::new("random");
        let mut input = |name: &str, ty: Type| {
            let id = graph.add_value(name, ty);
            graph.inputs.push(id);
            id
        };
        let tokens = input("tokens", Type::new(DType::I32, [Sym::T]));
        let pos = input("pos", Type::new(DType::I32, [Sym::T]));
        let slot = input("slot", Type::new(DType::I32, [Sym::T]));
        let table = input("table", Type::new(DType::I32, [4u64, 2]));
        let x = input("x", rows_type(DType::F32, 16));
        Builder { graph, rows: vec![x], versions: vec![], tokens, pos, slot, table, scope: String::new() }
    }

    fn weight(&mut self, name: &str, shape: &[u64], layout: Layout) -> WeightId {
        self.graph.add_weight(Weight { name: name.into(), ty: Type::new(DType::BF16, shape.to_vec()), layout })
    }

    fn op(&mut self, kind: OpKind, operands: Vec<Operand>, types: Vec<Type>) -> Vec<ValueId> {
        let results: Vec<ValueId> = types.into_iter().map(|ty| self.graph.add_value("v", ty)).collect();
        self.graph.ops.push(Op::new(kind, operands, results.clone(), &self.scope));
        results
    }

    fn step(&mut self, kind: u8, a: usize, b: usize) {
        let x = self.rows[a % self.rows.len()];
        let ty = self.graph.ty(x).clone();
        let width = ty.last().expect("rows have constant columns");
        let (pos, slot) = (self.pos.into(), self.slot.into());
        let made = match kind {
            0 => {
                let function = UnaryFn::ALL[b % UnaryFn::ALL.len()].0;
                self.op(OpKind::Unary(function), vec![x.into()], vec![ty])
            }
            1 => {
                let y = self.rows[b % self.rows.len()];
                if *self.graph.ty(y) != ty {
                    return;
                }
                self.op(OpKind::Binary(BinaryFn::Mul), vec![x.into(), y.into()], vec![ty])
            }
            2 => {
                let c = Operand::Const((b as f64 - 30000.0) * 10f64.powi((a % 40) as i32 - 20));
                let operands = if b.is_multiple_of(2) { vec![x.into(), c] } else { vec![c, x.into()] };
                self.op(OpKind::Binary(BinaryFn::Sub), operands, vec![ty])
            }
            3 => {
                let w = self.weight(&format!("n.{width}"), &[width], Layout::Tensor);
                self.op(OpKind::RmsNorm { eps: 1e-5 }, vec![x.into(), w.into()], vec![ty])
            }
            4 => {
                let w = self.weight(&format!("w-{width}"), &[8, width], Layout::Tensor);
                self.op(OpKind::Matmul, vec![x.into(), w.into()], vec![rows_type(DType::BF16, 8)])
            }
            5 => {
                let parts: Vec<WeightId> =
                    (0..2).map(|i| self.weight(&format!("p{i}.{width}"), &[8, width], Layout::Tensor)).collect();
                let block = [None, Some(4)][b % 2];
                let layout = Layout::Concat { axis: 0, block, parts };
                let w = self.weight(&format!("ab{}/{width}", b % 2), &[16, width], layout);
                self.op(OpKind::Matmul, vec![x.into(), w.into()], vec![rows_type(DType::F16, 16)])
            }
            6 if width == 16 => {
                let kind = OpKind::Split { sizes: vec![8, 8], block: [None, Some(2)][b % 2] };
                let half = rows_type(ty.dtype, 8);
                self.op(kind, vec![x.into()], vec![half.clone(), half])
            }
            7 => {
                let w = self.weight(&format!("c.{width}"), &[width, 3], Layout::Tensor);
                let state = self.state(&[4, 8, width], DType::BF16);
                let operands = vec![x.into(), w.into(), state.into(), pos, slot];
                let state_ty = self.graph.ty(state).clone();
                let made = self.op(OpKind::Conv1dCausal, operands, vec![ty, state_ty]);
                self.advance(state, made[1]);
                vec![made[0]]
            }
            8 => self.op(OpKind::Rope { theta: 1e6, head_dim: 4 }, vec![x.into(), pos], vec![ty]),
            9 => {
                let kv = self.state(&[4, 2, width / 4, 8, 4], DType::F16);
                let table = self.table.into();
                let kv_ty = self.graph.ty(kv).clone();
                let kv_operands = vec![x.into(), x.into(), kv.into(), table, pos, slot];
                let next = self.op(OpKind::KvWrite, kv_operands, vec![kv_ty])[0];
                self.advance(kv, next);
                let kind = OpKind::Attention { heads: width / 4, scale: 0.5 };
                self.op(kind, vec![x.into(), next.into(), table, pos, slot], vec![ty])
            }
            10 => {
                let w = self.weight(&format!("e.{width}"), &[6, 8, width], Layout::Tensor);
                let chosen = self.op(OpKind::TopK { k: 2 }, vec![x.into(), slot], vec![pairs_type(DType::I32)])[0];
                let weights =
                    self.op(OpKind::GatherColumns, vec![x.into(), chosen.into()], vec![pairs_type(ty.dtype)])[0];
                let each = Type::new(DType::F32, [Sym::T.into(), 2u64.into(), Dim::fixed(8)]);
                let y = self.op(OpKind::ExpertMatmul, vec![x.into(), w.into(), chosen.into()], vec![each])[0];
                let operands = vec![y.into(), weights.into(), chosen.into()];
                self.op(OpKind::WeightedSum, operands, vec![rows_type(DType::F32, 8)])
            }
            11 => self.op(OpKind::Cast, vec![x.into()], vec![rows_type(DType::BF16, width)]),
            12 => {
                let w = self.weight("embed/table", &[100, 16], Layout::Tensor);
                self.op(OpKind::Embed, vec![self.tokens.into(), w.into()], vec![rows_type(DType::BF16, 16)])
            }
            _ => {
                self.scope = if b.is_multiple_of(4) { String::new() } else { format!("layers.{}.conv", a % 7) };
                return;
            }
        };
        self.rows.extend(made);
    }

    fn state(&mut self, shape: &[u64], dtype: DType) -> ValueId {
        let ty = Type::new(dtype, shape.to_vec());
        if let Some(&old) = self.versions.iter().find(|&&v| *self.graph.ty(v) == ty) {
            return old;
        }
        let id = self.graph.add_value("state", ty);
        self.graph.states.push(id);
        self.versions.push(id);
        id
    }

    fn advance(&mut self, old: ValueId, new: ValueId) {
        for version in &mut self.versions {
            if *version == old {
                *version = new;
            }
        }
    }

    fn finish(self, fusions: &[(usize, usize)], output: usize) -> Graph {
        let Builder { mut graph, rows, versions, .. } = self;
        graph.outputs = versions;
        graph.outputs.push(rows[output % rows.len()]);
        let mut rest = std::mem::take(&mut graph.ops);
        for &(skip, take) in fusions {
            let skip = skip.min(rest.len());
            graph.ops.extend(rest.drain(..skip));
            let body: Vec<Op> = rest.drain(..take.min(rest.len())).collect();
            if !body.is_empty() {
                graph.ops.push(fused(&graph, body, &rest));
            }
        }
        graph.ops.extend(rest);
        graph
    }
}

/// A fused operator of `body`, after which come the operators `rest`.
fn fused(graph: &Graph, body: Vec<Op>, rest: &[Op]) -> Op {
    let used: HashSet<ValueId> = rest.iter().flat_map(Op::uses).chain(graph.outputs.iter().copied()).collect();
    let results = body.iter().flat_map(|op| op.results.iter().copied()).filter(|id| used.contains(id)).collect();
    let kind = OpKind::Fused(vec![Stage::Norm, Stage::Matmul]);
    Op { kind, operands: outside_operands(&body), results, scope: "layers.0".into(), body }
}

fn rows_type(dtype: DType, columns: u64) -> Type {
    Type::new(dtype, [Sym::T.into(), Dim::fixed(columns)])
}

fn pairs_type(dtype: DType) -> Type {
    rows_type(dtype, 2)
}
