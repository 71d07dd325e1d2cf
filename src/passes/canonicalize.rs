//! One spelling for one thing.
//!
//! Needs nothing. Leaves, in operators whose operands may be exchanged, values before weights before numbers; no operator
//! that returns its operand as it is (times or over one, plus or minus zero, a cast to the same type, a split into one part,
//! a double negation); `x * sigmoid(x)` as silu; a division by a power of two as a multiplication. Results that the graph
//! returns keep their names, so operators that define one are not removed.
//!
//! Numbers stay the same to the last bit, except that `x + 0` gives zero a sign and that silu rounds once where its two
//! operators round twice.

use crate::ir::{BinaryFn, Graph, Op, OpKind, Operand, UnaryFn, Users, ValueId};
use crate::passes::{PassContext, Patch, Rewrite};

/// See the module.
pub struct Canonicalize;

impl Rewrite for Canonicalize {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let site = Site { graph, users, at, op: &graph.ops[at] };
        match (&site.op.kind, &site.op.operands[..]) {
            (OpKind::Binary(function), &[x, y]) => site.binary(*function, x, y),
            (OpKind::Unary(UnaryFn::Neg), &[Operand::Value(x)]) => site.double_negation(x),
            (OpKind::Cast, &[Operand::Value(x)]) => site.same_type(x).then(|| site.alias(x))?,
            (OpKind::Split { sizes, .. }, &[Operand::Value(x)]) if sizes.len() == 1 => site.alias(x),
            _ => None,
        }
    }
}

/// The operator under consideration.
struct Site<'a> {
    graph: &'a Graph,
    users: &'a Users,
    at: usize,
    op: &'a Op,
}

impl Site<'_> {
    fn binary(&self, function: BinaryFn, x: Operand, y: Operand) -> Option<Patch> {
        if function.commutes() && rank(y) < rank(x) {
            return Some(self.becomes(self.op.kind.clone(), vec![y, x]));
        }
        match (function, x, y) {
            (BinaryFn::Mul | BinaryFn::Div, Operand::Value(x), Operand::Const(1.0))
            | (BinaryFn::Add | BinaryFn::Sub, Operand::Value(x), Operand::Const(0.0)) => self.identity(x),
            (BinaryFn::Div, _, Operand::Const(divisor))
                if is_power_of_two(divisor) && is_power_of_two(1.0 / divisor) =>
            {
                Some(self.becomes(OpKind::Binary(BinaryFn::Mul), vec![x, Operand::Const(1.0 / divisor)]))
            }
            (BinaryFn::Mul, Operand::Value(x), Operand::Const(factor)) => self.nested_factor(x, factor),
            (BinaryFn::Mul, Operand::Value(x), Operand::Value(y)) => self.silu(x, y).or_else(|| self.silu(y, x)),
            _ => None,
        }
    }

    /// An operator whose result is `x`, up to the element type.
    fn identity(&self, x: ValueId) -> Option<Patch> {
        if self.same_type(x) {
            return self.alias(x);
        }
        let same_shape = self.graph.ty(x).shape == self.graph.ty(self.op.results[0]).shape;
        same_shape.then(|| self.becomes(OpKind::Cast, vec![x.into()]))
    }

    fn double_negation(&self, negated: ValueId) -> Option<Patch> {
        let inner = self.definition(negated, &OpKind::Unary(UnaryFn::Neg))?;
        let x = inner.operands.first()?.value()?;
        let exact = self.same_type(x) && self.same_type(negated);
        exact.then(|| self.alias(x))?
    }

    /// `x * gate` where `gate` is the sigmoid of `x`.
    fn silu(&self, x: ValueId, gate: ValueId) -> Option<Patch> {
        let sigmoid = self.definition(gate, &OpKind::Unary(UnaryFn::Sigmoid))?;
        let is_silu = sigmoid.operands.first()?.value() == Some(x);
        is_silu.then(|| self.becomes(OpKind::Unary(UnaryFn::Silu), vec![x.into()]))
    }

    /// `(x * a) * b` as `x * (a * b)`, where that is exact: both are powers of two of at least one, and nothing is converted.
    /// (Two smaller ones would round twice among the subnormal numbers.)
    fn nested_factor(&self, scaled: ValueId, b: f64) -> Option<Patch> {
        let inner = self.definition(scaled, &OpKind::Binary(BinaryFn::Mul))?;
        let &[Operand::Value(x), Operand::Const(a)] = &inner.operands[..] else { return None };
        let grows = |factor: f64| is_power_of_two(factor) && factor.abs() >= 1.0;
        let exact = grows(a) && grows(b) && is_power_of_two(a * b) && self.same_type(x) && self.same_type(scaled);
        exact.then(|| self.becomes(self.op.kind.clone(), vec![x.into(), Operand::Const(a * b)]))
    }

    fn definition(&self, value: ValueId, kind: &OpKind) -> Option<&Op> {
        let op = &self.graph.ops[self.users.definition(value)?];
        (op.kind == *kind).then_some(op)
    }

    fn same_type(&self, x: ValueId) -> bool {
        self.graph.ty(x) == self.graph.ty(self.op.results[0])
    }

    /// Another operator with the same results.
    fn becomes(&self, kind: OpKind, operands: Vec<Operand>) -> Patch {
        let op = Op::new(kind, operands, self.op.results.clone(), &self.op.scope);
        Patch::new(self.graph).remove(self.at).insert(op)
    }

    /// `x` in place of the operator's only result.
    fn alias(&self, x: ValueId) -> Option<Patch> {
        let result = self.op.results[0];
        (!self.users.is_output(result)).then(|| Patch::new(self.graph).remove(self.at).replace(result, x.into()))
    }
}

fn rank(operand: Operand) -> u8 {
    match operand {
        Operand::Value(_) => 0,
        Operand::Weight(_) => 1,
        Operand::Const(_) => 2,
    }
}

/// True for plus or minus a power of two that f32, in which kernels compute, holds as a normal number.
fn is_power_of_two(x: f64) -> bool {
    const FRACTION: u32 = (1 << 23) - 1;
    let narrow = x as f32;
    f64::from(narrow) == x && narrow.is_normal() && narrow.to_bits() & FRACTION == 0
}

#[cfg(test)]
mod tests {
    use super::is_power_of_two;

    #[test]
    fn powers_of_two_are_those_f32_holds_exactly() {
        for x in [1.0, -2.0, 0.125, 2f64.powi(127), 2f64.powi(-126)] {
            assert!(is_power_of_two(x), "{x}");
        }
        for x in [0.0, 3.0, 0.1, 2f64.powi(128), 2f64.powi(-127), f64::NAN, f64::INFINITY, 1.0 + 1e-12] {
            assert!(!is_power_of_two(x), "{x}");
        }
    }
}
