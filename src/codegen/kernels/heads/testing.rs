//! Steps around attention, as the compiler makes them, of any size.

use crate::codegen::kernels::Problem;
use crate::plan::{DType, Instr, Op, Phase, Semantic, Slot, TensorType};

/// Sizes of a step, with one type for all that are numbers.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    dtype: DType,
    rows: u64,
    heads: u64,
    kv_heads: u64,
    head: u64,
    page: u64,
    pages_per_slot: u64,
}

/// Three rows of 32 heads of 64 over 8 KV heads, in pages of 64.
pub fn sizes(dtype: DType) -> Sizes {
    Sizes { dtype, rows: 3, heads: 32, kv_heads: 8, head: 64, page: 64, pages_per_slot: 512 }
}

/// A step of a bucket of packed rows.
pub fn problem(semantic: &Semantic) -> Problem<'_> {
    Problem { semantic, phase: Phase::Prefill }
}

/// A step of a bucket with one row a sequence.
pub fn decode(semantic: &Semantic) -> Problem<'_> {
    Problem { semantic, phase: Phase::Decode }
}

impl Sizes {
    /// With so many rows.
    pub fn rows(self, rows: u64) -> Self {
        Sizes { rows, ..self }
    }

    /// With so many query heads.
    pub fn heads(self, heads: u64) -> Self {
        Sizes { heads, ..self }
    }

    /// With heads of this size.
    pub fn head(self, head: u64) -> Self {
        Sizes { head, ..self }
    }

    /// With room for so many pages a sequence.
    pub fn pages_per_slot(self, pages_per_slot: u64) -> Self {
        Sizes { pages_per_slot, ..self }
    }

    fn of(self, shape: &[u64]) -> TensorType {
        TensorType(self.dtype, shape.to_vec())
    }

    fn q(self) -> TensorType {
        self.of(&[self.rows, self.heads * self.head])
    }

    fn k(self) -> TensorType {
        self.of(&[self.rows, self.kv_heads * self.head])
    }

    /// Cache, block table, positions, slots.
    fn cache(self) -> [TensorType; 4] {
        let kv = self.of(&[2048, 2, self.kv_heads, self.page, self.head]);
        let index = |shape: &[u64]| TensorType(DType::I32, shape.to_vec());
        [kv, index(&[256, self.pages_per_slot]), index(&[self.rows]), index(&[self.rows])]
    }

    fn attend(self) -> Op {
        Op::Attention { heads: self.heads, scale: 1.0 / (self.head as f64).sqrt() }
    }

    fn semantic(name: &str, inputs: Vec<TensorType>, outputs: Vec<TensorType>, temps: Vec<TensorType>) -> Semantic {
        Semantic { name: name.into(), inputs, outputs, temps, body: vec![] }
    }

    /// Attention by itself.
    pub fn attention(self) -> Semantic {
        let inputs = [self.q()].into_iter().chain(self.cache()).collect();
        let body = vec![Instr(self.attend(), (0..5).map(Slot::In).collect(), vec![Slot::Out(0)])];
        Semantic { body, ..Self::semantic("attention", inputs, vec![self.q()], vec![]) }
    }

    /// The cache write by itself.
    pub fn kv_write(self) -> Semantic {
        let inputs = [self.k(), self.k()].into_iter().chain(self.cache()).collect();
        let body = vec![Instr(Op::KvWrite, (0..6).map(Slot::In).collect(), vec![])];
        Semantic { body, ..Self::semantic("kvwrite", inputs, vec![], vec![]) }
    }

    /// Norms, rotations and the cache write of q, k and v that are one input.
    pub fn prepared(self) -> Semantic {
        use Slot::{In, Out, Temp};
        let [kv, table, pos, slot] = self.cache();
        let joined = self.of(&[self.rows, (self.heads + 2 * self.kv_heads) * self.head]);
        let weight = self.of(&[self.head]);
        let inputs = vec![joined, weight.clone(), pos, weight, kv, table, slot];
        let temps = vec![self.q(), self.k(), self.k(), self.q(), self.k(), self.k()];
        let rope = Op::Rope { theta: 1e6, head_dim: self.head };
        let norm = Op::RmsNorm { eps: 1e-5 };
        let body = vec![
            Instr(Op::Split { block: None }, vec![In(0)], vec![Temp(0), Temp(1), Temp(2)]),
            Instr(norm.clone(), vec![Temp(0), In(1)], vec![Temp(3)]),
            Instr(rope.clone(), vec![Temp(3), In(2)], vec![Out(0)]),
            Instr(norm, vec![Temp(1), In(3)], vec![Temp(4)]),
            Instr(rope, vec![Temp(4), In(2)], vec![Temp(5)]),
            Instr(Op::KvWrite, vec![Temp(5), Temp(2), In(4), In(5), In(2), In(6)], vec![]),
        ];
        Semantic { body, ..Self::semantic("headrope+kvwrite", inputs, vec![self.q()], temps) }
    }

    /// The same of q, k and v that are three inputs.
    pub fn apart(self) -> Semantic {
        let mut semantic = self.prepared();
        semantic.body.remove(0);
        semantic.inputs.remove(0);
        semantic.inputs.extend([self.q(), self.k(), self.k()]);
        let moved = |slot: &mut Slot| match *slot {
            Slot::In(i) => *slot = Slot::In(i - 1),
            Slot::Temp(i) if i < 3 => *slot = Slot::In(6 + i),
            Slot::Temp(i) => *slot = Slot::Temp(i - 3),
            Slot::Out(_) => {}
        };
        for Instr(_, arguments, made) in &mut semantic.body {
            arguments.iter_mut().chain(made).for_each(moved);
        }
        semantic.temps.drain(..3);
        semantic
    }

    /// Norms, rotations, the cache write and attention.
    pub fn fused(self) -> Semantic {
        let mut semantic = self.prepared();
        semantic.name.push_str("+attention");
        semantic.temps.push(self.q());
        semantic.body[2].2 = vec![Slot::Temp(6)];
        let arguments = vec![Slot::Temp(6), Slot::In(4), Slot::In(5), Slot::In(2), Slot::In(6)];
        semantic.body.push(Instr(self.attend(), arguments, vec![Slot::Out(0)]));
        semantic
    }
}
