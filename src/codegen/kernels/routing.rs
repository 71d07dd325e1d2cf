//! The body of a router, with a norm before it and the sort of pairs after it or without.

use super::pattern::{args, dims, dtype, is_float, results};
use crate::plan::{BinaryFn, DType, Expr, Instr, Op, Semantic, Slot, UnaryFn};

/// What a router's body is made of. Values not named here live inside.
#[derive(Clone, PartialEq, Debug)]
pub struct Routing {
    /// Input of the norm, or of the gate.
    pub x: Slot,
    /// The norm.
    pub norm: Option<Norm>,
    /// The gate's weight `[E,K]`.
    pub gate: Slot,
    /// Added to the scores for the selection, `[E]`.
    pub bias: Option<Slot>,
    /// Slots of the rows.
    pub slot: Slot,
    /// The choice; an output, or inside.
    pub experts: Slot,
    /// The weights; an output.
    pub weights: Slot,
    /// Whether weights are divided by their sum, and what is added to that first.
    pub divided: Option<Option<f32>>,
    /// Factor on the weights, in the end.
    pub factor: Option<f32>,
    /// Pairs, places and offsets of the sort; outputs.
    pub group: Option<[Slot; 3]>,
    /// Rows, elements of a row, experts, and choices of a row.
    pub sizes: [u64; 4],
}

/// A norm of whole rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Norm {
    /// Its weight `[K]`.
    pub weight: Slot,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Its result; an output, or inside.
    pub result: Slot,
}

/// An operand of an elementwise function.
#[derive(Clone, Copy, PartialEq)]
enum Operand {
    Value(Slot),
    Number(f32),
}

impl Routing {
    /// The router that a semantic is, if it is one and nothing else.
    pub fn of(semantic: &Semantic) -> Option<Routing> {
        let mut group = None;
        let mut chain: Vec<&Instr> = vec![];
        for instr in &semantic.body {
            if instr.0 != Op::GroupRows {
                chain.push(instr);
            } else if group.replace((args::<1>(instr)?[0], results::<3>(instr)?)).is_some() {
                return None;
            }
        }
        let mut rest = &chain[..];
        let mut norm = None;
        if let Op::RmsNorm { eps } = rest.first()?.0 {
            let ([x, weight], [result]) = (args(rest[0])?, results(rest[0])?);
            norm = Some((x, Norm { weight, eps: eps as f32, result }));
            rest = &rest[1..];
        }
        let [product, sigmoid, after @ ..] = rest else { return None };
        let ([input, gate], [logits]) = (args(product)?, results(product)?);
        let [scores] = results(sigmoid)?;
        if product.0 != Op::Matmul || !is_sigmoid(sigmoid, logits) {
            return None;
        }
        rest = after;
        let mut inside = vec![logits, scores];
        let (mut selection, mut bias) = (scores, None);
        if let Some((BinaryFn::Add, Operand::Value(other), sum)) = with_other(rest.first()?, scores) {
            (selection, bias, rest) = (sum, Some(other), &rest[1..]);
            inside.push(sum);
        }
        let [select, pick, after @ ..] = rest else { return None };
        let ([selected, slot], [experts]) = (args(select)?, results(select)?);
        let [mut weights] = results(pick)?;
        if (&select.0, selected) != (&Op::TopK, selection) || pick.0 != Op::GatherColumns || pick.1 != [scores, experts]
        {
            return None;
        }
        rest = after;
        let mut divided = None;
        if let Some((added, quotient, sums, after)) = division(rest, weights) {
            inside.push(weights);
            inside.extend(sums);
            (divided, weights, rest) = (Some(added), quotient, after);
        }
        let mut factor = None;
        if let [last] = rest
            && let Some((BinaryFn::Mul, Operand::Number(by), scaled)) = with_other(last, weights)
        {
            inside.push(weights);
            (factor, weights, rest) = (Some(by), scaled, &[]);
        }
        let (x, norm) = norm.map_or((input, None), |(x, norm)| (x, Some(norm)));
        let fits = rest.is_empty()
            && norm.is_none_or(|norm| norm.result == input && dtype(semantic, norm.result) == dtype(semantic, x))
            && group.is_none_or(|(sorted, _)| sorted == experts);
        let ([rows, k], [count, chosen]) = (dims(semantic, x)?, dims(semantic, experts)?);
        let [all, _] = dims(semantic, gate)?;
        let found = Routing {
            x,
            norm,
            gate,
            bias,
            slot,
            experts,
            weights,
            divided,
            factor,
            group: group.map(|(_, results)| results),
            sizes: [rows, k, all, chosen],
        };
        (fits && count == rows && found.types_fit(semantic, &inside)).then_some(found)
    }

    /// True if values inside are f32 and no outputs, and all outputs are known.
    fn types_fit(&self, semantic: &Semantic, inside: &[Slot]) -> bool {
        let [_, k, experts, _] = self.sizes;
        let f32_temp = |&slot: &Slot| matches!(slot, Slot::Temp(_)) && dtype(semantic, slot) == DType::F32;
        let input = |slot: Slot| matches!(slot, Slot::In(_));
        let mut outputs = vec![self.weights];
        outputs.extend([Some(self.experts), self.norm.map(|norm| norm.result)].into_iter().flatten());
        outputs.retain(|slot| matches!(slot, Slot::Out(_)));
        outputs.extend(self.group.into_iter().flatten());
        let bias_fits = self
            .bias
            .is_none_or(|bias| input(bias) && is_float(semantic, bias) && dims(semantic, bias) == Some([experts]));
        let norm_fits = self.norm.is_none_or(|norm| input(norm.weight) && dims(semantic, norm.weight) == Some([k]));
        let group_fits = self.group.is_none_or(|group| dims(semantic, group[2]) == Some([experts + 1]));
        inside.iter().all(f32_temp)
            && [self.x, self.gate, self.slot].into_iter().all(input)
            && dtype(semantic, self.weights) == DType::F32
            && outputs.contains(&self.weights)
            && outputs.len() == semantic.outputs.len()
            && outputs.iter().all(|slot| matches!(slot, Slot::Out(_)))
            && (bias_fits && norm_fits && group_fits)
    }
}

fn is_sigmoid(instr: &Instr, of: Slot) -> bool {
    let Op::Pointwise(exprs) = &instr.0 else { return false };
    exprs[..] == [Expr::Arg(0), Expr::Unary(UnaryFn::Sigmoid, 0)] && instr.1 == [of]
}

/// The one function of two operands that an elementwise operator is, its operands and its result.
fn binary(instr: &Instr) -> Option<(BinaryFn, [Operand; 2], Slot)> {
    let (Op::Pointwise(exprs), [result]) = (&instr.0, results(instr)?) else { return None };
    let [first, second, Expr::Binary(function, a, b)] = exprs[..] else { return None };
    let operand = |at: u32| match [first, second].get(at as usize)? {
        Expr::Arg(i) => instr.1.get(*i as usize).copied().map(Operand::Value),
        Expr::Const(x) => Some(Operand::Number(*x)),
        _ => None,
    };
    Some((function, [operand(a)?, operand(b)?], result))
}

/// A function whose order of operands does not matter, of a value and another operand, with its result.
fn with_other(instr: &Instr, value: Slot) -> Option<(BinaryFn, Operand, Slot)> {
    let (function, [a, b], result) = binary(instr)?;
    let other = if a == Operand::Value(value) { b } else { a };
    let commutes = matches!(function, BinaryFn::Add | BinaryFn::Mul);
    (commutes && [a, b].contains(&Operand::Value(value)) && other != Operand::Value(value))
        .then_some((function, other, result))
}

/// What is added to the sum, the quotient, the sums, and the instructions after them.
type Division<'a> = (Option<f32>, Slot, Vec<Slot>, &'a [&'a Instr]);

/// `weights / (row_sum(weights) + constant)`.
fn division<'a>(body: &'a [&'a Instr], weights: Slot) -> Option<Division<'a>> {
    let (sum, mut rest) = body.split_first()?;
    let [mut divisor] = results(sum)?;
    if sum.0 != Op::RowSum || sum.1 != [weights] {
        return None;
    }
    let mut sums = vec![divisor];
    let mut added = None;
    if let Some((BinaryFn::Add, Operand::Number(number), result)) = with_other(rest.first()?, divisor) {
        (added, divisor, rest) = (Some(number), result, &rest[1..]);
        sums.push(divisor);
    }
    let (function, operands, quotient) = binary(rest.first()?)?;
    let expected = [Operand::Value(weights), Operand::Value(divisor)];
    (function == BinaryFn::Div && operands == expected).then_some((added, quotient, sums, &rest[1..]))
}
