//! What the twins of matrix products of many rows have in common: a product at the front of a body, with what follows it.

use super::builder::Builder;
use super::expression::Epilogue;
use super::pattern::{Body, args, dims, dtype, is_half, results, rows_and_last};
use crate::plan::{DType, Instr, Op, Semantic, Slot};

/// Rows of x in a band of tiles, whose weights blocks that run at the same time share.
pub const BAND_ROWS: u64 = 2048;

/// A body that is a product, `x [..,K]` times `w [..,N,K]`, and an epilogue.
#[derive(Clone, PartialEq, Debug)]
pub struct Product {
    /// Which row of x and which matrix of w a row of the result takes.
    pub form: Form,
    /// The left operand.
    pub x: Slot,
    /// The weight.
    pub w: Slot,
    /// Rows of the result.
    pub rows: u64,
    /// Size of the axis summed over.
    pub k: u64,
    /// Columns of the product.
    pub n: u64,
    /// Matrices of w.
    pub experts: u64,
    /// What follows.
    pub epilogue: Epilogue,
}

/// Which row of x and which matrix of w a row of the result takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// The same row, the only matrix.
    Plain,
    /// Rows sorted by matrix, group g at offsets g to g + 1.
    Grouped {
        /// The groups' bounds.
        offsets: Slot,
        /// Row `pairs[r] / k` of x instead of the same.
        gathered: Option<(Slot, u64)>,
    },
    /// Row r has matrix `experts[r]`, and row `r / k` of x.
    ByPair {
        /// The matrices.
        experts: Slot,
        /// Rows of the result for one of x.
        k: u64,
    },
}

impl Product {
    /// The product that a body begins with ([`Product::of`]), if tensor cores can compute it from rows of whole chunks of 16 bytes.
    pub fn of_tensor_cores(semantic: &Semantic) -> Option<Product> {
        let product = Product::of(semantic)?;
        let (x, w) = (dtype(semantic, product.x), dtype(semantic, product.w));
        (is_half(x) && x == w && product.in_chunks()).then_some(product)
    }

    /// The same of rows of f32, as sums of terms that have the weight's type, bf16.
    pub fn of_terms(semantic: &Semantic) -> Option<Product> {
        let product = Product::of(semantic)?;
        let types = (dtype(semantic, product.x), dtype(semantic, product.w));
        (types == (DType::F32, DType::BF16) && product.in_chunks()).then_some(product)
    }

    /// Whether tiles can have rows of the weight and of the result by whole chunks of 16 bytes.
    fn in_chunks(&self) -> bool {
        let chunked = self.k > 0 && self.k.is_multiple_of(8) && self.n.is_multiple_of(8 * self.halves());
        let halves = self.epilogue.block.is_none_or(|block| block == 8);
        chunked && halves && !matches!(self.form, Form::ByPair { .. })
    }

    /// Whether a list says which rows of x they are.
    pub fn gathers(&self) -> bool {
        matches!(self.form, Form::Grouped { gathered: Some(_), .. })
    }

    /// The product that a body begins with; none if it is none, or if anything but an epilogue follows.
    pub fn of(semantic: &Semantic) -> Option<Product> {
        let mut body = Body::of(semantic);
        let ((), instr) = body.take(|op| {
            let product =
                matches!(op, Op::Matmul | Op::GroupedMatmulGather { .. } | Op::GroupedMatmul | Op::ExpertMatmul);
            product.then_some(())
        })?;
        let [product] = results(instr)?;
        let (form, [x, w], experts) = form(semantic, instr)?;
        let epilogue = Epilogue::new(semantic, body.rest, product)?;
        let (rows, n) = rows_and_last(semantic, product);
        let (_, k) = rows_and_last(semantic, x);
        let inner = rows_and_last(semantic, w);
        if inner != (experts * n, k) || rows == 0 || n == 0 || semantic.outputs.len() != 1 {
            return None;
        }
        // Everything after the product has its rows and columns, or those of a half.
        let columns = if epilogue.block.is_some() { n / 2 } else { n };
        let fits = |slot: &Slot| rows_and_last(semantic, *slot) == (rows, columns);
        let after = if epilogue.block.is_some() { &body.rest[1..] } else { body.rest };
        let fit = after.iter().all(|Instr(_, _, made)| made.iter().all(fits)) && fits(&epilogue.output);
        let evenly = epilogue.block.is_none_or(|block| block > 0 && n.is_multiple_of(2 * block));
        let floats = [x, w, product, epilogue.output].iter().all(|&slot| dtype(semantic, slot) != DType::I32);
        (fit && evenly && floats).then_some(Product { form, x, w, rows, k, n, experts, epilogue })
    }

    /// Halves of the product that one column of the result takes.
    pub fn halves(&self) -> u64 {
        if self.epilogue.block.is_some() { 2 } else { 1 }
    }

    /// Tiles of `height` rows that there may be at most, whatever the groups; those of the rows past the last group included.
    pub fn row_tiles(&self, height: u64) -> u64 {
        match self.form {
            Form::Grouped { .. } => self.rows.min((self.rows + (self.experts + 1) * (height - 1)) / height),
            _ => self.rows.div_ceil(height),
        }
    }

    /// Tiles of `height` rows to expect if rows are spread over all groups.
    pub fn expected_row_tiles(&self, height: u64) -> f64 {
        if !matches!(self.form, Form::Grouped { .. }) {
            return self.rows.div_ceil(height) as f64;
        }
        let groups = self.experts.min(self.rows).max(1) as f64;
        groups * (self.rows as f64 / groups / height as f64 + 0.5).max(1.0)
    }

    /// Writes the types and sizes, and adds the parameters: `x`, `w`, of the form, of the epilogue, and `rows` where the
    /// launch does not tell.
    pub fn declare(&self, builder: &mut Builder) {
        let (x, w) = (builder.ty(self.x).0, builder.ty(self.w).0);
        builder.alias("X", x).alias("W", w);
        builder.constant("K", self.k).constant("N", self.n);
        builder.pointer("x", self.x).pointer("w", self.w);
        self.declare_rest(builder);
    }

    /// The same without `X`, `W`, sizes, `x` and `w`.
    pub fn declare_rest(&self, builder: &mut Builder) {
        let (mut grouped, mut gathered, mut by_pair) = (0, 0, 0);
        match self.form {
            Form::Plain => {}
            Form::Grouped { offsets, gathered: from } => {
                grouped = 1;
                if let Some((pairs, k)) = from {
                    gathered = 1;
                    builder.constant("PER_TOKEN", k).pointer("pairs", pairs);
                }
                builder.constant("EXPERTS", self.experts).pointer("offsets", offsets);
            }
            Form::ByPair { experts, k } => {
                by_pair = 1;
                builder.constant("PER_TOKEN", k).pointer("experts", experts);
            }
        }
        builder.line(format_args!("#define GROUPED {grouped}"));
        builder.line(format_args!("#define GATHERED {gathered}"));
        builder.line(format_args!("#define BY_PAIR {by_pair}"));
        self.epilogue.declare(builder);
        if by_pair == 0 {
            builder.int("rows", self.rows);
        }
    }
}

/// The form of a product, its operands, and how many matrices there are; none if shapes do not fit.
fn form(semantic: &Semantic, instr: &Instr) -> Option<(Form, [Slot; 2], u64)> {
    let Instr(op, arguments, made) = instr;
    let &[product] = &made[..] else { return None };
    if !arguments.iter().all(|slot| matches!(slot, Slot::In(_))) {
        return None;
    }
    let shape = |slot| rows_and_last(semantic, slot);
    let index = |slot: Slot, count: u64| {
        let (rows, last) = shape(slot);
        (dtype(semantic, slot) == DType::I32 && rows * last == count).then_some(slot)
    };
    let found = match *op {
        Op::Matmul => {
            let [x, w] = args(instr)?;
            let ([rows, _], [_, _]) = (dims::<2>(semantic, x)?, dims::<2>(semantic, w)?);
            (shape(product).0 == rows).then_some((Form::Plain, [x, w], 1))
        }
        Op::GroupedMatmulGather { k } => {
            let [x, w, pairs, offsets] = args(instr)?;
            let ([rows, _], [experts, _, _]) = (dims::<2>(semantic, x)?, dims::<3>(semantic, w)?);
            let gathered = Some((index(pairs, shape(product).0)?, k));
            let form = Form::Grouped { offsets: index(offsets, experts + 1)?, gathered };
            (k > 0 && shape(product).0 == rows * k).then_some((form, [x, w], experts))
        }
        Op::GroupedMatmul => {
            let [x, w, offsets] = args(instr)?;
            let ([rows, _], [experts, _, _]) = (dims::<2>(semantic, x)?, dims::<3>(semantic, w)?);
            let form = Form::Grouped { offsets: index(offsets, experts + 1)?, gathered: None };
            (shape(product).0 == rows).then_some((form, [x, w], experts))
        }
        Op::ExpertMatmul => {
            let [x, w, chosen] = args(instr)?;
            let ([rows, each], [experts, _, _]) = (dims::<2>(semantic, chosen)?, dims::<3>(semantic, w)?);
            let k = match shape(x).0 {
                count if count == rows * each && dims::<3>(semantic, x).is_some() => 1,
                count if count == rows && dims::<2>(semantic, x).is_some() => each,
                _ => return None,
            };
            let form = Form::ByPair { experts: index(chosen, shape(product).0)?, k };
            Some((form, [x, w], experts))
        }
        _ => None,
    };
    found.filter(|(_, _, experts)| *experts > 0)
}

/// Semantics of products, for the tests of twins.
#[cfg(test)]
pub mod testing {
    use super::*;
    use crate::plan::{BinaryFn, Expr, TensorType, UnaryFn};

    /// What follows the product.
    #[derive(Clone, Copy, PartialEq, Debug)]
    pub enum After {
        /// Nothing.
        Nothing,
        /// The addition of an operand of the result's shape.
        Residual,
        /// `silu(gate) * up` of halves interleaved so.
        Swiglu(Option<u64>),
    }

    /// x, w and y of one type.
    pub fn semantic(op: Op, ty: DType, rows: u64, k: u64, n: u64, after: After) -> Semantic {
        typed(op, [ty, ty, ty], rows, k, n, after)
    }

    /// A product of `rows` rows of x over five experts where there are any, four a token, with the types of x, w, y.
    pub fn typed(op: Op, [x, w, y]: [DType; 3], rows: u64, k: u64, n: u64, after: After) -> Semantic {
        let index = |shape| TensorType(DType::I32, shape);
        let (experts, each) = (5, 4);
        let mut inputs = vec![TensorType(x, vec![rows, k]), TensorType(w, vec![experts, n, k])];
        let mut outer = vec![rows];
        match op {
            Op::Matmul => inputs[1].1 = vec![n, k],
            Op::GroupedMatmulGather { .. } => {
                inputs.extend([index(vec![rows * each]), index(vec![experts + 1])]);
                outer = vec![rows * each];
            }
            Op::GroupedMatmul => inputs.push(index(vec![experts + 1])),
            _ => {
                inputs.push(index(vec![rows, each]));
                outer.push(each);
            }
        }
        let shape = |n: u64| outer.iter().copied().chain([n]).collect::<Vec<_>>();
        let arguments = (0..inputs.len() as u32).map(Slot::In).collect();
        let mut semantic = Semantic {
            name: "product".into(),
            inputs,
            outputs: vec![TensorType(y, shape(n))],
            temps: vec![],
            body: vec![Instr(op, arguments, vec![Slot::Out(0)])],
        };
        let temp = |semantic: &mut Semantic, n| {
            semantic.temps.push(TensorType(y, shape(n)));
            Slot::Temp(semantic.temps.len() as u32 - 1)
        };
        match after {
            After::Nothing => {}
            After::Residual => {
                let (product, stream) = (temp(&mut semantic, n), Slot::In(semantic.inputs.len() as u32));
                semantic.body[0].2 = vec![product];
                semantic.inputs.push(TensorType(y, shape(n)));
                let sum = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 1)];
                semantic.body.push(Instr(Op::Pointwise(sum), vec![stream, product], vec![Slot::Out(0)]));
            }
            After::Swiglu(block) => {
                let product = temp(&mut semantic, n);
                let [gate, up, silu] = [0; 3].map(|_| temp(&mut semantic, n / 2));
                semantic.body[0].2 = vec![product];
                semantic.outputs[0].1 = shape(n / 2);
                semantic.body.push(Instr(Op::Split { block }, vec![product], vec![gate, up]));
                let function = vec![Expr::Arg(0), Expr::Unary(UnaryFn::Silu, 0)];
                semantic.body.push(Instr(Op::Pointwise(function), vec![gate], vec![silu]));
                let function = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Mul, 0, 1)];
                semantic.body.push(Instr(Op::Pointwise(function), vec![silu, up], vec![Slot::Out(0)]));
            }
        }
        semantic
    }

    /// Writes a kernel's text where `KERNELS_OUT` says, if it does, to compile it by hand.
    pub fn write(name: &str, text: &str) {
        if let Some(folder) = std::env::var_os("KERNELS_OUT") {
            std::fs::write(std::path::Path::new(&folder).join(format!("{name}.cu")), text).expect("the folder exists");
        }
    }
}
